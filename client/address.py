"""Where a Triton server is: what `--url` says, taken apart."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from anatomynet.engine.errors import ServerError

DEFAULT_URL = "localhost:8001"
DEFAULT_PORT = 8001
DEFAULT_TLS_PORT = 443
TLS_SCHEMES = ("https://", "grpcs://")
RESOLVED_SCHEMES = ("dns:", "ipv4:", "ipv6:")


@dataclass(frozen=True)
class ServerAddress:
    """Of a gRPC service. `host` is empty where gRPC's own name resolution (dns:///, ipv4:) finds several.

    Attributes:
        target: as gRPC wants it.
        secure: through TLS.
    """

    target: str
    host: str
    port: int
    secure: bool

    @property
    def is_loopback(self) -> bool:
        """By its form; nothing is looked up."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    @property
    def may_be_several(self) -> bool:
        """Whether each call may reach another server: one name for all of them, or a proxy before them."""
        return not self.host or self.secure


def address_from_url(url: str) -> ServerAddress:
    """HOST:PORT, without TLS and with port 8001 unless given; https://HOST:PORT or grpcs://HOST:PORT, TLS and 443.

    Raises:
        ServerError: something else.
    """
    scheme = next((scheme for scheme in TLS_SCHEMES if url.startswith(scheme)), "")
    target = url.removeprefix(scheme)
    target = target.removesuffix("/") if scheme else target
    if target.startswith(RESOLVED_SCHEMES):
        return ServerAddress(target, "", 0, bool(scheme))
    default_port = DEFAULT_TLS_PORT if scheme else DEFAULT_PORT
    try:
        parts = urlsplit(f"//{target}")
        host, port = parts.hostname or "", default_port if parts.port is None else parts.port
    except ValueError:  # a port that is none, a bracket that does not close
        host, port = "", 0
    if not host or "/" in target or "@" in target or any(map(str.isspace, target)):
        raise ServerError(
            f"{_without_password(url) or 'an empty word'} is no address of a server: expected HOST:PORT of its gRPC "
            f"service, as {DEFAULT_URL}, or https://HOST:PORT"
        )
    return ServerAddress(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", host, port, bool(scheme))


def _without_password(url: str) -> str:
    return f"...@{url.rpartition('@')[2]}" if "@" in url else url
