"""Cases are read as they lie on disk, or refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import nrrd
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from anatomynet.engine.config import ModelConfig, load_config
from anatomynet.engine.data import (
    HEAD_AND_NECK_MARGIN_MM,
    LONGEST_HEAD_AND_NECK_MM,
    Case,
    at_network_resolution,
    cut_to_body,
    cut_to_head_and_neck,
    find_cases,
    read_case,
)
from anatomynet.engine.errors import DataError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.network import AnatomyNet, ServedNetwork, normalised_from_hu
from anatomynet.engine.preprocess import body_box
from anatomynet.engine.resolution import enlarged
from anatomynet.engine.volume import CTVolume
from tests.openkbp import REDUCTION
from tests.synthetic_head import LEFT, RIGHT, STEM, STRUCTURES, head

OPENKBP = Path(__file__).resolve().parents[2] / "shared" / "data" / "openkbp"
SHAPE = (6, 7, 8)


def write_nrrd(path: Path, array: NDArray[Any], **header: object) -> None:
    """An array (z, y, x), axes LPS unless the header says otherwise; None leaves a field out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {
        "space": "left-posterior-superior",
        "space directions": np.diag([1.5, 1.25, 2.5]),
        "space origin": [-10.0, 20.0, -30.0],
    } | {key.replace("_", " "): value for key, value in header.items()}
    nrrd.write(str(path), array, {k: v for k, v in fields.items() if v is not None}, index_order="C")


def mask_of(*voxels: tuple[int, int, int]) -> NDArray[np.uint8]:
    mask = np.zeros(SHAPE, np.uint8)
    for voxel in voxels:
        mask[voxel] = 1
    return mask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A case with BrainStem and Parotid_L, each of two voxels."""
    folder = tmp_path / "pt_1"
    write_nrrd(folder / "img.nrrd", np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16))
    write_nrrd(folder / "structures" / "BrainStem.nrrd", mask_of((1, 2, 3), (1, 2, 4)))
    write_nrrd(folder / "structures" / "Parotid_L.nrrd", mask_of((4, 5, 6), (4, 5, 7)))
    return folder


def test_a_case_is_read_as_z_y_x(folder: Path) -> None:
    case = read_case(folder, STRUCTURES)
    assert case.name == "pt_1"
    assert np.array_equal(case.volume.hu, np.arange(np.prod(SHAPE)).reshape(SHAPE))
    assert case.volume.geometry == VolumeGeometry(SHAPE, (1.5, 1.25, 2.5), (-10.0, 20.0, -30.0))
    assert np.argwhere(case.labels == STEM).tolist() == [[1, 2, 3], [1, 2, 4]]
    assert np.argwhere(case.labels == LEFT).tolist() == [[4, 5, 6], [4, 5, 7]]
    assert case.annotated == (True, True, False)


def test_labels_follow_the_models_order(folder: Path) -> None:
    case = read_case(folder, ("Parotid_R", "Parotid_L", "BrainStem"))
    assert case.annotated == (False, True, True)
    assert case.labels[1, 2, 3] == 3
    assert case.labels[4, 5, 6] == 2


def test_other_files_are_left_alone(folder: Path) -> None:
    (folder / "structures" / "Thyroid.nrrd").write_bytes(b"not read")
    assert read_case(folder, STRUCTURES).annotated == (True, True, False)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint8])
def test_hounsfield_units_of_any_type_are_rounded_to_int16(folder: Path, dtype: type[np.generic]) -> None:
    write_nrrd(folder / "img.nrrd", np.full(SHAPE, 99.6).astype(dtype))
    hu = read_case(folder, STRUCTURES).volume.hu
    assert hu.dtype == np.int16
    assert (hu == (100 if np.issubdtype(dtype, np.floating) else 99)).all()


def test_hounsfield_units_beyond_int16_are_clipped(folder: Path) -> None:
    write_nrrd(folder / "img.nrrd", np.where(np.indices(SHAPE)[2] > 3, 1e6, -1e6))
    assert set(np.unique(read_case(folder, STRUCTURES).volume.hu)) == {-32768, 32767}


def test_an_empty_mask_is_not_annotated_and_told(folder: Path) -> None:
    """As an empty ROI is, and a value of a label map that no voxel has."""
    write_nrrd(folder / "structures" / "Parotid_R.nrrd", mask_of())
    case = read_case(folder, STRUCTURES)
    assert case.annotated == (True, True, False)
    assert case.remarks == ("Parotid_R: its mask is empty, so it is not annotated",)


def test_a_case_of_empty_masks_is_refused(folder: Path) -> None:
    for name in ("BrainStem", "Parotid_L"):
        write_nrrd(folder / "structures" / f"{name}.nrrd", mask_of())
    with pytest.raises(DataError, match=r"none of .* in its structures/; empty: BrainStem, Parotid_L"):
        read_case(folder, STRUCTURES)


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (mask_of((1, 2, 3)) * 0.3 + mask_of((1, 2, 4)), "0, 0.3, 1"),
        (mask_of((1, 2, 3)) * np.int8(-1), "-1, 0"),
        (mask_of((1, 2, 3)) + 2 * mask_of((1, 2, 4)), "0, 1, 2"),
    ],
    ids=["soft", "negative", "label map"],
)
def test_a_mask_of_several_values_is_refused(folder: Path, mask: NDArray[Any], found: str) -> None:
    write_nrrd(folder / "structures" / "Parotid_L.nrrd", mask)
    with pytest.raises(DataError, match=rf"Parotid_L\.nrrd: expected a mask, .* found {found}"):
        read_case(folder, STRUCTURES)


@pytest.mark.parametrize("inside", [1, 255])
def test_a_mask_may_have_any_one_value_inside(folder: Path, inside: int) -> None:
    write_nrrd(folder / "structures" / "Parotid_L.nrrd", mask_of((4, 5, 6)) * np.uint8(inside))
    assert np.argwhere(read_case(folder, STRUCTURES).labels == LEFT).tolist() == [[4, 5, 6]]


def test_a_structure_that_another_covers_is_told(folder: Path) -> None:
    write_nrrd(folder / "structures" / "Parotid_R.nrrd", mask_of((4, 5, 6), (0, 0, 0), (0, 0, 1)))
    case = read_case(folder, STRUCTURES)
    assert case.remarks == ("Parotid_L: 50% of it is drawn as another structure too, and counts as that",)


def test_two_structures_of_the_same_voxels_are_refused(folder: Path) -> None:
    write_nrrd(folder / "structures" / "Parotid_R.nrrd", mask_of((4, 5, 6), (4, 5, 7)))
    with pytest.raises(DataError, match="Parotid_L: every voxel of it is drawn as another structure too"):
        read_case(folder, STRUCTURES)


def test_hidden_files_are_no_masks_and_what_cannot_be_read_is_named(folder: Path) -> None:
    """macOS leaves ._NAME beside a file on foreign disks."""
    (folder / "structures" / "._Parotid_L.nrrd").write_bytes(b"\0\5\26\7")
    (folder / "structures" / "Parotid_R.nhdr").write_text("NRRD0005")
    case = read_case(folder, STRUCTURES)
    assert case.annotated == (True, True, False)
    assert case.unmatched == ("Parotid_R.nhdr",)


def test_two_cts_in_a_case_are_refused(folder: Path) -> None:
    write_nifti(folder / "ct.nii.gz", np.zeros(SHAPE, np.int16))
    with pytest.raises(DataError, match=r"img\.nrrd and ct\.nii\.gz: expected one CT"):
        read_case(folder, STRUCTURES)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_hounsfield_units_that_are_no_numbers_are_refused(folder: Path, value: float) -> None:
    hu = np.zeros(SHAPE, np.float32)
    hu[0, 0, 0] = value
    write_nrrd(folder / "img.nrrd", hu)
    with pytest.raises(DataError, match=r"img\.nrrd: expected finite"):
        read_case(folder, STRUCTURES)


def test_a_mask_of_another_shape_is_refused(folder: Path) -> None:
    write_nrrd(folder / "structures" / "Parotid_L.nrrd", np.zeros((6, 7, 9), np.uint8))
    with pytest.raises(DataError, match=r"Parotid_L\.nrrd: expected the CT's shape \(6, 7, 8\).*found \(6, 7, 9\)"):
        read_case(folder, STRUCTURES)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_mask_that_is_no_numbers_is_refused(folder: Path, value: float) -> None:
    mask = mask_of((1, 2, 3)).astype(np.float32)
    mask[0, 0, 0] = value
    write_nrrd(folder / "structures" / "Parotid_L.nrrd", mask)
    with pytest.raises(DataError, match=r"Parotid_L\.nrrd: .*found NaN or infinity"):
        read_case(folder, STRUCTURES)


def test_a_mask_of_another_spacing_is_refused(folder: Path) -> None:
    write_nrrd(folder / "structures" / "Parotid_L.nrrd", mask_of(), space_directions=np.diag([1.5, 1.25, 3.0]))
    with pytest.raises(DataError, match=r"Parotid_L\.nrrd: expected the CT's spacing"):
        read_case(folder, STRUCTURES)


@pytest.mark.parametrize("file", ["img.nrrd", "structures/BrainStem.nrrd"])
@pytest.mark.parametrize(
    "header",
    [
        {"space": "right-anterior-superior"},
        {"space": None},
        {"space_directions": np.diag([-1.5, 1.25, 2.5])},
        {"space_directions": np.diag([1.5, 1.25, -2.5])},
        {"space_directions": np.diag([1.5, 0.0, 2.5])},
        {"space_directions": np.array([[0.0, 1.5, 0.0], [1.25, 0.0, 0.0], [0.0, 0.0, 2.5]])},
        {"space_directions": np.array([[1.5, 0.1, 0.0], [0.0, 1.25, 0.0], [0.0, 0.0, 2.5]])},
        {"space_directions": None},
    ],
)
def test_axes_that_are_not_lps_are_refused(folder: Path, file: str, header: dict[str, object]) -> None:
    write_nrrd(folder / file, np.zeros(SHAPE, np.int16), **header)
    with pytest.raises(DataError, match=rf"{Path(file).name}: expected three axes along left-posterior-superior"):
        read_case(folder, STRUCTURES)


def test_lps_may_be_abbreviated_and_rounded(folder: Path) -> None:
    rounded = np.diag([1.5, 1.25, 2.5]) + 1e-9
    write_nrrd(folder / "img.nrrd", np.zeros(SHAPE, np.int16), space="LPS", space_directions=rounded)
    assert read_case(folder, STRUCTURES).volume.geometry.spacing == pytest.approx((1.5, 1.25, 2.5))


def test_four_axes_are_refused(folder: Path) -> None:
    nrrd.write(str(folder / "img.nrrd"), np.zeros((2, *SHAPE), np.int16), {"space": "left-posterior-superior"})
    with pytest.raises(DataError, match="expected three axes"):
        read_case(folder, STRUCTURES)


def test_no_known_structure_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"pt_1: none of Mandible, Larynx"):
        read_case(folder, ("Mandible", "Larynx"))


@pytest.mark.parametrize("damage", [b"", b"not NRRD", b"NRRD0005\n", b"NRRD0005\ntype: nonsense\n\n"])
def test_damaged_files_are_refused(folder: Path, damage: bytes) -> None:
    (folder / "img.nrrd").write_bytes(damage)
    with pytest.raises(DataError, match=r"img\.nrrd"):
        read_case(folder, STRUCTURES)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(folder: Path, kept: float) -> None:
    data = (folder / "img.nrrd").read_bytes()
    (folder / "img.nrrd").write_bytes(data[: int(kept * len(data))])
    with pytest.raises(DataError, match=r"img\.nrrd"):
        read_case(folder, STRUCTURES)


def test_changed_bytes_are_refused(folder: Path) -> None:
    data = bytearray((folder / "img.nrrd").read_bytes())
    start = data.index(b"\n\n") + 12  # behind the header of the compressed stream
    data[start : start + 8] = b"\xff" * 8
    (folder / "img.nrrd").write_bytes(data)
    with pytest.raises(DataError, match=r"img\.nrrd"):
        read_case(folder, STRUCTURES)


def test_a_missing_ct_is_refused(folder: Path) -> None:
    (folder / "img.nrrd").unlink()
    with pytest.raises(DataError, match=r"img\.nrrd"):
        read_case(folder, STRUCTURES)


def test_cases_are_found_by_name(folder: Path) -> None:
    write_nrrd(folder.parent / "pt_0" / "img.nrrd", np.zeros(SHAPE, np.int16))
    (folder.parent / "empty").mkdir()
    assert find_cases(folder.parent) == [folder.parent / "pt_0", folder]


def test_a_folder_of_masks_without_a_ct_is_a_case_that_cannot_be_read(folder: Path) -> None:
    (folder / "img.nrrd").rename(folder / "IMG.nrrd")
    assert find_cases(folder.parent) == [folder]


def test_a_hidden_folder_is_no_case(folder: Path) -> None:
    """A case that `archive` was killed at is one."""
    folder.rename(folder.with_name(".case_1.part"))
    with pytest.raises(DataError, match="no case in"):
        find_cases(folder.parent)


def test_no_case_is_refused(tmp_path: Path) -> None:
    for empty in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match=r"no case in .*: expected folders with img\.nrrd"):
            find_cases(empty)


@pytest.mark.skipif(not OPENKBP.is_dir(), reason=f"no OpenKBP data at {OPENKBP}")
def test_a_real_patient_is_anatomy() -> None:
    """Left is left, up is up: what a wrong axis order would break."""
    model = load_config("openkbp7")[0]
    case = read_case(OPENKBP / "validation" / "pt_236", model.structures)
    assert case.annotated == (True,) * len(model.structures)
    middle = {
        name: case.volume.geometry.points_from_indices(np.mean(np.argwhere(case.labels == label), axis=0)[::-1])
        for label, name in enumerate(model.structures, start=1)
    }
    assert middle["Parotid_L"][0] > middle["BrainStem"][0] > middle["Parotid_R"][0]
    assert middle["BrainStem"][1] > middle["Mandible"][1]
    assert middle["BrainStem"][2] > middle["Larynx"][2] > middle["Esophagus"][2]
    bone = case.volume.hu[case.labels == model.structures.index("Mandible") + 1]
    muscle_and_nerve = case.volume.hu[case.labels == model.structures.index("BrainStem") + 1]
    assert np.median(bone) > 200
    assert 0 < np.median(muscle_and_nerve) < 80


@pytest.mark.skipif(not OPENKBP.is_dir(), reason=f"no OpenKBP data at {OPENKBP}")
def test_a_real_patient_keeps_every_label_in_the_body_box() -> None:
    model = load_config("openkbp7")[0]
    case = read_case(OPENKBP / "validation" / "pt_236", model.structures)
    cut = cut_to_body(case)
    assert np.array_equal(np.bincount(cut.labels.ravel())[1:], np.bincount(case.labels.ravel())[1:])
    assert cut.labels.size < 0.6 * case.labels.size


def long_case(slices: int, *, contours: slice, spacing: float = 5.0) -> Case:
    """A scan of so many slices, each of its own Hounsfield units, with a brain stem on some of them."""
    geometry = VolumeGeometry((slices, 8, 8), (1.5, 1.5, spacing), (0.0, 0.0, -1000.0))
    hu = np.broadcast_to(np.arange(slices, dtype=np.int16)[:, None, None], geometry.shape).copy()
    labels = np.zeros(geometry.shape, np.uint8)
    labels[contours, 3:5, 3:5] = STEM
    return Case("long", CTVolume(hu, geometry), labels, (True, False, False))


def test_a_whole_body_is_cut_to_the_slices_around_the_contours() -> None:
    cut = cut_to_head_and_neck(long_case(300, contours=slice(200, 212)))
    margin = round(HEAD_AND_NECK_MARGIN_MM / 5)
    assert cut.volume.hu[:, 0, 0].tolist() == list(range(200 - margin, 212 + margin))
    assert cut.volume.geometry.origin == (0.0, 0.0, -1000.0 + (200 - margin) * 5)
    assert cut.labels.shape == cut.volume.hu.shape
    assert np.flatnonzero(cut.labels.any(axis=(1, 2))).tolist() == list(range(margin, margin + 12))


def test_a_stray_voxel_at_the_feet_does_not_keep_the_whole_body() -> None:
    case = long_case(300, contours=slice(200, 212))
    clean = cut_to_head_and_neck(case)
    case.labels[2, 4, 4] = STEM
    np.testing.assert_array_equal(cut_to_head_and_neck(case).labels, clean.labels)


def test_the_vertex_is_the_end() -> None:
    cut = cut_to_head_and_neck(long_case(300, contours=slice(285, 295)))
    assert cut.volume.hu[-1, 0, 0] == 299


def test_a_scan_of_head_and_neck_stays_as_it_is() -> None:
    slices = round(LONGEST_HEAD_AND_NECK_MM / 5)
    case = long_case(slices, contours=slice(slices - 3, slices))
    assert cut_to_head_and_neck(case) is case
    without = long_case(300, contours=slice(0, 0))
    assert cut_to_head_and_neck(without) is without


@pytest.mark.skipif(not OPENKBP.is_dir(), reason=f"no OpenKBP data at {OPENKBP}")
def test_a_real_patient_is_no_whole_body() -> None:
    case = read_case(OPENKBP / "validation" / "pt_236", load_config("openkbp7")[0].structures)
    assert cut_to_head_and_neck(case) is case


def test_cutting_to_the_body_keeps_places() -> None:
    case = head()
    wide = np.full((40, 96, 96), -1000, np.int16)
    wide[8:32, 24:72, 24:72] = case.volume.hu
    labels = np.zeros(wide.shape, np.uint8)
    labels[8:32, 24:72, 24:72] = case.labels
    geometry = VolumeGeometry((40, 96, 96), (1.5, 1.5, 2.5), (-70.0, 12.0, 300.0))
    cut = cut_to_body(Case("wide", CTVolume(wide, geometry), labels, case.annotated))
    start, stop = body_box(wide, in_plane_stride=1)
    assert cut.labels.shape == tuple(np.subtract(stop, start))
    assert (cut.labels > 0).sum() == (labels > 0).sum()
    for label in (LEFT, RIGHT):
        there = [
            g.points_from_indices(np.mean(np.argwhere(array == label), axis=0)[::-1])
            for g, array in ((geometry, labels), (cut.volume.geometry, cut.labels))
        ]
        np.testing.assert_allclose(there[0], there[1], atol=1e-6)
    assert (cut.volume.hu[cut.labels == LEFT] == 550).all()


Nifti: Any = nibabel.Nifti1Image  # not typed
RAS = np.diag([-1.5, -1.25, 2.5, 1.0])  # of an array (x, y, z) whose axes run to the left, back and head


def write_nifti(path: Path, array: NDArray[Any], affine: NDArray[np.float64] = RAS) -> None:
    """An array (z, y, x)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(Nifti(array.transpose(2, 1, 0), affine), path)


@pytest.fixture
def nifti(tmp_path: Path) -> Path:
    """The same case as `folder`, without masks yet."""
    write_nifti(tmp_path / "n_1" / "ct.nii.gz", np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16))
    return tmp_path / "n_1"


@pytest.mark.parametrize("layout", ["masks", "label map", "label map, one table"])
def test_nifti_is_read_as_nrrd_is(folder: Path, nifti: Path, layout: str) -> None:
    if layout == "masks":
        write_nifti(nifti / "structures" / "BrainStem.nii.gz", mask_of((1, 2, 3), (1, 2, 4)))
        write_nifti(nifti / "structures" / "LT PAROTID.nii", mask_of((4, 5, 6), (4, 5, 7)))
        write_nifti(nifti / "structures" / "Thyroid.nii.gz", mask_of((0, 0, 0)))
    else:
        labels = 7 * mask_of((1, 2, 3), (1, 2, 4)) + 3 * mask_of((4, 5, 6), (4, 5, 7)) + 9 * mask_of((0, 0, 0))
        write_nifti(nifti / "labels.nii.gz", labels)
        table = nifti.parent if "one" in layout else nifti
        # A value without a voxel is not annotated, for who would know?
        (table / "labels.toml").write_text("Brainstem = 7\nParotid_L = 3\nThyroid = 9\nParotid_R = 4\n")
    expected, case = read_case(folder, STRUCTURES), read_case(nifti, STRUCTURES)
    np.testing.assert_array_equal(case.volume.hu, expected.volume.hu)
    np.testing.assert_array_equal(case.labels, expected.labels)
    assert case.annotated == expected.annotated == (True, True, False)
    assert case.volume.geometry.spacing == pytest.approx(expected.volume.geometry.spacing)
    assert (case.unmatched, expected.unmatched) == (("Thyroid",), ())
    assert find_cases(nifti.parent) == [nifti, folder]


def test_a_departments_own_names_are_understood(nifti: Path, tmp_path: Path) -> None:
    write_nifti(nifti / "structures" / "Ohrspeichel li.nii.gz", mask_of((4, 5, 6)))
    (tmp_path / "own.toml").write_text('Parotid = ["Ohrspeichel"]\n')
    assert read_case(nifti, STRUCTURES, alias_file=tmp_path / "own.toml").annotated == (False, True, False)
    with pytest.raises(DataError, match=r"none of BrainStem.*found Ohrspeichel li"):
        read_case(nifti, STRUCTURES)


def test_two_masks_of_one_structure_are_refused(nifti: Path) -> None:
    for name in ("BrainStem", "Brain Stem"):
        write_nifti(nifti / "structures" / f"{name}.nii.gz", mask_of((1, 2, 3)))
    with pytest.raises(DataError, match="Brain Stem and BrainStem are both BrainStem; expected one"):
        read_case(nifti, STRUCTURES)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (None, "a label map without labels.toml"),
        ("BrainStem", "not TOML"),
        ('BrainStem = "1"', "whole numbers above 0"),
        ("BrainStem = 1\nLarynx = 1", "each its own"),
    ],
)
def test_a_label_map_without_a_table_is_refused(nifti: Path, table: str | None, complaint: str) -> None:
    write_nifti(nifti / "labels.nii.gz", mask_of((1, 2, 3)))
    if table:
        (nifti / "labels.toml").write_text(table)
    with pytest.raises(DataError, match=complaint):
        read_case(nifti, STRUCTURES)


def test_a_label_map_of_fractions_is_refused(nifti: Path) -> None:
    write_nifti(nifti / "labels.nii.gz", mask_of((1, 2, 3)) * np.float32(1.4))
    (nifti / "labels.toml").write_text("BrainStem = 1")
    with pytest.raises(DataError, match=r"labels\.nii\.gz: expected whole numbers"):
        read_case(nifti, STRUCTURES)


def test_a_value_that_no_table_names_is_told(nifti: Path) -> None:
    write_nifti(nifti / "labels.nii.gz", mask_of((1, 2, 3)) + 7 * mask_of((4, 5, 6)))
    (nifti / "labels.toml").write_text("BrainStem = 1")
    assert read_case(nifti, STRUCTURES).unmatched == ("value 7",)


def test_a_label_map_beside_masks_is_refused(nifti: Path) -> None:
    write_nifti(nifti / "labels.nii.gz", mask_of((1, 2, 3)))
    (nifti / "labels.toml").write_text("BrainStem = 1")
    write_nifti(nifti / "structures" / "BrainStem.nii.gz", mask_of((1, 2, 4)))
    with pytest.raises(DataError, match=r"labels\.nii\.gz and structures/: expected one of them"):
        read_case(nifti, STRUCTURES)


def test_a_mask_that_lies_elsewhere_is_refused(nifti: Path) -> None:
    moved = RAS.copy()
    moved[2, 3] = 2.5
    write_nifti(nifti / "structures" / "BrainStem.nii.gz", mask_of((1, 2, 3)), moved)
    with pytest.raises(DataError, match=r"BrainStem\.nii\.gz: expected the CT's origin .*: it lies elsewhere"):
        read_case(nifti, STRUCTURES)


def fine_case(sides: tuple[int, int, int], spacing: float, stride: int) -> Case:
    """Noise at full resolution, with two structures."""
    random = np.random.default_rng(sides)
    hu = random.integers(-1000, 1500, sides).astype(np.int16)
    labels = random.integers(0, 3, sides).astype(np.uint8)
    geometry = VolumeGeometry(sides, (spacing / stride, spacing / stride, 2.5), (-70.0, 12.0, 300.0))
    return Case("fine", CTVolume(hu, geometry), labels, (True, True))


def two_structures(stride: int) -> ModelConfig:
    return ModelConfig("two", ("BrainStem", "Larynx"), stride, (0.9, 0.9, 2.0), (1.2, 1.2, 3.0), (-250.0, 550.0))


@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("sides", [(8, 64, 64), (9, 66, 61)])
def test_a_case_at_full_resolution_is_what_the_served_graph_makes_of_it(
    sides: tuple[int, int, int], stride: int
) -> None:
    model = two_structures(stride)
    case = fine_case(sides, stride * 1.0, stride)
    coarse = at_network_resolution(case, model)
    served = ServedNetwork(AnatomyNet(model.classes), model).network_input_from_hu(torch.from_numpy(case.volume.hu))[
        0, 0
    ]
    depth, height, width = coarse.labels.shape
    expected = served[:depth, :height, :width]
    found = normalised_from_hu(torch.from_numpy(coarse.volume.hu), model.hu_window)
    assert (found - expected).abs().max() <= 0.5001 / 400  # half a HU of a window 800 HU wide, -1 to 1
    for label in (1, 2):
        share = F.avg_pool2d(torch.from_numpy(case.labels == label)[:, None].float(), stride, ceil_mode=False)[:, 0]
        inside = torch.from_numpy(coarse.labels == label)[:, : share.shape[1], : share.shape[2]]
        # Where two structures share a block evenly, the later one has it.
        assert torch.equal(inside | (share == 0.5), (share > 0.5) | (share == 0.5))


def test_a_reduced_case_stays_in_its_place() -> None:
    case = fine_case((8, 64, 64), 4.0, 4)
    labels = np.zeros_like(case.labels)
    labels[2:5, 8:24, 20:40] = 1
    coarse = at_network_resolution(replace(case, labels=labels), two_structures(4))
    assert coarse.volume.geometry.spacing == (4.0, 4.0, 2.5)
    there = [
        g.points_from_indices(np.mean(np.argwhere(array == 1), axis=0)[::-1])
        for g, array in ((case.volume.geometry, labels), (coarse.volume.geometry, coarse.labels))
    ]
    np.testing.assert_allclose(there[0], there[1], atol=1e-6)


@pytest.mark.parametrize(("stride", "spacing"), [(1, 0.7), (1, 1.7), (2, 1.6), (4, 2.73), (4, 4.0), (4, 5.42)])
def test_a_case_at_the_networks_resolution_is_left_as_it_is(stride: int, spacing: float) -> None:
    case = fine_case((8, 16, 16), spacing, 1)
    assert at_network_resolution(case, two_structures(stride)) is case


@pytest.mark.parametrize(("stride", "spacing"), [(1, 0.5), (1, 2.0), (2, 0.6), (2, 3.5), (4, 2.1), (4, 8.0), (4, 0.4)])
def test_a_spacing_near_neither_range_is_refused(stride: int, spacing: float) -> None:
    with pytest.raises(DataError, match=r"fine: .* mm in plane; expected about 0\.9 to 1\.2 mm for two"):
        at_network_resolution(fine_case((8, 16, 16), spacing, 1), two_structures(stride))


@pytest.mark.skipif(not OPENKBP.is_dir(), reason=f"no OpenKBP data at {OPENKBP}")
def test_a_real_patient_at_full_resolution_becomes_the_reduced_one() -> None:
    model = load_config("openkbp7")[0]
    reduced = read_case(OPENKBP / "validation" / "pt_236", model.structures)
    assert at_network_resolution(reduced, model) is reduced
    labels = reduced.labels.repeat(REDUCTION, axis=1).repeat(REDUCTION, axis=2)
    again = at_network_resolution(replace(reduced, volume=enlarged(reduced.volume, REDUCTION), labels=labels), model)
    np.testing.assert_array_equal(again.volume.hu, reduced.volume.hu)
    np.testing.assert_array_equal(again.labels, reduced.labels)
    np.testing.assert_allclose(again.volume.geometry.affine, reduced.volume.geometry.affine, atol=1e-9)
