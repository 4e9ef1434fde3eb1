"""The network, whole: AnatomyNet as published, and the served graph around it.

Zhu et al., "AnatomyNet", Medical Physics 2018 (arXiv 1808.05238), section 2.2 and figure 1: a 3-D U-Net of
squeeze-and-excitation residual blocks with one single down-sampling, so that small organs keep their voxels.

    stem      1 -> 28, stride 2              the one down-sampling
    encoder   28 -> 30 -> 32 -> 34           two blocks each, at half resolution
    decoder   34+32 -> 32, 32+30 -> 30, 30+28 -> 28, one more block each
    head      transposed 28 -> 14, + input, residual block, 3x3x3 to the classes
"""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anatomynet.engine.config import ModelConfig

STEM_CHANNELS = 28
ENCODER_CHANNELS = (30, 32, 34)
HEAD_CHANNELS = 14
# One hidden unit for every 15 channels in a plain block, for every 16 in a block that follows a concatenation.
REDUCTION = 15
REDUCTION_AFTER_CONCATENATION = 16
AIR = -1.0  # what lies outside the volume, after normalisation


class SqueezeExcitation(nn.Module):
    """Weighs each channel by what the whole volume holds (section 2.2, equation 1)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Float (n, channels, z, y, x) -> the same shape."""
        # The sum runs over millions of voxels, more than FP16 can count: always FP32.
        means = x.mean(dim=(2, 3, 4), dtype=torch.float32).to(self.squeeze.weight.dtype)
        weights = torch.sigmoid(self.excite(F.leaky_relu(self.squeeze(means))))
        return x * weights.to(x.dtype)[:, :, None, None, None]


class ResidualBlock(nn.Module):
    """conv - BN - LeakyReLU - conv - BN (- squeeze and excitation) + shortcut - LeakyReLU (section 2.2, figure 1).

    The shortcut is the identity where the channels agree, else a convolution of `shortcut_kernel` with BN.
    """

    def __init__(self, channels_in: int, channels_out: int, *, reduction: int | None, shortcut_kernel: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv(channels_in, channels_out)
        self.norm1 = nn.BatchNorm3d(channels_out)
        self.conv2 = _conv(channels_out, channels_out)
        self.norm2 = nn.BatchNorm3d(channels_out)
        self.recalibrate = SqueezeExcitation(channels_out, reduction) if reduction else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.shortcut = nn.Sequential(
                _conv(channels_in, channels_out, kernel=shortcut_kernel), nn.BatchNorm3d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Float (n, channels_in, z, y, x) -> (n, channels_out, z, y, x)."""
        y = F.leaky_relu(_normalised(self.conv1, self.norm1, x))
        y = self.recalibrate(_normalised(self.conv2, self.norm2, y))
        if isinstance(self.shortcut, nn.Sequential):
            return F.leaky_relu(y + _normalised(*_conv_and_norm(self.shortcut), x))
        return F.leaky_relu(y + self.shortcut(x))


class AnatomyNet(nn.Module):
    """The published network (section 2.2, figure 1), at its own resolution.

    Args:
        classes: background and structures; 10 classes give 734,417 parameters.

    Input: float (n, 1, z, y, x), normalised to -1..1, at least 8 voxels a side; n is 1 in the paper.
    Output: logits, float (n, classes, z, y, x), of the input's size: odd sides are padded with air and cut again.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        # The only down-sampling (section 2.2): a chiasm of a few slices would not live through a second one.
        self.stem = nn.Sequential(_conv(1, STEM_CHANNELS, stride=2), nn.BatchNorm3d(STEM_CHANNELS), nn.LeakyReLU())
        widths = (STEM_CHANNELS, *ENCODER_CHANNELS)
        self.encoder = nn.ModuleList(
            nn.Sequential(
                ResidualBlock(before, after, reduction=REDUCTION),
                ResidualBlock(after, after, reduction=REDUCTION),
            )
            for before, after in pairwise(widths)
        )
        # All at one resolution, each after the encoder's features of its own level (figure 1).
        self.decoder = nn.ModuleList(
            nn.Sequential(
                ResidualBlock(deep + skip, skip, reduction=REDUCTION_AFTER_CONCATENATION),
                ResidualBlock(skip, skip, reduction=REDUCTION),
            )
            for deep, skip in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        # Back to the input's resolution, and the CT itself beside the features (figure 1).
        self.upsample = nn.ConvTranspose3d(STEM_CHANNELS, HEAD_CHANNELS, kernel_size=2, stride=2)
        self.head = ResidualBlock(HEAD_CHANNELS + 1, HEAD_CHANNELS, reduction=None, shortcut_kernel=3)
        self.classify = nn.Conv3d(HEAD_CHANNELS, classes, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Float (n, 1, z, y, x) -> logits (n, classes, z, y, x)."""
        depth, height, width = x.shape[2:]
        x = F.pad(x, (0, width % 2, 0, height % 2, 0, depth % 2), value=AIR)
        return self.logits_of_even_sides(x)[:, :, :depth, :height, :width]

    def logits_of_even_sides(self, x: Tensor) -> Tensor:
        """`forward` for sides that are all even, so without padding: what is exported."""
        y = F.leaky_relu(_normalised(*_conv_and_norm(self.stem), x))
        skips = []
        for stage in self.encoder:
            skips.append(y)
            y = stage(y)
        for stage in self.decoder:
            y = stage(torch.cat((y, skips.pop()), dim=1))
        y = self.head(torch.cat((self.upsample(y), x), dim=1))
        logits: Tensor = self.classify(y)
        return logits


def normalised_from_hu(hu: Tensor, window: tuple[float, float]) -> Tensor:
    """Hounsfield units, any shape -> float, the window mapped to -1..1 and clipped there."""
    low, high = window
    return (hu.float().clamp(low, high) - (low + high) / 2) / ((high - low) / 2)


class ServedNetwork(nn.Module):
    """The served model's contract around AnatomyNet, in PyTorch: what every exported form is held against.

    Input: CT, int16 (z, y, x), Hounsfield units, of any size of at least 8 voxels (8 x stride in plane) a side.
    Output: LABEL_MAP, uint8 (z, y, x), and CONFIDENCE, float32 (structures,): the mean top probability over each
    structure's border voxels at the network's resolution; 0 where the structure is absent.

    Args:
        network: AnatomyNet, or another that maps its input to its output.
        config: of it.
    """

    def __init__(self, network: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.network = network
        self.config = config

    def forward(self, hu: Tensor) -> tuple[Tensor, Tensor]:
        """CT -> LABEL_MAP, CONFIDENCE."""
        coarse = self.network(self.network_input_from_hu(hu))
        label_map = self.logits_on_grid(coarse, hu.shape).argmax(dim=1)[0].to(torch.uint8)
        return label_map, border_confidence(coarse)

    def network_input_from_hu(self, hu: Tensor) -> Tensor:
        """int16 (z, y, x) -> float (1, 1, z', y', x'): padded with air to whole strides, averaged, normalised."""
        low, _ = self.config.hu_window
        stride = self.config.in_plane_stride
        depth, height, width = hu.shape
        pad = (0, -width % (2 * stride), 0, -height % (2 * stride), 0, depth % 2)
        x = F.pad(hu.float()[None, None], pad, value=low)
        if stride > 1:
            x = F.avg_pool3d(x, (1, stride, stride))
        return normalised_from_hu(x, self.config.hu_window)

    def logits_on_grid(self, coarse: Tensor, shape: torch.Size) -> Tensor:
        """Logits at the network's resolution -> logits (1, classes, z, y, x) of the CT's own shape."""
        stride = self.config.in_plane_stride
        if stride > 1:
            coarse = F.interpolate(coarse, scale_factor=(1, stride, stride), mode="trilinear", align_corners=False)
        depth, height, width = shape
        return coarse[:, :, :depth, :height, :width]


def border_confidence(logits: Tensor) -> Tensor:
    """Logits (1, classes, z, y, x) -> float32 (classes - 1,), the mean top probability along each border.

    A border voxel has a voxel of another label among its 26 neighbours.
    """
    top, label = logits.softmax(dim=1).max(dim=1)
    label_as_float = label.float()[None]
    highest = F.max_pool3d(label_as_float, 3, stride=1, padding=1)[0]
    lowest = -F.max_pool3d(-label_as_float, 3, stride=1, padding=1)[0]
    border = highest != lowest
    sums = [((label == c) & border).float() for c in range(1, logits.shape[1])]
    return torch.stack([(s * top).sum() / s.sum().clamp(min=1) for s in sums])


def _normalised(conv: nn.Conv3d, norm: nn.BatchNorm3d, x: Tensor) -> Tensor:
    """norm(conv(x)). While training with frozen statistics they go into the kernel: PyTorch's normalisation takes a
    third of a training step on a CPU, frozen or not."""
    statistics_are_frozen = conv.training and not norm.training
    if not statistics_are_frozen:
        y: Tensor = norm(conv(x))
        return y
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    kernel = conv.weight * scale[:, None, None, None, None]
    return F.conv3d(x, kernel, norm.bias - mean * scale, conv.stride, conv.padding)


def _conv_and_norm(layers: nn.Sequential) -> tuple[nn.Conv3d, nn.BatchNorm3d]:
    return cast("tuple[nn.Conv3d, nn.BatchNorm3d]", (layers[0], layers[1]))


def _conv(channels_in: int, channels_out: int, *, kernel: int = 3, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(channels_in, channels_out, kernel, stride=stride, padding=kernel // 2, bias=False)
