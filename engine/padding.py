"""AnatomyNet with channels that tensor cores and vectors like: padded with zeros to a multiple, and the same logits."""

import torch
from torch import nn

from anatomynet.engine.folding import folded
from anatomynet.engine.network import AnatomyNet, ResidualBlock, SqueezeExcitation


def padded_network(network: AnatomyNet, multiple: int) -> AnatomyNet:
    """A folded copy in which 28, 30, 32 and 34 channels are the next multiple; the head stays as it is."""
    network = folded(network)
    stem = network.stem[0]
    assert isinstance(stem, nn.Conv3d)
    widths = [stem.out_channels]
    _pad_conv(stem, [stem.in_channels], multiple, pad_in=False)
    for stage in network.encoder:
        widths.append(_pad_stage(stage, [widths[-1]], multiple))
    deep = widths.pop()
    for stage in network.decoder:
        deep = _pad_stage(stage, [deep, widths.pop()], multiple)
    upsample = network.upsample
    upsample.weight.data = _spread(upsample.weight.data, 0, [deep], multiple)
    upsample.in_channels = upsample.weight.shape[0]
    return network


def _pad_stage(stage: nn.Module, given: list[int], multiple: int) -> int:
    """Pads its blocks, of which the first gets the `given` channels concatenated; how many truly come out."""
    for block in stage.children():
        assert isinstance(block, ResidualBlock)
        out = block.conv1.out_channels
        _pad_conv(block.conv1, given, multiple)
        _pad_conv(block.conv2, [out], multiple)
        if isinstance(block.shortcut, nn.Sequential):
            shortcut = block.shortcut[0]
            assert isinstance(shortcut, nn.Conv3d)
            _pad_conv(shortcut, given, multiple)
        if isinstance(block.recalibrate, SqueezeExcitation):
            squeeze, excite = block.recalibrate.squeeze, block.recalibrate.excite
            squeeze.weight.data = _spread(squeeze.weight.data, 1, [out], multiple)
            excite.weight.data = _spread(excite.weight.data, 0, [out], multiple)
            excite.bias.data = _spread(excite.bias.data, 0, [out], multiple)
        given = [out]
    return given[0]


def _pad_conv(conv: nn.Conv3d, given: list[int], multiple: int, *, pad_in: bool = True) -> None:
    if pad_in:
        conv.weight.data = _spread(conv.weight.data, 1, given, multiple)
    out = [conv.weight.shape[0]]
    conv.weight.data = _spread(conv.weight.data, 0, out, multiple)
    if conv.bias is not None:
        conv.bias.data = _spread(conv.bias.data, 0, out, multiple)
    conv.out_channels, conv.in_channels = conv.weight.shape[:2]


def _spread(tensor: torch.Tensor, axis: int, parts: list[int], multiple: int) -> torch.Tensor:
    """Zeros after each part of an axis, up to a multiple."""
    pieces = []
    for part in torch.split(tensor, parts, dim=axis):
        shape = list(part.shape)
        shape[axis] = -part.shape[axis] % multiple
        pieces += [part, part.new_zeros(shape)]
    return torch.cat(pieces, dim=axis)
