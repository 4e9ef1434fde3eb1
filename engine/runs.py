"""Runs: a mask as the stretches of voxels in its rows, in which its box, centre and pieces are found.

Only the first look is at every voxel: an organ of 50,000 is a thousand stretches.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.geometry import Index

# Where a voxel's neighbours lie, the rows (z, y) that come before its own.
ROWS_BEFORE = {"faces": ((0, -1), (-1, 0)), "corners": ((0, -1), (-1, -1), (-1, 0), (-1, 1))}
Touch = Literal["faces", "corners"]


@dataclass(frozen=True, eq=False)
class Runs:
    """The voxels inside a mask, as n stretches along x; from the first voxel to the last.

    Attributes:
        shape: of the mask, (z, y, x).
        start: int64 (n,), index of each one's first voxel in the flattened mask.
        length: int64 (n,), voxels.
    """

    shape: Index
    start: NDArray[np.int64]
    length: NDArray[np.int64]

    @property
    def places(self) -> NDArray[np.int64]:
        """int64 (3, n): z, y, x of each one's first voxel."""
        height, width = self.shape[1:]
        row, x = np.divmod(self.start, width)
        return np.stack((*np.divmod(row, height), x))

    def voxels(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Indices, in the flattened mask, of all voxels of the chosen ones."""
        start, length = self.start[chosen], self.length[chosen]
        before = np.cumsum(length) - length
        numbers: NDArray[np.int64] = np.repeat(start - before, length) + np.arange(int(length.sum()))
        return numbers

    def box(self, chosen: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
        """The box (z, y, x) of the chosen ones, of which there is at least one."""
        z, y, x = self.places[:, chosen]
        stop_x = int((x + self.length[chosen]).max())
        return slice(int(z[0]), int(z[-1]) + 1), slice(int(y.min()), int(y.max()) + 1), slice(int(x.min()), stop_x)

    def centre(self) -> NDArray[np.float64]:
        """Centre of mass of all of them, (z, y, x) in voxels."""
        z, y, x = self.places
        twice_x = 2 * x + self.length - 1  # of a run's middle; twice, since whole numbers are summed without rounding
        sums = [self.length @ z, self.length @ y, self.length @ twice_x / 2]
        mean: NDArray[np.float64] = np.array(sums) / self.length.sum()
        return mean


def runs_of(mask: NDArray[np.bool_]) -> Runs:
    """The runs of a mask (z, y, x)."""
    depth, height, width = mask.shape
    z, y = np.nonzero(mask.any(axis=2))  # the other rows are not looked at again
    rows = np.zeros((len(z), width + 2), np.bool_)
    rows[:, 1:-1] = mask[z, y]
    row, column = np.divmod(np.flatnonzero(rows[:, 1:] != rows[:, :-1]), width + 1)
    # In each row changes to inside and to outside alternate.
    start = (z * height + y)[row[::2]] * width + column[::2]
    return Runs((depth, height, width), start, column[1::2] - column[::2])


def pieces_of(runs: Runs, *, touch: Touch = "corners") -> NDArray[np.int64]:
    """Which piece each run is of, int64 (n,): 0 and up in the order of their first voxels, as ndimage.label counts.

    Args:
        runs: of a mask.
        touch: what two voxels of a piece share at least: a corner (26-connected) or a face (6-connected).
    """
    # A column and a row beyond the last, of no run: what lies at opposite borders is then no neighbour.
    row, plane = runs.shape[2] + 1, (runs.shape[1] + 1) * (runs.shape[2] + 1)
    start = np.array([plane, row, 1]) @ runs.places
    stop = start + runs.length
    columns = 1 if touch == "faces" else 0  # that neighbours have in common at least
    piece = np.arange(len(start))
    for z, y in ROWS_BEFORE[touch]:
        offset = z * plane + y * row
        # Of the row before: from the first run that does not end too soon to the last that does not begin too late.
        first = np.searchsorted(stop, start + (offset + columns))
        count = np.searchsorted(start, stop + (offset - columns), side="right") - first
        earlier = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(count.sum())
        piece = _joined(piece, np.repeat(piece, count), piece[earlier])
    numbers: NDArray[np.int64] = np.unique(piece, return_inverse=True)[1]
    return numbers


def _joined(piece: NDArray[np.int64], one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    """Makes one piece of each pair of pieces, which are known by their first runs, as the joined ones are."""
    while (apart := one != other).any():
        one, other = one[apart], other[apart]
        into = np.arange(len(piece))
        # The first of all that a piece touches: with any other, a plate over a thousand dots takes a thousand rounds.
        np.minimum.at(into, np.maximum(one, other), np.minimum(one, other))
        into = _ends_of(into)
        piece, one, other = into[piece], into[one], into[other]
    return piece


def _ends_of(into: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each number ends that goes into another, which goes into another."""
    while not np.array_equal(further := into[into], into):
        into = further
    return into
