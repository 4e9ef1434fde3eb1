"""A network with seeded random weights that draws every structure, and CTs to draw them on: for the export's tests."""

import copy
import dataclasses
import functools

import numpy as np
import onnx
import torch
from scipy import ndimage
from torch import nn

from anatomynet.engine.config import ModelConfig, load_config
from anatomynet.engine.network import AnatomyNet, ServedNetwork
from anatomynet.engine.volume import HounsfieldArray
from anatomynet.export.onnx import network_model

SEED = 1808
STRIDES = (1, 2, 4)
BACKGROUND_LEAD = 10.0
VOXELS_A_STRUCTURE = 300  # at the network's resolution
CALIBRATION_SHAPE = (21, 163, 171)


def random_config(stride: int = 4) -> ModelConfig:
    config, _ = load_config("openkbp7")
    return dataclasses.replace(config, in_plane_stride=stride, checkpoint_sha256="5eed" * 16)


def smooth_hu(shape: tuple[int, int, int], *, seed: int = SEED) -> HounsfieldArray:
    """int16 (z, y, x): blobs between air and bone, and sharp noise on them."""
    random = np.random.default_rng(seed)
    blobs = ndimage.gaussian_filter(random.standard_normal(shape), (1.5, 6, 6))
    hu: HounsfieldArray = (blobs / blobs.std() * 500 + random.normal(0, 40, shape)).clip(-1000, 2000).astype(np.int16)
    return hu


@functools.cache
def random_network() -> AnatomyNet:
    """Eval mode, normalisations as if trained; every structure wins somewhere on `smooth_hu(CALIBRATION_SHAPE)`."""
    config = random_config()
    random = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    network = AnatomyNet(config.classes).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 2.0),
                (module.bias.data, -0.3, 0.3),
            ):
                assert tensor is not None
                tensor.uniform_(low, high, generator=random)
    with torch.no_grad():
        network.classify.weight.mul_(20)
        hu = torch.from_numpy(smooth_hu(CALIBRATION_SHAPE))
        logits = network(ServedNetwork(network, config).network_input_from_hu(hu))[0]
        shift_class(network, 0, BACKGROUND_LEAD)
        logits[0] += BACKGROUND_LEAD
        for label in range(1, config.classes):
            gap = (logits.max(dim=0).values - logits[label]).flatten()
            shift = gap.kthvalue(VOXELS_A_STRUCTURE).values.item() + 0.5
            shift_class(network, label, shift)
            logits[label] += shift
    return network


def shift_class(network: AnatomyNet, label: int, shift: float) -> None:
    """Adds `shift` to one class's logits."""
    bias = network.classify.bias
    assert bias is not None
    bias.data[label] += shift


def changed_network() -> AnatomyNet:
    """A copy of `random_network` to change."""
    return copy.deepcopy(random_network())


@functools.cache
def _random_graph() -> onnx.ModelProto:
    return network_model(random_network())


def random_graph() -> onnx.ModelProto:
    """`random_network` as ONNX, exported once a session."""
    return copy.deepcopy(_random_graph())
