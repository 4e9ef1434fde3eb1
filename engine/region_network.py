"""The region finder's network: a coarse CT -> where the structures are -> their box. Learnt by train_region.py.

A small U-Net of two down-samplings, without normalisation layers: air is 0, so that what lies beyond the scan looks
like air, and nothing hangs on how large the scan is.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anatomynet.engine.region import RegionConfig

CHANNELS = (8, 16, 24)
POOLED = 4  # the sides of what the network is given are multiples of it: padded with air at the far end
SLOPE = 0.01  # of the leaky ReLU


class RegionNetwork(nn.Module):
    """The U-Net.

    Input: float (n, 1, z, y, x), air 0, all sides multiples of 4.
    Output: logits of "a structure is in this voxel", float (n, 1, z, y, x).
    """

    def __init__(self) -> None:
        super().__init__()
        fine, middle, coarse = CHANNELS
        self.encode_fine = _two_convolutions(1, fine)
        self.encode_middle = _two_convolutions(fine, middle)
        self.encode_coarse = _two_convolutions(middle, coarse)
        self.decode_middle = _two_convolutions(coarse + middle, middle)
        self.decode_fine = _two_convolutions(middle + fine, fine)
        self.classify = nn.Conv3d(fine, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Float (n, 1, z, y, x) -> logits (n, 1, z, y, x)."""
        fine = self.encode_fine(x)
        middle = self.encode_middle(F.max_pool3d(fine, 2))
        coarse = self.encode_coarse(F.max_pool3d(middle, 2))
        middle = self.decode_middle(torch.cat((_doubled(coarse), middle), dim=1))
        fine = self.decode_fine(torch.cat((_doubled(middle), fine), dim=1))
        logits: Tensor = self.classify(fine)
        return logits


def input_from_coarse(hu: Tensor, config: RegionConfig) -> Tensor:
    """HU, int16 (z, y, x) -> float (1, 1, z', y', x'): the window to 0..1, clipped, padded with air."""
    low, high = config.hu_window
    pad = [length for side in reversed(hu.shape) for length in (0, -side % POOLED)]
    return F.pad((hu.float().clamp(low, high) - low) / (high - low), pad)[None, None]


class ServedRegion(nn.Module):
    """The served model `anatomynet_region` in PyTorch: what the exported graph is held against.

    Input: CT_COARSE, int16 (z, y, x), Hounsfield units, of any size.
    Output: BOX, int64 (6,): start z, y, x and stop z, y, x in coarse voxels, half-open; six zeros where nothing is.
    """

    def __init__(self, network: nn.Module, config: RegionConfig) -> None:
        super().__init__()
        self.network = network
        self.config = config

    def forward(self, hu: Tensor) -> Tensor:
        """CT_COARSE -> BOX."""
        return box_of(self.logits(hu) > self.config.threshold, self.config.margin)

    def logits(self, hu: Tensor) -> Tensor:
        """CT_COARSE -> logits, float (z, y, x), of "a structure is in this voxel"."""
        depth, height, width = hu.shape
        logits: Tensor = self.network(input_from_coarse(hu, self.config))[0, 0, :depth, :height, :width]
        return logits


def box_of(found: Tensor, margin: tuple[int, int, int]) -> Tensor:
    """Bool (z, y, x) -> int64 (6,): the box of what is True and a margin around it; six zeros where nothing is."""
    if not found.any():
        return torch.zeros(6, dtype=torch.int64)
    places = found.nonzero()
    size, around = torch.tensor(found.shape), torch.tensor(margin)
    start = (places.min(dim=0).values - around).clamp(min=0)
    return torch.cat((start, torch.minimum(places.max(dim=0).values + 1 + around, size)))


def _two_convolutions(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(channels_in, channels_out, 3, padding=1),
        nn.LeakyReLU(SLOPE),
        nn.Conv3d(channels_out, channels_out, 3, padding=1),
        nn.LeakyReLU(SLOPE),
    )


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
