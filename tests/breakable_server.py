"""A real tritonserver, not watched by the launcher: a test may kill, freeze and start it again on the same ports."""

import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.triton_servers import COMPLETE, START_TIMEOUT_S, free_ports, model_process, unwatched

SHARED_MEMORY_FOLDER = Path("/dev/shm")
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
        ports = [f"--http-port={self.http_port}", f"--grpc-port={self.grpc_port}"]
        command = [str(unwatched(self._folder)), *ports, f"--metrics-port={self.metrics_port}", COMPLETE]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *EXPLICIT],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "XDG_CACHE_HOME": str(self._folder),
                    "ANATOMYNET_REPOSITORY": str(self.repository),
                },
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._answers():
                self._stub = model_process(self.process.pid)
                return
            time.sleep(0.1)
        raise AssertionError(f"tritonserver did not become ready:\n{self.log.read_text()}")

    def kill(self) -> None:
        """kill -9, and nothing of it is left: neither its Python backend nor the shared memory of that."""
        if self._process is None:
            return
        leftovers = self._shared_memory_of_stub()
        self._process.kill()
        self._process.wait()
        if self._stub is not None:
            self.kill_model()
        for path in leftovers:
            path.unlink(missing_ok=True)

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

    def waiting_requests(self) -> int:
        """How many are in its queue."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(int(float(line.split()[1])) for line in lines if line.startswith("nv_inference_pending_request_c"))

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/v2/health/ready", timeout=1):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _shared_memory_of_stub(self) -> list[Path]:
        names = {path.name: path for path in SHARED_MEMORY_FOLDER.iterdir()}
        try:
            words = Path(f"/proc/{self._stub}/cmdline").read_bytes().decode().split("\0")
        except OSError:
            return []
        return [names[word] for word in words if word in names]


@contextmanager
def two_servers(repository: Path, folder: Path) -> Iterator[list[BreakableServer]]:
    """Of the same model, not started yet; killed at the end."""
    servers = [BreakableServer(repository, folder / name) for name in ("first", "second")]
    try:
        yield servers
    finally:
        for server in servers:
            server.kill()
