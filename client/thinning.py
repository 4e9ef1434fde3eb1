"""Fewer points on a contour, within a tolerance in mm: between tracing and the RTSTRUCT.

Douglas and Peucker's rule (Cartographica 10, 1973): between two points that stay, the one farthest from the straight
line stays too where it lies farther off than the tolerance. All contours are split at once.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from anatomynet.client.paths import HalfVoxels, Paths, paths_of

# After this many halvings of the tolerance nothing moves any more.
LARGEST_HALVING_COUNT = 8


def thinned_paths(paths: Paths, *, half_voxel: tuple[float, float], tolerance_mm: float, safe: bool = False) -> Paths:
    """Thin closed paths, plane by plane.

    A path keeps three points or more and its keyholes, crosses neither itself nor its neighbours, and stays inside or
    outside of each: a plane in which it would not is thinned with half the tolerance, and so on.

    Args:
        paths: at least one.
        half_voxel: mm along x and y.
        tolerance_mm: the largest distance between a path and its thinned one, both ways; above 0.
        safe: the tolerance is too small for paths to meet, so nothing needs to be checked.

    Returns:
        The same paths with fewer points, at least 3 each.
    """
    if safe:
        return _thin(paths, half_voxel, tolerance_mm)
    done: dict[int, Sequence[HalfVoxels]] = {}
    waiting = _by_plane(paths)
    for _ in range(LARGEST_HALVING_COUNT):
        together = paths_of((plane, path) for plane, full in waiting.items() for path in full)
        for plane, thinned in _by_plane(_thin(together, half_voxel, tolerance_mm)).items():
            if _keeps_topology(waiting[plane], thinned):
                done[plane] = thinned
                del waiting[plane]
        if not waiting:
            break
        tolerance_mm /= 2
    done.update(waiting)
    return paths_of((plane, path) for plane in sorted(done) for path in done[plane])


def _by_plane(paths: Paths) -> dict[int, list[HalfVoxels]]:
    return {plane: [path for _, path in group] for plane, group in groupby(paths, key=lambda item: item[0])}


def _thin(paths: Paths, half_voxel: tuple[float, float], tolerance_mm: float) -> Paths:
    """The points that stay."""
    # The first point of a path once more at its end, so that the last edge is one as any other.
    closing = np.zeros(len(paths.points) + len(paths.planes), np.bool_)
    closing[paths.bounds[1:] + np.arange(len(paths.planes))] = True
    closed = np.insert(np.arange(len(paths.points)), paths.bounds[1:], paths.bounds[:-1])
    stays = _pinned(paths)[closed]
    x, y = (column * scale for column, scale in zip(paths.points[closed].T, half_voxel, strict=True))
    _keep_what_is_far(x, y, stays, tolerance_mm)
    return paths.only(stays[~closing])


def _pinned(paths: Paths) -> NDArray[np.bool_]:
    """Which points stay whatever the tolerance: the first of each path, and a keyhole's, which it passes twice."""
    columns, rows = paths.points.max(axis=0) + 1
    x, y = paths.points.T
    place = (np.repeat(np.arange(len(paths.planes)), paths.lengths) * rows + y) * columns + x
    ordered = np.sort(place)
    pinned = np.isin(place, ordered[1:][ordered[1:] == ordered[:-1]])
    pinned[paths.bounds[:-1]] = True
    return pinned


def _keep_what_is_far(
    x: NDArray[np.float64], y: NDArray[np.float64], stays: NDArray[np.bool_], tolerance_mm: float
) -> None:
    """Adds to the points that stay, farthest first, those off the lines between them."""
    ends = np.flatnonzero(stays)
    start, stop = ends[:-1], ends[1:]
    while True:
        apart = stop - start > 1
        start, stop = start[apart], stop[apart]
        if not start.size:
            return
        inner = stop - start - 1
        first = np.cumsum(inner) - inner
        line = np.repeat(np.arange(len(inner)), inner)
        number = (start + 1 - first)[line] + np.arange(len(line))
        distance = _distance_to_segment(x[number], y[number], (x[start], y[start], x[stop], y[stop]), line)
        farthest = np.maximum.reduceat(distance, first)
        candidates = np.flatnonzero(distance == farthest[line])
        # Of several that are as far, the first.
        middle = number[candidates[np.diff(line[candidates], prepend=-1) > 0]]
        far = farthest > tolerance_mm
        start, stop, middle = start[far], stop[far], middle[far]
        stays[middle] = True
        # What lies within the tolerance of its line is done with; only the halves of a line that was split go on.
        start, stop = np.concatenate([start, middle]), np.concatenate([middle, stop])


def _distance_to_segment(
    x: NDArray[np.float64], y: NDArray[np.float64], ends: tuple[NDArray[np.float64], ...], line: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Of each point to its line, between that line's ends: x0, y0, x1, y1 by the line's number."""
    x0, y0, x1, y1 = ends
    along_x, along_y = x1 - x0, y1 - y0
    square = along_x**2 + along_y**2
    square[square == 0] = 1
    x, y = x - x0[line], y - y0[line]
    share = (x * along_x[line] + y * along_y[line]) / square[line]
    share = share.clip(0, 1)
    distance: NDArray[np.float64] = np.sqrt((x - share * along_x[line]) ** 2 + (y - share * along_y[line]) ** 2)
    return distance


def _keeps_topology(cycles: Sequence[HalfVoxels], thinned: Sequence[HalfVoxels]) -> bool:
    """Whether thinned paths of one plane cut no other and none of themselves, keep their cuts and their nesting."""
    if min(map(len, thinned)) < 3:
        return False
    edges = np.concatenate([np.hstack((path, np.roll(path, -1, axis=0))) for path in thinned])
    steps = np.concatenate([np.hstack((c, np.roll(c, -1, axis=0))) for c in cycles])
    vanished = (edges[:, :2] == edges[:, 2:]).all(axis=1).any()  # a hole of one point, where its cut ends
    if vanished or _repeated(edges) != _repeated(steps) or _any_meet(edges):
        return False
    if len(cycles) == 1:
        return True
    return all(
        _surrounds(path, other[0]) == _surrounds(cycle, other[0])
        for i, (cycle, path) in enumerate(zip(cycles, thinned, strict=True))
        for j, other in enumerate(cycles)
        if i != j
    )


def _repeated(edges: HalfVoxels) -> int:
    """How many edges (n, 4) run where another does: a keyhole's cut, there and back."""
    forward = (edges[:, 0] < edges[:, 2]) | ((edges[:, 0] == edges[:, 2]) & (edges[:, 1] < edges[:, 3]))
    undirected = np.where(forward[:, None], edges, edges[:, [2, 3, 0, 1]])
    return len(edges) - len(np.unique(undirected, axis=0))


def _any_meet(edges: HalfVoxels) -> bool:
    """Whether two edges (n, 4) without a common end have a point in common; whole numbers, so exact."""
    start, end = edges[:, None, :2], edges[:, None, 2:]
    a, b = edges[None, :, :2], edges[None, :, 2:]
    side_a, side_b = _side(start, end, a), _side(start, end, b)
    straddled = side_a * side_b <= 0
    apart = (np.maximum(start, end) < np.minimum(a, b)).any(-1) | (np.maximum(a, b) < np.minimum(start, end)).any(-1)
    common_end = np.logical_or.reduce([(p == q).all(-1) for p in (start, end) for q in (a, b)])
    return bool((straddled & straddled.T & ~apart & ~common_end).any())


def _side(start: HalfVoxels, end: HalfVoxels, point: HalfVoxels) -> NDArray[np.int64]:
    """On which side of a line a point lies: -1, 0 on it, 1."""
    along, offset = end - start, point - start
    side: NDArray[np.int64] = np.sign(along[..., 0] * offset[..., 1] - along[..., 1] * offset[..., 0])
    return side


def _surrounds(path: HalfVoxels, point: HalfVoxels) -> bool:
    """Whether a point lies inside a path, by the even-odd rule."""
    x, y = path.T
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    crossed = (y <= point[1]) != (next_y <= point[1])
    height = np.where(crossed, next_y - y, 1)
    return bool(np.count_nonzero(crossed & (x + (point[1] - y) * (next_x - x) / height > point[0])) % 2)
