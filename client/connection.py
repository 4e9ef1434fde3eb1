"""Where the network runs: the server that was asked for, one on this machine, or the embedded engine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from anatomynet.client.triton import TIMEOUT_S, TritonRuntime, probe_local
from anatomynet.engine.runtime import Runtime, load_runtime


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Which servers, and how volumes reach them: what every command asks that needs one.

    Attributes:
        urls: HOST:PORT or https://HOST:PORT of each one's gRPC, to be asked in turn; none is a server on this machine
            if it is READY, else the embedded engine. All that follows is for servers at `urls`.
        shared_memory, timeout_s, wait_s, retries, tell: see TritonRuntime.
    """

    urls: tuple[str, ...] = ()
    shared_memory: Literal["auto", "on", "off"] = "auto"
    timeout_s: float = TIMEOUT_S
    wait_s: float = 0.0
    retries: bool = True
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
        ServerError: the server that was asked for is not there; never a silent fallback.
        ModelError: no server, and no embedded engine installed.
    """
    if not server.urls:
        return probe_local() or load_runtime()
    return TritonRuntime(
        *server.urls,
        shared_memory=server.shared_memory,
        timeout_s=server.timeout_s,
        wait_s=server.wait_s,
        retries=server.retries,
        tell=server.tell,
    )


def describe_runtime(runtime: Runtime) -> str:
    """One line: model, checkpoint, and where it runs."""
    return f"{runtime.model.name}, checkpoint {runtime.model.checkpoint_sha256[:12]}, {runtime.description}"
