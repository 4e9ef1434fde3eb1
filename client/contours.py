"""LabelMap -> closed polygons, slice by slice: the step before the RTSTRUCT.

Marching squares at level 0.5: a contour runs half-way between the voxel centres inside and those outside, so it never
touches a centre, and whatever reads it back at the centres finds the label map again, voxel for voxel. Voxels that
touch by a corner are one island. A polygon's area falls short of its voxels' by half a voxel, however large it is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

from anatomynet.client.paths import Paths, paths_of
from anatomynet.client.thinning import thinned_paths
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.structure_region import StructureRegion, regions_from_label_map
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
    regions = regions_from_label_map(label_map)
    return contours_of_regions(regions, label_map.geometry, tolerance_mm=tolerance_mm)


def contours_of_regions(
    regions: Sequence[StructureRegion], geometry: VolumeGeometry, *, tolerance_mm: float = 0.0
) -> tuple[StructureContours, ...]:
    """What `trace_contours` gives, of a label map's regions: for whoever has these already.

    Args:
        regions: of our structures; those of no voxel are left out.
        geometry: of the grid that they lie on.
        tolerance_mm: as above.
    """
    drawn = [(region.structure, region) for region in regions if region.structure and region.voxels]
    if not drawn:
        return ()
    # The planes of all structures one after another: their contours are followed and thinned at once.
    first_plane = np.cumsum([0, *(len(region.box) for _, region in drawn)])
    paths = _thinned(_closed_paths([region.box for _, region in drawn]), geometry.spacing[:2], tolerance_mm)
    owner = np.searchsorted(first_plane, paths.planes, side="right") - 1
    corner = np.array([region.start for _, region in drawn])[owner]
    slices = paths.planes - first_plane[owner] + corner[:, 0]
    points = paths.points / 2 - 1 + np.repeat(corner[:, :0:-1], paths.lengths, axis=0)
    contours = [
        Contour(z, points[start:stop])
        for z, (start, stop) in zip(slices.tolist(), pairwise(paths.bounds.tolist()), strict=True)
    ]
    bounds = np.searchsorted(owner, np.arange(len(drawn) + 1)).tolist()
    return tuple(
        StructureContours(structure, tuple(contours[start:stop]), geometry)
        for (structure, _), (start, stop) in zip(drawn, pairwise(bounds), strict=True)
    )


def exact_tolerance_mm(geometry: VolumeGeometry) -> float:
    """The largest tolerance at which no centre changes sides: what is read back is the label map still."""
    return EXACT_TOLERANCE_SHARE * min(geometry.spacing[:2])


def _thinned(paths: Paths, spacing: tuple[float, float], tolerance_mm: float) -> Paths:
    if tolerance_mm > 0:
        # Parts of a contour that are no neighbours lie twice as far apart as that: they cannot meet.
        safe = tolerance_mm <= EXACT_TOLERANCE_SHARE * min(spacing)
        half_voxel = (spacing[0] / 2, spacing[1] / 2)
        return thinned_paths(paths, half_voxel=half_voxel, tolerance_mm=tolerance_mm, safe=safe)
    return paths.only(_turns(paths))


def _closed_paths(masks: Sequence[NDArray[np.bool_]]) -> Paths:
    """Outlines of masks (z, y, x), one after another: points (x, y) in half voxels from a voxel outside their corner.

    Planes are numbered through all masks.
    """
    cycles = _cycles(masks)
    first = cycles.points[cycles.bounds[:-1]]
    second = cycles.points[cycles.bounds[:-1] + 1]
    # With the inside on its right, a path leaves its highest point to the right, unless it goes around a hole.
    with_holes = set(cycles.planes[second[:, 0] < first[:, 0]].tolist())
    if not with_holes:
        return cycles
    planes = [plane for mask in masks for plane in mask]
    return paths_of(_with_holes_joined(cycles, with_holes, planes))


def _with_holes_joined(
    cycles: Paths, with_holes: set[int], planes: Sequence[NDArray[np.bool_]]
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    for plane, group in groupby(cycles, key=lambda item: item[0]):
        paths = [points for _, points in group]
        if plane in with_holes:
            as_lists = [list(map(tuple, points.tolist())) for points in paths]
            paths = [np.array(cycle) for cycle in _join_holes(as_lists, np.pad(planes[plane], 1))]
        yield from ((plane, points) for points in paths)


def _cycles(masks: Sequence[NDArray[np.bool_]]) -> Paths:
    """Marching squares over all planes of masks (z, y, x) at once: closed paths, each from its highest point."""
    height, width = (np.max([mask.shape[1:] for mask in masks], axis=0) + 2).tolist()  # voxels outside all round
    cells = _cells(masks)
    from_id, to_id = _crossings(*cells, height=height, width=width)
    order = np.argsort(from_id)
    from_id = from_id[order]
    following = np.searchsorted(from_id, to_id[order])
    order, bounds = _followed(following.tolist())
    row, x = np.divmod(from_id[order], 2 * width)
    plane, y = np.divmod(row, 2 * height)
    return Paths(np.stack((x, y), axis=1), bounds, plane[bounds[:-1]])


def _followed(following: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numbers cycle after cycle, each from its lowest; and where in them each cycle begins, and the last ends."""
    order: list[int] = []
    bounds = []
    seen = bytearray(len(following))
    for first in range(len(following)):
        if seen[first]:
            continue
        bounds.append(len(order))
        i = first
        while not seen[i]:
            seen[i] = 1
            order.append(i)
            i = following[i]
    return np.array(order), np.array([*bounds, len(order)])


def _cells(masks: Sequence[NDArray[np.bool_]]) -> tuple[NDArray[np.int64], ...]:
    """The cells that a contour crosses: plane, row, column, and which of the four corners are inside."""
    found, first_plane = [], 0
    for mask in masks:
        inside = np.pad(mask.view(np.uint8), ((0, 0), (1, 1), (1, 1)))
        left, right = inside[:, :, :-1], inside[:, :, 1:]
        corners = left[:, :-1] | right[:, :-1] << 1 | right[:, 1:] << 2 | left[:, 1:] << 3
        crossed = np.flatnonzero((corners != 0) & (corners != 15))
        z, y, x = np.unravel_index(crossed, corners.shape)
        found.append((first_plane + z, y, x, corners.reshape(-1)[crossed]))
        first_plane += len(mask)
    plane, y, x, case = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return plane, y, x, case


def _crossings(
    plane: NDArray[np.int64],
    y: NDArray[np.int64],
    x: NDArray[np.int64],
    case: NDArray[np.int64],
    *,
    height: int,
    width: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where contours enter and leave cells, as numbers of half-voxel points: (plane 2 height + y) 2 width + x."""
    origin = (plane * 2 * height + 2 * y) * 2 * width + 2 * x
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


def _join_holes(cycles: list[Cycle], inside: NDArray[np.bool_]) -> list[Cycle]:
    """Outer paths only: a cut leads from each hole upwards, between two columns of voxel centres, to what is above."""
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


def _point_above(point: HalfVoxel, inside: NDArray[np.bool_]) -> tuple[HalfVoxel, HalfVoxel]:
    """Where a line straight up first meets a contour, and the contour's own point at or just before that place."""
    x, y = point
    column = x // 2
    row = next(r for r in range(y // 2 - 1, -1, -1) if not inside[r, column : column + 2].all())
    if inside[row, column] != inside[row, column + 1]:
        return (x, 2 * row), (x, 2 * row)
    # The middle of a level stretch, which runs to the right where the inside is below.
    return (x, 2 * row + 1), (x - 1, 2 * row + 1)


def _turns(paths: Paths) -> NDArray[np.bool_]:
    """Which points are not passed straight on; a cut's turning points are among them."""
    following = paths.following
    ahead = paths.points[following] - paths.points
    behind = np.empty_like(ahead)
    behind[following] = ahead
    turn = behind[:, 0] * ahead[:, 1] - behind[:, 1] * ahead[:, 0]
    back = (behind * ahead).sum(axis=1) < 0
    turning: NDArray[np.bool_] = (turn != 0) | back
    return turning
