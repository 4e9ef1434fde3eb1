"""The records beside outputs, and what a run that was killed leaves there."""

import fcntl
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from anatomynet.client.records import ABANDONED_S, RECORDS, UNFINISHED, is_done, write_recorded
from anatomynet.engine.errors import OutputError
from anatomynet.engine.output import write_whole
from tests.full_disk import largest_file
from tests.waiting import wait_until

RECORD = {"slices_sha256": "s", "checkpoint_sha256": "c", "asked_sha256": "a"}


def outputs_in(folder: Path) -> dict[str, Path]:
    return {"rtstruct": folder / "head.rtstruct.dcm", "seg": folder / "head.seg.dcm"}


def write_both(folder: Path, data: bytes, *, overwrite: bool = False) -> bool:
    def write(staged: Mapping[str, Path]) -> None:
        for path in staged.values():
            path.write_bytes(data)

    return write_recorded(outputs_in(folder), RECORD, write, findings=0, overwrite=overwrite)


def write_one(folder: Path) -> Path:
    output = folder / "head.rtstruct.dcm"
    write_recorded(
        {"rtstruct": output}, {}, lambda staged: staged["rtstruct"].write_bytes(b"contours"), findings=0, overwrite=True
    )
    return output


@pytest.mark.parametrize("look", [1, 2])
def test_a_study_beside_that_is_finished_meanwhile_is_no_error(
    look: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = tmp_path / RECORDS / f"other.rtstruct.dcm.1{UNFINISHED}"
    beside.mkdir(parents=True)
    looks, stat = 0, Path.stat

    def stat_while_another_runs(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        nonlocal looks
        looks += path == beside
        if path == beside and looks == look:
            beside.rmdir()
        return stat(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", stat_while_another_runs)
    assert write_one(tmp_path).read_bytes() == b"contours"
    assert looks


def test_only_what_lies_long_unfinished_is_removed(tmp_path: Path) -> None:
    records = tmp_path / RECORDS
    old, young, not_ours = (records / name for name in (f"old{UNFINISHED}", f"young{UNFINISHED}", f"file{UNFINISHED}"))
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "head.rtstruct.dcm").write_bytes(b"half")
    not_ours.write_bytes(b"somebody's")
    for path in (old, not_ours):
        os.utime(path, (path.stat().st_mtime - ABANDONED_S - 60,) * 2)
    write_one(tmp_path)
    assert {path.name for path in records.iterdir()} == {young.name, not_ours.name, "head.rtstruct.dcm.json"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_runs_that_write_the_same_files_take_turns(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one comes when the first one's record has its name, and its file has none yet."""
    replace, flock = Path.replace, fcntl.flock
    second: list[Future[bool]] = []
    asked: list[object] = []

    def flock_noted(*arguments: int) -> None:
        asked.append(arguments)
        flock(*arguments)

    def replace_beside_another(path: Path, target: Path) -> Path:
        if target == tmp_path / "head.rtstruct.dcm" and not second:
            before = len(asked)
            second.append(pool.submit(write_both, tmp_path, b"the second's", overwrite=overwrite))
            wait_until(lambda: second[0].done() or len(asked) > before)
        return replace(path, target)

    monkeypatch.setattr(fcntl, "flock", flock_noted)
    monkeypatch.setattr(Path, "replace", replace_beside_another)
    with ThreadPoolExecutor(1) as pool:
        assert write_both(tmp_path, b"the first's", overwrite=overwrite)
    assert second[0].result() == overwrite  # else it was done before
    files = outputs_in(tmp_path).values()
    assert {path.read_bytes() for path in files} == {b"the second's" if overwrite else b"the first's"}
    assert is_done([*files], RECORD)


def test_a_full_disk_leaves_the_old_files_and_what_accounts_for_them(tmp_path: Path) -> None:
    """It is full when the second record is written."""
    write_both(tmp_path, b"old")
    files, written = [*outputs_in(tmp_path).values()], list[Path]()

    def fill_up(path: Path, data: bytes, **options: bool) -> None:
        written.append(path)
        with largest_file(0 if len(written) == 2 else 1 << 20):
            write_whole(path, data, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anatomynet.client.records.write_whole", fill_up)
        with pytest.raises(OutputError, match="nothing was left behind"):
            write_both(tmp_path, b"new", overwrite=True)
    assert len(written) == 2
    assert {path.read_bytes() for path in files} == {b"old"}
    assert is_done(files, RECORD)
