"""engine/limits.py: the one rule for the largest CT."""

import math

import numpy as np
import pytest

from anatomynet.engine.errors import GeometryError, ModelError
from anatomynet.engine.limits import (
    CHANNELS_AT_FULL_RESOLUTION,
    SizeLimit,
    check_size,
    largest_slices,
    largest_voxels,
    size_limit,
    size_limit_from_parameters,
)
from anatomynet.engine.runtime import TorchRuntime
from tests.random_network import STRIDES, random_config, random_network

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


def test_a_plans_sides_count() -> None:
    """As many voxels may lie in a longer row, which the plan's profile does not take."""
    limit = SizeLimit(largest_voxels(random_config()), (1022, 512, 512))
    limit.check((1022, 511, 512), random_config())
    with pytest.raises(GeometryError, match=r"at most \(1022, 512, 512\), which is what the server's plan"):
        limit.check((20, 520, 512), random_config())


def test_what_a_served_model_says_of_itself() -> None:
    config = random_config()
    found = size_limit_from_parameters({"largest_voxels": "1000", "largest_shape_zyx": "10 10 10"}, config)
    assert found == SizeLimit(1000, (10, 10, 10))
    assert size_limit_from_parameters({}, config) == size_limit(config)
    with pytest.raises(ModelError, match="no whole number: export it again"):
        size_limit_from_parameters({"largest_voxels": "many"}, config)


def test_embedded_runtimes_refuse_what_is_too_large() -> None:
    runtime = TorchRuntime(random_network(), random_config())
    with pytest.raises(GeometryError, match="1022 slices of 512 x 512"):
        runtime.infer(np.zeros((2000, 512, 512), np.int16))
