"""A real tritonserver for a test, started by the launcher as a user would."""

import importlib.util
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from tests.waiting import wait_until

LAUNCHER = Path(sys.executable).with_name("tritonserver")
START_TIMEOUT_S = 120
STARTS = 3
STOP_TIMEOUT_S = 60
# As the container starts it: Triton does not load a model once more beforehand, to find out what config.pbtxt lacks.
COMPLETE = "--disable-auto-complete-config"
HOLDING = Path(__file__).with_name("holding")
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

    def holding(self) -> AbstractContextManager[Callable[[], bool]]:
        """See holding()."""
        return holding(self.log.parent)

    def stop(self) -> int:
        """Its exit status after SIGTERM."""
        with freed_shared_memory(self.process):
            self.process.send_signal(signal.SIGTERM)
            return self.process.wait(timeout=STOP_TIMEOUT_S)


@contextmanager
def freed_shared_memory(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """A server ends within. What it shares with its Python backend's processes would stay, 15 MB each, where one of
    them has died or it is killed itself: a container's /dev/shm has 64 MB.
    """
    maps = Path(f"/proc/{process.pid}/maps").read_text() if process.poll() is None else ""
    yield
    for path in set(re.findall(r"/dev/shm/triton_python_backend\S+", maps)):
        Path(path).unlink(missing_ok=True)


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
    server = start_until_ready(lambda: _launched(repository, options, folder, program))
    try:
        yield server
    finally:
        left_with = server.stop()
    assert left_with == status, f"tritonserver left with {left_with}:\n{server.log.read_text()}"


def holding_python(folder: Path) -> Path:
    """Of an environment in a folder, which has this one's packages and, first, tests/holding/hold.py.

    Triton's Python backend runs its environment, and goes by none of Python's variables.
    """
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    ours = sysconfig.get_path("purelib")
    (packages / "hold.pth").write_text(f"import site; site.addsitedir({ours!r})\n{HOLDING}\nimport hold\n")
    return environment / "bin" / "python"


def unwatched(folder: Path) -> Path:
    """A program for `running_server`; see UNWATCHED."""
    program = folder / "unwatched"
    program.write_text(UNWATCHED.format(python=holding_python(folder)))
    program.chmod(0o755)
    return program


def server_environment(folder: Path, repository: Path) -> dict[str, str]:
    """Variables of a server that has its cache in a folder, and looks there for whether it holds its volumes."""
    own = {"XDG_CACHE_HOME": folder, "ANATOMYNET_HOLDING_FOLDER": folder, "ANATOMYNET_REPOSITORY": repository}
    return {**os.environ, **{name: str(path) for name, path in own.items()}}


def model_process(server: int) -> int:
    """The one that computes, of a server that is not watched and has one model."""
    children = [
        int(pid) for each in Path(f"/proc/{server}").glob("task/*/children") for pid in each.read_text().split()
    ]
    (stub,) = [pid for pid in children if b"python_backend_stub" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return stub


@contextmanager
def holding(folder: Path) -> Iterator[Callable[[], bool]]:
    """Within, a volume that the server of a folder computes is not done: neither few cores nor many, nor a pause of
    this process, is too long or too short for what is done to the server meanwhile.

    Yields:
        whether it has begun to compute one.
    """
    hold = folder / f"{next(_HOLDS)}.hold"  # another each time: none goes on with the one before
    hold.touch()
    try:
        yield hold.with_suffix(".held").exists
    finally:
        hold.unlink()


def _launched(repository: Path, options: Sequence[str], folder: Path, program: Path) -> RunningServer:
    http_port, grpc_port, metrics_port = free_ports(3)
    launcher = [holding_python(folder), LAUNCHER, f"--model-repository={repository}", COMPLETE]
    command = [
        *(launcher if program == LAUNCHER else [program]),
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
                **server_environment(folder, repository),
                "PATH": os.pathsep.join((str(LAUNCHER.parent), os.environ.get("PATH", os.defpath))),
            },
        )
    return RunningServer(process, grpc_port, http_port, metrics_port, log)


class Launched(Protocol):
    """A server that may not be READY yet."""

    @property
    def process(self) -> "subprocess.Popen[bytes]": ...
    @property
    def http_port(self) -> int: ...
    @property
    def log(self) -> Path: ...


LaunchedServer = TypeVar("LaunchedServer", bound=Launched)


def start_until_ready(launch: Callable[[], LaunchedServer]) -> LaunchedServer:
    """READY. One that ends before is launched anew and told in pytest's summary: another program may have taken its
    port, and Triton takes a Python backend for dead that a busy machine lets wait for a second."""
    for starts_left in reversed(range(STARTS)):
        server = launch()
        if _becomes_ready(server):
            return server
        failure = f"tritonserver did not become ready:\n{server.log.read_text()}"
        if server.process.poll() is None or not starts_left:
            server.process.kill()
            server.process.wait()
            raise AssertionError(failure)
        warnings.warn(failure, stacklevel=2)
    raise AssertionError("the last start returns or raises")


def _becomes_ready(server: Launched) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/v2/health/ready", timeout=1):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    return False


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
_HOLDS = itertools.count()
