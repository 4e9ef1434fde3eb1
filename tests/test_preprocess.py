"""The network is shown the patient, in known axes, at a trained spacing, on an unshifted pooling grid."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn import functional as F

from anatomynet.engine.config import ModelConfig, load_config
from anatomynet.engine.errors import GeometryError
from anatomynet.engine.geometry import Index, VolumeGeometry
from anatomynet.engine.preprocess import BOX_STEP, POOLING, body_box, prepare, resample_linear, trained_grid
from anatomynet.engine.volume import CTVolume

AIR, TISSUE = -1000, 40
INTERPOLATION_TOLERANCE = 0.01  # HU, of values up to 1000 whose weights are float32

STRIDE_1 = ModelConfig("test", ("BrainStem",), 1, (1.0, 1.0, 2.0), (2.0, 2.0, 3.0), (-250.0, 550.0))
STRIDE_4 = replace(STRIDE_1, in_plane_stride=4)


def ellipsoid(shape: Index, centre: tuple[float, ...], radii: tuple[float, ...]) -> NDArray[np.int16]:
    """HU of tissue in air."""
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    inside = sum(((i - c) / r) ** 2 for i, c, r in zip((z, y, x), centre, radii, strict=True)) <= 1
    return np.where(inside, TISSUE, AIR).astype(np.int16)


@st.composite
def bodies(draw: st.DrawFn, stride: int) -> NDArray[np.int16]:
    """An ellipsoid at least three sampled voxels in radius, anywhere in the volume, cut by its faces or not."""
    units = (POOLING, POOLING * stride, POOLING * stride)
    sides = [draw(st.integers(8 * unit, 22 * unit)) for unit in units]
    centre = tuple(draw(st.floats(0, side - 1)) for side in sides)
    radii = tuple(draw(st.floats(3.0 * unit, 12.0 * unit)) for unit in units)
    return ellipsoid((sides[0], sides[1], sides[2]), centre, radii)


@pytest.mark.parametrize("stride", [1, 2, 4])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_body_box_holds_the_body_on_the_pooling_grid(stride: int, data: st.DataObject) -> None:
    hu = data.draw(bodies(stride))
    start, stop = body_box(hu, in_plane_stride=stride)
    multiples = np.multiply(BOX_STEP, (1, stride, stride))
    for axis, (a, b, side) in enumerate(zip(start, stop, hu.shape, strict=True)):
        assert 0 <= a < b <= side
        assert a % (POOLING if axis == 0 else POOLING * stride) == 0
        assert (b - a) % multiples[axis] == 0 or (a, b) == (0, side)
    outside = hu.copy()
    outside[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = AIR
    assert (outside == AIR).all()


def test_body_box_cuts_air_away() -> None:
    start, stop = body_box(ellipsoid((64, 128, 128), (32, 64, 64), (10, 20, 30)), in_plane_stride=1)
    assert np.subtract(stop, start).tolist() == [32, 48, 64]


def test_body_box_is_as_wide_to_the_left_as_to_the_right() -> None:
    # Bodies whose extent with margins is a whole number of steps, so that nothing is rounded to one side.
    hu = ellipsoid((64, 128, 128), (31.5, 63.5, 63.5), (13.5, 21.5, 29.5))
    start, stop = body_box(hu, in_plane_stride=1)
    assert np.add(start, stop).tolist() == [64, 128, 128]


@settings(deadline=None, max_examples=25)
@given(hu=bodies(1))
def test_box_of_a_full_resolution_ct_is_that_of_the_averaged_one(hu: NDArray[np.int16]) -> None:
    # Training sees CTs at the network's resolution, serving sees full ones: the boxes must be the same.
    full = hu.repeat(4, axis=1).repeat(4, axis=2)
    coarse_start, coarse_stop = body_box(hu, in_plane_stride=1)
    start, stop = body_box(full, in_plane_stride=4)
    assert start == tuple(np.multiply(coarse_start, (1, 4, 4)))
    assert stop == tuple(np.multiply(coarse_stop, (1, 4, 4)))


@pytest.mark.parametrize("stride", [1, 4])
def test_without_a_body_the_box_is_the_whole_volume(stride: int) -> None:
    assert body_box(np.full((17, 64, 65), AIR, np.int16), in_plane_stride=stride) == ((0, 0, 0), (17, 64, 65))


def test_the_couch_is_left_out() -> None:
    hu = ellipsoid((48, 128, 128), (24, 40, 64), (20, 24, 24))
    hu[:, 112:116] = TISSUE
    assert body_box(hu, in_plane_stride=1)[1][1] <= 80


def test_trained_spacing_is_left_alone() -> None:
    for spacing in ((1.0, 1.0, 2.0), (2.0, 2.0, 3.0), (1.5, 1.2, 2.5), (0.985, 2.03, 3.05)):
        geometry = VolumeGeometry((20, 30, 40), spacing)
        assert trained_grid(geometry, STRIDE_1) is geometry


def test_other_spacing_goes_to_the_nearest_that_was_trained() -> None:
    grid = trained_grid(VolumeGeometry((20, 40, 40), (0.5, 1.5, 6.0)), STRIDE_1)
    assert grid == VolumeGeometry((40, 40, 20), (1.0, 1.5, 3.0), (0.25, 0.0, -1.5))


@pytest.mark.parametrize("shape", [(9, 20, 13), (7, 33, 40), (30, 20, 20)])
def test_resampling_agrees_with_torch(shape: Index) -> None:
    array = np.random.default_rng(1).uniform(-1000, 1000, (15, 20, 26)).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(array)[None, None], shape, mode="trilinear", align_corners=False)
    np.testing.assert_allclose(resample_linear(array, shape), expected[0, 0].numpy(), atol=INTERPOLATION_TOLERANCE)


@pytest.mark.parametrize("dtype", [np.int16, np.bool_, np.float32])
def test_resampling_to_the_same_shape_changes_nothing(dtype: type[np.generic]) -> None:
    array = np.random.default_rng(2).integers(0, 2, (4, 5, 6)).astype(dtype)
    same = resample_linear(array, (4, 5, 6))
    assert same.dtype == np.float32
    assert np.array_equal(same, array.astype(np.float32))


def test_a_part_of_a_resampled_array_is_cut_from_the_whole() -> None:
    array = np.random.default_rng(3).uniform(-1000, 1000, (10, 12, 1)).astype(np.float32)
    whole = resample_linear(array, (25, 12, 3))
    part = resample_linear(array, (25, 12, 3), start=(3, 2, 1), stop=(20, 11, 2))
    np.testing.assert_allclose(part, whole[3:20, 2:11, 1:2], atol=INTERPOLATION_TOLERANCE)


def test_prepare_gives_the_body_and_where_it_was() -> None:
    hu = ellipsoid((48, 128, 128), (24, 64, 64), (20, 24, 24))
    given_ = prepare(CTVolume(hu, VolumeGeometry((48, 128, 128), (1.5, 1.5, 2.5))), STRIDE_1)
    stop = np.add(given_.start, given_.hu.shape)
    assert np.array_equal(given_.hu, hu[tuple(slice(a, b) for a, b in zip(given_.start, stop, strict=True))])
    assert given_.hu.dtype == np.int16
    assert np.shares_memory(given_.hu, hu)  # a runtime makes the one copy
    assert given_.grid == given_.canonical
    assert given_.notes == ()


def test_prepare_says_that_it_resampled() -> None:
    hu = np.full((20, 40, 40), TISSUE, np.int16)
    given_ = prepare(CTVolume(hu, VolumeGeometry((20, 40, 40), (0.5, 0.5, 2.5))), STRIDE_1)
    assert given_.grid.shape == (20, 20, 20)
    assert given_.hu.dtype == np.int16
    assert (given_.hu == TISSUE).all()
    assert len(given_.notes) == 1
    assert "from 0.5 x 0.5 x 2.5 mm to 1 x 1 x 2.5 mm" in given_.notes[0]


@pytest.mark.parametrize(
    ("config", "shape"),
    [(STRIDE_1, (7, 40, 40)), (STRIDE_1, (40, 40, 7)), (STRIDE_4, (40, 40, 31)), (STRIDE_4, (7, 40, 40))],
)
def test_too_small_volumes_are_refused(config: ModelConfig, shape: Index) -> None:
    volume = CTVolume(np.zeros(shape, np.int16), VolumeGeometry(shape, (1.5, 1.5, 2.5)))
    with pytest.raises(GeometryError, match="expected at least"):
        prepare(volume, config)


def test_a_volume_that_resampling_makes_too_small_is_refused() -> None:
    volume = CTVolume(np.zeros((20, 20, 20), np.int16), VolumeGeometry((20, 20, 20), (0.1, 0.1, 2.5)))
    with pytest.raises(GeometryError, match="expected at least"):
        prepare(volume, STRIDE_1)


def test_shipped_configurations_leave_their_own_spacing_alone() -> None:
    geometry = VolumeGeometry((100, 512, 512), (1.0, 1.0, 2.5))
    for name in ("oar9", "openkbp7"):
        assert trained_grid(geometry, load_config(name)[0]) is geometry
