"""The network is the published one, takes any size, and the graph around it does what the contract says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.network import (
    AIR,
    AnatomyNet,
    ResidualBlock,
    ServedNetwork,
    SqueezeExcitation,
    border_confidence,
    normalised_from_hu,
)

PAPERS_CLASSES = 10
PAPERS_PARAMETERS = 734_417
FLOAT_TOLERANCE = 1e-5
HALF_TOLERANCE = 2e-3  # relative; half precision has 11 bits
CONFIG = ModelConfig("test", ("BrainStem", "Parotid_L"), 1, (1.0, 1.0, 2.0), (2.0, 2.0, 3.0), (-250.0, 550.0))


@pytest.fixture(scope="module")
def network() -> AnatomyNet:
    """Three classes; its batch norms have seen data, so that in eval mode it is no special case."""
    torch.manual_seed(0)
    network = AnatomyNet(3)
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(1, 1, 12, 16, 16))
    return network.eval()


def random_hu(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(-1000, 1500, shape).astype(np.int16))


def test_size_is_the_papers() -> None:
    assert sum(parameter.numel() for parameter in AnatomyNet(PAPERS_CLASSES).parameters()) == PAPERS_PARAMETERS


def test_every_parameter_learns() -> None:
    network = AnatomyNet(3)
    network(torch.randn(1, 1, 8, 8, 8)).square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_squeeze_is_by_15_and_by_16_after_a_concatenation() -> None:
    blocks = [block for block in AnatomyNet(3).modules() if isinstance(block, ResidualBlock)]
    hidden = [
        (block.conv1.in_channels, block.recalibrate.squeeze.out_features)
        for block in blocks
        if isinstance(block.recalibrate, SqueezeExcitation)
    ]
    encoder = [(28, 30 // 15), (30, 30 // 15), (30, 32 // 15), (32, 32 // 15), (32, 34 // 15), (34, 34 // 15)]
    decoder = [(66, 32 // 16), (32, 32 // 15), (62, 30 // 16), (30, 30 // 15), (58, 28 // 16), (28, 28 // 15)]
    assert hidden == encoder + decoder
    assert len(blocks) == 13  # the head's has none


@pytest.mark.parametrize("shape", [(8, 8, 8), (9, 11, 13), (8, 15, 10), (17, 8, 9)])
def test_logits_have_the_size_of_the_input(network: AnatomyNet, shape: tuple[int, int, int]) -> None:
    with torch.inference_mode():
        assert network(torch.zeros(1, 1, *shape)).shape == (1, 3, *shape)


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("odd", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 3, 7), (1, 5, 2)])
def test_served_network_keeps_the_size(network: AnatomyNet, stride: int, odd: tuple[int, int, int]) -> None:
    hu = random_hu(8 + odd[0], 8 * stride + odd[1], 8 * stride + odd[2])
    with torch.inference_mode():
        labels, confidence = ServedNetwork(network, replace(CONFIG, in_plane_stride=stride))(hu)
    assert labels.shape == hu.shape
    assert labels.dtype == torch.uint8
    assert labels.max() <= 2
    assert confidence.shape == (2,)
    assert confidence.dtype == torch.float32
    assert ((confidence >= 0) & (confidence <= 1)).all()


def test_at_stride_1_the_label_is_the_likeliest_class(network: AnatomyNet) -> None:
    hu = random_hu(10, 12, 14)
    with torch.inference_mode():
        labels, confidence = ServedNetwork(network, CONFIG)(hu)
        logits = network(normalised_from_hu(hu, CONFIG.hu_window)[None, None])
    assert torch.equal(labels.long(), logits.argmax(dim=1)[0])
    assert torch.equal(confidence, border_confidence(logits))
    assert len(labels.unique()) > 1  # or this proves nothing


def test_an_odd_side_is_one_slice_of_air_more(network: AnatomyNet) -> None:
    x = torch.randn(1, 1, 9, 11, 13)
    padded = torch.full((1, 1, 10, 12, 14), AIR)
    padded[:, :, :9, :11, :13] = x
    with torch.inference_mode():
        assert torch.equal(network(x), network(padded)[:, :, :9, :11, :13])
        assert torch.equal(network(padded), network.logits_of_even_sides(padded))


def test_a_served_ct_of_odd_size_is_one_with_more_air(network: AnatomyNet) -> None:
    hu = random_hu(9, 35, 45)
    padded = torch.full((10, 40, 48), -250, dtype=torch.int16)
    padded[:9, :35, :45] = hu
    served = ServedNetwork(network, replace(CONFIG, in_plane_stride=4))
    with torch.inference_mode():
        labels, confidence = served(hu)
        expected_labels, expected_confidence = served(padded)
    assert torch.equal(labels, expected_labels[:9, :35, :45])
    assert torch.equal(confidence, expected_confidence)


def test_padding_is_not_seen_where_nothing_is_padded(network: AnatomyNet) -> None:
    served = ServedNetwork(network, replace(CONFIG, in_plane_stride=4))
    assert served.network_input_from_hu(random_hu(8, 32, 40)).shape == (1, 1, 8, 8, 10)
    assert served.network_input_from_hu(random_hu(9, 33, 41)).shape == (1, 1, 10, 10, 12)


def test_entrance_averages_hounsfield_units_before_it_clips(network: AnatomyNet) -> None:
    hu = torch.zeros(8, 32, 32, dtype=torch.int16)
    hu[0, :4, 4:8] = torch.tensor([-1000, 0, 0, 0], dtype=torch.int16)  # mean -250: the window's low end
    hu[1, 4:8, :4] = torch.tensor([3000, 0, 0, 0], dtype=torch.int16)  # mean 750: above it
    x = ServedNetwork(network, replace(CONFIG, in_plane_stride=4)).network_input_from_hu(hu)[0, 0]
    assert x.shape == (8, 8, 8)
    assert x[0, 0, 1] == -1
    assert x[1, 1, 0] == 1
    assert x[7, 7, 7] == pytest.approx(-150 / 400)


def test_exit_interpolates_between_the_centres_of_averaged_voxels(network: AnatomyNet) -> None:
    served = ServedNetwork(network, replace(CONFIG, in_plane_stride=4))
    ramp = torch.arange(8.0).expand(1, 3, 8, 8, 8)
    fine = served.logits_on_grid(ramp, torch.Size((7, 32, 30)))
    assert fine.shape == (1, 3, 7, 32, 30)
    place = ((torch.arange(30) + 0.5) / 4 - 0.5).clamp(0, 7)
    assert torch.allclose(fine, place.expand_as(fine), atol=FLOAT_TOLERANCE)


@pytest.mark.parametrize(("hu", "expected"), [(-3000, -1), (-250, -1), (150, 0), (350, 0.5), (550, 1), (32767, 1)])
def test_hounsfield_units_are_normalised(hu: int, expected: float) -> None:
    normalised = normalised_from_hu(torch.tensor([hu], dtype=torch.int16), (-250.0, 550.0))
    assert normalised.dtype == torch.float32
    assert normalised.item() == expected


def test_means_of_half_precision_are_counted_in_single_precision() -> None:
    block = SqueezeExcitation(15, 15).half()
    traced = make_fx(block)(torch.ones(1, 15, 4, 4, 4, dtype=torch.half))
    means = [node for node in traced.graph.nodes if node.op == "call_function" and "mean" in str(node.target)]
    assert [node.kwargs.get("dtype") for node in means] == [torch.float32]


def test_squeeze_of_a_full_size_volume_does_not_saturate() -> None:
    # 178 x 512 x 512 after the one down-sampling; the sum is 9,000 times what half precision can hold.
    torch.manual_seed(0)
    block = SqueezeExcitation(2, 2)
    x = torch.tensor([100.0, -30.0]).reshape(1, 2, 1, 1, 1)
    expected = block(x).flatten()
    with torch.inference_mode():
        found = block.half()(x.half().expand(1, 2, 89, 256, 256))[0, :, -1, -1, -1]
    assert torch.isfinite(found).all()
    assert torch.allclose(found.float(), expected, rtol=HALF_TOLERANCE)


def confidence_by_hand(logits: NDArray[np.float32]) -> list[float]:
    """`border_confidence`, a voxel at a time."""
    shares = np.exp(logits) / np.exp(logits).sum(axis=0)
    labels, top = shares.argmax(axis=0), shares.max(axis=0)
    on_border: dict[int, list[float]] = {c: [] for c in range(1, len(logits))}
    for z, y, x in np.ndindex(labels.shape):
        around = labels[max(0, z - 1) : z + 2, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        if labels[z, y, x] and (around != labels[z, y, x]).any():
            on_border[labels[z, y, x]].append(top[z, y, x])
    return [float(np.mean(values)) if values else 0.0 for values in on_border.values()]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_border_confidence_agrees_with_a_plain_loop(seed: int) -> None:
    random = np.random.default_rng(seed)
    blocks = random.normal(0, 2, (4, 2, 3, 3)).repeat(3, axis=1).repeat(3, axis=2).repeat(3, axis=3)
    logits = (blocks + random.normal(0, 0.2, blocks.shape)).astype(np.float32)
    logits[3] = -9  # never the likeliest
    found = border_confidence(torch.from_numpy(logits)[None]).tolist()
    assert found == pytest.approx(confidence_by_hand(logits), abs=FLOAT_TOLERANCE)
    assert found[2] == 0


def test_the_inside_of_a_structure_does_not_count() -> None:
    logits = np.zeros((2, 7, 7, 7), np.float32)
    logits[1] = -20
    logits[1, 1:6, 1:6, 1:6] = 1.0
    outer = border_confidence(torch.from_numpy(logits)[None]).item()
    logits[1, 2:5, 2:5, 2:5] = 20.0
    assert border_confidence(torch.from_numpy(logits)[None]).item() == outer
    assert outer == pytest.approx(1 / (1 + np.exp(-1)), abs=FLOAT_TOLERANCE)


def test_frozen_statistics_train_as_the_layer_would() -> None:
    torch.manual_seed(1)
    network = AnatomyNet(3)
    volume = torch.randn(1, 1, 8, 16, 16)
    network(volume)  # so that the statistics are no special case
    expected = _logits_and_gradients(network.eval(), volume)
    network.train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.eval()
    found = _logits_and_gradients(network, volume)
    assert len(expected) == 1 + len(list(network.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def _logits_and_gradients(network: AnatomyNet, volume: Tensor) -> list[Tensor]:
    network.zero_grad()
    logits: Tensor = network(volume)
    (logits**2).mean().backward()  # type: ignore[no-untyped-call]
    return [logits.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]
