"""NRRD and NIfTI are read to where SimpleITK, which wrote them, says each voxel lies."""

from pathlib import Path
from typing import Any

import nibabel
import nrrd
import numpy as np
import pytest
import SimpleITK

from anatomynet.engine.errors import DataError, OutputError
from anatomynet.engine.geometry import Direction, VolumeGeometry
from anatomynet.engine.volume_files import read_volume, stem_of, write_nrrd
from tests.dicom_studies import all_directions

SHAPE = (3, 4, 5)
SPACING, ORIGIN = (1.5, 1.25, 2.5), (-10.0, 20.0, -30.0)
ITK: Any = SimpleITK  # neither its calls nor nibabel's are typed
Nifti: Any = nibabel.Nifti1Image
MILLIMETRES = 1e-3  # NIfTI keeps its orientation as float32


def write_by_simpleitk(path: Path, direction: Direction) -> Any:
    image = ITK.GetImageFromArray(np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE))
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection(np.ravel(direction).tolist())
    ITK.WriteImage(image, str(path))
    return image


@pytest.mark.parametrize("direction", all_directions())
def test_nifti_of_any_orientation_is_turned_to_the_patients_axes(tmp_path: Path, direction: Direction) -> None:
    image = write_by_simpleitk(tmp_path / "ct.nii.gz", direction)
    array, geometry = read_volume(tmp_path / "ct.nii.gz")
    np.testing.assert_allclose(geometry.direction, np.eye(3), atol=1e-6)
    for z, y, x in np.ndindex(array.shape):
        point = geometry.points_from_indices((x, y, z)).tolist()
        index = image.TransformPhysicalPointToIndex(point)
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint(index), point, atol=MILLIMETRES)
        assert array[z, y, x] == image.GetPixel(index)


def test_what_is_written_comes_back_and_simpleitk_reads_it_so(tmp_path: Path) -> None:
    hu = np.random.default_rng(1).integers(-1024, 3071, SHAPE, dtype=np.int16)
    geometry = VolumeGeometry(SHAPE, SPACING, ORIGIN)
    write_nrrd(tmp_path / "img.nrrd", hu, geometry)
    array, found = read_volume(tmp_path / "img.nrrd")
    assert found == geometry
    np.testing.assert_array_equal(array, hu)
    image = ITK.ReadImage(str(tmp_path / "img.nrrd"))
    np.testing.assert_array_equal(ITK.GetArrayFromImage(image), hu)
    assert (image.GetSpacing(), image.GetOrigin()) == (SPACING, ORIGIN)
    with pytest.raises(OutputError, match="exists"):
        write_nrrd(tmp_path / "img.nrrd", hu, geometry)


def test_a_name_has_its_suffix_taken_off() -> None:
    assert [stem_of(Path(name)) for name in ("A.nii.gz", "B.nii", "C.v2.nrrd")] == ["A", "B", "C.v2"]


@pytest.mark.parametrize("damage", [b"", b"not NIfTI", b"\x1f\x8b broken"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_damaged_nifti_is_refused(tmp_path: Path, suffix: str, damage: bytes) -> None:
    (tmp_path / f"ct{suffix}").write_bytes(damage)
    with pytest.raises(DataError, match=r"ct\.nii.* is not a readable NIfTI file"):
        read_volume(tmp_path / f"ct{suffix}")


@pytest.mark.parametrize("kept", [0.3, 0.7])
def test_truncated_nifti_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "ct.nii.gz"
    noise = np.random.default_rng(1).integers(0, 30000, (20, 20, 20), dtype=np.int16)
    nibabel.save(Nifti(noise, np.eye(4)), path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(DataError, match="not a readable NIfTI file"):
        read_volume(path)


def test_nifti_without_orientation_is_refused(tmp_path: Path) -> None:
    image = Nifti(np.zeros(SHAPE, np.int16), None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    nibabel.save(image, tmp_path / "ct.nii")
    with pytest.raises(DataError, match="expected three axes and an orientation"):
        read_volume(tmp_path / "ct.nii")


@pytest.mark.parametrize(
    ("along_x", "shift_z", "refused"),
    [
        pytest.param(-1.0, 0.0, True, id="mirrored"),
        pytest.param(1.0, 2.6, True, id="elsewhere"),
        pytest.param(1.0, 0.9, False, id="alike"),
    ],
)
def test_nifti_of_two_orientations_is_refused(tmp_path: Path, along_x: float, shift_z: float, *, refused: bool) -> None:
    affine = np.diag([-1.0, -1.0, 2.5, 1.0])
    image = Nifti(np.zeros(SHAPE, np.int16), affine)
    image.set_sform(affine, code=2)
    affine[0, 0] *= along_x
    affine[2, 3] += shift_z
    image.set_qform(affine, code=1)
    nibabel.save(image, tmp_path / "ct.nii")
    if not refused:
        assert read_volume(tmp_path / "ct.nii")[0].shape == SHAPE[::-1]
        return
    with pytest.raises(DataError, match=r"ct\.nii: its sform and qform place voxels up to [\d.]+ mm apart: .* write"):
        read_volume(tmp_path / "ct.nii")


def test_oblique_nifti_is_refused(tmp_path: Path) -> None:
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]
    nibabel.save(Nifti(np.zeros(SHAPE, np.int16), turned), tmp_path / "ct.nii")
    with pytest.raises(DataError, match=r"ct\.nii: oblique volume"):
        read_volume(tmp_path / "ct.nii")


def test_an_nrrd_of_another_space_is_refused(tmp_path: Path) -> None:
    nrrd.write(str(tmp_path / "img.nrrd"), np.zeros(SHAPE, np.int16), {"space": "RAS"})
    with pytest.raises(DataError, match="expected three axes along left-posterior-superior"):
        read_volume(tmp_path / "img.nrrd")


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (b"space origin: (0,0,0)", b"space origin: (0,0)", "not a readable NRRD file"),
        (b"space origin: (0,0,0)", b"space origin: (nan,0,0)", r"ct\.nrrd: .* origin \(nan, 0.0, 0.0\)"),
        (b"type: int16", b"type: int17", "not a readable NRRD file"),
        (b"encoding: gzip", b'space units: "cm" "cm" "cm"\nencoding: gzip', "expected lengths in mm, found cm"),
    ],
)
def test_an_nrrd_header_that_makes_no_sense_is_refused(tmp_path: Path, old: bytes, new: bytes, complaint: str) -> None:
    path = tmp_path / "ct.nrrd"
    write_nrrd(path, np.zeros((4, 5, 6), np.int16), VolumeGeometry((4, 5, 6), (1.0, 1.0, 2.0)))
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    with pytest.raises(DataError, match=complaint):
        read_volume(path)


@pytest.mark.parametrize("dtype", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]])
def test_nifti_of_colours_or_complex_numbers_is_refused(tmp_path: Path, dtype: Any) -> None:
    nibabel.save(Nifti(np.zeros((4, 5, 6), dtype), np.diag([-1.0, -1.0, 2.0, 1.0])), tmp_path / "ct.nii.gz")
    with pytest.raises(DataError, match="expected one real number a voxel"):
        read_volume(tmp_path / "ct.nii.gz")


def test_nifti_in_other_units_is_refused(tmp_path: Path) -> None:
    image = Nifti(np.zeros((4, 5, 6), np.int16), np.diag([-1.0, -1.0, 2.0, 1.0]))
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "ct.nii.gz")
    with pytest.raises(DataError, match="expected lengths in mm, found meter"):
        read_volume(tmp_path / "ct.nii.gz")
