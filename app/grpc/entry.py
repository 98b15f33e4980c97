"""Who may call what, and with which certificate the service shows itself: keys and TLS, as over HTTP."""

from collections.abc import Callable, Iterator

import grpc

from app.errors import SettingsError
from app.grpc.calls import Context
from app.keys import Access, Keyring, presented_in
from app.tls import Certificate

_OPEN = frozenset({"ServerLive", "ServerReady"})
_ADMIN = frozenset({"RepositoryModelLoad", "RepositoryModelUnload"})


def access_of(route: str) -> Access | None:
    """Return what a method asks of a key; None: nothing. What is not named needs the scope `predict`."""
    method = route.rpartition("/")[2]
    if method in _OPEN:
        return None
    return Access.ADMIN if method in _ADMIN else Access.PREDICT


def doorkeeper(keyring: Keyring) -> Callable[[Context, str], str]:
    """Return what lets a call of a route in, by the key in its metadata, and tells the key's name."""

    def enter(context: Context, route: str) -> str:
        needed = access_of(route)
        if needed is None or not (keyring.guarded or needed is Access.ADMIN):
            return ""
        return keyring.admit(presented_in(_headers(context)), needed)

    return enter


def credentials_of(certificate: Certificate, client_ca: bytes | None) -> grpc.ServerCredentials:
    """Return what gRPC shows of a certificate, a renewed one from its first connection on.

    Raises:
        SettingsError: the key is encrypted, which gRPC cannot read.
    """
    if b"ENCRYPTED" in certificate.pem[0]:
        raise SettingsError(
            "gRPC takes no encrypted key: give --tls-key one without a password, or leave out --grpc-port."
        )
    shown = certificate.pem

    def present() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([shown], client_ca)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        if certificate.pem is shown:
            return None
        shown = certificate.pem
        return present()

    # Its own documentation lets `renewed` return None for "as before"; the stubs do not.
    return grpc.dynamic_ssl_server_credentials(present(), renewed, client_ca is not None)  # type: ignore[arg-type]


def _headers(context: Context) -> Iterator[tuple[bytes, bytes]]:
    for name, value in context.invocation_metadata() or ():
        yield name.encode(), value.encode() if isinstance(value, str) else value
