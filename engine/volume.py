"""CTVolume and LabelMap: an array with its geometry. What goes into `segment`, and what comes out."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.errors import GeometryError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.structures import Structure

HounsfieldArray = NDArray[np.int16]
LabelArray = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class CTVolume:
    """A CT.

    Attributes:
        hu: int16 (z, y, x), Hounsfield units.
        geometry: of that array, in any axis-aligned orientation.

    Raises:
        GeometryError: an array of another shape or type.
    """

    hu: HounsfieldArray
    geometry: VolumeGeometry

    def __post_init__(self) -> None:
        _check_array(self.hu, np.dtype(np.int16), self.geometry)


@dataclass(frozen=True, eq=False)
class LabelMap:
    """Which structure each voxel belongs to.

    Attributes:
        labels: uint8 (z, y, x), 0 background, i + 1 for structures[i].
        geometry: of that array: the CT's own.
        structures: what the labels mean.
        confidence: for each structure the mean top probability along its border, 0 where absent; None for a truth.
        stray_ml: for each structure the millilitres that were left out as strays, small pieces apart from the rest;
            None for a truth.
        notes: what was done on the way that a user should know, one sentence each ("resampled from ...").
        computed_share: of the CT's voxels, those that the network saw; None for a truth.

    Raises:
        GeometryError: an array of another shape or type.
    """

    labels: LabelArray
    geometry: VolumeGeometry
    structures: tuple[Structure, ...]
    confidence: tuple[float, ...] | None = None
    stray_ml: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()
    computed_share: float | None = None

    def __post_init__(self) -> None:
        _check_array(self.labels, np.dtype(np.uint8), self.geometry)


def _check_array(array: NDArray[np.generic], dtype: np.dtype[np.generic], geometry: VolumeGeometry) -> None:
    if array.dtype != dtype or array.shape != geometry.shape:
        raise GeometryError(
            f"expected {dtype} of shape {geometry.shape} (z, y, x), found {array.dtype} of shape {array.shape}"
        )
