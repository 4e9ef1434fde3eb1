import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anatomynet.engine.errors import OutputError
from anatomynet.engine.output import prepare_folder, refuse_existing, write_whole
from tests.full_disk import largest_file

WRITER_BYTES = 8 << 20
MOMENTS = 20
WRITER = f"""
import itertools, sys
from pathlib import Path
from anatomynet.engine.output import write_whole
print("begun", flush=True)
for number in itertools.count():
    write_whole(Path(sys.argv[1]), bytes([number % 256]) * {WRITER_BYTES}, overwrite=True)
"""


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.bin"
    write_whole(path, b"all of it")
    assert path.read_bytes() == b"all of it"
    assert list(tmp_path.iterdir()) == [path]


def test_an_older_file_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "result.bin"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match="exists and was kept"):
        refuse_existing(path, overwrite=False)
    with pytest.raises(OutputError, match="exists and was kept"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    write_whole(path, b"new", overwrite=True)
    assert path.read_bytes() == b"new"


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.bin"
    path.write_bytes(b"old")
    with largest_file(1024), pytest.raises(OutputError, match="could not be written"):
        write_whole(path, bytes(4096), overwrite=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_killed_at_any_moment_it_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "result.bin"
    found = set()
    for moment in range(MOMENTS):
        with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE) as writer:
            assert writer.stdout
            writer.stdout.readline()  # it has begun
            time.sleep(0.003 * moment)
            while moment == MOMENTS - 1 and not path.exists() and writer.poll() is None:  # on a busy machine
                time.sleep(0.003)
            writer.kill()
        parts = list(tmp_path.glob(".*.part"))  # between its name and its place
        assert all(part.stat().st_size == WRITER_BYTES for part in parts)
        if path.exists():
            data = path.read_bytes()
            assert len(data) == WRITER_BYTES
            found |= {*data}
            assert len({*data}) == 1
    assert found


@pytest.mark.parametrize("nameless", [True, False], ids=["nameless", "named"])
def test_two_may_write_one_file_at_the_same_time(
    nameless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads, or containers in which each is process 1, on a disk that they share."""
    path, replace, others = tmp_path / "result.bin", Path.replace, [b"the other's"]

    def replace_after_another(beside: Path, target: Path) -> Path:
        if others:
            write_whole(path, others.pop(), overwrite=True)
        return replace(beside, target)

    monkeypatch.setattr(Path, "replace", replace_after_another)
    if not nameless:
        monkeypatch.setattr("anatomynet.engine.output._nameless_file", lambda folder: None)
    write_whole(path, b"this one's", overwrite=True)
    assert not others
    assert path.read_bytes() == b"this one's"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="its folder does not exist"):
        refuse_existing(tmp_path / "missing" / "result.bin", overwrite=True)


def test_a_name_that_cannot_be_looked_at_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="cannot be written: File name too long; give another --output"):
        refuse_existing(tmp_path / ("a" * 256), overwrite=True)

    def is_dir(self: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "is_dir", is_dir)
    with pytest.raises(OutputError, match="cannot be written: Permission denied"):
        refuse_existing(tmp_path / "result.bin", overwrite=False)


def test_a_folder_is_emptied_only_of_slices(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    prepare_folder(folder, overwrite=False)
    (folder / "1.dcm").touch()
    with pytest.raises(OutputError, match="holds 1 files and was kept"):
        prepare_folder(folder, overwrite=False)
    prepare_folder(folder, overwrite=True)
    assert not list(folder.iterdir())
    (folder / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"more than \.dcm files"):
        prepare_folder(folder, overwrite=True)
    assert (folder / "thesis.tex").exists()
