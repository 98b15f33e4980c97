"""Fetch the models' archive, and unpack it only if it is the one that was meant.

    MODELS_URL=https://… MODELS_SHA256=… python fetch.py DIRECTORY

Run by the init container, with nothing but Python. The archive is a tar file, compressed or not, of <name>/<version>/…
as under `models/`. What is in DIRECTORY is either all of it or nothing: a container that is started again in the same
pod finds it whole, and does not fetch it twice.
"""

import hashlib
import http.client
import lzma
import os
import re
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60
"""Of silence, not of the whole."""
SCRATCH = ".fetching"
"""Hidden, so that the service would pass it over."""


def fetch(url: str, sha256: str, into: Path) -> str:
    """Bring the models into a directory; returns what was done, in one sentence.

    Raises:
        ValueError: the archive is another one, or no archive of models; nothing is left of it.
        OSError: it cannot be fetched or written.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(f"MODELS_SHA256 is '{sha256}', and no SHA-256: 64 digits of 0-9 and a-f.")
    done = into / f".{sha256}"
    if done.exists():
        return f"{into} holds the models already."
    # What a signed address is signed with is a secret, and this goes into a log.
    told = url.partition("?")[0]
    scratch = into / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        archive = scratch / "archive"
        found = _download(url, archive)
        if found != sha256:
            raise ValueError(f"{told} has SHA-256 {found}, and not {sha256}: nothing is unpacked.")
        unpacked = scratch / "models"
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, filter="data")
        except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"{told} is no archive of models: {' '.join(str(error).split())}") from error
        archive.unlink()
        names = sorted({path.parent.parent.name for path in unpacked.glob("[!.]*/*/*")})
        if not names:
            raise ValueError(f"{told} is no archive of models: in it is no <name>/<version>/….")
        for name in names:
            shutil.rmtree(into / name, ignore_errors=True)
            (unpacked / name).rename(into / name)
        done.touch()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return f"Fetched {', '.join(names)} from {told}."


def _download(url: str, to: Path) -> str:
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer, to.open("wb") as file:
        while chunk := answer.read(CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def main() -> int:
    """Do it as the environment says; 1 with one sentence where that cannot be."""
    url, sha256 = os.environ["MODELS_URL"].strip(), os.environ["MODELS_SHA256"].strip().lower()
    try:
        sys.stdout.write(fetch(url, sha256, Path(sys.argv[1])) + "\n")
    except (ValueError, OSError, http.client.HTTPException) as error:
        # What urllib says of itself may have several lines, or none, and the address with what it is signed with.
        told = re.sub(r"\?.*", "?…", " ".join(str(error).split()).replace(url, url.partition("?")[0]))
        sys.stderr.write(f"{told or type(error).__name__}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
