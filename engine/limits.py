"""The largest CT that the network can be given: the one rule, for every runtime, server and plan.

Convolutions and interpolations on GPUs index a tensor with 32 bits. The largest tensor is either what the last block
sees, 15 channels at the network's resolution, or the logits at the CT's own.
"""

import math

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import GeometryError

LARGEST_TENSOR = 2**31 - 1
CHANNELS_AT_FULL_RESOLUTION = 15  # the up-sampled features and the CT
IN_PLANE_VOXELS = 512


def largest_voxels(config: ModelConfig) -> int:
    """Voxels of the largest CT, of sides that need no padding."""
    pooled = config.in_plane_stride**2
    return LARGEST_TENSOR * pooled // max(CHANNELS_AT_FULL_RESOLUTION, config.classes * pooled)


def largest_slices(config: ModelConfig) -> int:
    """Slices of 512 x 512 in the largest CT; an even number."""
    return largest_voxels(config) // IN_PLANE_VOXELS**2 // 2 * 2


def check_size(shape: tuple[int, ...], config: ModelConfig) -> None:
    """Refuses a CT (z, y, x) beyond the rule, before anything is computed.

    Raises:
        GeometryError: it is larger.
    """
    step = 2 * config.in_plane_stride
    padded = [-(-side // unit) * unit for side, unit in zip(shape, (2, step, step), strict=True)]
    if math.prod(padded) > largest_voxels(config):
        raise GeometryError(
            f"CT of {shape} voxels (z, y, x): expected at most {largest_voxels(config)} in all, "
            f"{largest_slices(config)} slices of 512 x 512; segment a part of the scan"
        )
