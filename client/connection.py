"""Where the network runs: the server that was asked for, one on this machine, or the embedded engine."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from anatomynet.client.access import Access, read_access
from anatomynet.client.address import address_from_url
from anatomynet.client.triton import TIMEOUT_S, TritonRuntime, probe_local
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import ServerError
from anatomynet.engine.runtime import OpenVinoRuntime, Runtime, load_runtime


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Which servers, and how volumes reach them: what every command asks that needs one.

    Attributes:
        urls: HOST:PORT or https://HOST:PORT of each one's gRPC, to be asked in turn; none is a server on this machine
            if it is READY, else the embedded engine. All that follows is for servers at `urls`.
        shared_memory, timeout_s, wait_s, retries, tell: see TritonRuntime.
        tls_ca, tls_cert, tls_key, api_key_file: for https://; see read_access.
    """

    urls: tuple[str, ...] = ()
    shared_memory: Literal["auto", "on", "off"] = "auto"
    timeout_s: float = TIMEOUT_S
    wait_s: float = 0.0
    retries: bool = True
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    api_key_file: Path | None = None
    tell: Callable[[str], None] = field(default=lambda line: None, compare=False)


@contextmanager
def connected(server: ServerOptions) -> Iterator[Runtime]:
    """What computes the model, for as long as the block lasts.

    Raises:
        ServerError: the server that was asked for is not there; never a silent fallback.
        ModelError: no server, and no embedded engine installed.
    """
    runtime = choose_runtime(server)
    try:
        yield runtime
    finally:
        if isinstance(runtime, TritonRuntime):
            runtime.close()


def choose_runtime(server: ServerOptions) -> Runtime:
    """The servers at `urls`; without any a server on this machine if it is READY, else the embedded engine.

    Raises:
        ServerError: the server that was asked for is not there, or what opens it is wrong; never a silent fallback.
        ModelError: no server, and no embedded engine installed.
    """
    access = access_to(server)
    if not server.urls:
        return probe_local(retries=server.retries) or _embedded()
    return TritonRuntime(
        *server.urls,
        shared_memory=server.shared_memory,
        timeout_s=server.timeout_s,
        wait_s=server.wait_s,
        retries=server.retries,
        access=access,
        tell=server.tell,
    )


def _embedded() -> Runtime:
    runtime = load_runtime()
    if isinstance(runtime, OpenVinoRuntime):
        runtime.begin_region_finder()
    return runtime


def access_to(server: ServerOptions) -> Access:
    """What opens the servers at `urls`; nobody is asked anything.

    Raises:
        ServerError: a file that cannot be what it should, an address that is none or has no use for it.
    """
    addresses = [address_from_url(url) for url in server.urls]
    access = read_access(
        tls_ca=server.tls_ca,
        tls_cert=server.tls_cert,
        tls_key=server.tls_key,
        api_key_file=server.api_key_file,
        # Where the key would not be sent, it may be another's, or empty, as compose files set it.
        environment=os.environ if any(address.secure for address in addresses) else {},
    )
    if access.given and not server.urls:
        raise ServerError(f"{' and '.join(access.given)} without a server: expected --url https://HOST:PORT")
    for address in addresses:
        access.check_fits(address)
    return access


def describe_runtime(runtime: Runtime) -> str:
    """One line: model, checkpoint, and where it runs."""
    return describe_model(runtime.model, runtime.description)


def describe_model(model: ModelConfig, place: str) -> str:
    """The same line, where `place` is the description of the runtime that drew."""
    return f"{model.name}, checkpoint {model.checkpoint_sha256[:12]}, {place}"
