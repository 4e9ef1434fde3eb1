"""AnatomyNet as it is served: batch normalisation folded into the convolutions before it, and the same logits."""

import copy
from typing import TypeVar, cast

import torch
from torch import nn

from anatomynet.engine.network import ResidualBlock

Module = TypeVar("Module", bound=nn.Module)


def folded(network: Module) -> Module:
    """A copy in eval mode with every BatchNorm folded into the convolution before it; the logits stay the same."""
    network = copy.deepcopy(network).eval()
    fuse = torch.nn.utils.fuse_conv_bn_eval
    for block in network.modules():
        if isinstance(block, ResidualBlock):
            for conv, norm in (("conv1", "norm1"), ("conv2", "norm2")):
                setattr(block, conv, fuse(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, nn.Identity())
        elif isinstance(block, nn.Sequential) and isinstance(block[0], nn.Conv3d):
            block[0] = fuse(block[0], cast(nn.BatchNorm3d, block[1]))
            block[1] = nn.Identity()
    return network
