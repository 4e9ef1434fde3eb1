"""The records beside outputs, and what a run that was killed leaves there."""

import os
from pathlib import Path

import pytest

from anatomynet.client.records import ABANDONED_S, RECORDS, UNFINISHED, write_recorded


def write_one(folder: Path) -> Path:
    output = folder / "head.rtstruct.dcm"
    write_recorded({"rtstruct": output}, {}, lambda staged: staged["rtstruct"].write_bytes(b"contours"))
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
