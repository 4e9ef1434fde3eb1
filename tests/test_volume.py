"""An array and its geometry agree, or are refused."""

import numpy as np
import pytest

from anatomynet.engine.errors import GeometryError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.structures import structures_by_name
from anatomynet.engine.volume import CTVolume, LabelMap

GEOMETRY = VolumeGeometry((2, 3, 4), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32, np.uint8])
def test_hounsfield_units_are_int16(dtype: type[np.generic]) -> None:
    with pytest.raises(GeometryError, match="expected int16 of shape"):
        CTVolume(np.zeros((2, 3, 4), dtype), GEOMETRY)


@pytest.mark.parametrize("shape", [(4, 3, 2), (2, 3), (2, 3, 4, 1)])
def test_shape_is_the_geometrys(shape: tuple[int, ...]) -> None:
    with pytest.raises(GeometryError, match="of shape"):
        CTVolume(np.zeros(shape, np.int16), GEOMETRY)
    with pytest.raises(GeometryError, match="of shape"):
        LabelMap(np.zeros(shape, np.uint8), GEOMETRY, structures_by_name(("BrainStem",)))


def test_labels_are_uint8() -> None:
    with pytest.raises(GeometryError, match="expected uint8"):
        LabelMap(np.zeros((2, 3, 4), np.int64), GEOMETRY, ())


def test_what_fits_is_kept() -> None:
    hu = np.zeros((2, 3, 4), np.int16)
    assert CTVolume(hu, GEOMETRY).hu is hu
