"""A real tritonserver for a test, started by the launcher as a user would."""

import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import wait_until

LAUNCHER = Path(sys.executable).with_name("tritonserver")
START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 60
# As the container starts it: Triton does not load a model once more beforehand, to find out what config.pbtxt lacks.
COMPLETE = "--disable-auto-complete-config"
FIRST_OUTGOING_PORT = 32_768  # Linux's own default of net.ipv4.ip_local_port_range


# Past the launcher's check and its watch: what it refuses is served, and a model that has died stays dead.
UNWATCHED = """#!{python}
import os, sys
from anatomynet.export.launcher import deepen_stacks, server_command

arguments = ["--model-repository=" + os.environ["ANATOMYNET_REPOSITORY"], *sys.argv[1:]]
command, environment = server_command(arguments, os.environ)
deepen_stacks()
os.execve(command[0], command, environment)
"""


@dataclass(frozen=True)
class RunningServer:
    """`process` is the launcher, the server's parent, or the server itself (UNWATCHED); `log` is what they write."""

    process: "subprocess.Popen[bytes]"
    grpc_port: int
    http_port: int
    metrics_port: int
    log: Path

    @property
    def url(self) -> str:
        """HOST:PORT of its gRPC service."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.metrics_port}/metrics"

    def stop(self) -> int:
        """Its exit status after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=STOP_TIMEOUT_S)


ServerStarter = Callable[..., AbstractContextManager[RunningServer]]


def has_server() -> bool:
    return importlib.util.find_spec("pytriton") is not None


@contextmanager
def running_server(
    repository: Path, *options: str, folder: Path, status: int = 0, program: Path = LAUNCHER
) -> Iterator[RunningServer]:
    """Serves a repository on free ports; READY inside the block.

    Args:
        folder: for its log and its cache.
        status: with which it must leave after the block.
        program: what starts it; another than the launcher finds the repository in ANATOMYNET_REPOSITORY.
    """
    server = _launched(repository, options, folder, program)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        left_with = server.stop()
    assert left_with == status, f"tritonserver left with {left_with}:\n{server.log.read_text()}"


def unwatched(folder: Path) -> Path:
    """A program for `running_server`; see UNWATCHED."""
    program = folder / "unwatched"
    program.write_text(UNWATCHED.format(python=sys.executable))
    program.chmod(0o755)
    return program


def model_process(server: int) -> int:
    """The one that computes, of a server that is not watched and has one model."""
    children = [
        int(pid) for each in Path(f"/proc/{server}").glob("task/*/children") for pid in each.read_text().split()
    ]
    (stub,) = [pid for pid in children if b"python_backend_stub" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return stub


def _launched(repository: Path, options: Sequence[str], folder: Path, program: Path) -> RunningServer:
    http_port, grpc_port, metrics_port = free_ports(3)
    command = [
        str(program),
        *([f"--model-repository={repository}", COMPLETE] if program == LAUNCHER else []),
        f"--http-port={http_port}",
        f"--grpc-port={grpc_port}",
        f"--metrics-port={metrics_port}",
        *options,
    ]
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PATH": os.pathsep.join((str(LAUNCHER.parent), os.environ.get("PATH", os.defpath))),
                "XDG_CACHE_HOME": str(folder),
                "ANATOMYNET_REPOSITORY": str(repository),
            },
        )
    return RunningServer(process, grpc_port, http_port, metrics_port, log)


def _wait_until_ready(server: RunningServer) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.http_url}/v2/health/ready", timeout=1):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise AssertionError(f"tritonserver did not become ready:\n{server.log.read_text()}")


def volumes_answered(*urls: str) -> list[int]:
    """By each server, since it started."""
    from tritonclient.grpc import InferenceServerClient

    counts = []
    for url in urls:
        with InferenceServerClient(url) as client:
            (statistics,) = client.get_inference_statistics("anatomynet").model_stats
            counts.append(int(statistics.inference_stats.success.count))
    return counts


def answered_since(before: Sequence[int], *urls: str, volumes: int) -> list[int]:
    """By each server. One counts a volume a moment after its answer has left, so all `volumes` are waited for."""

    def since() -> list[int]:
        return [now - then for now, then in zip(volumes_answered(*urls), before, strict=True)]

    wait_until(lambda: sum(since()) >= volumes, f"{volumes} volumes in the servers' statistics")
    return since()


def free_ports(count: int) -> list[int]:
    """Ports on which nothing listens, and which nobody takes before a server of this test does.

    A port that the kernel chooses (0) comes from the range of outgoing connections' own: let go until a server binds
    it, it may be another's by then. These lie below that range, each process of a test run has its own, and none
    comes twice.
    """
    found: list[int] = []
    for port in _PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"{count} free ports were looked for; {len(found)} are left")


def ports_of(worker: int, workers: int) -> range:
    """Of one of pytest-xdist's processes, counted from 0."""
    return range(10_000 + worker, FIRST_OUTGOING_PORT, workers)


def _shuffled_ports() -> Iterator[int]:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = list(ports_of(worker, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
    random.SystemRandom().shuffle(ports)  # for other runs on this machine start with others
    return iter(ports)


_PORTS = _shuffled_ports()
