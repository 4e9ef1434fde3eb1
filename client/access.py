"""How a client shows a proxy who it is, and whom it takes for the server: TLS files and an API key, checked once.

gRPC takes any bytes for a certificate, and then tells no more than that a handshake failed: what can be wrong with the
files is found here, before anything is sent.
"""

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from anatomynet.client.address import ServerAddress
from anatomynet.engine.errors import ServerError

API_KEY_VARIABLE = "ANATOMYNET_API_KEY"
API_KEY_HEADER = "x-api-key"
LARGEST_FILE = 2**20


@dataclass(frozen=True, kw_only=True)
class Access:
    """What opens a server at https://.

    Attributes:
        ca: PEM of the CAs that the server's certificate may come from; None is the public ones.
        certificate, key: PEM of the client's own certificate, with what leads to its CA, and of its private key.
        api_key: sent with every call, and through TLS alone; empty where there is none.
        given: options that ask for TLS, by name, so that none of them is ever passed over.
    """

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    api_key: str = field(default="", repr=False)
    given: tuple[str, ...] = ()

    def check_fits(self, address: ServerAddress) -> None:
        """Whether all that was given would be used there.

        Raises:
            ServerError: an address without TLS; nothing is sent in plain text by a slip.
        """
        if self.given and not address.secure:
            raise ServerError(
                f"{address.target} is spoken to in plain text, and {' and '.join(self.given)} is for TLS: expected "
                "https://HOST:PORT"
            )


NO_ACCESS = Access()


def read_access(
    *,
    tls_ca: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    api_key_file: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Access:
    """What the files hold, and the API key of ANATOMYNET_API_KEY where there is no file of one.

    Raises:
        ServerError: a file that is not there, not PEM or encrypted, a key and a certificate that do not belong
            together, one without the other, or no API key in its file; never a secret in the message.
    """
    files = {"tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key, "api_key_file": api_key_file}
    if tls_key and not tls_cert:
        raise ServerError(f"{tls_key} is a key without its certificate: give --tls-cert too (a node: tls_cert)")
    if tls_cert and not tls_key:
        raise ServerError(f"{tls_cert} is a certificate without its key: give --tls-key too (a node: tls_key)")
    if tls_ca:
        _check_certificates(tls_ca, "of a CA")
    if tls_cert and tls_key:
        _check_certificates(tls_cert, "of this client")
        _check_key(tls_cert, tls_key)
    if api_key_file:
        api_key = _api_key(_bytes(api_key_file), f"{api_key_file} holds no API key")
    elif API_KEY_VARIABLE in environment:
        api_key = _api_key(os.fsencode(environment[API_KEY_VARIABLE]), f"{API_KEY_VARIABLE} is no API key")
    else:
        api_key = ""
    return Access(
        ca=_bytes(tls_ca) if tls_ca else None,
        certificate=_bytes(tls_cert) if tls_cert else None,
        key=_bytes(tls_key) if tls_key else None,
        api_key=api_key,
        given=tuple(f"--{name.replace('_', '-')}" for name, path in files.items() if path),
    )


def _check_certificates(path: Path, whose: str) -> None:
    expected = f"expected a certificate {whose} as PEM (-----BEGIN CERTIFICATE-----)"
    try:
        text = _bytes(path).decode("ascii")
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise ServerError(f"{path} is not PEM: {expected}") from error


def _check_key(certificate: Path, key: Path) -> None:
    def refuse_password() -> str:
        raise ServerError(
            f"{key} is encrypted, and gRPC cannot ask for its password: `openssl pkey -in {key.name}` writes it plain; "
            "let nobody else read that file"
        )

    _bytes(key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, password=refuse_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ServerError(f"{key} is not the key of {certificate}: give two that belong together") from error
        raise ServerError(
            f"{key} is not PEM: expected the private key of {certificate} (-----BEGIN PRIVATE KEY-----)"
        ) from error


def _api_key(content: bytes, wrong: str) -> str:
    """A header's value: visible ASCII, and no blank."""
    key = content.strip()
    if not key or not all(0x21 <= byte <= 0x7E for byte in key):
        raise ServerError(f"{wrong}: expected one line of visible ASCII, without blanks")
    return key.decode("ascii")


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_FILE)
    except OSError as error:
        raise ServerError(f"{path} cannot be read ({error.strerror})") from error
