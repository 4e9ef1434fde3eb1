"""`tritonserver` stays Triton's parent: it starts Triton anew where the process of a Python model has died.

A shape that numpy refuses ends that process before model.py is asked (2.51), and so does a want of memory. Triton
starts no other, says READY all the same, fails every request, and does not stop in good time: so it is killed. Signals
and exit status pass as if this process were Triton.
"""

import ctypes
import fcntl
import os
import resource
import secrets
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from anatomynet.engine.errors import ServerError
from anatomynet.engine.output import alone_in

# By its region prefix: a server's command line and environment.
Prepare = Callable[[str | None], tuple[Sequence[str], Mapping[str, str]]]

STOPS = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})
FORWARDED = STOPS | {signal.SIGUSR1, signal.SIGUSR2}
AWAITED = FORWARDED | {signal.SIGCHLD}
SI_KERNEL = 128  # si_code of a signal that the terminal sent to the whole group: Triton has it already
PR_SET_PDEATHSIG = 1
STUB = "triton_python_b"  # of triton_python_backend_stub the kernel keeps 15 letters
LOOK_S = 1.0
# One that dies as often would die again; whoever started this may then know better.
MOST_DEATHS, WITHIN_S = 5, 300.0

SHARED_MEMORY = Path("/dev/shm")
REGION_PREFIX = "anatomynet_triton_"


def keep_running(prepare: Prepare) -> NoReturn:
    """Runs what `prepare` names, anew when a model of it has died, and leaves as it leaves.

    Raises:
        ServerError: it cannot be started, or has died too often.
        AnatomyNetError: what `prepare` raises.
    """
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
    deaths: deque[float] = deque(maxlen=MOST_DEATHS)
    while True:
        with own_regions() as prefix:
            status = _status_of(*prepare(prefix), unblocked)
        if status is not None:
            _leave(status)  # only now: where a signal ends this process, its regions are gone
        deaths.append(time.monotonic())
        often = len(deaths) == MOST_DEATHS and deaths[-1] - deaths[0] < WITHIN_S
        found = "the process of a Python model has died, and Triton starts no other"
        if often:
            raise ServerError(f"{found}: {MOST_DEATHS} times within {WITHIN_S:.0f} s, so this ends too")
        sys.stderr.write(f"tritonserver: {found}: starting Triton anew\n")
        sys.stderr.flush()


def _status_of(
    command: Sequence[str], environment: Mapping[str, str], unblocked: set[signal.Signals] | set[int]
) -> int | None:
    """Runs a server: its status as Popen tells it, or None once a model of it has died, and it was killed for that."""
    pending: set[int] = signal.sigpending()
    if stops := pending & STOPS:  # before there is one
        return -min(stops)
    server = _started(command, environment, unblocked)
    return None if _lives_on(server) else server.returncode


def _started(
    command: Sequence[str], environment: Mapping[str, str], unblocked: set[signal.Signals] | set[int]
) -> "subprocess.Popen[bytes]":
    """As if this process became it, but that it dies with this process."""
    libc = ctypes.CDLL(None)

    def become() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)

    try:
        return subprocess.Popen(
            command,
            env=environment,
            close_fds=False,
            restore_signals=False,
            preexec_fn=become,
        )
    except OSError as error:
        raise ServerError(f"could not start {command[0]}: {error.strerror}") from error


def _lives_on(server: "subprocess.Popen[bytes]") -> bool:
    """False once it has ended; True once a model of it has died, and it was killed for that."""
    stopping, dead = False, set[int]()
    while server.poll() is None:
        received = signal.sigtimedwait(AWAITED, LOOK_S)
        if received is None:
            before, dead = dead, {pid for pid, state in _stubs(server.pid) if state == "Z"}
            if before & dead and not stopping:  # one that Triton unloads it reaps at once
                _kill(server)
                return True
        elif received.si_signo in FORWARDED:
            stopping |= received.si_signo in STOPS
            if received.si_code != SI_KERNEL:
                server.send_signal(received.si_signo)
    return False


def _stubs(server: int) -> Iterator[tuple[int, str]]:
    """The processes of its Python models, each with its state; Z has ended."""
    for children in Path(f"/proc/{server}/task").glob("*/children"):
        with suppress(OSError):  # threads come and go
            for pid in map(int, children.read_text().split()):
                name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
                if name == STUB:
                    yield pid, rest.split()[0]


def _kill(server: "subprocess.Popen[bytes]") -> None:
    """And what it started: as process 1 of a container this one must see them off."""
    stubs = [pid for pid, _ in _stubs(server.pid)]
    for pid in (*stubs, server.pid):
        os.kill(pid, signal.SIGKILL)  # none is another's: each has its parent still
    server.wait()
    for pid in stubs:
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _leave(status: int) -> NoReturn:
    if status < 0:
        with suppress(OSError):  # nobody can choose what SIGKILL does
            signal.signal(-status, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the server's own is there
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-status})
        os.kill(os.getpid(), -status)
        status = 128 - status  # as process 1 of a container
    raise SystemExit(status)


@contextmanager
def own_regions() -> Iterator[str | None]:
    """What the names of a server's regions of shared memory begin with; those go at the end, 100 MB and more.

    Triton itself leaves them where it is killed. Beside them lies a file that whoever uses them has locked: what is not
    locked was left by one that is dead, in whatever container, and goes first. None where there is no such folder.
    """
    try:
        with alone_in(SHARED_MEMORY):
            _drop_abandoned()
            lock = SHARED_MEMORY / f"{REGION_PREFIX}{secrets.token_hex(8)}.lock"
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        yield None
        return
    os.set_inheritable(descriptor, True)  # a server that outlives this process holds it on
    try:
        yield f"{lock.stem}_"
    finally:
        _drop(lock)
        os.close(descriptor)


def _drop_abandoned() -> None:
    for lock in SHARED_MEMORY.glob(f"{REGION_PREFIX}*.lock"):
        with suppress(OSError):  # another user's, or held
            descriptor = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _drop(lock)
            finally:
                os.close(descriptor)


def _drop(lock: Path) -> None:
    """The regions first: without it nobody would know them."""
    for path in (*SHARED_MEMORY.glob(f"{lock.stem}_*"), lock):
        path.unlink(missing_ok=True)
