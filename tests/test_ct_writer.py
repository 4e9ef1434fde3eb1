"""The CT series that is written: valid, exact, and the same each time."""

from pathlib import Path

import numpy as np
import pytest

from anatomynet.client.ct_writer import write_ct_series
from anatomynet.client.study import read_ct_series, volume_from_series
from anatomynet.engine.errors import GeometryError, OutputError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.volume import CTVolume
from tests.dicom_studies import DIRECTIONS, complaints, random_volume
from tests.full_disk import largest_file


@pytest.mark.parametrize("position", DIRECTIONS)
def test_dciodvfy_and_dcentvfy_have_no_complaint(tmp_path: Path, position: str) -> None:
    on_couch = position if position.isupper() else "HFS"
    series = write_ct_series(tmp_path, random_volume(direction=DIRECTIONS[position]), patient_position=on_couch)
    for ct_slice in series.slices:
        assert complaints("dciodvfy", ct_slice.path) == []
    assert complaints("dcentvfy", *(s.path for s in series.slices)) == []


def test_every_int16_comes_back(tmp_path: Path) -> None:
    hu = np.arange(-32768, 32768, dtype=np.int16).reshape(4, 128, 128)
    series = write_ct_series(tmp_path, CTVolume(hu, VolumeGeometry((4, 128, 128), (1.0, 1.0, 1.0))))
    np.testing.assert_array_equal(volume_from_series(series).hu, hu)


def test_the_same_call_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_ct_series(tmp_path / name, random_volume(), seed=3)
    contents = [[path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in "ab"]
    assert contents[0] == contents[1]


def test_another_seed_or_volume_is_another_study(tmp_path: Path) -> None:
    volume = random_volume()
    other = CTVolume(volume.hu + np.int16(1), volume.geometry)
    series = [
        write_ct_series(tmp_path / "a", volume, seed=0),
        write_ct_series(tmp_path / "b", volume, seed=1),
        write_ct_series(tmp_path / "c", other, seed=0),
    ]
    assert len({s.study_instance_uid for s in series}) == 3
    assert len({s.frame_of_reference_uid for s in series}) == 3
    assert len({c.sop_instance_uid for s in series for c in s.slices}) == 3 * 6


def test_oblique_volume_is_refused(tmp_path: Path) -> None:
    c, s = float(np.cos(0.1)), float(np.sin(0.1))
    geometry = VolumeGeometry((2, 2, 2), (1.0, 1.0, 1.0), direction=((1, 0, 0), (0, c, -s), (0, s, c)))
    with pytest.raises(GeometryError, match="oblique"):
        write_ct_series(tmp_path, CTVolume(np.zeros((2, 2, 2), np.int16), geometry))


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        write_ct_series(tmp_path / "file" / "study", random_volume())


def test_a_full_disk_leaves_no_part_of_a_series(tmp_path: Path) -> None:
    with largest_file(1024), pytest.raises(OutputError, match="cannot be written"):
        write_ct_series(tmp_path / "study", random_volume())
    assert list((tmp_path / "study").iterdir()) == []


def test_read_again_it_is_the_same_series(tmp_path: Path) -> None:
    written = write_ct_series(tmp_path, random_volume())
    read = read_ct_series(tmp_path)
    assert (written.slices, written.geometry) == (read.slices, read.geometry)
