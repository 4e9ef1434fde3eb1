"""What a command says where it cannot speak, and what it does not hide."""

import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from anatomynet.engine.command import STOPS, unwound_by_stops

COMMAND = """
import click
from anatomynet.engine.command import reports_errors

@click.command()
@reports_errors
def main() -> None:
    {}

main()
"""


# Whoever starts the tests in the background has signals ignored, and children inherit that.
HOLDER = """
import signal, sys, time
from pathlib import Path
from anatomynet.client.study_files import opened_study
from anatomynet.engine.command import STOPS, reports_errors

for number in STOPS:
    signal.signal(number, signal.SIG_DFL)

@reports_errors
def hold() -> None:
    with opened_study(Path(sys.argv[1])):
        print("unpacked", flush=True)
        time.sleep(60)

hold()
"""


def run(body: str, stdout: Path) -> subprocess.CompletedProcess[str]:
    with stdout.open("w") as file:
        command = [sys.executable, "-c", COMMAND.format(body)]
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        return subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, check=False, env=buffered)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("body", ["click.echo('a line')", "print('a' * 100_000)"])
def test_output_that_cannot_be_written_is_one_line(body: str) -> None:
    """As where `> log.txt` is on a full disk."""
    ended = run(body, Path("/dev/full"))
    place = "where the output goes, or for temporary files"
    line = f"error: No space left on device {place}: make room, and run it again\n"
    assert (ended.returncode, ended.stderr) == (1, line)


def test_another_fault_of_the_system_is_not_taken_for_it(tmp_path: Path) -> None:
    ended = run("open('/nowhere/to/be/found')", tmp_path / "out.txt")
    assert ended.returncode == 1
    assert "FileNotFoundError" in ended.stderr


@pytest.mark.parametrize("stop", STOPS)
def test_a_command_that_is_stopped_leaves_no_patient_behind(stop: signal.Signals, tmp_path: Path) -> None:
    packed, temporary = tmp_path / "study.zip", tmp_path / "temporary"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("1.dcm", b"a patient's")
    temporary.mkdir()
    command, environment = [sys.executable, "-c", HOLDER, str(packed)], {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stderr
        assert holder.stdout.readline() == b"unpacked\n"
        assert list(temporary.rglob("*.dcm"))
        holder.send_signal(stop)
        assert not holder.stderr.read()
    assert holder.returncode == 128 + stop
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("stop", STOPS)
def test_a_second_stop_does_not_break_off_the_tidying(stop: signal.Signals) -> None:
    before, tidied = signal.signal(stop, signal.SIG_DFL), []

    def stopped_twice() -> None:
        with unwound_by_stops():
            try:
                signal.raise_signal(stop)
            finally:
                signal.raise_signal(stop)
                tidied.append(True)

    try:
        with pytest.raises(SystemExit) as left:
            stopped_twice()
        assert left.value.code == 128 + stop
        assert tidied
        assert signal.getsignal(stop) == signal.SIG_DFL
    finally:
        signal.signal(stop, before)


@pytest.mark.parametrize("chosen", [signal.SIG_IGN, lambda *_: None], ids=["nohup", "program"])
def test_what_was_chosen_for_a_stop_stays(chosen: signal.Handlers) -> None:
    before = signal.signal(STOPS[-1], chosen)
    try:
        with unwound_by_stops():
            assert signal.getsignal(STOPS[-1]) == chosen
        assert signal.getsignal(STOPS[-1]) == chosen
    finally:
        signal.signal(STOPS[-1], before)


def test_a_command_that_runs_in_a_thread_leaves_signals_alone() -> None:
    before = [signal.getsignal(stop) for stop in STOPS]
    found: list[object] = []

    def look() -> None:
        with unwound_by_stops():
            found.extend(signal.getsignal(stop) for stop in STOPS)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == before
