"""TLS: the certificate that the service shows, and whose clients' certificates it takes; read again when renewed.

What does not fit together is told in one sentence at the start, and changes nothing while the service runs. Knows files
and contexts; nothing of HTTP.
"""

import logging
import ssl
from pathlib import Path
from typing import Any

from app.errors import SettingsError
from app.settings import Settings
from app.watch import Watch

log = logging.getLogger(__name__)

HANDSHAKE_S = 10.0
"""A client that has connected and does not finish its handshake holds a connection no longer than this."""
GOODBYE_S = 1.0
"""A client whose connection is closed has so long to say that it has noticed, as TLS wants it; a drain waits for it."""


class Certificate:
    """The files of the service's certificate, as one context for every connection."""

    def __init__(self, certificate: str, key: str = "", password_file: str = "", client_ca: str = "") -> None:
        """Read them.

        Args:
            certificate: PEM file of the certificate and those between it and its authority.
            key: PEM file of the private key; empty: it is in the certificate's file.
            password_file: file whose content is the key's password; empty: it has none.
            client_ca: PEM file of the authorities whose clients alone may connect; empty: everybody may.

        Raises:
            SettingsError: a file cannot be read, is not what it should be, or does not fit the others.
        """
        self._certificate, self._key, self._password_file = certificate, key or certificate, password_file
        self._client_ca = client_ca
        self.pem = (b"", b"")
        """Key and certificate, in PEM, as they were read last: gRPC wants them so."""
        self._watch = Watch(Path(name) for name in (certificate, key, password_file) if name)
        self.context = self._new_context()

    def refresh(self) -> None:
        """Show a renewed certificate to whoever connects from now on; to be called about once a second.

        What does not fit together leaves the certificate as it is. Other client authorities are taken at a start alone.
        """
        if not self._watch.have_changed():
            return
        try:
            self._new_context()  # a context into which half of a pair was loaded would be spoilt
            self._load(self.context)
        except SettingsError as fault:
            log.error("the certificate cannot be renewed: the one before it stays", extra={"reason": fault.message})
            return
        log.info("certificate read", extra={"file": self._certificate})

    def _new_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # TLS 1.2 and 1.3, with Python's ciphers
        context.set_alpn_protocols(["http/1.1"])
        self._load(context)
        if self._client_ca:
            _trust(context, self._client_ca, "The client authority")
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        _trust(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self._certificate, "The certificate")
        key = _text_of(self._key, "The certificate's key")
        password = _text_of(self._password_file, "The password file").strip() if self._password_file else ""
        try:
            # Without a function to ask, OpenSSL would ask the terminal for the password, and wait.
            context.load_cert_chain(self._certificate, self._key, lambda: password)
        except ssl.SSLError as error:
            raise SettingsError(self._why_not(error, "ENCRYPTED" in key)) from error
        self.pem = key.encode(), _text_of(self._certificate, "The certificate").encode()

    def _why_not(self, error: ssl.SSLError, encrypted: bool) -> str:
        if error.reason == "KEY_VALUES_MISMATCH":
            return f"The key {self._key} is not the key of the certificate {self._certificate}."
        if encrypted and self._password_file:
            return f"The key {self._key} is encrypted, and the content of {self._password_file} is not its password."
        if encrypted:
            return (
                f"The key {self._key} is encrypted, and its password is needed: "
                "set --tls-key-password-file or CONVOY_TLS_KEY_PASSWORD_FILE."
            )
        return (
            f"The key {self._key} cannot be used: no PEM key is in it; "
            f"set --tls-key or CONVOY_TLS_KEY to the file that has it ({error.reason or error})."
        )


def options(context: ssl.SSLContext | None) -> dict[str, Any]:
    """Return what an event loop is to be told for a listening or an accepted socket; None: plain."""
    if context is None:
        return {}
    return {"ssl": context, "ssl_handshake_timeout": HANDSHAKE_S, "ssl_shutdown_timeout": GOODBYE_S}


def certificate_of(settings: Settings) -> Certificate | None:
    """Return the certificate that the settings name; None: the service speaks plain HTTP.

    Raises:
        SettingsError: something is wrong with it, or the other files are named without one.
    """
    others = {
        "tls_key": settings.tls_key,
        "tls_key_password_file": settings.tls_key_password_file,
        "tls_client_ca": settings.tls_client_ca,
    }
    if not settings.tls_certificate:
        if named := [name for name, value in others.items() if value]:
            raise SettingsError(f"{named[0]} is set, but no tls_certificate: without one there is no TLS.")
        return None
    return Certificate(settings.tls_certificate, *others.values())


def _trust(context: ssl.SSLContext, file: str, what: str) -> None:
    """Read the certificates of a PEM file into a context.

    Raises:
        SettingsError: it cannot be read, or holds none.
    """
    _text_of(file, what)
    try:
        context.load_verify_locations(cafile=file)
    except ssl.SSLError as error:
        raise SettingsError(f"{what} {file} cannot be used: no PEM certificate is in it ({error.reason}).") from error


def _text_of(file: str, what: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{what} {file} cannot be read: {error.strerror}.") from error
    except ValueError:
        raise SettingsError(f"{what} {file} is not text: give it as PEM.") from None
