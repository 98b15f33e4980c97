"""Downloads of published data sets, checked before use.

Owns where each comes from and the digest that it must have. A download is complete under its name, or not there.
"""

import hashlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from training.atomic import replacing
from training.errors import FetchError
from training.progress import counting

TIMEOUT_S = 30
CHUNK_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Archive:
    """A published file. Its home gives MD5 alone, which finds damage; whoever can alter that page is not kept out."""

    url: str
    md5: str

    @property
    def file(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


_HOME = "https://www.cs.toronto.edu/~kriz"
ARCHIVES = {
    "cifar10": Archive(f"{_HOME}/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    "cifar10-binary": Archive(f"{_HOME}/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
}


def fetch(archive: Archive, folder: Path) -> Path:
    """Download an archive into a folder, unless it is there already, and return its path.

    Raises:
        FetchError: there is no way to its home, or what came (or lay there) is not what was published.
    """
    path = folder / archive.file
    if path.is_file():
        with path.open("rb") as file:
            found = hashlib.file_digest(file, _md5).hexdigest()
        if found != archive.md5:
            raise FetchError(f"{path} is not the published file (its MD5 is {found}): delete it and fetch again.")
        return path
    try:
        _download(archive, path)
    except HTTPError as error:
        raise FetchError(f"{archive.url} answers {error.code} {error.reason}: try again later.") from error
    except (URLError, TimeoutError, ConnectionError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise FetchError(
            f"{archive.url} cannot be reached ({reason}): check the network, "
            f"or download it elsewhere and put it into {folder}."
        ) from error
    except OSError as error:
        raise FetchError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def _md5() -> "hashlib._Hash":
    """MD5 against damage; a machine that forbids it for security allows it so."""
    return hashlib.md5(usedforsecurity=False)


def _download(archive: Archive, path: Path) -> None:
    digest = _md5()
    with urlopen(archive.url, timeout=TIMEOUT_S) as answer, replacing(path) as file:
        total = int(answer.headers.get("Content-Length") or 0)
        received = 0
        with counting(f"Fetching {archive.file}, bytes", total) as advance:
            while chunk := answer.read(CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                advance(len(chunk))
        if received < total:
            raise FetchError(f"{archive.url} broke off after {received:,} of {total:,} bytes: fetch again.")
        if digest.hexdigest() != archive.md5:
            raise FetchError(
                f"{archive.url} sent something else than the published file (MD5 {digest.hexdigest()}, "
                f"published {archive.md5}): nothing was kept."
            )
