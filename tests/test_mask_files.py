"""SEG and NIfTI: what highdicom and SimpleITK write is read back voxel for voxel; another grid is refused."""

import builtins
import errno
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from anatomynet.client.mask_files import read_structures
from anatomynet.client.study import CTSeries, read_ct_series
from anatomynet.engine.errors import StudyError
from tests.dicom_studies import DIRECTIONS, edit, random_volume, write_study

SHAPE = (6, 24, 28)
NAMES = ("Parotid_L", "Brain Stem")

Mask = NDArray[np.bool_]


@pytest.fixture(params=["HFS", "FFP", "sagittal"])
def series(request: pytest.FixtureRequest, tmp_path: Path) -> CTSeries:
    write_study(tmp_path / "study", random_volume(SHAPE, DIRECTIONS[request.param]))
    return read_ct_series(tmp_path / "study")


@pytest.fixture
def head_first(tmp_path: Path) -> CTSeries:
    write_study(tmp_path / "study", random_volume(SHAPE))
    return read_ct_series(tmp_path / "study")


def masks() -> dict[str, Mask]:
    """Two overlapping structures, the same in no mirror."""
    first, second = np.zeros((2, *SHAPE), np.bool_)
    first[1:4, 3:9, 4:20], first[1, 3, 4:7] = True, False
    second[2:5, 8:21, 15:26] = True
    return dict(zip(NAMES, (first, second), strict=True))


def test_what_cannot_be_looked_at_is_refused(
    tmp_path: Path, head_first: CTSeries, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StudyError, match="cannot be read: File name too long"):
        read_structures(tmp_path / ("a" * 256), head_first)

    def iterdir(self: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(StudyError, match="cannot be read: Permission denied"):
        read_structures(tmp_path, head_first)


def write_seg(path: Path, series: CTSeries, kind: str = "BINARY") -> Path:
    hd: Any = pytest.importorskip("highdicom")
    from pydicom.sr.codedict import codes

    segments = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.Organ,
            segmented_property_type=codes.SCT.Organ,
            algorithm_type="MANUAL",
        )
        for number, name in enumerate(NAMES, start=1)
    ]
    images = [pydicom.dcmread(s.path) for s in series.slices]
    pixels = np.stack(list(masks().values()), axis=-1).astype(np.uint8)
    if kind == "LABELMAP":
        pixels = np.where(pixels[..., 1], 2, pixels[..., 0]).astype(np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # highdicom's, of the study's short elements
        seg = hd.seg.Segmentation(
            source_images=images,
            pixel_array=pixels.astype(np.float32) if kind == "FRACTIONAL" else pixels,
            segmentation_type=kind,
            segment_descriptions=segments,
            series_instance_uid=hd.UID(),
            series_number=2,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="test",
            manufacturer_model_name="test",
            software_versions="1",
            device_serial_number="1",
        )
    seg.save_as(path)
    return path


def write_nifti(path: Path, series: CTSeries, mask: NDArray[Any], *, shift_mm: float = 0.0) -> Path:
    import SimpleITK

    sitk: Any = SimpleITK  # its calls are not typed
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing(series.geometry.spacing)
    image.SetOrigin([v + shift_mm for v in series.geometry.origin])
    image.SetDirection(np.array(series.geometry.direction).ravel().tolist())
    sitk.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
def test_a_segmentation_comes_back_voxel_for_voxel(tmp_path: Path, series: CTSeries, kind: str) -> None:
    found = read_structures(write_seg(tmp_path / "seg.dcm", series, kind), series)
    assert found.roi_names == NAMES
    for roi, mask in zip(found.rois, masks().values(), strict=True):
        np.testing.assert_array_equal(roi.mask(series.geometry), mask)


def test_a_label_map_segmentation_comes_back(tmp_path: Path, head_first: CTSeries) -> None:
    found = read_structures(write_seg(tmp_path / "seg.dcm", head_first, "LABELMAP"), head_first)
    first, second = masks().values()
    by_name = {roi.name: roi.mask(head_first.geometry) for roi in found.rois if roi.name in NAMES}
    np.testing.assert_array_equal(by_name[NAMES[0]], first & ~second)
    np.testing.assert_array_equal(by_name[NAMES[1]], second)


def test_only_wanted_segments_are_read(tmp_path: Path, head_first: CTSeries) -> None:
    path = write_seg(tmp_path / "seg.dcm", head_first)
    found = read_structures(path, head_first, wanted=lambda name: name == NAMES[1])
    assert [roi.name for roi in found.rois] == [NAMES[1]]


def test_a_segmentation_of_another_ct_is_refused(tmp_path: Path, head_first: CTSeries) -> None:
    path = write_seg(tmp_path / "seg.dcm", head_first)
    edit(path, FrameOfReferenceUID="1.2.3.4711")
    with pytest.raises(StudyError, match=r"seg\.dcm was drawn in frame of reference"):
        read_structures(path, head_first)


@pytest.mark.parametrize(("keyword", "value"), [("Rows", SHAPE[1] - 1), ("PixelSpacing", [3.0, 3.0])])
def test_a_segmentation_on_another_grid_is_refused(
    tmp_path: Path, head_first: CTSeries, keyword: str, value: Any
) -> None:
    path = write_seg(tmp_path / "seg.dcm", head_first)
    dataset = pydicom.dcmread(path)
    if keyword == "Rows":
        dataset.Rows = value
    else:
        dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = value
    dataset.save_as(path)
    with pytest.raises(StudyError, match=r"seg\.dcm lies on another grid"):
        read_structures(path, head_first)


def test_a_damaged_segmentation_is_refused(tmp_path: Path, head_first: CTSeries) -> None:
    path = write_seg(tmp_path / "seg.dcm", head_first)
    edit(path, PerFrameFunctionalGroupsSequence=None)
    with pytest.raises(StudyError, match=r"seg\.dcm is damaged"):
        read_structures(path, head_first)


def test_a_folder_of_nifti_masks_comes_back_voxel_for_voxel(tmp_path: Path, series: CTSeries) -> None:
    folder = tmp_path / "masks"
    folder.mkdir()
    (folder / "notes.txt").write_text("beside")
    for name, mask in masks().items():
        write_nifti(folder / f"{name}.nii.gz", series, mask)
    found = {roi.name: roi.mask(series.geometry) for roi in read_structures(folder, series).rois}
    assert found.keys() == set(NAMES)
    for name, mask in masks().items():
        np.testing.assert_array_equal(found[name], mask)


def test_a_nifti_mask_stored_along_other_axes_comes_back(tmp_path: Path, head_first: CTSeries) -> None:
    """nibabel's canonical order, R to L and P to A, against the CT's."""
    nibabel: Any = pytest.importorskip("nibabel")
    mask = masks()[NAMES[0]]
    image = nibabel.load(write_nifti(tmp_path / "lps.nii", head_first, mask))
    nibabel.save(nibabel.as_closest_canonical(image), tmp_path / "Parotid_L.nii")
    (roi,) = read_structures(tmp_path / "Parotid_L.nii", head_first).rois
    assert roi.name == "Parotid_L"
    np.testing.assert_array_equal(roi.mask(head_first.geometry), mask)


def test_a_nifti_mask_on_another_grid_is_refused(tmp_path: Path, series: CTSeries) -> None:
    mask = masks()[NAMES[0]]
    for name, wrong in (
        ("shifted", write_nifti(tmp_path / "shifted.nii", series, mask, shift_mm=0.5)),
        ("smaller", write_nifti(tmp_path / "smaller.nii", series, mask[:-1])),
    ):
        with pytest.raises(StudyError, match=rf"{name}\.nii lies on another grid"):
            read_structures(wrong, series)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("sform", "its sform and qform place voxels up to 52 mm apart"),
        ("units", "expected lengths in mm, found meter"),
        ("nan", r"origin .*nan"),
    ],
)
def test_a_nifti_mask_that_may_lie_elsewhere_is_refused(
    tmp_path: Path, head_first: CTSeries, change: str, complaint: str
) -> None:
    nibabel: Any = pytest.importorskip("nibabel")
    image = nibabel.load(write_nifti(tmp_path / "whole.nii", head_first, masks()[NAMES[0]]))
    affine = image.affine.copy()
    if change == "sform":
        affine[2, 3] += 52
        image.set_qform(affine, code=1)
    elif change == "units":
        image.header.set_xyzt_units("meter")
    else:
        affine[2, 3] = np.nan
        image.set_qform(None, code=0)
        image.set_sform(affine, code=1)
    nibabel.save(image, tmp_path / "Parotid_L.nii")
    with pytest.raises(StudyError, match=rf"Parotid_L\.nii: .*{complaint}"):
        read_structures(tmp_path / "Parotid_L.nii", head_first)


def test_a_nifti_label_map_is_refused(tmp_path: Path, head_first: CTSeries) -> None:
    first, second = masks().values()
    path = write_nifti(tmp_path / "labels.nii", head_first, first.astype(np.uint8) + second)
    with pytest.raises(StudyError, match=r"labels\.nii holds 3 values; expected one mask"):
        read_structures(path, head_first)


def test_what_is_no_nifti_is_refused(tmp_path: Path, head_first: CTSeries) -> None:
    (tmp_path / "text.nii").write_text("not NIfTI")
    with pytest.raises(StudyError, match=r"text\.nii is not a readable NIfTI file"):
        read_structures(tmp_path / "text.nii", head_first)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match="holds no NIfTI masks"):
        read_structures(tmp_path / "empty", head_first)


def test_nifti_without_nibabel_says_what_to_install(
    tmp_path: Path, head_first: CTSeries, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_nifti(tmp_path / "Larynx.nii", head_first, masks()[NAMES[0]])
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "nibabel":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(StudyError, match=r"pip install 'anatomynet\[formats\]'"):
        read_structures(path, head_first)


def test_other_files_are_told_by_the_reader_of_rtstructs(tmp_path: Path, head_first: CTSeries) -> None:
    with pytest.raises(StudyError, match=r"none\.dcm cannot be read"):
        read_structures(tmp_path / "none.dcm", head_first)
    with pytest.raises(StudyError, match="is a CT Image Storage"):
        read_structures(head_first.slices[0].path, head_first)
