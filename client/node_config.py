"""How a site's DICOM node is set up: a TOML file, read once when `anatomynet-client listen` starts.

    ae_title = "ANATOMYNET"
    port = 11112
    spool = "/var/lib/anatomynet"        # everything received and drawn; a relative path is beside this file

    [[peer]]                             # who may send; nobody else is let in
    ae_title = "CT_SIM"
    address = "10.1.2.3"                 # or a network, "10.1.2.0/24"

    [[destination]]                      # who gets what was drawn; none keeps it in the spool alone
    name = "planning"
    ae_title = "TPS"
    host = "10.1.2.9"
    port = 104

NodeConfig names every other key and its default.
"""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any

from anatomynet.engine.errors import NodeError

Network = IPv4Network | IPv6Network
# Relative ones are beside the file.
PATHS = ("spool", "structure_table", "tls_ca", "tls_cert", "tls_key", "api_key_file")
OUTPUT_TYPES = ("rtstruct", "seg", "nifti")
LONGEST_AE_TITLE = 16  # DICOM's AE (PS3.5 6.2)
LARGEST_PORT = 65535


@dataclass(frozen=True)
class Peer:
    """Who may send.

    Attributes:
        ae_title: the calling AE title.
        network: the addresses it may call from.
    """

    ae_title: str
    network: Network


@dataclass(frozen=True)
class Destination:
    """Who gets what was drawn.

    Attributes:
        name: in the log and in the spool: what was sent to a name is not sent to it again.
        ae_title: the called AE title.
        host, port: where it listens.
    """

    name: str
    ae_title: str
    host: str
    port: int


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """A node's settings.

    Attributes:
        ae_title: the node's own, which callers must name.
        port, bind: where it listens; bind "" is every IPv4 address of this machine.
        spool: folder of everything received and drawn.
        peers: who may send.
        destinations: each gets every RTSTRUCT and SEG.
        urls: HOST:PORT or https://HOST:PORT of Triton servers' gRPC, asked in turn; without any, a server on this
            machine, else the embedded engine.
        tls_ca, tls_cert, tls_key, api_key_file: what opens servers at https://, as files; see read_access.
        output_types: some of rtstruct, seg and nifti.
        structures: names of those to draw; all that the model knows where there is none.
        structure_table: a department's names, colours and types.
        quiet_seconds: a series to which nothing was added for so long is complete, whatever its association does.
        quiet_seconds_after_release: the same once every association that brought it has been released; not zero,
            since some senders open an association for each slice.
        attempts: at a server or destination that is away, before the study is parked.
        retry_seconds: before the second attempt; each wait is twice the one before, up to an hour.
        timeout_seconds: for an answer of a peer or destination, and how long a peer may say nothing.
        keep_days, keep_parked_days: after which what was sent, or parked, is deleted; 0 keeps it.
        most_associations: at a time; one more is refused.
        most_instances: of one series.
        largest_instance_mb: of one C-STORE.
        smallest_free_gb: of the spool's disk; with less, C-STORE is refused with A700.
    """

    ae_title: str
    port: int
    spool: Path
    peers: tuple[Peer, ...]
    destinations: tuple[Destination, ...] = ()
    bind: str = ""
    urls: tuple[str, ...] = ()
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    api_key_file: Path | None = None
    output_types: tuple[str, ...] = ("rtstruct",)
    structures: tuple[str, ...] = ()
    structure_table: Path | None = None
    quiet_seconds: float = 60.0
    quiet_seconds_after_release: float = 10.0
    attempts: int = 8
    retry_seconds: float = 30.0
    timeout_seconds: float = 60.0
    keep_days: float = 7.0
    keep_parked_days: float = 30.0
    most_associations: int = 8
    most_instances: int = 2000
    largest_instance_mb: float = 1024.0
    smallest_free_gb: float = 5.0

    def knows(self, ae_title: str, address: str) -> bool:
        """Whether a caller of this AE title may call from this address."""
        return any(peer.ae_title == ae_title.strip() and _is_in(address, peer.network) for peer in self.peers)

    def knows_address(self, address: str) -> bool:
        """Whether any caller may call from this address."""
        return any(_is_in(address, peer.network) for peer in self.peers)


def load_node_config(path: Path) -> NodeConfig:
    """Reads a node's settings.

    Raises:
        NodeError: a file that is not there or not TOML, an unknown or missing key, a value that does not fit.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise NodeError(f"{path} cannot be read: expected the node's TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise NodeError(f"{path.name} is not TOML: {error}") from error
    values = _checked(table, NODE_KEYS, path.name)
    peers = tuple(Peer(peer["ae_title"], ip_network(peer["address"], strict=False)) for peer in values.pop("peer"))
    destinations = tuple(Destination(**destination) for destination in values.pop("destination", ()))
    names = [destination.name for destination in destinations]
    if len(set(names)) < len(names):
        raise NodeError(f"{path.name}: two destinations have one name; expected a name for each")
    for key in PATHS:
        if key in values:
            values[key] = path.absolute().parent / values[key]
    return NodeConfig(**values, peers=peers, destinations=destinations)


@dataclass(frozen=True)
class _Key:
    """What a key of the file may hold."""

    fits: Callable[[Any], bool]
    expected: str
    required: bool = False
    table: Mapping[str, "_Key"] = field(default_factory=dict)


def _checked(table: Mapping[str, Any], keys: Mapping[str, _Key], where: str) -> dict[str, Any]:
    """The table's values, lists as tuples.

    Raises:
        NodeError: a key that is unknown or missing, or a value that does not fit.
    """
    missing = [name for name, key in keys.items() if key.required and name not in table]
    if missing:
        raise NodeError(f"{where}: {missing[0]} is missing; expected {keys[missing[0]].expected}")
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in keys:
            raise NodeError(f"{where}: unknown key {name}; expected some of {', '.join(keys)}")
        key = keys[name]
        if not key.fits(value):
            raise NodeError(f"{where}: {name} is {value!r}; expected {key.expected}")
        if key.table:
            value = [_checked(each, key.table, f"{where}: [[{name}]]") for each in value]
        values[name] = tuple(value) if isinstance(value, list) else value
    return values


def _is_in(address: str, network: Network) -> bool:
    caller = ip_address(address.partition("%")[0])
    return (getattr(caller, "ipv4_mapped", None) or caller) in network


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and value == value.strip() != ""


def _is_ae_title(value: Any) -> bool:
    return _is_text(value) and value.isascii() and "\\" not in value and len(value) <= LONGEST_AE_TITLE


def _is_network(value: Any) -> bool:
    try:
        ip_network(value, strict=False)
    except ValueError:
        return False
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _number(low: float, high: float, unit: str, *, whole: bool = False) -> _Key:
    kinds = (int,) if whole else (int, float)
    return _Key(lambda v: type(v) in kinds and low <= v <= high, f"{low:g} to {high:g} {unit}")


def _tables(keys: Mapping[str, _Key], expected: str, *, required: bool = False) -> _Key:
    def fits(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)

    return _Key(fits, expected, required, keys)


_AE_TITLE = _Key(_is_ae_title, f"an AE title: 1 to {LONGEST_AE_TITLE} ASCII characters", required=True)
_PORT = _Key(lambda v: type(v) is int and 0 < v <= LARGEST_PORT, f"a port, 1 to {LARGEST_PORT}", required=True)
_TEXT = _Key(_is_text, "a text", required=True)
_PATH = _Key(_is_text, "a path")
PEER_KEYS = {
    "ae_title": _AE_TITLE,
    "address": _Key(_is_network, 'an address or a network, "10.1.2.3" or "10.1.2.0/24"', required=True),
}
DESTINATION_KEYS = {"name": _TEXT, "ae_title": _AE_TITLE, "host": _TEXT, "port": _PORT}
NODE_KEYS = {
    "ae_title": _AE_TITLE,
    "port": _PORT,
    "spool": _Key(_is_text, "the path of a folder", required=True),
    "peer": _tables(PEER_KEYS, "one or more tables [[peer]] with ae_title and address", required=True),
    "destination": _tables(DESTINATION_KEYS, "tables [[destination]] with name, ae_title, host and port"),
    "bind": _Key(lambda v: v == "" or _is_text(v), "an address of this machine"),
    "urls": _Key(_texts, 'a list of servers, ["HOST:PORT"]'),
    "tls_ca": _PATH,
    "tls_cert": _PATH,
    "tls_key": _PATH,
    "api_key_file": _PATH,
    "output_types": _Key(
        lambda v: _texts(v) and bool(v) and set(v) <= set(OUTPUT_TYPES), f"a list of some of {', '.join(OUTPUT_TYPES)}"
    ),
    "structures": _Key(_texts, "a list of structures' names"),
    "structure_table": _PATH,
    "quiet_seconds": _number(0.1, 86400, "seconds"),
    "quiet_seconds_after_release": _number(0.1, 86400, "seconds"),
    "attempts": _number(1, 1000, "attempts", whole=True),
    "retry_seconds": _number(0.1, 3600, "seconds"),
    "timeout_seconds": _number(1, 3600, "seconds"),
    "keep_days": _number(0, 36500, "days"),
    "keep_parked_days": _number(0, 36500, "days"),
    "most_associations": _number(1, 1000, "associations", whole=True),
    "most_instances": _number(2, 100000, "instances", whole=True),
    "largest_instance_mb": _number(1, 4096, "MB"),
    "smallest_free_gb": _number(0, 1e6, "GB"),
}
