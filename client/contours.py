"""LabelMap -> closed polygons, slice by slice: the step before the RTSTRUCT.

Marching squares at level 0.5: a contour runs half-way between the voxel centres inside and those outside, so it never
touches a centre, and whatever reads it back at the centres finds the label map again, voxel for voxel. Voxels that
touch by a corner are one island. A polygon's area falls short of its voxels' by half a voxel, however large it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from anatomynet.client.thinning import thinned_cycles
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.structures import Structure
from anatomynet.engine.volume import LabelMap

# A cell has the centres of 2 x 2 voxels as its corners: 1 upper left, 2 upper right, 4 lower right, 8 lower left, set
# where inside. Its sides are 0 top, 1 right, 2 bottom, 3 left. A contour crosses it from side to side with the inside
# on its right; where two opposite corners are inside it crosses twice, and the second crossing stands apart.
CROSSINGS = {
    1: (0, 3), 2: (1, 0), 4: (2, 1), 8: (3, 2),
    3: (1, 3), 6: (2, 0), 12: (3, 1), 9: (0, 2),
    7: (2, 3), 11: (1, 2), 13: (0, 1), 14: (3, 0),
    5: (0, 1), 10: (3, 0),
}  # fmt: skip
SECOND_CROSSINGS = {5: (2, 3), 10: (1, 2)}
# Middle of each side from the cell's upper left corner, in half voxels.
SIDE_X, SIDE_Y = np.array([1, 2, 1, 0]), np.array([0, 1, 2, 1])

# No contour comes nearer to a centre than sqrt(1/8) of a voxel's smaller side: thinned by less, it passes none.
EXACT_TOLERANCE_SHARE = 0.35

HalfVoxel = tuple[int, int]
Cycle = list[HalfVoxel]


@dataclass(frozen=True, eq=False)
class Contour:
    """One closed polygon on one slice.

    Attributes:
        slice_index: z of the label map.
        points: float64 (n, 2), n >= 3: continuous indices (x, y), whole numbers at voxel centres; the last point joins
            the first. Holes are reached by keyholes: a cut of no width, there and back.
    """

    slice_index: int
    points: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class StructureContours:
    """All contours of one structure that was found.

    Attributes:
        structure: what they outline.
        contours: by slice, at least one.
        geometry: of the label map they were traced on.
    """

    structure: Structure
    contours: tuple[Contour, ...]
    geometry: VolumeGeometry


def trace_contours(label_map: LabelMap, *, tolerance_mm: float = 0.0) -> tuple[StructureContours, ...]:
    """Outline every structure of a label map, in the map's own order; one that is absent is left out.

    Args:
        label_map: what to outline.
        tolerance_mm: how far a thinned contour may run beside the full one; less where it would cross itself or
            another. 0 keeps every point that cannot be dropped without moving the contour.
    """
    corner, labels = _occupied(label_map.labels)
    spacing = label_map.geometry.spacing[:2]
    found = []
    for label, structure in enumerate(label_map.structures, start=1):
        start, mask = _occupied(labels == label)
        if mask.size:
            offset = np.add(corner, start)
            contours = tuple(
                Contour(int(offset[0]) + z, points / 2 - 1 + offset[:0:-1])
                for z, points in _closed_paths(mask, spacing, tolerance_mm)
            )
            found.append(StructureContours(structure, contours, label_map.geometry))
    return tuple(found)


def exact_tolerance_mm(geometry: VolumeGeometry) -> float:
    """The largest tolerance at which no centre changes sides: what is read back is the label map still."""
    return EXACT_TOLERANCE_SHARE * min(geometry.spacing[:2])


def _occupied(array: NDArray[np.generic]) -> tuple[NDArray[np.intp], NDArray[np.generic]]:
    """The box (z, y, x) of what is not zero: its first corner and its contents; empty where there is nothing."""
    in_plane = array.any(axis=0)
    sides = [array.any(axis=(1, 2)), in_plane.any(axis=1), in_plane.any(axis=0)]
    if not in_plane.any():
        return np.zeros(3, np.intp), array[:0]
    ranges = [np.flatnonzero(side)[[0, -1]] for side in sides]
    box = tuple(slice(int(first), int(last) + 1) for first, last in ranges)
    return np.array([first for first, _ in ranges]), array[box]


def _closed_paths(
    mask: NDArray[np.generic], spacing: tuple[float, float], tolerance_mm: float
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Outlines of bool (z, y, x): the slice, and points (x, y) in half voxels from a voxel outside its corner."""
    inside = np.pad(mask.astype(np.uint8), ((0, 0), (1, 1), (1, 1)))
    slices = [(z, _join_holes(cycles, inside[z])) for z, cycles in _cycles_by_slice(inside)]
    if tolerance_mm > 0:
        half_voxel = (spacing[0] / 2, spacing[1] / 2)
        # Parts of a contour that are no neighbours lie twice as far apart as that: they cannot meet.
        safe = tolerance_mm <= EXACT_TOLERANCE_SHARE * min(spacing)
        yield from thinned_cycles(slices, half_voxel=half_voxel, tolerance_mm=tolerance_mm, safe=safe)
        return
    for z, cycles in slices:
        for cycle in cycles:
            yield z, _without_straight_points(np.array(cycle))


def _cycles_by_slice(inside: NDArray[np.uint8]) -> Iterator[tuple[int, list[Cycle]]]:
    """Marching squares over all slices of (z, y, x) at once: closed paths, in half voxels (x, y), of each slice.

    Each path starts at its highest point.
    """
    _, height, width = inside.shape
    from_id, to_id = _crossings(inside)
    order = np.argsort(from_id)
    from_id, to_id = from_id[order], to_id[order]
    following = np.searchsorted(from_id, to_id).tolist()
    row, x = np.divmod(from_id, 2 * width)
    z, y = np.divmod(row, 2 * height)
    points = list(zip(x.tolist(), y.tolist(), strict=True))
    first_of_slice = np.searchsorted(z, np.arange(len(inside) + 1)).tolist()
    seen = bytearray(len(points))
    for k, (start, stop) in enumerate(pairwise(first_of_slice)):
        cycles = []
        for first in range(start, stop):
            cycle, i = [], first
            while not seen[i]:
                seen[i] = 1
                cycle.append(points[i])
                i = following[i]
            if cycle:
                cycles.append(cycle)
        yield k, cycles


def _crossings(inside: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where contours enter and leave each cell, as numbers of half-voxel points: (z 2 height + y) 2 width + x."""
    _, height, width = inside.shape
    left, right = inside[:, :, :-1], inside[:, :, 1:]
    corners = left[:, :-1] | right[:, :-1] << 1 | right[:, 1:] << 2 | left[:, 1:] << 3
    z, y, x = np.nonzero((corners != 0) & (corners != 15))
    case = corners[z, y, x]
    origin = (z * 2 * height + 2 * y) * 2 * width + 2 * x
    side = SIDE_Y * 2 * width + SIDE_X
    from_side, to_side = _sides(CROSSINGS)
    twice = np.isin(case, list(SECOND_CROSSINGS))
    second_from, second_to = _sides(SECOND_CROSSINGS)
    again = case[twice]
    from_id = np.concatenate([origin + side[from_side[case]], origin[twice] + side[second_from[again]]])
    to_id = np.concatenate([origin + side[to_side[case]], origin[twice] + side[second_to[again]]])
    return from_id, to_id


def _sides(crossings: dict[int, tuple[int, int]]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    table = np.zeros((2, 16), np.intp)
    for case, sides in crossings.items():
        table[:, case] = sides
    return table[0], table[1]


def _join_holes(cycles: list[Cycle], inside: NDArray[np.uint8]) -> list[Cycle]:
    """Outer paths only: a cut leads from each hole upwards, between two columns of voxel centres, to what is above."""
    # With the inside on its right, a path leaves its highest point to the right, unless it goes around a hole.
    outer = [cycle for cycle in cycles if cycle[1] > cycle[0]]
    # From the top down: what a cut meets is an outer path, or a hole that has been joined.
    holes = sorted((_from_highest_side(cycle) for cycle in cycles if cycle[1] < cycle[0]), key=lambda hole: hole[0][1])
    owner = {point: cycle for cycle in (*outer, *holes) for point in cycle} if holes else {}
    for hole in holes:
        meeting, before = _point_above(hole[0], inside)
        joined = owner[before]
        at = joined.index(before) + 1
        joined[at:at] = [*([meeting] if meeting != before else []), *hole, hole[0], meeting]
        owner.update(dict.fromkeys(hole, joined))
    return outer


def _from_highest_side(hole: Cycle) -> Cycle:
    """The path from its highest point that lies between two columns, that is, at an odd x."""
    start = min((y, x, i) for i, (x, y) in enumerate(hole) if x % 2)[2]
    return hole[start:] + hole[:start]


def _point_above(point: HalfVoxel, inside: NDArray[np.uint8]) -> tuple[HalfVoxel, HalfVoxel]:
    """Where a line straight up first meets a contour, and the contour's own point at or just before that place."""
    x, y = point
    column = x // 2
    row = next(r for r in range(y // 2 - 1, -1, -1) if not inside[r, column : column + 2].all())
    if inside[row, column] != inside[row, column + 1]:
        return (x, 2 * row), (x, 2 * row)
    # The middle of a level stretch, which runs to the right where the inside is below.
    return (x, 2 * row + 1), (x - 1, 2 * row + 1)


def _without_straight_points(points: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same closed path without the points at which it goes straight on; a cut's turning points stay."""
    ahead = np.roll(points, -1, axis=0) - points
    behind = np.roll(ahead, 1, axis=0)
    turn = behind[:, 0] * ahead[:, 1] - behind[:, 1] * ahead[:, 0]
    back = (behind * ahead).sum(axis=1) < 0
    kept: NDArray[np.int64] = points[(turn != 0) | back]
    return kept
