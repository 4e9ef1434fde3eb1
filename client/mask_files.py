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
from anatomynet.engine.errors import DataError, StudyError
from anatomynet.engine.preprocess import array_from_canonical
from anatomynet.engine.volume_files import read_volume

LABEL_MAP_SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"  # DICOM 2024d; pydicom has no name for it yet
SEG_CLASSES = (SegmentationStorage, LABEL_MAP_SEGMENTATION_STORAGE)
NIFTI_SUFFIXES = (".nii", ".nii.gz")
# How far the corner of a mask's voxel may lie off the CT's own, in voxels.
GRID_TOLERANCE = 0.01

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
        values, geometry = read_volume(path)
    except DataError as error:
        raise StudyError(str(error)) from error
    found = len(np.unique(values))
    if found > 2:
        raise StudyError(
            f"{path.name} holds {found} values; expected one mask: write a file a structure, named after it"
        )
    grid = series.geometry.canonical()
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(grid.shape[::-1]) - 1)
    off = np.abs(grid.indices_from_points(geometry.points_from_indices(corners)) - corners).max()
    if geometry.shape != grid.shape or not off <= GRID_TOLERANCE:
        raise _other_grid(path)
    return array_from_canonical(values != 0, series.geometry)


def _other_grid(path: Path) -> StudyError:
    return StudyError(
        f"{path.name} lies on another grid than the CT; expected its own voxels: export it without resampling"
    )
