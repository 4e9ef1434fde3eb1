"""The largest CT that can be computed: the one rule for every runtime, server and plan.

Convolutions and interpolations on GPUs index a tensor with 32 bits. The largest tensor is either what the last block
sees, 15 channels at the network's resolution, or the logits at the CT's own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import GeometryError, ModelError

LARGEST_TENSOR = 2**31 - 1
CHANNELS_AT_FULL_RESOLUTION = 15  # the up-sampled features and the CT
IN_PLANE_VOXELS = 512
# Of a served model's parameters.
VOXELS_KEY, SIDES_KEY = "largest_voxels", "largest_shape_zyx"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SizeLimit:
    """The largest CT that something takes.

    Attributes:
        voxels: in all, those of the padding too.
        sides: (z, y, x), none may be longer, as a plan's profile has it; empty where only the number counts.
    """

    voxels: int
    sides: Shape = ()

    def check(self, shape: Shape, config: ModelConfig) -> None:
        """Refuses a larger CT (z, y, x), before anything is computed.

        Raises:
            GeometryError: it is larger.
        """
        step = 2 * config.in_plane_stride
        padded = [-(-side // unit) * unit for side, unit in zip(shape, (2, step, step), strict=True)]
        if math.prod(padded) > self.voxels:
            slices = _slices(self.voxels)
            raise GeometryError(
                f"CT of {shape} voxels (z, y, x): expected at most {self.voxels} in all, {slices} slices of "
                "512 x 512; segment a part of the scan"
            )
        if self.sides and any(side > limit for side, limit in zip(padded, self.sides, strict=True)):
            raise GeometryError(
                f"CT of {shape} voxels (z, y, x): expected at most {self.sides}, which is what the server's plan was "
                "built for; segment a part of the scan"
            )


def size_limit(config: ModelConfig) -> SizeLimit:
    """What the rule leaves any runtime."""
    return SizeLimit(largest_voxels(config))


def size_limit_from_parameters(parameters: Mapping[str, str], config: ModelConfig) -> SizeLimit:
    """What a served model says of itself; what the rule says where it says nothing.

    Args:
        parameters: of its config.pbtxt.
        config: of the model.

    Raises:
        ModelError: parameters that are not whole numbers.
    """
    try:
        voxels = int(parameters.get(VOXELS_KEY, largest_voxels(config)))
        sides = tuple(map(int, parameters.get(SIDES_KEY, "").split()))
    except ValueError as error:
        raise ModelError(
            f"the served model's {VOXELS_KEY} or {SIDES_KEY} is no whole number: export it again"
        ) from error
    return SizeLimit(voxels, sides if len(sides) == 3 else ())


def largest_voxels(config: ModelConfig) -> int:
    """Voxels of the largest CT, of sides that need no padding."""
    pooled = config.in_plane_stride**2
    return LARGEST_TENSOR * pooled // max(CHANNELS_AT_FULL_RESOLUTION, config.classes * pooled)


def largest_slices(config: ModelConfig) -> int:
    """Slices of 512 x 512 in the largest CT; an even number."""
    return _slices(largest_voxels(config))


def check_size(shape: Shape, config: ModelConfig) -> None:
    """Refuses a CT (z, y, x) beyond the rule, before anything is computed.

    Raises:
        GeometryError: it is larger.
    """
    size_limit(config).check(shape, config)


def _slices(voxels: int) -> int:
    """Of 512 x 512, an even number."""
    return voxels // IN_PLANE_VOXELS**2 // 2 * 2
