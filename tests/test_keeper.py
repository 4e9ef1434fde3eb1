"""export/keeper.py: Triton's parent, here of scripts that stand for Triton; of a real one in test_faults.py."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from anatomynet.export import keeper
from tests.waiting import wait_until

# Looks often; its arguments are the folder for shared memory and the server.
KEEP = """
import os, sys
from pathlib import Path
from anatomynet.engine.errors import ServerError
from anatomynet.export import keeper
keeper.LOOK_S = 0.05
keeper.SHARED_MEMORY = Path(sys.argv[1])
try:
    keeper.keep_running(lambda prefix: (sys.argv[2:], {**os.environ, "PREFIX": prefix}))
except ServerError as error:
    sys.exit(str(error))
"""
SERVER = """#!{python}
import os, signal, subprocess, sys, time
from pathlib import Path

folder = Path({folder!r})
starts = folder / "starts"
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
first = starts.read_text() == "x"
(folder / "regions").open("a").write(os.environ["PREFIX"] + "\\n")
stub = [folder / "triton_python_backend_stub"]
{body}
"""
FOREVER = "signal.pause()"


@contextmanager
def keeping(folder: Path, body: str, *before: str) -> Iterator["subprocess.Popen[str]"]:
    """A keeper, and its server of a Python text, which has a model's process to start; killed after the block.

    The text keeps the process in a variable, as long as it shall not be reaped.
    """
    stub, server, regions = folder / "triton_python_backend_stub", folder / "server", folder / "shm"
    stub.write_text("#!/bin/sh\nexit\n")
    server.write_text(SERVER.format(python=sys.executable, folder=str(folder), body=body))
    for script in (stub, server):
        script.chmod(0o755)
    command = [*before, sys.executable, "-c", KEEP, str(regions), str(server)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as kept:
        try:
            yield kept
        finally:
            kept.kill()


def test_a_server_whose_model_has_died_is_started_anew(tmp_path: Path) -> None:
    body = f"child = subprocess.Popen(stub) if first else sys.exit(7)\n{FOREVER}"
    with keeping(tmp_path, body) as kept:
        _, said = kept.communicate(timeout=60)
    assert kept.returncode == 7
    assert said.count("\n") == 1
    assert "starting Triton anew" in said
    prefixes = (tmp_path / "regions").read_text().split()
    assert len(set(prefixes)) == 2


def test_one_that_cannot_live_is_given_up(tmp_path: Path) -> None:
    with keeping(tmp_path, f"child = subprocess.Popen(stub)\n{FOREVER}") as kept:
        _, said = kept.communicate(timeout=60)
    assert kept.returncode == 1
    assert (tmp_path / "starts").read_text() == "x" * keeper.MOST_DEATHS
    assert said.splitlines()[-1].endswith("5 times within 300 s, so this ends too")


def test_a_model_that_is_unloaded_has_not_died(tmp_path: Path) -> None:
    with keeping(tmp_path, "for _ in range(50): subprocess.run(stub)\nsys.exit(7)") as kept:
        _, said = kept.communicate(timeout=60)
    assert (kept.returncode, said) == (7, "")


def test_a_server_that_is_stopping_may_lose_its_model(tmp_path: Path) -> None:
    """It has to answer what it has accepted."""
    body = "\n".join(
        (
            "def stop(*_):",
            "    child = subprocess.Popen(stub)",
            "    time.sleep(1)",
            "    sys.exit(7)",
            "signal.signal(signal.SIGTERM, stop)",
            "print('ready', flush=True)",
            FOREVER,
        )
    )
    with keeping(tmp_path, body) as kept:
        assert kept.stdout
        assert kept.stdout.readline() == "ready\n"
        kept.send_signal(signal.SIGTERM)
        _, said = kept.communicate(timeout=60)
    assert (kept.returncode, said) == (7, "")


@pytest.mark.parametrize("number", sorted(keeper.FORWARDED))
def test_a_signal_reaches_the_server_and_its_end_is_passed_on(tmp_path: Path, number: signal.Signals) -> None:
    # Python handles SIGINT, and whoever starts the tests in the background has some ignored.
    usual = f"signal.signal({number:d}, signal.SIG_DFL); print('ready', flush=True)"
    with keeping(tmp_path, f"{usual}\n{FOREVER}") as kept:
        assert kept.stdout
        assert kept.stdout.readline() == "ready\n"
        kept.send_signal(number)
        assert kept.wait(timeout=60) == -number


@pytest.mark.parametrize(
    ("end", "status"),
    [("sys.exit(7)", 7), ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL)],
    ids=["exit", "killed"],
)
def test_an_ended_server_leaves_no_regions(tmp_path: Path, shared_memory: Path, end: str, status: int) -> None:
    """Above all one that was killed for want of memory."""
    region = f"Path({str(shared_memory)!r}, os.environ['PREFIX'] + '1').touch()"
    with keeping(tmp_path, f"{region}\n{end}") as kept:
        assert kept.wait(timeout=60) == status
    assert (tmp_path / "starts").read_text() == "x"
    assert list(shared_memory.iterdir()) == []


def test_a_stop_before_the_server_leaves_no_regions(shared_memory: Path) -> None:
    prepare = "os.kill(os.getpid(), 15) or (sys.argv[2:], {**os"
    command = [sys.executable, "-c", KEEP.replace("(sys.argv[2:], {**os", prepare), str(shared_memory), "true"]
    stopped = subprocess.run(command, timeout=60, check=False)
    assert stopped.returncode == -signal.SIGTERM
    assert list(shared_memory.iterdir()) == []


def test_process_1_of_a_container_stops(tmp_path: Path) -> None:
    """What a signal does to others by default it does not do to process 1."""
    alone = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("process 1 takes a namespace")
    with keeping(tmp_path, f"print('ready', flush=True)\n{FOREVER}", *alone) as kept:
        assert kept.stdout
        assert kept.stdout.readline() == "ready\n"
        (first,) = Path(f"/proc/{kept.pid}/task/{kept.pid}/children").read_text().split()
        os.kill(int(first), signal.SIGTERM)
        assert kept.wait(timeout=60) == 128 + signal.SIGTERM


def test_a_killed_keeper_leaves_no_server(tmp_path: Path) -> None:
    with keeping(tmp_path, f"print(os.getpid(), flush=True)\n{FOREVER}") as kept:
        assert kept.stdout
        server = Path(f"/proc/{int(kept.stdout.readline())}")
        kept.kill()
        wait_until(lambda: not server.exists(), "the end of the server")


# --- what Triton leaves in shared memory


@pytest.fixture(autouse=True)
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(keeper, "SHARED_MEMORY", folder)
    return folder


def test_regions_go_with_their_server_and_no_others(shared_memory: Path) -> None:
    other = shared_memory / "triton_python_backend_shm_region_1"
    other.touch()
    with keeper.own_regions() as first, keeper.own_regions() as second:
        (shared_memory / f"{first}1").touch()
        kept = shared_memory / f"{second}1"
        kept.touch()
        with keeper.own_regions():
            assert kept.exists()
    assert list(shared_memory.iterdir()) == [other]


def test_what_a_killed_one_left_goes_at_the_next_start(shared_memory: Path) -> None:
    (shared_memory / f"{keeper.REGION_PREFIX}1.lock").touch()
    (shared_memory / f"{keeper.REGION_PREFIX}1_2").touch()
    with keeper.own_regions() as prefix:
        assert prefix
        assert [path.name for path in shared_memory.iterdir()] == [f"{prefix[:-1]}.lock"]


def test_what_a_process_holds_stays(shared_memory: Path) -> None:
    """Also a server that has outlived its keeper."""
    child = "import subprocess, sys; subprocess.run(['cat'], close_fds=False)"
    with keeper.own_regions() as prefix:
        assert prefix
        region = shared_memory / f"{prefix}1"
        region.touch()
        with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, close_fds=False) as held:
            held_lock = shared_memory / f"{prefix[:-1]}.lock"
            with keeper.own_regions():
                assert region.exists()
                assert held_lock.exists()
            held.communicate()


def test_without_shared_memory_it_serves_all_the_same(shared_memory: Path) -> None:
    shared_memory.rmdir()
    with keeper.own_regions() as prefix:
        assert prefix is None
