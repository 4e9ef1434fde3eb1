"""A real tritonserver, not watched by the launcher: a test may kill, freeze and start it again on the same ports."""

import os
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from tests.triton_servers import (
    COMPLETE,
    free_ports,
    freed_shared_memory,
    holding,
    model_process,
    server_environment,
    start_until_ready,
    unwatched,
)

# The model can be loaded anew, and nothing else is loaded.
EXPLICIT = ("--model-control-mode=explicit", "--load-model=anatomynet")


class BreakableServer:
    """`repository` is a copy of its own; `log` is what it has written since it was last started."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.repository = folder / "triton_repo"
        shutil.copytree(repository, self.repository)
        self.log = folder / "log.txt"
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._stub: int | None = None

    @property
    def url(self) -> str:
        """HOST:PORT of its gRPC service."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process

    def ensure_running(self) -> None:
        """READY, whatever was done to it before."""
        if self._process is None or self._process.poll() is not None or self._stub is None:
            self.start()

    def start(self) -> None:
        """READY when this returns."""
        start_until_ready(self._launched)
        self._stub = model_process(self.process.pid)

    def _launched(self) -> "BreakableServer":
        ports = [f"--http-port={self.http_port}", f"--grpc-port={self.grpc_port}"]
        command = [str(unwatched(self._folder)), *ports, f"--metrics-port={self.metrics_port}", COMPLETE]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *EXPLICIT],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(self._folder, self.repository),
            )
        return self

    def kill(self) -> None:
        """kill -9, and nothing of it is left: neither its Python backend nor the shared memory of that."""
        if self._process is None:
            return
        with freed_shared_memory(self._process):
            self._process.kill()
            self._process.wait()
        if self._stub is not None:
            self.kill_model()

    def kill_model(self) -> None:
        """kill -9 of the process that computes, as the kernel does it for want of memory."""
        assert self._stub is not None
        with suppress(ProcessLookupError):  # it went with its server
            os.kill(self._stub, signal.SIGKILL)
        self._stub = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within, the server's ports are open, and nobody answers."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def holding(self) -> AbstractContextManager[Callable[[], bool]]:
        """See triton_servers.holding."""
        return holding(self._folder)

    def waiting_requests(self) -> int:
        """How many are in its queue."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(int(float(line.split()[1])) for line in lines if line.startswith("nv_inference_pending_request_c"))


@contextmanager
def two_servers(repository: Path, folder: Path) -> Iterator[list[BreakableServer]]:
    """Of the same model, not started yet; killed at the end."""
    servers = [BreakableServer(repository, folder / name) for name in ("first", "second")]
    try:
        yield servers
    finally:
        for server in servers:
            server.kill()
