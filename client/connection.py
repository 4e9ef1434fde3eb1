"""Where the network runs: the server that was asked for, one on this machine, or the embedded engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from anatomynet.client.triton import TritonRuntime, probe_local
from anatomynet.engine.runtime import Runtime, load_runtime


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Which server, and how volumes reach it: what every command asks that needs one.

    Attributes:
        url: HOST:PORT of its gRPC; None is a server on this machine if it is READY, else the embedded engine.
        shared_memory: see TritonRuntime; for a server at `url`.
    """

    url: str | None = None
    shared_memory: Literal["auto", "on", "off"] = "auto"


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
    """The server at `url`; without one a server on this machine if it is READY, else the embedded engine.

    Raises:
        ServerError: the server that was asked for is not there; never a silent fallback.
        ModelError: no server, and no embedded engine installed.
    """
    if server.url:
        return TritonRuntime(server.url, shared_memory=server.shared_memory)
    return probe_local() or load_runtime()


def describe_runtime(runtime: Runtime) -> str:
    """One line: model, checkpoint, and where it runs."""
    return f"{runtime.model.name}, checkpoint {runtime.model.checkpoint_sha256[:12]}, {runtime.description}"
