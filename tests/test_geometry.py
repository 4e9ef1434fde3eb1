"""Where a voxel lies must survive every turn, crop and resampling."""

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from anatomynet.engine.errors import GeometryError
from anatomynet.engine.geometry import Direction, VolumeGeometry
from anatomynet.engine.preprocess import array_from_canonical, canonical_from_array

MICROMETRE = 1e-3  # mm, the largest error of a place that is allowed here
SHAPE = (3, 4, 5)
SPACING = (0.9, 1.1, 2.5)
ORIGIN = (-120.5, 33.25, -410.0)


def _direction(matrix: NDArray[np.float64]) -> Direction:
    (a, b, c), (d, e, f), (g, h, i) = matrix.tolist()
    return (a, b, c), (d, e, f), (g, h, i)


# Every way in which three index axes can run along the patient's, mirrored ones too: 6 orders x 8 signs.
ORIENTATIONS = [
    _direction(np.eye(3)[:, order] * signs)
    for order in permutations(range(3))
    for signs in product((1.0, -1.0), repeat=3)
]


def rotation(degrees: float) -> Direction:
    """A turn around z."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return _direction(np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]]))


def places(geometry: VolumeGeometry) -> NDArray[np.float64]:
    """LPS mm of every voxel, (z, y, x, 3)."""
    z, y, x = np.indices(geometry.shape)
    return geometry.points_from_indices(np.stack((x, y, z), axis=-1))


def faces(geometry: VolumeGeometry) -> NDArray[np.float64]:
    """LPS mm of the two outermost corners."""
    return geometry.points_from_indices(np.array([(0, 0, 0), geometry.shape[::-1]]) - 0.5)


@pytest.mark.parametrize("direction", ORIENTATIONS)
def test_canonical_keeps_every_voxel_in_its_place(direction: Direction) -> None:
    geometry = VolumeGeometry(SHAPE, SPACING, ORIGIN, direction)
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    canonical = geometry.canonical()
    turned = canonical_from_array(array, geometry)
    assert np.array_equal(np.array(canonical.direction), np.eye(3))
    assert turned.shape == canonical.shape
    place_of_value = places(geometry).reshape(-1, 3)
    np.testing.assert_allclose(places(canonical), place_of_value[turned], atol=MICROMETRE)


@pytest.mark.parametrize("direction", ORIENTATIONS)
def test_turning_back_undoes_turning(direction: Direction) -> None:
    geometry = VolumeGeometry(SHAPE, SPACING, ORIGIN, direction)
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    assert np.array_equal(array_from_canonical(canonical_from_array(array, geometry), geometry), array)


def test_there_are_48_orientations() -> None:
    assert len(set(ORIENTATIONS)) == 48


def test_canonical_of_canonical_is_itself() -> None:
    geometry = VolumeGeometry(SHAPE, SPACING, ORIGIN)
    assert geometry.canonical() == geometry
    assert geometry.canonical_axes() == ((0, 1, 2), (False, False, False))


def test_first_axis_of_a_feet_first_series_is_flipped() -> None:
    feet_first = VolumeGeometry(SHAPE, SPACING, ORIGIN, ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, -1.0)))
    assert feet_first.canonical_axes() == ((0, 1, 2), (True, False, False))
    assert feet_first.canonical().origin == (ORIGIN[0], ORIGIN[1], ORIGIN[2] - 2 * SPACING[2])


@pytest.mark.parametrize("degrees", [0.1, 1.0, 30.0, 45.0, 89.0])
def test_oblique_is_refused(degrees: float) -> None:
    geometry = VolumeGeometry(SHAPE, SPACING, ORIGIN, rotation(degrees))
    with pytest.raises(GeometryError, match="oblique"):
        geometry.canonical_axes()
    with pytest.raises(GeometryError, match="oblique"):
        geometry.canonical()


def test_rounding_of_a_header_is_not_oblique() -> None:
    assert VolumeGeometry(SHAPE, SPACING, ORIGIN, rotation(0.03)).canonical_axes()[0] == (0, 1, 2)
    shortened = _direction(0.999999 * np.eye(3))  # cosines written with six digits, cut instead of rounded
    assert VolumeGeometry(SHAPE, SPACING, ORIGIN, shortened).canonical_axes()[0] == (0, 1, 2)


@pytest.mark.parametrize(
    ("shape", "spacing", "origin", "direction"),
    [
        ((0, 4, 5), SPACING, ORIGIN, rotation(0)),
        (SHAPE, (1.0, 0.0, 1.0), ORIGIN, rotation(0)),
        (SHAPE, (1.0, 1.0, -2.0), ORIGIN, rotation(0)),
        (SHAPE, (1.0, float("nan"), 1.0), ORIGIN, rotation(0)),
        (SHAPE, (1.0, 1.0, float("inf")), ORIGIN, rotation(0)),
        (SHAPE, SPACING, (float("nan"), 0.0, 0.0), rotation(0)),
        (SHAPE, SPACING, ORIGIN, ((1.0, 0.1, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))),
        (SHAPE, SPACING, ORIGIN, ((2.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))),
        (SHAPE, SPACING, ORIGIN, ((float("nan"), 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))),
    ],
)
def test_impossible_grids_are_refused(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    origin: tuple[float, float, float],
    direction: Direction,
) -> None:
    with pytest.raises(GeometryError, match="expected"):
        VolumeGeometry(shape, spacing, origin, direction)


def test_affine_by_hand() -> None:
    # x index runs to the patient's back, y index to the right.
    geometry = VolumeGeometry(
        SHAPE, (2.0, 3.0, 5.0), (10.0, 20.0, 30.0), ((0.0, -1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0))
    )
    assert geometry.points_from_indices([1, 2, 3]).tolist() == [10.0 - 6.0, 20.0 + 2.0, 30.0 + 15.0]
    assert (geometry.affine @ [1, 2, 3, 1]).tolist() == [4.0, 22.0, 45.0, 1.0]


coordinates = st.floats(-1e3, 1e3)


@settings(deadline=None, max_examples=60)
@given(
    point=st.tuples(coordinates, coordinates, coordinates),
    spacing=st.tuples(*[st.floats(0.2, 8.0)] * 3),
    orientation=st.sampled_from([*ORIENTATIONS, rotation(17.0)]),
)
def test_points_and_indices_round_trip(
    point: tuple[float, float, float], spacing: tuple[float, float, float], orientation: Direction
) -> None:
    geometry = VolumeGeometry(SHAPE, spacing, ORIGIN, orientation)
    there = geometry.indices_from_points(geometry.points_from_indices(point))
    np.testing.assert_allclose(there, point, atol=1e-6)
    back = geometry.points_from_indices(geometry.indices_from_points(point))
    np.testing.assert_allclose(back, point, atol=1e-6)


@pytest.mark.parametrize("direction", [*ORIENTATIONS[::5], rotation(17.0)])
def test_a_crop_keeps_every_voxel_in_its_place(direction: Direction) -> None:
    geometry = VolumeGeometry(SHAPE, SPACING, ORIGIN, direction)
    crop = geometry.cropped((1, 0, 2), (3, 3, 5))
    assert crop.shape == (2, 3, 3)
    np.testing.assert_allclose(places(crop), places(geometry)[1:3, 0:3, 2:5], atol=MICROMETRE)


@settings(deadline=None, max_examples=80)
@given(
    shape=st.tuples(*[st.integers(1, 200)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6.0)] * 3),
    wanted=st.tuples(*[st.floats(0.5, 5.0)] * 3),
    direction=st.sampled_from(ORIENTATIONS),
)
def test_resampling_keeps_the_outer_faces(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    wanted: tuple[float, float, float],
    direction: Direction,
) -> None:
    geometry = VolumeGeometry(shape, spacing, ORIGIN, direction)
    resampled = geometry.resampled(wanted)
    np.testing.assert_allclose(faces(resampled), faces(geometry), atol=MICROMETRE)
    # No whole number of voxels comes nearer to the wanted spacing.
    extent = np.array(shape[::-1]) * spacing
    voxels = np.array(resampled.shape[::-1])
    assert (np.abs(extent / wanted - voxels) <= np.where(voxels == 1, 1, 0.5) + 1e-9).all()


def test_resampling_by_hand() -> None:
    # Four voxels of 1 mm, from -0.5 to 3.5 mm, become two of 2 mm, centred on 0.5 and 2.5 mm.
    resampled = VolumeGeometry((4, 4, 4), (1.0, 1.0, 1.0)).resampled((2.0, 1.0, 0.5))
    assert resampled == VolumeGeometry((8, 4, 2), (2.0, 1.0, 0.5), (0.5, 0.0, -0.25))
