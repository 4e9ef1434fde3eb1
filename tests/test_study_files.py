"""Zip files and DICOMDIRs bring the same series as their folder; what is dangerous is refused before it is unpacked."""

import stat
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from anatomynet.client import study_files
from anatomynet.client.cli import main
from anatomynet.client.contours import trace_contours
from anatomynet.client.rtstruct import write_rtstruct
from anatomynet.client.study import read_ct_series, volume_from_series
from anatomynet.client.study_files import OpenedStudies, opened_study
from anatomynet.client.study_search import find_studies
from anatomynet.engine.errors import StudyError
from anatomynet.engine.structures import STRUCTURES
from anatomynet.engine.volume import LabelMap
from tests.dicom_studies import random_volume, write_study


@pytest.fixture(autouse=True)
def unpacked_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where zip files are unpacked."""
    folder = tmp_path / "unpacked"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def zip_of(path: Path, *entries: tuple[str, bytes], link: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
        if link:
            info = zipfile.ZipInfo(link)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "/etc/passwd")
    return path


def refusal(path: Path, words: str, unpacked: Path) -> None:
    with pytest.raises(StudyError, match=words) as error, opened_study(path):
        pass
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(unpacked.iterdir())


def test_a_zip_brings_the_series_of_its_folder(tmp_path: Path, unpacked_here: Path) -> None:
    paths = write_study(tmp_path / "study")
    expected = volume_from_series(read_ct_series(tmp_path / "study"))
    entries = [(f"DICOM/IMG{k}", path.read_bytes()) for k, path in enumerate(paths)]
    packed = zip_of(tmp_path / "study.zip", *entries, ("README.txt", b"viewer"), ("DICOMDIR.html", b"x"))
    with opened_study(packed) as folder:
        found = volume_from_series(read_ct_series(folder))
    np.testing.assert_array_equal(found.hu, expected.hu)
    assert found.geometry == expected.geometry
    assert not list(unpacked_here.iterdir())


def test_the_studies_asked_for_last_stay_open(tmp_path: Path, unpacked_here: Path) -> None:
    first, second, third = (zip_of(tmp_path / f"{name}.zip", ("file", b"data")) for name in ("a", "b", "c"))
    with OpenedStudies(2) as opened:
        one, other = opened.folder_of(first), opened.folder_of(second)
        assert opened.folder_of(first) == one
        last = opened.folder_of(third)  # in the place of the second
        assert {*unpacked_here.iterdir()} == {one, last}
        assert opened.folder_of(second) != other
        with pytest.raises(StudyError):
            opened.folder_of(zip_of(tmp_path / "bad.zip", ("../out", b"data")))
    assert not list(unpacked_here.iterdir())


def test_a_dicomdir_stands_for_its_folder(tmp_path: Path) -> None:
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    with opened_study(tmp_path / "DICOMDIR") as folder:
        assert folder == tmp_path


def test_a_folder_and_any_other_file_are_left_to_the_reader(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / "file.dcm"):
        with opened_study(path) as found:
            assert found == path


def test_what_cannot_be_looked_at_is_found_and_refused_when_read(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path, why in (
        (tmp_path / ("a" * 256), "File name too long"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
    ):
        assert [study.path for study in find_studies([path], left_out=[path])] == [path]
        with pytest.raises(StudyError, match=f"cannot be read: {why}"), opened_study(path):
            pass
        with pytest.raises(StudyError, match=f"cannot be read: {why}"):
            read_ct_series(path)


@pytest.mark.parametrize("name", ["../out.dcm", "a/../../out.dcm", "/etc/out.dcm", "..\\out.dcm", "C:\\out.dcm"])
def test_paths_that_lead_outside_are_refused(tmp_path: Path, unpacked_here: Path, name: str) -> None:
    refusal(zip_of(tmp_path / "s.zip", ("fine", b"1"), (name, b"2")), "outside its folder", unpacked_here)


def test_links_are_refused(tmp_path: Path, unpacked_here: Path) -> None:
    refusal(zip_of(tmp_path / "s.zip", link="slice.dcm"), "outside its folder", unpacked_here)


def test_a_bomb_is_refused(tmp_path: Path, unpacked_here: Path) -> None:
    bomb = zip_of(tmp_path / "s.zip", ("slice.dcm", bytes(study_files.ALWAYS_ALLOWED_BYTES + 1)))
    assert bomb.stat().st_size < 100_000
    refusal(bomb, "more than 100 times its size", unpacked_here)


@pytest.mark.parametrize(("limit", "value"), [("LARGEST_FILE_COUNT", 2), ("LARGEST_UNPACKED_BYTES", 2999)])
def test_what_is_too_large_is_refused(
    tmp_path: Path, unpacked_here: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    packed = zip_of(tmp_path / "s.zip", *((f"{k}", bytes(1000)) for k in range(3)))
    with opened_study(packed) as folder:
        assert len(list(folder.iterdir())) == 3
    monkeypatch.setattr(study_files, limit, value)
    refusal(packed, "unpacks to 3 files", unpacked_here)


def test_a_file_that_says_less_than_it_holds_is_refused(tmp_path: Path, unpacked_here: Path) -> None:
    packed = zip_of(tmp_path / "s.zip", ("slice.dcm", bytes(100_000)))
    data = packed.read_bytes()
    packed.write_bytes(data.replace((100_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    refusal(packed, "damaged", unpacked_here)


def test_a_damaged_and_an_encrypted_zip_are_refused(tmp_path: Path, unpacked_here: Path) -> None:
    packed = zip_of(tmp_path / "s.zip", ("slice.dcm", np.random.default_rng(1).bytes(5000)))
    data = bytearray(packed.read_bytes())
    data[300] ^= 0xFF
    packed.write_bytes(data)
    refusal(packed, "damaged", unpacked_here)
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    packed.write_bytes(data)
    refusal(packed, "encrypted", unpacked_here)


def with_damaged_lzma(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("slice.dcm", np.random.default_rng(1).bytes(5000))
    data = bytearray(path.read_bytes())
    data[data.index(b"slice.dcm") + len(b"slice.dcm") + 4] = 0xFF  # LZMA's properties
    path.write_bytes(data)
    return path


def with_a_name_that_is_no_utf_8(path: Path) -> Path:
    data = zip_of(path, ("\u00e9.dcm", b"data")).read_bytes()
    path.write_bytes(data.replace("\u00e9".encode(), b"\xff\xff"))
    return path


@pytest.mark.parametrize("damaged", [with_damaged_lzma, with_a_name_that_is_no_utf_8])
def test_damage_of_any_kind_is_refused_when_read_and_not_when_searched_for(
    tmp_path: Path, unpacked_here: Path, damaged: Callable[[Path], Path]
) -> None:
    (tmp_path / "in").mkdir()
    packed = damaged(tmp_path / "in" / "s.zip")
    assert [study.path for study in find_studies([tmp_path / "in"])] == [packed]
    refusal(packed, "damaged", unpacked_here)


def test_the_commands_take_a_zip(tmp_path: Path, unpacked_here: Path) -> None:
    """`compare` reads the CT of a zip and of its folder alike, and leaves nothing behind."""
    runner = CliRunner()
    paths = write_study(tmp_path / "study", random_volume((6, 40, 40)))
    series = read_ct_series(tmp_path / "study")
    labels = np.zeros(series.geometry.shape, np.uint8)
    labels[1:5, 5:30, 5:30] = 1
    label_map = LabelMap(labels, series.geometry, tuple(STRUCTURES.values()))
    write_rtstruct(tmp_path / "rs.dcm", series, trace_contours(label_map))
    packed = zip_of(tmp_path / "study.zip", *((path.name, path.read_bytes()) for path in paths))
    both = ["--reference", str(tmp_path / "rs.dcm"), "--prediction", str(tmp_path / "rs.dcm")]
    results = [runner.invoke(main, ["compare", str(study), *both]) for study in (tmp_path / "study", packed)]
    assert [r.exit_code for r in results] == [0, 0]
    assert results[0].output == results[1].output
    assert not list(unpacked_here.iterdir())
