"""DICOM SEG and NIfTI -> StructureSet: masks that others wrote, on a series' grid, beside structure_set.py's contours.

Nothing is resampled: a file whose voxels are not those of the CT is refused.
"""

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import SegmentationStorage

from anatomynet.client.headers import DAMAGED
from anatomynet.client.quiet import quiet_libraries
from anatomynet.client.structure_set import (
    Mask,
    StructureSet,
    check_frames_of_reference,
    read_structure_set,
    roi_from_mask,
)
from anatomynet.client.study import CTSeries
from anatomynet.client.study_files import mode_of
from anatomynet.engine.errors import StudyError

LABEL_MAP_SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"  # DICOM 2024d; pydicom has no name for it yet
SEG_CLASSES = (SegmentationStorage, LABEL_MAP_SEGMENTATION_STORAGE)
NIFTI_SUFFIXES = (".nii", ".nii.gz")
# How far the corner of a mask's voxel may lie off the CT's own, in voxels.
GRID_TOLERANCE = 0.01
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

Wanted = Callable[[str], bool]


def read_structures(path: Path, series: CTSeries, *, wanted: Wanted = lambda _: True) -> StructureSet:
    """The ROIs of an RTSTRUCT, a DICOM SEG, a NIfTI mask, or a folder of such masks, on the grid of a series.

    Args:
        path: a file, or a folder with a NIfTI mask a structure, each named after it.
        series: the CT they were drawn on.
        wanted: which ROIs to read, by name; all of them without.

    Raises:
        StudyError: a file that cannot be read, is none of these, or lies on another grid.
    """
    if stat.S_ISDIR(mode_of(path)):
        try:
            files = sorted(file for file in path.iterdir() if _is_nifti(file))
        except OSError as error:
            raise StudyError(f"{path} cannot be read: {error.strerror or error}") from error
        if not files:
            raise StudyError(f"{path} holds no NIfTI masks; expected STRUCTURE.nii.gz in it, or give an RTSTRUCT")
        return _read_nifti(files, series, wanted)
    if _is_nifti(path):
        return _read_nifti([path], series, wanted)
    if _sop_class_uid(path) in SEG_CLASSES:
        return _read_seg(path, series, wanted)
    return read_structure_set(path, series, wanted=wanted)


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(NIFTI_SUFFIXES)


def _sop_class_uid(path: Path) -> str:
    """Of a DICOM file; "" of any other, which whoever reads it will tell."""
    try:
        return str(pydicom.dcmread(path, specific_tags=["SOPClassUID"], stop_before_pixels=True).get("SOPClassUID", ""))
    except (OSError, *DAMAGED):
        return ""


def _read_seg(path: Path, series: CTSeries, wanted: Wanted) -> StructureSet:
    """A segmentation's segments (PS3.3 C.8.20), each frame on the slice at its position."""
    try:
        with quiet_libraries():
            dataset = pydicom.dcmread(path)
            _check_seg_grid(dataset, series, path)
            names = {int(s.SegmentNumber): str(s.SegmentLabel) for s in dataset.SegmentSequence}
            masks = _seg_masks(dataset, series, path, {n for n, name in names.items() if wanted(name)})
    except (RuntimeError, *DAMAGED) as error:
        raise StudyError(f"{path.name} is damaged: its segments cannot be read; export it again") from error
    rois = tuple(roi_from_mask(names[number], mask) for number, mask in masks.items())
    return StructureSet(series.geometry, rois, tuple(names.values()))


def _check_seg_grid(dataset: Dataset, series: CTSeries, path: Path) -> None:
    check_frames_of_reference({str(dataset.FrameOfReferenceUID)}, series, path)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    row_spacing, column_spacing = (float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing)
    axes = np.array(series.geometry.direction)[:, :2] * series.geometry.spacing[:2]
    theirs = cosines.T * (column_spacing, row_spacing)
    corner = np.array((series.columns, series.rows))
    same_size = (dataset.Rows, dataset.Columns) == (series.rows, series.columns)
    if not same_size or np.abs((axes - theirs) * corner).max() > GRID_TOLERANCE * min(series.geometry.spacing):
        raise _other_grid(path)


def _seg_masks(dataset: Dataset, series: CTSeries, path: Path, numbers: set[int]) -> dict[int, Mask]:
    positions = np.array([s.position for s in series.slices])
    masks = {number: np.zeros(series.geometry.shape, np.bool_) for number in sorted(numbers)}
    frames: NDArray[Any] = dataset.pixel_array.reshape(-1, series.rows, series.columns)
    label_map = dataset.SegmentationType == "LABELMAP"
    threshold = float(dataset.get("MaximumFractionalValue", 1)) / 2
    for frame, item in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        position = np.array(item.PlanePositionSequence[0].ImagePositionPatient, dtype=np.float64)
        distances = np.linalg.norm(positions - position, axis=1)
        k = int(distances.argmin())
        if distances[k] > GRID_TOLERANCE * min(series.geometry.spacing):
            raise _other_grid(path)
        if label_map:
            for number, mask in masks.items():
                mask[k] |= frame == number
        else:
            number = int(item.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
            if number in masks:
                masks[number][k] |= frame > threshold
    return masks


def _read_nifti(files: list[Path], series: CTSeries, wanted: Wanted) -> StructureSet:
    names = {file: file.name[: file.name.lower().rindex(".nii")] for file in files}
    rois = tuple(roi_from_mask(name, _nifti_mask(file, series)) for file, name in names.items() if wanted(name))
    return StructureSet(series.geometry, rois, tuple(names.values()))


def _nifti_mask(path: Path, series: CTSeries) -> Mask:
    """bool (z, y, x) on the series' grid, True where the file is not 0."""
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError
        from nibabel.wrapstruct import WrapStructError
    except ImportError as error:
        raise StudyError(f"{path.name}: NIfTI needs nibabel; pip install nibabel, or give an RTSTRUCT") from error
    try:
        image = nibabel.Nifti1Image.from_filename(path)
        values, affine = np.asarray(image.dataobj), np.asarray(image.affine)
    except (OSError, ImageFileError, HeaderDataError, WrapStructError, *DAMAGED) as error:
        raise StudyError(f"{path.name} cannot be read as NIfTI; write it again") from error
    found = np.unique(values)
    if len(found) > 2 or values.ndim != 3:
        raise StudyError(
            f"{path.name} holds {len(found)} values in {values.ndim} dimensions; expected one mask in three: "
            "write a file a structure, named after it"
        )
    return _on_series_grid(values != 0, RAS_TO_LPS @ affine, series, path)


def _on_series_grid(mask: Mask, affine: NDArray[np.float64], series: CTSeries, path: Path) -> Mask:
    """A mask (i, j, k) with its index -> LPS mm matrix, turned to the series' (z, y, x)."""
    to_series = np.linalg.inv(series.geometry.affine) @ affine
    turn = np.rint(to_series[:3, :3])
    order = np.abs(turn).argmax(axis=1)  # of the file's axes along x, y, z
    corners = np.array(np.meshgrid(*((0, side - 1) for side in mask.shape))).reshape(3, -1)
    exact = to_series[:3, :3] @ corners + to_series[:3, 3:]
    sides = np.array(series.geometry.shape[::-1])
    same = sorted(order) == [0, 1, 2] and tuple(np.array(mask.shape)[order]) == tuple(sides)
    off = np.abs(exact - np.where(np.abs(exact) < 0.5, 0, sides[:, None] - 1)).max()
    if not same or off > GRID_TOLERANCE:
        raise _other_grid(path)
    flips = [axis for axis in range(3) if turn[axis, order[axis]] < 0]
    return np.flip(mask.transpose(order), flips).transpose(2, 1, 0)


def _other_grid(path: Path) -> StudyError:
    return StudyError(
        f"{path.name} lies on another grid than the CT; expected its own voxels: export it without resampling"
    )
