"""A shape's distance is that of its surface, its box holds it, and its mirror image is one."""

import numpy as np
import pytest

from anatomynet.engine.phantom_shapes import Array, Common, Ellipsoid, HalfSpace, Loft, Shape, Tube, Union

EXACT_MM = 1e-3  # float32 over 100 mm
NEAR_SURFACE_MM = 1.0
FIRST_ORDER_MM = 0.1  # error of the first-order distance of an ellipsoid, so near its surface
VOLUME_TOLERANCE = 0.01

BALL = Ellipsoid((4.0, -3.0, 2.0), (10.0, 10.0, 10.0))
EGG = Ellipsoid((4.0, -3.0, 2.0), (10.0, 14.0, 20.0))
BOX = Ellipsoid((4.0, -3.0, 2.0), (10.0, 14.0, 20.0), boxy=True)
TAPERED = Tube(((0, 0, -20, 4), (10, 0, 0, 8), (6, 5, 20, 3)))
FLAT = Tube(((0, 0, -20, 4), (10, 0, 20, 6)), (1, 2, 0.5))
STACK = Loft(((-20, 0, 0, 5, 8), (0, 6, 2, 10, 12), (20, 3, 0, 6, 6)))
HALF_BALL = Common((BALL, HalfSpace((0.0, 0.0, 2.0), (0.0, 0.0, 3.0))))
PAIR = Union((BALL, TAPERED))
SHAPES = [BALL, EGG, BOX, TAPERED, FLAT, STACK, HALF_BALL, PAIR]


def lattice(step: float = 1.0) -> tuple[Array, Array, Array]:
    axis = np.arange(-40, 40, step, dtype=np.float32)
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    return x, y, z


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: type(s).__name__)
def test_box_holds_the_shape(shape: Shape) -> None:
    points = lattice()
    inside = shape.distance(*points) < 0
    low, high = shape.bounds()
    assert inside.any()
    for axis, p in enumerate(points):
        assert low[axis] <= p[inside].min()
        assert p[inside].max() <= high[axis]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: type(s).__name__)
def test_mirror_image_lies_on_the_other_side(shape: Shape) -> None:
    x, y, z = lattice(2.0)
    np.testing.assert_allclose(shape.mirrored().distance(-x, y, z), shape.distance(x, y, z), atol=EXACT_MM)


def test_ball_is_exact() -> None:
    x, y, z = lattice()
    expected = np.sqrt((x - 4) ** 2 + (y + 3) ** 2 + (z - 2) ** 2) - 10
    np.testing.assert_allclose(BALL.distance(x, y, z), expected, atol=EXACT_MM)


def test_tube_is_exact_round_its_axis() -> None:
    x, y, z = lattice()
    straight = Tube(((0, 0, -100, 5), (0, 0, 100, 5)))
    np.testing.assert_allclose(straight.distance(x, y, z), np.hypot(x, y) - 5, atol=EXACT_MM)


def test_plane_is_exact_whatever_its_normals_length() -> None:
    x, y, z = lattice(4.0)
    np.testing.assert_allclose(HalfSpace((0, 0, 5), (0, 0, 7)).distance(x, y, z), z - 5, atol=EXACT_MM)


def test_egg_is_right_near_its_surface() -> None:
    # Points are put on the surface, then moved along its normal by a known distance.
    rng = np.random.default_rng(0)
    on_sphere = rng.standard_normal((1000, 3))
    on_sphere /= np.linalg.norm(on_sphere, axis=1, keepdims=True)
    radii = np.array(EGG.radii)
    normal = on_sphere / radii
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    moved = rng.uniform(-NEAR_SURFACE_MM, NEAR_SURFACE_MM, 1000)
    points = (on_sphere * radii + moved[:, None] * normal + EGG.centre).astype(np.float32)
    np.testing.assert_allclose(EGG.distance(*points.T), moved, atol=FIRST_ORDER_MM)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (EGG, 4 / 3 * np.pi * 10 * 14 * 20),
        (Loft(((-10, 0, 0, 5, 8), (10, 4, 0, 5, 8))), np.pi * 5 * 8 * 20),
        (Tube(((0, 0, -10, 5), (0, 0, 10, 5)), (1, 2, 1)), 2 * (np.pi * 25 * 20 + 4 / 3 * np.pi * 125)),
        (HALF_BALL, 2 / 3 * np.pi * 1000),
    ],
    ids=["ellipsoid", "loft", "tube", "half ball"],
)
def test_volume_is_the_textbooks(shape: Shape, expected: float) -> None:
    step = 0.5
    x, y, z = (p + np.float32(step / 2) for p in lattice(step))
    assert (shape.distance(x, y, z) < 0).sum() * step**3 == pytest.approx(expected, rel=VOLUME_TOLERANCE)


def test_layers_do_not_break_at_the_centre() -> None:
    # The gradient vanishes there: a distance above zero would punch a hole into the organ.
    for shape in (EGG, BOX, STACK):
        centre = np.array([[[-1e-4, 0, 1e-4]]], dtype=np.float32)
        x, y, z = (centre + np.float32(c) for c in getattr(shape, "centre", (6.0, 2.0, 0.0)))
        assert (shape.distance(x, y, z) < -5).all()
