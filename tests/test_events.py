"""TensorBoard itself reads what training wrote, also after an interruption."""

import builtins
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from anatomynet.engine.errors import OutputError
from anatomynet.engine.events import event_log, forget_events
from tests.full_disk import largest_file

ROWS = [{"step": step, "loss": 1.0 / step, "mean": 0.1 * step, "Larynx": float("nan")} for step in (1, 2, 3)]


def points(output: Path) -> dict[str, list[tuple[int, Any]]]:
    """What TensorBoard finds: tag -> (step, value)."""
    pytest.importorskip("tensorboardX", reason="event files are written where tensorboardX is installed")
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard reads what was written"
    )
    events = accumulator.EventAccumulator(str(output.with_suffix(".tensorboard"))).Reload()
    return {
        tag: [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def write(output: Path, rows: list[dict[str, float]], *, first: int = 0) -> None:
    with event_log(output, first=first) as write_row:
        for row in rows:
            write_row(row)


def test_tensorboard_reads_every_point(tmp_path: Path) -> None:
    write(tmp_path / "run.safetensors", ROWS)
    assert points(tmp_path / "run.safetensors") == {
        "loss": [(row["step"], row["loss"]) for row in ROWS],
        "DSC/mean": [(row["step"], row["mean"]) for row in ROWS],
    }


@pytest.mark.parametrize(("first", "kept"), [(2, [(1, 1.0), (2, 0.5)]), (0, [])])
def test_what_an_interrupted_run_wrote_too_far_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, kept: list[tuple[int, float]]
) -> None:
    output = tmp_path / "run.safetensors"
    write(output, ROWS)
    later = time.time() + 60  # else the file of a run that began at the same step might have the same name
    monkeypatch.setattr("time.time", lambda: later)
    write(output, [{"step": 3, "loss": 9.0}], first=first)
    assert points(output)["loss"] == [*kept, (3, 9.0)]


def test_each_point_is_there_at_once(tmp_path: Path) -> None:
    """Nothing waits for the end of the run, which may be killed."""
    output = tmp_path / "run.safetensors"
    with event_log(output, first=0) as write_row:
        for count, row in enumerate(ROWS, start=1):
            write_row(row)
            assert len(points(output)["loss"]) == count


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    output = tmp_path / "run.safetensors"
    with event_log(output, first=0) as write_row, largest_file(64), pytest.raises(OutputError, match="not be written"):
        write_row(ROWS[0])


def test_another_run_is_forgotten(tmp_path: Path) -> None:
    output = tmp_path / "run.safetensors"
    forget_events(output)  # nothing there
    write(output, ROWS)
    forget_events(output)
    assert list(tmp_path.iterdir()) == []


def test_without_the_library_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    really_import = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> ModuleType:
        if name.partition(".")[0] == "tensorboardX":
            raise ImportError(name)
        return really_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    write(tmp_path / "run.safetensors", ROWS)
    assert list(tmp_path.iterdir()) == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "tensorboardX" in lines[0]
