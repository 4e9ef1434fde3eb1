"""Fewer points on a contour, within a tolerance in mm: between tracing and the RTSTRUCT.

Douglas and Peucker's rule (Cartographica 10, 1973): between two points that stay, the one farthest from the straight
line stays too where it lies farther off than the tolerance. All contours of a structure are split at once.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

HalfVoxel = tuple[int, int]
Cycle = Sequence[HalfVoxel]
Points = NDArray[np.int64]

# After this many halvings of the tolerance nothing moves any more.
LARGEST_HALVING_COUNT = 8


def thinned_cycles(
    slices: Sequence[tuple[int, Sequence[Cycle]]],
    *,
    half_voxel: tuple[float, float],
    tolerance_mm: float,
    safe: bool = False,
) -> Iterator[tuple[int, Points]]:
    """Thin the closed paths of one structure, slice by slice.

    A path keeps three points or more and its keyholes, crosses neither itself nor its neighbours, and stays inside or
    outside of each: a slice in which it would not is thinned with half the tolerance, and so on.

    Args:
        slices: the slice's number and its paths, points (x, y) in half voxels.
        half_voxel: mm along x and y.
        tolerance_mm: the largest distance between a path and its thinned one, both ways; above 0.
        safe: the tolerance is too small for paths to meet, so nothing needs to be checked.

    Yields:
        Number of the slice, and points (n, 2) of a path, n >= 3.
    """
    done: dict[int, Sequence[Points]] = {}
    waiting = [(z, cycles) for z, cycles in slices if cycles]
    for _ in range(LARGEST_HALVING_COUNT):
        refused = []
        for (z, cycles), thinned in zip(waiting, _thin(waiting, half_voxel, tolerance_mm), strict=True):
            if safe or _keeps_topology(cycles, thinned):
                done[z] = thinned
            else:
                refused.append((z, cycles))
        waiting, tolerance_mm = refused, tolerance_mm / 2
        if not waiting:
            break
    done.update((z, [np.array(cycle) for cycle in cycles]) for z, cycles in waiting)
    for z in sorted(done):
        yield from ((z, points) for points in done[z])


def _thin(
    slices: Sequence[tuple[int, Sequence[Cycle]]], half_voxel: tuple[float, float], tolerance_mm: float
) -> list[list[Points]]:
    """The points that stay, by slice and path."""
    counts = [[len(cycle) for cycle in cycles] for _, cycles in slices]
    closed = np.concatenate([[*cycle, cycle[0]] for _, cycles in slices for cycle in cycles])
    pinned = np.concatenate([_pinned(cycle) for _, cycles in slices for cycle in cycles])
    kept = _split_where_far(closed * np.array(half_voxel), pinned, tolerance_mm)
    ends = np.cumsum([n + 1 for slice_counts in counts for n in slice_counts])
    paths = iter(closed[start : end - 1][kept[start : end - 1]] for start, end in pairwise([0, *ends.tolist()]))
    return [[next(paths) for _ in slice_counts] for slice_counts in counts]


def _pinned(cycle: Cycle) -> NDArray[np.bool_]:
    """Which points of a path, the first of them again at its end, stay whatever the tolerance: ends, and keyholes'."""
    visits = Counter(cycle)
    return np.array([True, *(visits[point] > 1 for point in cycle[1:]), True])


def _split_where_far(points: NDArray[np.float64], kept: NDArray[np.bool_], tolerance_mm: float) -> NDArray[np.bool_]:
    """Which points (n, 2) stay: those that do already, and, farthest first, those off the lines between them."""
    kept = kept.copy()
    numbers = np.arange(len(points))
    while True:
        ends = np.flatnonzero(kept)
        before = np.maximum.accumulate(np.where(kept, numbers, 0))
        after = ends[np.searchsorted(ends, numbers)]
        distance = _distance_to_segment(points, points[before], points[after])
        farthest = np.maximum.reduceat(distance, ends)
        chosen = np.flatnonzero((distance == farthest[np.searchsorted(ends, before)]) & (distance > tolerance_mm))
        if not chosen.size:
            return kept
        _, first = np.unique(before[chosen], return_index=True)
        kept[chosen[first]] = True


def _distance_to_segment(
    points: NDArray[np.float64], start: NDArray[np.float64], end: NDArray[np.float64]
) -> NDArray[np.float64]:
    along, offset = end - start, points - start
    square = (along**2).sum(axis=1)
    share = (offset * along).sum(axis=1) / np.where(square > 0, square, 1)
    distance: NDArray[np.float64] = np.linalg.norm(offset - share.clip(0, 1)[:, None] * along, axis=1)
    return distance


def _keeps_topology(cycles: Sequence[Cycle], thinned: Sequence[Points]) -> bool:
    """Whether thinned paths of one slice cut no other and none of themselves, keep their cuts and their nesting."""
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
        _surrounds(path, other[0]) == _surrounds(np.array(cycle), other[0])
        for i, (cycle, path) in enumerate(zip(cycles, thinned, strict=True))
        for j, other in enumerate(cycles)
        if i != j
    )


def _repeated(edges: Points) -> int:
    """How many edges (n, 4) run where another does: a keyhole's cut, there and back."""
    forward = (edges[:, 0] < edges[:, 2]) | ((edges[:, 0] == edges[:, 2]) & (edges[:, 1] < edges[:, 3]))
    undirected = np.where(forward[:, None], edges, edges[:, [2, 3, 0, 1]])
    return len(edges) - len(np.unique(undirected, axis=0))


def _any_meet(edges: Points) -> bool:
    """Whether two edges (n, 4) without a common end have a point in common; whole numbers, so exact."""
    start, end = edges[:, None, :2], edges[:, None, 2:]
    a, b = edges[None, :, :2], edges[None, :, 2:]
    side_a, side_b = _side(start, end, a), _side(start, end, b)
    straddled = side_a * side_b <= 0
    apart = (np.maximum(start, end) < np.minimum(a, b)).any(-1) | (np.maximum(a, b) < np.minimum(start, end)).any(-1)
    common_end = np.logical_or.reduce([(p == q).all(-1) for p in (start, end) for q in (a, b)])
    return bool((straddled & straddled.T & ~apart & ~common_end).any())


def _side(start: Points, end: Points, point: Points) -> NDArray[np.int64]:
    """On which side of a line a point lies: -1, 0 on it, 1."""
    along, offset = end - start, point - start
    side: NDArray[np.int64] = np.sign(along[..., 0] * offset[..., 1] - along[..., 1] * offset[..., 0])
    return side


def _surrounds(path: Points, point: HalfVoxel) -> bool:
    """Whether a point lies inside a path, by the even-odd rule."""
    x, y = path.T
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    crossed = (y <= point[1]) != (next_y <= point[1])
    height = np.where(crossed, next_y - y, 1)
    return bool(np.count_nonzero(crossed & (x + (point[1] - y) * (next_x - x) / height > point[0])) % 2)
