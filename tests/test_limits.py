"""engine/limits.py: the one rule for the largest CT."""

import math

import pytest

from anatomynet.engine.errors import GeometryError
from anatomynet.engine.limits import CHANNELS_AT_FULL_RESOLUTION, check_size, largest_slices, largest_voxels
from tests.random_network import STRIDES, random_config

INDEX_LIMIT = 2**31


@pytest.mark.parametrize("stride", STRIDES)
def test_no_tensor_of_the_largest_ct_is_beyond_32_bits(stride: int) -> None:
    config = random_config(stride)
    for voxels in (largest_voxels(config), largest_slices(config) * 512 * 512):
        assert CHANNELS_AT_FULL_RESOLUTION * voxels < INDEX_LIMIT * stride**2
        assert config.classes * voxels < INDEX_LIMIT
    beyond = largest_voxels(config) + stride**2
    assert max(CHANNELS_AT_FULL_RESOLUTION * beyond // stride**2, config.classes * beyond) >= INDEX_LIMIT


@pytest.mark.parametrize(("stride", "slices"), [(1, 546), (4, 1022)])
def test_how_many_slices_that_is(stride: int, slices: int) -> None:
    config = random_config(stride)
    assert largest_slices(config) == slices
    check_size((slices, 512, 512), config)
    check_size((slices, 511, 509), config)


@pytest.mark.parametrize("stride", STRIDES)
def test_what_is_larger_is_refused(stride: int) -> None:
    with pytest.raises(
        GeometryError, match=r"\(2000, 512, 512\) voxels .* at most \d+ in all, \d+ slices of 512 x 512"
    ):
        check_size((2000, 512, 512), random_config(stride))


def test_padding_counts() -> None:
    config = random_config(1)
    shape = (547, 511, 512)
    assert math.prod(shape) < largest_voxels(config)
    with pytest.raises(GeometryError):
        check_size(shape, config)
