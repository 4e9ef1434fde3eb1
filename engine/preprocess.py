"""CTVolume -> network input, and what undoes it. Second step of the straight path, first half of `segment`.

turn to canonical axes -> resample where the spacing was not trained -> cut to the patient's body box
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.boxes import slices_of
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import GeometryError
from anatomynet.engine.geometry import Index, VolumeGeometry
from anatomynet.engine.runs import pieces_of, runs_of
from anatomynet.engine.volume import CTVolume, HounsfieldArray

Scalar = TypeVar("Scalar", bound=np.generic)

BODY_HU = -500  # between air and any tissue
# A box grows to multiples of this at the network's resolution, so that only a few shapes are ever computed.
BOX_STEP = (16, 8, 8)
POOLING = 2  # the network's one down-sampling: a box may only start where a pooled voxel starts
# A study may lie this far outside the trained spacing before it is resampled: headers round.
SPACING_TOLERANCE = 0.02
SMALLEST_NETWORK_SIDE = 8


@dataclass(frozen=True, eq=False)
class NetworkInput:
    """What a runtime is given, and what it takes to put its answer back.

    Attributes:
        hu: int16 (z, y, x), canonical axes: z to the head, y to the back, x to the patient's left. A view of the CT
            where nothing was resampled: a runtime copies it once, to where it is computed.
        start: of `hu` in `grid`, (z, y, x).
        grid: the whole volume's canonical grid, at a spacing that was trained.
        canonical: the whole volume's canonical grid at its own spacing; the same as `grid` unless resampled.
        notes: what a user should know.
    """

    hu: HounsfieldArray
    start: Index
    grid: VolumeGeometry
    canonical: VolumeGeometry
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> Index:
        """Of `hu`, (z, y, x)."""
        return _index(self.hu.shape)

    def cropped(self, start: Index, stop: Index) -> "NetworkInput":
        """A part of it, [start:stop] of `hu`; a view."""
        box = slices_of(start, stop)
        return replace(self, hu=self.hu[box], start=_index(np.add(self.start, start).tolist()))


def prepare(volume: CTVolume, config: ModelConfig) -> NetworkInput:
    """What the network of `config` is shown of a CT.

    Raises:
        GeometryError: an oblique volume, or one too small for the network.
    """
    hu = canonical_from_array(volume.hu, volume.geometry)
    canonical = volume.geometry.canonical()
    grid = trained_grid(canonical, config)
    notes: tuple[str, ...] = ()
    if grid != canonical:
        hu = np.rint(resample_linear(hu, grid.shape)).astype(np.int16)
        notes = (
            f"resampled from {_millimetres(canonical)} to {_millimetres(grid)} (x, y, z): "
            f"{config.name} was not trained for the study's spacing",
        )
    smallest = smallest_shape(config)
    if any(side < least for side, least in zip(grid.shape, smallest, strict=True)):
        raise GeometryError(f"volume of {grid.shape} voxels (z, y, x): expected at least {smallest} for {config.name}")
    start, stop = body_box(hu, in_plane_stride=config.in_plane_stride)
    box = slices_of(start, stop)
    return NetworkInput(hu[box], start, grid, canonical, notes)


def smallest_shape(config: ModelConfig) -> Index:
    """Voxels (z, y, x) of the smallest CT that the network takes."""
    in_plane = SMALLEST_NETWORK_SIDE * config.in_plane_stride
    return SMALLEST_NETWORK_SIDE, in_plane, in_plane


def body_box(hu: HounsfieldArray, *, in_plane_stride: int) -> tuple[Index, Index]:
    """The patient's bounding box: the largest piece above -500 HU, rounded outwards.

    Args:
        hu: int16 (z, y, x), Hounsfield units, canonical axes.
        in_plane_stride: a voxel of the network's is so many wide.

    Returns:
        Start and stop, voxels (z, y, x), half-open: the start is a multiple of 2 in z and of 2 x stride in plane. The
        whole volume, if nothing in it is above -500 HU.
    """
    step = (POOLING, POOLING * in_plane_stride, POOLING * in_plane_stride)
    # One voxel of every pooled one, from its middle: a margin to the left is then as wide as one to the right.
    sampled = hu[tuple(slice(unit // 2, None, unit) for unit in step)]
    runs = runs_of(sampled > BODY_HU)
    if not len(runs.start):
        return (0, 0, 0), _index(hu.shape)
    piece = pieces_of(runs, touch="faces")
    found = runs.box(piece == np.argmax(np.bincount(piece, weights=runs.length)))
    sides = [
        _rounded_side(piece, unit=unit, size=size, multiple=multiple)
        for piece, unit, size, multiple in zip(
            found, step, hu.shape, np.multiply(BOX_STEP, (1, in_plane_stride, in_plane_stride)), strict=True
        )
    ]
    return _index([a for a, _ in sides]), _index([b for _, b in sides])


def trained_grid(geometry: VolumeGeometry, config: ModelConfig) -> VolumeGeometry:
    """The same extent at the nearest spacing that was trained; the same geometry where its own was."""
    own = np.array(geometry.spacing)
    nearest = np.clip(own, config.smallest_spacing, config.largest_spacing)
    if (np.abs(nearest - own) <= SPACING_TOLERANCE * own).all():
        return geometry
    x, y, z = nearest.tolist()
    return geometry.resampled((x, y, z))


def canonical_from_array(array: NDArray[Scalar], geometry: VolumeGeometry) -> NDArray[Scalar]:
    """An array of `geometry`, turned to canonical axes; a view.

    Raises:
        GeometryError: an oblique grid.
    """
    order, flips = geometry.canonical_axes()
    return np.flip(array.transpose(order), [axis for axis, flip in enumerate(flips) if flip])


def array_from_canonical(array: NDArray[Scalar], geometry: VolumeGeometry) -> NDArray[Scalar]:
    """What undoes `canonical_from_array`: a canonical array, turned back to `geometry`; a view."""
    order, flips = geometry.canonical_axes()
    return np.flip(array, [axis for axis, flip in enumerate(flips) if flip]).transpose(np.argsort(order))


def resample_linear(
    array: NDArray[np.generic], shape: Index, *, start: Index = (0, 0, 0), stop: Index | None = None
) -> NDArray[np.float32]:
    """Linear interpolation of an array (z, y, x) to `shape` over the same outer faces; float32.

    Only [start:stop] of the result is computed and returned. Beyond the outermost centres the edge value continues.
    """
    result = array
    for axis, (new, first, last) in enumerate(zip(shape, start, stop or shape, strict=True)):
        old = array.shape[axis]
        if new == old:
            result = result[(slice(None),) * axis + (slice(first, last),)]
            continue
        position = ((np.arange(first, last) + 0.5) * old / new - 0.5).clip(0, old - 1)
        low = np.minimum(position.astype(np.intp), max(old - 2, 0))
        side = [1, 1, 1]
        side[axis] = -1
        weight = (position - low).astype(np.float32).reshape(side)
        high = np.minimum(low + 1, old - 1)
        result = np.take(result, low, axis) * (1 - weight) + np.take(result, high, axis) * weight
    return np.asarray(result, dtype=np.float32)


def _rounded_side(piece: slice, *, unit: int, size: int, multiple: int) -> tuple[int, int]:
    """One side of a box: from coarse indices to voxels, a coarse voxel wider, its length a multiple where it fits."""
    first, last = max(0, (piece.start - 1) * unit), min(size, (piece.stop + 1) * unit)
    length = min(size, -(-(last - first) // multiple) * multiple)
    first = min(first, (size - length) // unit * unit)
    # Of a side that is no multiple, the rest beyond the last whole step: then the whole side.
    return (first, first + length) if first + length >= last else (0, size)


def _index(values: Iterable[int]) -> Index:
    z, y, x = (int(v) for v in values)
    return (z, y, x)


def _millimetres(geometry: VolumeGeometry) -> str:
    return " x ".join(f"{s:.3g}" for s in geometry.spacing) + " mm"
