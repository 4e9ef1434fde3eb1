"""AnatomyNet as a GPU's tensor cores want it: the same logits, other shapes. What GpuRuntime computes with.

    stem       the 3 x 3 x 3 of stride 2 as a 2 x 2 x 2 over blocks of eight voxels: eight channels instead of one
    trunk      batch normalisation folded, channels padded with zeros to multiples of eight, channels last
    upsample   one matrix product, in which the CT goes through beside the features: no concatenation at full resolution
    head       its first convolution and its shortcut read the same, so they are one; 16 channels, of which the last is
               1 everywhere and carries the biases

The 3 x 3 x 3 convolutions and what stands between them are in engine.gpu_operations. The means of squeeze and
excitation, and what they decide, are in FP32 whatever the network is in. The head sees no further than three voxels, so
it may be computed in slabs of slices: see `HEAD_HALO`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anatomynet.engine.gpu_operations import Operations, Shape, rows_of, volume_of
from anatomynet.engine.network import HEAD_CHANNELS, AnatomyNet, ResidualBlock, SqueezeExcitation
from anatomynet.engine.padding import padded_network

MULTIPLE = 8  # of channels, for FP16
HEAD_WIDTH = 16  # HEAD_CHANNELS, the CT, and ones
CT_CHANNEL, ONES_CHANNEL = HEAD_CHANNELS, HEAD_WIDTH - 1
LAST = torch.channels_last_3d
HEAD_HALO = 2  # slices of features, each of which is two of the CT


class TensorCoreNetwork(nn.Module):
    """AnatomyNet's logits, for inference alone.

    Args:
        network: whose weights are copied.
        operations: what computes its 3 x 3 x 3 convolutions, and what is between them.
        dtype: of weights and activations; FP16 is what it is for, FP32 shows that the logits are the same.
    """

    def __init__(self, network: AnatomyNet, operations: Operations, dtype: torch.dtype) -> None:
        super().__init__()
        source = padded_network(network, MULTIPLE)
        stem = source.stem[0]
        assert isinstance(stem, nn.Conv3d)
        self.classes = source.classify.out_channels
        self.operations = operations
        self.stem = _Weights(_over_blocks(stem.weight).contiguous(memory_format=LAST), stem.bias, dtype)
        widths = [stem.out_channels]
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for stage in source.encoder:
            self.encoder.append(_Stage(stage, operations, dtype, widths[-1:]))
            widths.append(_width(stage))
        deep = widths.pop()
        for stage in source.decoder:
            self.decoder.append(_Stage(stage, operations, dtype, (deep, widths.pop())))
            deep = _width(stage)
        self.upsample = _Weights(*_upsample_matrix(source.upsample), dtype)
        width = -(-self.classes // MULTIPLE) * MULTIPLE
        self.first, self.second, self.classify = (
            _Weights(operations.prepared(kernel.detach().to(dtype), [HEAD_WIDTH]), None, dtype)
            for kernel in (
                _first_of_head(source.head),
                _with_ones(source.head.conv2, HEAD_WIDTH, keep_ones=False),
                _with_ones(source.classify, width, keep_ones=False),
            )
        )
        self.dtype = dtype

    def blocks_of(self, x: Tensor) -> Tensor:
        """Float (1, 1, z, y, x), all sides even -> (1, 8, z / 2, y / 2, x / 2): two by two by two voxels, one below
        the other in channels."""
        depth, height, width = x.shape[2:]
        halves = x.to(self.dtype).view(depth // 2, 2, height // 2, 2, width // 2, 2)
        return volume_of(halves.permute(0, 2, 4, 1, 3, 5).reshape(-1, 8), (depth // 2, height // 2, width // 2))

    def features(self, blocks: Tensor) -> Tensor:
        """Blocks -> (1, 32, z / 2, y / 2, x / 2): all that looks further than a few voxels."""
        shape = _shape(blocks)
        stem = F.conv3d(F.pad(blocks, (1, 0, 1, 0, 1, 0)), self.stem.weight)
        rows = self.operations.shift_leaky(rows_of(stem).contiguous(), self.stem.shift)
        skips = []
        for stage in self.encoder:
            skips.append(rows)
            rows = stage((rows,), shape)
        for stage in self.decoder:
            rows = stage((rows, skips.pop()), shape)
        return volume_of(rows, shape)

    def logits(self, features: Tensor, blocks: Tensor) -> Tensor:
        """Features and blocks, of all slices or of some -> (1, classes and up to seven more, z, y, x), channels last.

        Of some: right but for the outermost `HEAD_HALO` slices of features, where the volume goes on.
        """
        rows = self._upsampled(features, blocks)
        depth, height, width = _shape(features)
        shape = (2 * depth, 2 * height, 2 * width)
        rows, shortcut = self.operations.convolved_in_two((rows,), shape, self.first.weight)
        rows = self.operations.convolved_leaky((rows,), shape, self.second.weight, None, others=shortcut)
        return volume_of(self.operations.convolved((rows,), shape, self.classify.weight), shape)

    def _upsampled(self, features: Tensor, blocks: Tensor) -> Tensor:
        """-> (voxels, 16), at the CT's resolution: the transposed convolution, the CT, and ones."""
        depth, height, width = _shape(features)
        rows = torch.cat((rows_of(features), rows_of(blocks)), dim=1)
        fine = torch.addmm(self.upsample.shift.to(self.dtype), rows, self.upsample.weight)
        # Moved eight bytes at a time: by halves it would take four times as long.
        wide = fine.view(torch.float64).view(depth, height, width, 2, 2, -1)
        return wide.permute(0, 3, 1, 4, 2, 5).contiguous().view(self.dtype).view(-1, HEAD_WIDTH)


class _Weights(nn.Module):
    """A kernel in the network's own precision, and a shift a channel in FP32."""

    weight: Tensor
    shift: Tensor

    def __init__(self, weight: Tensor, shift: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        weight = weight.detach().to(dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("shift", (weight.new_zeros(0) if shift is None else shift.detach()).float())


class _Stage(nn.Module):
    """Two blocks, the first of which reads volumes of `inward` channels."""

    def __init__(self, stage: nn.Module, operations: Operations, dtype: torch.dtype, inward: Sequence[int]) -> None:
        super().__init__()
        first, second = stage.children()
        self.first = _Block(first, operations, dtype, inward)
        self.second = _Block(second, operations, dtype, [_width(stage)])

    def forward(self, inputs: Sequence[Tensor], shape: Shape) -> Tensor:
        """See _Block."""
        rows: Tensor = self.second([self.first(inputs, shape)], shape)
        return rows


class _Block(nn.Module):
    """ResidualBlock, its convolutions' biases taken along in the passes between them."""

    def __init__(self, block: nn.Module, operations: Operations, dtype: torch.dtype, inward: Sequence[int]) -> None:
        super().__init__()
        assert isinstance(block, ResidualBlock)
        assert isinstance(block.recalibrate, SqueezeExcitation)
        self.operations = operations
        self.inward = list(inward)
        self.conv1, self.conv2 = (
            _Weights(operations.prepared(conv.weight.detach().to(dtype), channels), conv.bias, dtype)
            for conv, channels in ((block.conv1, inward), (block.conv2, [block.conv2.in_channels]))
        )
        self.squeeze, self.excite = block.recalibrate.squeeze, block.recalibrate.excite
        self.shortcut: _Weights | None = None
        if isinstance(block.shortcut, nn.Sequential):
            conv = block.shortcut[0]
            assert isinstance(conv, nn.Conv3d)
            self.shortcut = _Weights(conv.weight.flatten(1).T.contiguous(), conv.bias, dtype)

    def forward(self, inputs: Sequence[Tensor], shape: Shape) -> Tensor:
        """Rows (voxels, channels), of one volume or two whose channels follow one another -> rows (voxels, channels
        out)."""
        y = self.operations.convolved_leaky(inputs, shape, self.conv1.weight, self.conv1.shift)
        y, means = self.operations.convolved_with_means((y,), shape, self.conv2.weight)
        scale = torch.sigmoid(self.excite(F.leaky_relu(self.squeeze(means + self.conv2.shift))))
        shift = scale * self.conv2.shift
        if self.shortcut is None:
            return self.operations.scale_add_leaky(y, scale, inputs[0], shift)
        return self.operations.scale_add_leaky(y, scale, self._beside(inputs), shift + self.shortcut.shift)

    def _beside(self, inputs: Sequence[Tensor]) -> Tensor:
        """The shortcut's convolution of 1 x 1 x 1, without its shift: no concatenation."""
        assert self.shortcut is not None
        first, *rest = torch.split(self.shortcut.weight, self.inward)
        total = inputs[0] @ first
        for rows, weight in zip(inputs[1:], rest, strict=True):
            total = torch.addmm(total, rows, weight)
        return total


def _width(stage: nn.Module) -> int:
    """Channels out of a stage of the network."""
    *_, last = stage.children()
    assert isinstance(last, ResidualBlock)
    return last.conv2.out_channels


def _shape(volume: Tensor) -> Shape:
    depth, height, width = volume.shape[2:]
    return depth, height, width


def _over_blocks(kernel: Tensor) -> Tensor:
    """(c, 1, 3, 3, 3) of stride 2, padded by 1 -> (c, 8, 2, 2, 2) over blocks, padded by 1 before."""
    # Of a voxel's neighbours along an axis: in which block, and where in it.
    places = ((0, 1), (1, 0), (1, 1))
    blocks = kernel.new_zeros(kernel.shape[0], 2, 2, 2, 2, 2, 2)
    for z, (block_z, in_z) in enumerate(places):
        for y, (block_y, in_y) in enumerate(places):
            for x, (block_x, in_x) in enumerate(places):
                blocks[:, in_z, in_y, in_x, block_z, block_y, block_x] = kernel[:, 0, z, y, x]
    return blocks.reshape(kernel.shape[0], 8, 2, 2, 2)


def _upsample_matrix(conv: nn.ConvTranspose3d) -> tuple[Tensor, Tensor]:
    """Matrix (features and 8, 8 x 16) and shift (8 x 16,): a row of features and a block -> eight voxels."""
    assert conv.bias is not None
    channels = conv.weight.shape[0]
    matrix = conv.weight.new_zeros(channels + 8, 2, 2, 2, HEAD_WIDTH)
    matrix[:channels, ..., :HEAD_CHANNELS] = conv.weight.permute(0, 2, 3, 4, 1)
    matrix = matrix.view(channels + 8, 8, HEAD_WIDTH)
    for place in range(8):
        matrix[channels + place, place, CT_CHANNEL] = 1
    shift = conv.weight.new_zeros(8, HEAD_WIDTH)
    shift[:, :HEAD_CHANNELS] = conv.bias
    shift[:, ONES_CHANNEL] = 1
    return matrix.view(channels + 8, -1), shift.flatten()


def _first_of_head(head: ResidualBlock) -> Tensor:
    """(32, 16, 3, 3, 3): what goes on to the second convolution, then the shortcut; ones in both."""
    assert isinstance(head.shortcut, nn.Sequential)
    shortcut = head.shortcut[0]
    assert isinstance(shortcut, nn.Conv3d)
    return torch.cat([_with_ones(conv, HEAD_WIDTH, keep_ones=True) for conv in (head.conv1, shortcut)])


def _with_ones(conv: nn.Conv3d, width: int, *, keep_ones: bool) -> Tensor:
    """(width, 16, 3, 3, 3): the bias as the weight of the ones, in the middle; `keep_ones` hands them on."""
    assert conv.bias is not None
    kernel = conv.weight.new_zeros(width, HEAD_WIDTH, 3, 3, 3)
    kernel[: conv.out_channels, : conv.in_channels] = conv.weight
    kernel[: conv.out_channels, ONES_CHANNEL, 1, 1, 1] = conv.bias
    if keep_ones:
        kernel[ONES_CHANNEL, ONES_CHANNEL, 1, 1, 1] = 1
    return kernel
