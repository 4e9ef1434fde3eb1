"""RTSTRUCT -> masks on a series' grid: the way back from contours, to compare them with others.

A voxel belongs to an ROI where its centre lies inside its contours, or on one (PS3.3 C.8.8.6.3). Contours of one slice
are taken together by the even-odd rule: a keyhole leaves its hole, and so does a contour inside another, as planning
systems write and read them. Two that overlap otherwise are refused: what both hold, the rule would leave out.

Contours that run through the centres of border voxels thus give back all of the mask that they were traced from;
plastimatch leaves those centres out (against such masks DSC 0.94 to 1.0 here, and 0.08 to 0.72 there).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import UID, RTStructureSetStorage

from anatomynet.client.contours import Contour
from anatomynet.client.headers import DAMAGED, uid_tail
from anatomynet.client.quiet import quiet_libraries
from anatomynet.client.study import CTSeries
from anatomynet.engine.errors import StudyError
from anatomynet.engine.geometry import Index, VolumeGeometry
from anatomynet.engine.metrics import common_box

# A contour this share of the slice spacing off its slice still belongs to it: positions are often cut to 0.1 mm.
OFF_SLICE_SHARE = 0.2
# A centre this near to a contour, in voxels, lies on it: points are often cut to 0.01 mm.
ON_CONTOUR = 0.005
# Of the smaller of two contours: less in common with the other is the rounding of neighbours' points, and less outside
# it that of a hole's.
OVERLAP = 0.02
# Of the outer one's border: a hole that leaves less of it is the same contour drawn twice.
THINNEST_WALL = 0.25
PAIRS_AT_ONCE = 32  # of contours; each takes some copies of the part of the slice that they lie on

CLOSED_TYPES = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
Colour = tuple[int, int, int]
Mask = NDArray[np.bool_]
PointsMm = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Roi:
    """One region of interest of a file.

    Attributes:
        name: as the file gives it.
        colour: red, green, blue, 0 to 255; None where the file gives none.
        start: (z, y, x) of `box` on the series' grid.
        box: bool (z, y, x), True inside; of no voxel where the ROI is empty.
        problem: why the ROI could not be drawn, "" where it could; `box` is empty then.
    """

    name: str
    colour: Colour | None
    start: Index
    box: Mask
    problem: str = ""

    def mask(self, geometry: VolumeGeometry) -> Mask:
        """bool (z, y, x) on the whole grid."""
        whole = np.zeros(geometry.shape, np.bool_)
        whole[tuple(slice(a, a + n) for a, n in zip(self.start, self.box.shape, strict=True))] = self.box
        return whole


@dataclass(frozen=True, eq=False)
class StructureSet:
    """The ROIs of one file on a series' grid.

    Attributes:
        geometry: of the series.
        rois: those that were wanted, in the file's order.
        roi_names: of all in the file.
    """

    geometry: VolumeGeometry
    rois: tuple[Roi, ...]
    roi_names: tuple[str, ...]


def read_structure_set(path: Path, series: CTSeries, *, wanted: Callable[[str], bool] = lambda _: True) -> StructureSet:
    """Draws the ROIs of an RTSTRUCT on the grid of the series they were drawn on.

    Each contour is placed on the slice whose position it has. Points are passed over. An ROI with open contours, with
    contours between slices, outside the scan or over one another, has a `problem` and no voxels.

    Args:
        path: of the RTSTRUCT.
        series: the CT.
        wanted: which ROIs to draw, by name; all of them without.

    Raises:
        StudyError: a file that cannot be read, is no RTSTRUCT, was drawn in another frame of reference, or gives two
            ROIs one number.
    """
    dataset = _read_rtstruct(path)
    try:
        _check_numbers(dataset, path)
        names = {int(item.ROINumber): str(item.get("ROIName", "")) for item in dataset.StructureSetROISequence}
        check_frames_of_reference(_frames_of_reference(dataset), series, path)
        contours = {int(item.ReferencedROINumber): item for item in dataset.get("ROIContourSequence") or ()}
        rois = [_roi(name, contours.get(n, Dataset()), series) for n, name in names.items() if wanted(name)]
    except DAMAGED as error:
        raise StudyError(f"{path.name} is damaged: its contours cannot be read; export it again") from error
    return StructureSet(series.geometry, tuple(rois), tuple(names.values()))


def roi_from_mask(name: str, mask: Mask) -> Roi:
    """The ROI of a mask (z, y, x) on a series' grid."""
    z, y, x = common_box(mask, mask)
    return Roi(name, None, (z.start, y.start, x.start), mask[z, y, x].copy())


def fill_contours(polygons: Sequence[Contour], shape: Index) -> tuple[Index, Mask]:
    """The voxels whose centres lie inside closed polygons, or on one, by the even-odd rule in each slice.

    Args:
        polygons: of one ROI; one that is there twice counts once. What lies outside the grid is cut off.
        shape: of the grid (z, y, x).

    Returns:
        start: (z, y, x) of the box.
        box: bool (z, y, x), True inside; as small as it can be, of no voxel where no polygon has any.
    """
    return _filled([p for p in _without_repetitions(polygons) if len(p.points) >= 3], shape)


def _filled(polygons: Sequence[Contour], shape: Index) -> tuple[Index, Mask]:
    """What `fill_contours` gives of polygons of which none is there twice."""
    bounds = _bounds(polygons, shape)
    if bounds is None:
        return (0, 0, 0), np.zeros((0, 0, 0), np.bool_)
    start, stop = bounds
    depth, height, width = (b - a for a, b in zip(start, stop, strict=True))
    # +1 where a span of a row begins, -1 behind its end; spans that touch or overlap join.
    steps = np.zeros((depth * height, width + 1), np.int16)
    edges = _edges(polygons, start)
    # Lines just above and just below the centres: whatever contour runs along them is met by one.
    for offset in (-ON_CONTOUR, ON_CONTOUR):
        row, left, right = _spans(edges, offset, height=height)
        first = np.ceil(left - ON_CONTOUR).clip(0, width).astype(np.intp)
        behind = (np.floor(right + ON_CONTOUR) + 1).clip(0, width).astype(np.intp)
        real = first < behind
        np.add.at(steps, (row[real], first[real]), 1)
        np.add.at(steps, (row[real], behind[real]), -1)
    np.add.accumulate(steps, axis=1, out=steps)
    filled = (steps[:, :-1] > 0).reshape(depth, height, width)
    z, y, x = common_box(filled, filled)
    return (start[0] + z.start, start[1] + y.start, start[2] + x.start), filled[z, y, x]


def _read_rtstruct(path: Path) -> Dataset:
    try:
        with quiet_libraries():
            dataset = pydicom.dcmread(path)
            found = dataset.get("SOPClassUID", UID(""))
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror or error}") from error
    except DAMAGED as error:
        raise StudyError(f"{path.name} is no DICOM file, or damaged; expected an RT Structure Set") from error
    if found != RTStructureSetStorage:
        raise StudyError(f"{path.name} is a {found.name or 'file of unknown kind'}; expected an RT Structure Set")
    return dataset


def check_frames_of_reference(frames: set[str], series: CTSeries, path: Path) -> None:
    """Points and masks mean nothing in another frame of reference (PS3.3 C.7.4.1).

    Raises:
        StudyError: a frame of reference that is not the series', or none.
    """
    other = sorted(frames - {series.frame_of_reference_uid, ""})
    if other or not any(frames):
        found = uid_tail(other[0]) if other else "none"
        raise StudyError(
            f"{path.name} was drawn in frame of reference {found}; expected that of the CT, "
            f"{uid_tail(series.frame_of_reference_uid)}: export both together"
        )


def _frames_of_reference(dataset: Dataset) -> set[str]:
    frames = {str(item.get("ReferencedFrameOfReferenceUID", "")) for item in dataset.StructureSetROISequence}
    referenced = dataset.get("ReferencedFrameOfReferenceSequence") or ()
    return frames | {str(item.get("FrameOfReferenceUID", "")) for item in referenced}


def _check_numbers(dataset: Dataset, path: Path) -> None:
    """A number is all that binds contours to a name."""
    rois = [int(item.ROINumber) for item in dataset.StructureSetROISequence]
    drawn = [int(item.ReferencedROINumber) for item in dataset.get("ROIContourSequence") or ()]
    for keyword, numbers in (("ROINumber", rois), ("ReferencedROINumber", drawn)):
        twice = sorted({n for n in numbers if numbers.count(n) > 1})
        if twice:
            raise StudyError(
                f"{path.name}: two ROIs have {keyword} {twice[0]}: which contours are whose? Export it again"
            )


def _roi(name: str, item: Dataset, series: CTSeries) -> Roi:
    colour = _colour(item)
    empty = np.zeros((0, 0, 0), np.bool_)
    polygons, problem = _polygons(item, series)
    if problem:
        return Roi(name, colour, (0, 0, 0), empty, problem)
    shape = series.geometry.shape
    if polygons and _bounds(polygons, shape) is None:
        return Roi(name, colour, (0, 0, 0), empty, "it lies outside this CT")
    start, box = fill_contours(polygons, shape)
    return Roi(name, colour, start, box)


def _colour(item: Dataset) -> Colour | None:
    values = [int(v) for v in item.get("ROIDisplayColor") or ()]
    return (values[0], values[1], values[2]) if len(values) == 3 else None


def _polygons(item: Dataset, series: CTSeries) -> tuple[list[Contour], str]:
    """The closed contours of an ROI on their slices, and what is wrong with them, if anything."""
    contours = [(c.get("ContourGeometricType", ""), c) for c in item.get("ContourSequence") or ()]
    open_count = sum(kind.startswith("OPEN") for kind, _ in contours)
    if open_count:
        return [], f"{open_count} of {len(contours)} contours are open; expected closed ones"
    strange = sum(kind not in (*CLOSED_TYPES, "POINT") for kind, _ in contours)
    if strange:
        return [], f"{strange} of {len(contours)} contours are of no known type; expected {CLOSED_TYPES[0]}"
    closed = [_contour_points(c) for kind, c in contours if kind in CLOSED_TYPES]
    if contours and not closed:
        return [], f"{len(contours)} points, and no contour"
    positions = np.array([s.position for s in series.slices])
    placed = [_placed(points, positions, series.geometry) for points in closed if len(points) >= 3]
    off = placed.count(None)
    if off:
        return [], f"{off} of {len(closed)} contours do not lie on a slice of this CT"
    polygons = [polygon for polygon in placed if polygon is not None]
    # Of contours marked XOR, what two of them hold is meant to be outside (PS3.3 C.8.8.6.3).
    k = None if any(kind == CLOSED_TYPES[1] for kind, _ in contours) else _overlap(polygons, series.geometry.shape)
    if k is not None:
        return [], f"contours of slice {k + 1} overlap, or one is there twice: unite them, and export it again"
    return polygons, ""


def _contour_points(contour: Dataset) -> PointsMm:
    """LPS mm (n, 3)."""
    raw = contour.get_item("ContourData")
    text = raw.value if raw is not None and raw.value else b""
    # From the bytes: pydicom would make an object of every number.
    points: PointsMm = np.array(text.split(b"\\") if text else [], dtype=np.bytes_).astype(np.float64).reshape(-1, 3)
    if not np.isfinite(points).all():
        raise ValueError("a coordinate is not finite")
    return points


def _placed(points: PointsMm, positions: PointsMm, geometry: VolumeGeometry) -> Contour | None:
    """The contour on the slice, of those at `positions`, that it lies in; None where it lies in none."""
    direction, spacing = np.array(geometry.direction), geometry.spacing
    heights = points @ direction[:, 2]
    k = int(np.argmin(np.abs(positions @ direction[:, 2] - heights.mean())))
    if np.abs(heights - positions[k] @ direction[:, 2]).max() > OFF_SLICE_SHARE * spacing[2]:
        return None
    return Contour(k, (points - positions[k]) @ direction[:, :2] / spacing[:2])


def _without_repetitions(polygons: Sequence[Contour]) -> list[Contour]:
    """Each polygon once: by the even-odd rule a second copy would wipe out the first, wherever it begins."""
    return list({(p.slice_index, np.unique(p.points, axis=0).tobytes()): p for p in polygons}.values())


def _overlap(polygons: Sequence[Contour], shape: Index) -> int | None:
    """The first slice on which two contours share voxels though neither is a hole in the other; None without one."""
    of_slice: dict[int, list[PointsMm]] = {}
    for polygon in _without_repetitions(polygons):
        of_slice.setdefault(polygon.slice_index, []).append(polygon.points)
    return next((k for k, contours in sorted(of_slice.items()) if _any_overlap(contours, shape)), None)


def _any_overlap(contours: Sequence[PointsMm], shape: Index) -> bool:
    """Of the contours of one slice, (n, 2) each: whether even-odd makes of two of them what nobody can have meant."""
    low, high = (np.array([extreme(points, axis=0) for points in contours]) for extreme in (np.min, np.max))
    # What lies on the grid, a voxel wider.
    first = np.floor(low).clip(0) - 1
    sides = (np.ceil(high).clip(max=(shape[2] - 1, shape[1] - 1)) - first + 2).clip(0).astype(int)
    order = np.argsort(sides.prod(axis=1))
    low, high = low[order], high[order]
    near = np.argwhere(np.triu((np.maximum(low[:, None], low) < np.minimum(high[:, None], high)).all(axis=2), k=1))
    near = order[near]  # the smaller one of each pair first
    for n in range(0, len(near), PAIRS_AT_ONCE):
        some = near[n : n + PAIRS_AT_ONCE]
        width, height = sides[some[:, 0]].max(axis=0).tolist()
        if _overlapping([(contours[i] - first[i], contours[j] - first[i]) for i, j in some], height, width):
            return True
    return False


def _overlapping(pairs: Sequence[tuple[PointsMm, PointsMm]], height: int, width: int) -> bool:
    """Whether any pair is neither apart nor a hole, with a wall around it, in the other; seen in the first's box."""
    geometry = VolumeGeometry((len(pairs), max(1, height), max(1, width)), (1.0, 1.0, 1.0))  # a slice each

    def areas(*sides: int) -> Mask:
        drawn = [Contour(n, pair[side]) for n, pair in enumerate(pairs) for side in sides]
        return Roi("", None, *_filled(drawn, geometry.shape)).mask(geometry)

    inner, outer = areas(0), areas(1)
    shared = np.count_nonzero(inner & outer & ~areas(0, 1), axis=(1, 2))
    share = shared / np.count_nonzero(inner, axis=(1, 2)).clip(1)
    twice = np.count_nonzero(outer, axis=(1, 2)) - shared < THINNEST_WALL * _border_voxels(outer)
    return bool(((share > OVERLAP) & ((share < 1 - OVERLAP) | twice)).any())


def _border_voxels(areas: Mask) -> NDArray[np.intp]:
    """Of each area (n, y, x), the voxels that have a neighbour outside it."""
    padded = np.pad(areas, ((0, 0), (1, 1), (1, 1)))
    beside = padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    border: NDArray[np.intp] = np.count_nonzero(areas & ~beside, axis=(1, 2))
    return border


def _bounds(polygons: Sequence[Contour], shape: Index) -> tuple[Index, Index] | None:
    """The box of the grid that holds all polygons, start and stop (z, y, x)."""
    if not polygons:
        return None
    slices = [p.slice_index for p in polygons]
    low = np.floor(np.min([p.points.min(axis=0) for p in polygons], axis=0)).astype(int)
    high = np.ceil(np.max([p.points.max(axis=0) for p in polygons], axis=0)).astype(int)
    start = (max(0, min(slices)), max(0, int(low[1])), max(0, int(low[0])))
    stop = tuple(min(n, int(b) + 1) for n, b in zip(shape, (max(slices), high[1], high[0]), strict=True))
    return (start, (stop[0], stop[1], stop[2])) if all(a < b for a, b in zip(start, stop, strict=True)) else None


def _edges(polygons: Sequence[Contour], start: Index) -> NDArray[np.float64]:
    """All edges (n, 5) as z, x, y of the upper end, x, y of the lower end, counted from the box's start."""
    from_points = np.concatenate([p.points for p in polygons]) - start[:0:-1]
    to_points = np.concatenate([np.roll(p.points, -1, axis=0) for p in polygons]) - start[:0:-1]
    z = np.repeat([p.slice_index - start[0] for p in polygons], [len(p.points) for p in polygons])
    # Always from above: an edge that is passed there and back, as a keyhole's cut is, must cross twice at one place.
    down = from_points[:, 1] <= to_points[:, 1]
    upper = np.where(down[:, None], from_points, to_points)
    lower = np.where(down[:, None], to_points, from_points)
    return np.column_stack((z, upper, lower))


def _spans(
    edges: NDArray[np.float64], offset: float, *, height: int
) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
    """Where lines `offset` below the rows' centres are inside: row (z height + y), first and last x of each stretch."""
    z, upper_x, upper_y, lower_x, lower_y = edges.T
    first = np.ceil(upper_y - offset).clip(0, height).astype(np.intp)
    count = np.ceil(lower_y - offset).clip(0, height).astype(np.intp) - first
    edge = np.repeat(np.arange(len(edges)), count)
    y = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    slope = (lower_x - upper_x)[edge] / (lower_y - upper_y)[edge]
    x = upper_x[edge] + (y + offset - upper_y[edge]) * slope
    row = z[edge].astype(np.intp) * height + y
    order = np.lexsort((x, row))
    # A line meets a closed polygon an even number of times.
    return row[order][::2], x[order][::2], x[order][1::2]
