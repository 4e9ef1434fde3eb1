"""Paths: closed paths of many planes in one array, so that what is done to each is done to all at once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

HalfVoxels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Paths:
    """Closed paths, p of them, with n points in all.

    Attributes:
        points: int64 (n, 2), x and y in half voxels, path after path; a path's last point leads to its first.
        bounds: int64 (p + 1,), where in `points` each path begins, and at the end n.
        planes: int64 (p,), the number of the plane that each lies in; ascending.
    """

    points: HalfVoxels
    bounds: NDArray[np.int64]
    planes: NDArray[np.int64]

    def __iter__(self) -> Iterator[tuple[int, HalfVoxels]]:
        """The plane and the points of each; views."""
        for plane, (start, stop) in zip(self.planes.tolist(), pairwise(self.bounds.tolist()), strict=True):
            yield plane, self.points[start:stop]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Points of each."""
        return np.diff(self.bounds)

    @property
    def following(self) -> NDArray[np.int64]:
        """int64 (n,): which point comes after each."""
        after = np.arange(1, len(self.points) + 1)
        after[self.bounds[1:] - 1] = self.bounds[:-1]
        return after

    def only(self, kept: NDArray[np.bool_]) -> "Paths":
        """Without the points that are not kept, bool (n,)."""
        before = np.concatenate([[0], np.cumsum(kept)])
        return Paths(self.points[kept], before[self.bounds], self.planes)


def paths_of(pieces: Iterable[tuple[int, HalfVoxels]]) -> Paths:
    """The paths that `Paths` gives when iterated over; at least one."""
    planes, points = zip(*pieces, strict=True)
    return Paths(np.concatenate(points), np.cumsum([0, *map(len, points)]), np.array(planes, np.int64))
