"""VolumeGeometry: where a voxel lies in the patient. Here indices become millimetres, and millimetres indices.

Elsewhere contours do so (client/rtstruct.py, client/structure_set.py), which lie at each slice's own position, and
files of volumes, by the affine that each carries (engine/volume_files.py, client/nifti.py, client/mask_files.py).

Arrays are (z, y, x); points and everything of the geometry but `shape` are LPS (x, y, z) in mm: x to the patient's
left, y to the back, z to the head (DICOM PS3.3 C.7.6.2.1.1).
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anatomynet.engine.errors import GeometryError

Point = tuple[float, float, float]
Index = tuple[int, int, int]
Direction = tuple[Point, Point, Point]
IDENTITY: Direction = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
# Cosine of the largest angle at which an axis still counts as aligned with the patient's: 0.06 degrees, which moves
# the far corner of a 512 mm slice by half a millimetre.
ALIGNED_COSINE = 1 - 5e-7
SAME_PLACE_MM = 1e-3  # a grid that was written to a file and read again is as near
CUBIC_MM_PER_ML = 1000.0


@dataclass(frozen=True)
class VolumeGeometry:
    """A regular grid in the patient.

    Attributes:
        shape: voxels (z, y, x).
        spacing: mm between voxel centres (x, y, z), all above zero.
        origin: LPS mm of the centre of voxel [0, 0, 0].
        direction: rows of the 3 x 3 matrix whose columns are the unit vectors of the x, y and z index axes in LPS.

    Raises:
        GeometryError: a side or spacing that is not above zero, a value that is not finite, axes not at right angles.
    """

    shape: Index
    spacing: Point
    origin: Point = (0.0, 0.0, 0.0)
    direction: Direction = IDENTITY

    def __post_init__(self) -> None:
        if min(self.shape) < 1 or not min(self.spacing) > 0 or not np.isfinite([*self.spacing, *self.origin]).all():
            raise GeometryError(
                f"expected sides and spacing above zero, found shape {self.shape} and spacing {self.spacing} mm, "
                f"origin {self.origin}"
            )
        matrix = np.array(self.direction)
        if not np.allclose(matrix.T @ matrix, np.eye(3), atol=1e-3):
            raise GeometryError(f"expected three axes at right angles, found direction {self.direction}")

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(np.prod(self.spacing)) / CUBIC_MM_PER_ML

    @property
    def affine(self) -> NDArray[np.float64]:
        """float64 (4, 4): homogeneous index (x, y, z, 1) -> LPS mm."""
        matrix: NDArray[np.float64] = np.eye(4)
        matrix[:3, :3] = np.array(self.direction) * np.array(self.spacing)
        matrix[:3, 3] = self.origin
        return matrix

    def is_same_grid(self, other: "VolumeGeometry") -> bool:
        """Whether both have the same voxels in the same places, to SAME_PLACE_MM."""
        return self.shape == other.shape and np.allclose(self.affine, other.affine, rtol=0, atol=SAME_PLACE_MM)

    def points_from_indices(self, indices: ArrayLike) -> NDArray[np.float64]:
        """Continuous indices (..., 3) in (x, y, z) order -> LPS mm (..., 3); whole numbers are voxel centres."""
        affine = self.affine
        points: NDArray[np.float64] = np.asarray(indices, dtype=np.float64) @ affine[:3, :3].T + affine[:3, 3]
        return points

    def indices_from_points(self, points: ArrayLike) -> NDArray[np.float64]:
        """LPS mm (..., 3) -> continuous indices (..., 3) in (x, y, z) order."""
        affine = self.affine
        offsets: NDArray[np.float64] = np.asarray(points, dtype=np.float64) - affine[:3, 3]
        return offsets @ np.linalg.inv(affine[:3, :3]).T

    def cropped(self, start: Index, stop: Index) -> "VolumeGeometry":
        """The grid of array[start:stop], both (z, y, x); stop is exclusive."""
        origin = self.points_from_indices(start[::-1])
        return replace(self, shape=_index(np.subtract(stop, start)), origin=_point(origin))

    def resampled(self, spacing: Point) -> "VolumeGeometry":
        """The grid over the same outer faces, of whole voxels whose spacing (x, y, z) comes nearest to `spacing`."""
        extent = np.array(self.shape[::-1]) * self.spacing
        voxels = np.maximum(1, np.rint(extent / spacing))
        nearest = extent / voxels
        first_centre = (nearest / self.spacing - 1) / 2  # in voxels of this grid
        return replace(
            self,
            shape=_index(voxels[::-1]),
            spacing=_point(nearest),
            origin=_point(self.points_from_indices(first_centre)),
        )

    def canonical_axes(self) -> tuple[Index, tuple[bool, bool, bool]]:
        """How to turn the array to z to the head, y to the back, x to the left.

        Returns:
            order: for `array.transpose(order)`; then, of its three axes (z, y, x), which must be flipped.

        Raises:
            GeometryError: an oblique grid, on which turning would have to invent voxels.
        """
        matrix = np.array(self.direction)
        patient_axis = np.abs(matrix).argmax(axis=0)  # of each index axis x, y, z
        cosines = np.abs(matrix).max(axis=0) / np.linalg.norm(matrix, axis=0)  # headers cut unit vectors short
        if sorted(patient_axis) != [0, 1, 2] or cosines.min() < ALIGNED_COSINE:
            raise GeometryError(
                f"oblique volume: an axis lies {np.degrees(np.arccos(min(1.0, cosines.min()))):.2f} degrees off the "
                "patient's axes; expected slices that run along them: reconstruct the series without tilt"
            )
        index_axis = np.argsort(patient_axis)  # of each patient axis x, y, z
        order = tuple(int(2 - index_axis[2 - a]) for a in range(3))
        flips = tuple(bool(matrix[2 - a, index_axis[2 - a]] < 0) for a in range(3))
        return (order[0], order[1], order[2]), (flips[0], flips[1], flips[2])

    def canonical(self) -> "VolumeGeometry":
        """The grid after the array was turned by `canonical_axes`: the same voxels in the same places.

        Raises:
            GeometryError: an oblique grid.
        """
        order, flips = self.canonical_axes()
        shape = _index([self.shape[a] for a in order])
        axes_xyz = [2 - order[2 - a] for a in range(3)]
        spacing = _point([self.spacing[a] for a in axes_xyz])
        signs = [-1.0 if flips[2 - a] else 1.0 for a in range(3)]
        matrix = np.array(self.direction)[:, axes_xyz] * signs
        first = [0.0, 0.0, 0.0]
        for a, axis in enumerate(axes_xyz):
            if flips[2 - a]:
                first[axis] = self.shape[2 - axis] - 1
        rows = [_point(row) for row in matrix]
        return VolumeGeometry(shape, spacing, _point(self.points_from_indices(first)), (rows[0], rows[1], rows[2]))


def _point(values: ArrayLike) -> Point:
    x, y, z = np.asarray(values, dtype=np.float64).tolist()
    return (x, y, z)


def _index(values: ArrayLike) -> Index:
    z, y, x = np.asarray(values).astype(int).tolist()
    return (z, y, x)
