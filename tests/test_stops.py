"""Ctrl-C, SIGTERM and SIGHUP, once or twice, at whatever moment: what a command says, how it ends, what it leaves."""

import os
import pty
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anatomynet.engine.stops import ENDS, STOPS, temporary_folder, undisturbed, unwound_by_stops

# Whoever starts the tests in the background has signals ignored, and children inherit that.
COMMAND = """
import signal, sys, threading, time
from pathlib import Path
from anatomynet.engine.command import reports_errors
from anatomynet.engine.stops import ENDS

for number in ENDS:
    signal.signal(number, signal.SIG_DFL)

@reports_errors
def main() -> None:
{}

main()
"""
HOLDS_A_STUDY = """
    from anatomynet.client.study_files import opened_study
    with opened_study(Path(sys.argv[1])):
        print("unpacked", flush=True)
        time.sleep(60)
"""
# As a runtime that compiles: its thread is waited for as the process ends.
COMPUTES_IN_A_THREAD = """
    import os
    from concurrent.futures import ThreadPoolExecutor, thread
    def compute():
        while not thread._shutdown:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
    ThreadPoolExecutor(1).submit(compute)
    signal.raise_signal({number:d})
"""
IMPORTED = """
import importlib, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from anatomynet import start
start.import_module = lambda name: signal.raise_signal(signal.SIGINT)
start.client()
"""


@pytest.fixture(params=ENDS)
def end(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """One of the three, all with their usual handlers, and these again afterwards."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPS}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield request.param
    for number, handler in before.items():
        signal.signal(number, handler)


def ended(command: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", command, *arguments], capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize("stop", ENDS)
def test_a_command_that_is_stopped_leaves_no_patient_behind(stop: signal.Signals, tmp_path: Path) -> None:
    packed, temporary = tmp_path / "study.zip", tmp_path / "temporary"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("1.dcm", b"a patient's")
    temporary.mkdir()
    command, environment = COMMAND.format(HOLDS_A_STUDY), {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(
        [sys.executable, "-c", command, str(packed)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as holder:
        assert holder.stdout
        assert holder.stderr
        assert holder.stdout.readline() == b"unpacked\n"
        assert list(temporary.rglob("*.dcm"))
        holder.send_signal(stop)
        assert holder.stderr.read() == (b"interrupted\n" if stop == signal.SIGINT else b"")
    assert holder.returncode == 128 + stop
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("second", ENDS)
def test_a_second_one_does_not_break_off_the_tidying(end: signal.Signals, second: signal.Signals) -> None:
    tidied = []

    def stopped_twice() -> None:
        with unwound_by_stops():
            try:
                signal.raise_signal(end)
            finally:
                signal.raise_signal(second)
                tidied.append(True)

    with pytest.raises((SystemExit, KeyboardInterrupt)) as left:
        stopped_twice()
    assert tidied
    assert getattr(left.value, "code", 128 + signal.SIGINT) == 128 + end  # a KeyboardInterrupt has none
    signal.raise_signal(second)  # nor the wait for threads that comes after


@pytest.mark.parametrize("stop", ENDS)
def test_a_second_one_does_not_break_off_the_wait_for_threads(stop: signal.Signals) -> None:
    """The interpreter was torn down under the embedded engine, which ended in a crash."""
    found = ended(COMMAND.format(COMPUTES_IN_A_THREAD.format(number=stop)))
    assert (found.returncode, found.stderr) == (128 + stop, "interrupted\n" if stop == signal.SIGINT else "")


def test_what_is_deleted_is_deleted_whole(end: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = os.unlink

    def unlink_and_end(*arguments: Any, **options: Any) -> None:
        unlink(*arguments, **options)
        signal.raise_signal(end)

    def deleted() -> None:
        with unwound_by_stops(), temporary_folder(dir=tmp_path) as folder:
            for name in "abc":
                Path(folder, name).touch()
            monkeypatch.setattr(os, "unlink", unlink_and_end)

    with pytest.raises((SystemExit, KeyboardInterrupt)):
        deleted()
    assert not list(tmp_path.iterdir())


def test_what_comes_meanwhile_is_heard_afterwards(end: signal.Signals) -> None:
    heard: list[int] = []
    signal.signal(end, lambda number, _: heard.append(number))
    with undisturbed():
        signal.raise_signal(end)
        assert not heard
    assert heard == [end]


def test_who_loses_the_terminal_says_so_in_the_status_alone() -> None:
    """What is told while it unwinds cannot be written any more; that was another status, 120."""
    terminal, of_the_command = pty.openpty()
    says = "\n    try:\n        print('ready', flush=True); time.sleep(60)\n    finally:\n        print('table')"
    command = [sys.executable, "-c", COMMAND.format(says)]
    with subprocess.Popen(command, stdout=of_the_command, stderr=of_the_command) as process:
        os.close(of_the_command)
        assert os.read(terminal, 5) == b"ready"
        os.close(terminal)
        process.send_signal(signal.SIGHUP)
    assert process.returncode == 128 + signal.SIGHUP


def test_ctrl_c_while_a_command_is_imported_is_no_traceback() -> None:
    found = ended(IMPORTED)
    assert (found.returncode, found.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("chosen", [signal.SIG_IGN, lambda *_: None], ids=["nohup", "program"])
def test_what_was_chosen_for_a_stop_stays(chosen: signal.Handlers) -> None:
    before = signal.signal(STOPS[-1], chosen)
    try:
        with unwound_by_stops():
            assert signal.getsignal(STOPS[-1]) == chosen
        assert signal.getsignal(STOPS[-1]) == chosen
    finally:
        signal.signal(STOPS[-1], before)


def test_a_command_that_ends_by_itself_leaves_them_as_they_were(end: signal.Signals) -> None:
    before = signal.getsignal(end)
    with unwound_by_stops():
        assert signal.getsignal(end) != before
    assert signal.getsignal(end) == before


def test_a_command_that_runs_in_a_thread_leaves_signals_alone() -> None:
    before = [signal.getsignal(stop) for stop in ENDS]
    found: list[object] = []

    def look() -> None:
        with unwound_by_stops(), undisturbed():
            found.extend(signal.getsignal(stop) for stop in ENDS)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == before
