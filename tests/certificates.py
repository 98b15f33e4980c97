"""Certificates for tests, made by the command `openssl`, which is wherever Python's ssl was built."""

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    """A certificate that vouches for itself, and its key."""

    certificate: Path
    key: Path

    def trusting(self) -> ssl.SSLContext:
        """A client's context that trusts this certificate and no other."""
        return ssl.create_default_context(cafile=self.certificate)


def make_pair(folder: Path, name: str = "server", password: str = "") -> Pair:
    """Make a pair for 127.0.0.1, good for a day; with a password the key is encrypted."""
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    protection = ["-passout", f"pass:{password}"] if password else ["-nodes"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "1"]
    names = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    files = ["-keyout", str(pair.key), "-out", str(pair.certificate)]
    subprocess.run([*command, *protection, *names, *files], check=True, capture_output=True, timeout=60)
    return pair
