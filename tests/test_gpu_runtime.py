"""engine/gpu_runtime.py and what it computes with: on a CPU in FP32, where it must be the checkpoint itself; kernels in
Triton's interpreter, where that is installed; and on a GPU, where one is."""

import numpy as np
import pytest
import torch

from anatomynet.engine.gpu_network import TensorCoreNetwork
from anatomynet.engine.gpu_operations import TorchOperations
from anatomynet.engine.gpu_runtime import GpuRuntime
from anatomynet.engine.network import AnatomyNet
from anatomynet.engine.runtime import TorchRuntime
from tests.random_network import STRIDES, random_config, random_network, smooth_hu

ROUNDING = 1e-4  # of logits of about 10, in FP32
HALF_ROUNDING = 0.05
CONFIDENCE = 1e-5
SHAPE = (11, 35, 43)  # odd sides: padding and cropping both happen


def logits_of(network: AnatomyNet, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    form = TensorCoreNetwork(network, TorchOperations(), dtype)
    with torch.inference_mode():
        blocks = form.blocks_of(x)
        return form.logits(form.features(blocks), blocks)[:, : form.classes].float()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, ROUNDING), (torch.float16, HALF_ROUNDING)])
def test_logits_are_the_networks(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.rand(1, 1, 10, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        expected = random_network()(x)
    torch.testing.assert_close(logits_of(random_network(), x, dtype), expected, atol=tolerance, rtol=tolerance)


def test_any_number_of_classes() -> None:
    torch.manual_seed(0)
    network = AnatomyNet(17).eval()
    x = torch.rand(1, 1, 8, 10, 12) * 2 - 1
    with torch.inference_mode():
        expected = network(x)
    torch.testing.assert_close(logits_of(network, x, torch.float32), expected, atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("slices", [None, 1, 3], ids=["whole", "slabs of 1", "slabs of 3"])
def test_draws_what_the_checkpoint_draws(stride: int, slices: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = random_config(stride)
    runtime = GpuRuntime(random_network(), config, device="cpu")
    if slices is not None:
        monkeypatch.setattr(runtime, "_slab_thickness", lambda features: slices)
    hu = smooth_hu(SHAPE)
    labels, confidence = runtime.infer(hu)
    expected_labels, expected_confidence = TorchRuntime(random_network(), config).infer(hu)
    assert len(np.unique(expected_labels)) > 2
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(confidence, expected_confidence, atol=CONFIDENCE)


@pytest.mark.parametrize("stride", STRIDES)
def test_nothing_there_is_all_background(stride: int) -> None:
    config = random_config(stride)
    labels, confidence = GpuRuntime(background_network(), config, device="cpu").infer(smooth_hu((9, 64, 64)))
    assert not labels.any()
    assert not confidence.any()


def background_network() -> AnatomyNet:
    torch.manual_seed(0)
    network = AnatomyNet(random_config().classes).eval()
    assert network.classify.bias is not None
    network.classify.bias.data[0] += 1000
    return network
