"""The gate of the export: what passes, what it catches, and that rounding to FP16 is what FP16 does."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from anatomynet.engine.errors import ParityError
from anatomynet.engine.network import ServedNetwork, border_confidence
from anatomynet.engine.runtime import OnnxRuntime, Runtime, TorchRuntime
from anatomynet.engine.volume import HounsfieldArray, LabelArray
from anatomynet.export import parity
from anatomynet.export.onnx import served_model, write_onnx
from anatomynet.export.parity import (
    Reference,
    check_parity,
    confidence_of_ties,
    draw_reference,
    half_rounded_logits,
)
from tests.random_network import (
    CALIBRATION_SHAPE,
    changed_network,
    random_config,
    random_graph,
    random_network,
    shift_class,
    smooth_hu,
)

# PyTorch's own FP16 sums in blocks; one unit in the last place here and there, of logits of about 30.
HALF_ERROR = 0.1
FP32_ERROR = 1e-2  # what rounding must exceed, or it rounded nothing


@pytest.fixture(scope="module")
def reference() -> Reference:
    return draw_reference(random_network(), random_config(), smooth_hu(CALIBRATION_SHAPE))


@pytest.fixture
def runtime_of(tmp_path: Path) -> Callable[[onnx.ModelProto], Runtime]:
    def load(network: onnx.ModelProto, *, fp16: bool = False) -> Runtime:
        path = tmp_path / "model.onnx"
        write_onnx(served_model(network, random_config(), fp16=fp16), path)
        return OnnxRuntime(path)

    return load


def test_fp32_export_passes(reference: Reference, runtime_of: Callable[..., Runtime]) -> None:
    (report,) = check_parity(reference, runtime_of(random_graph()), fp16=False)
    assert report.voxels == np.prod(CALIBRATION_SHAPE)
    assert report.worst_margin <= parity.FP32_MARGIN
    assert report.smallest_dsc >= parity.SMALLEST_DSC
    assert report.largest_activation is None
    assert "labels changed" in str(report)


def test_fp16_export_is_judged_with_its_rounding(reference: Reference, runtime_of: Callable[..., Runtime]) -> None:
    rounded, report = check_parity(reference, runtime_of(random_graph(), fp16=True), fp16=True)
    assert rounded.largest_activation is not None
    assert 1 < rounded.largest_activation < parity.LARGEST_HALF
    assert report.largest_activation is None
    assert rounded.changed > 0, "rounding changed nothing, not even a near tie: was anything rounded?"


def test_weight_that_was_tampered_with_is_caught(reference: Reference, runtime_of: Callable[..., Runtime]) -> None:
    graph = random_graph()
    weight = next(w for w in graph.graph.initializer if "classify.weight" in w.name)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.02), weight.name))
    with pytest.raises(ParityError, match="does not draw what its checkpoint draws"):
        check_parity(reference, runtime_of(graph), fp16=False)


def test_one_voxel_that_is_no_tie_is_caught(reference: Reference) -> None:
    class OneVoxelOff(TorchRuntime):
        def infer(self, hu: HounsfieldArray) -> tuple[LabelArray, NDArray[np.float32]]:
            labels, confidence = super().infer(hu)
            labels[10, 80, 80] = (labels[10, 80, 80] + 1) % 8
            return labels, confidence

    right, wrong = (kind(random_network(), random_config()) for kind in (TorchRuntime, OneVoxelOff))
    assert check_parity(reference, right, fp16=False)[0].changed == 0
    with pytest.raises(ParityError, match=r"1 of [0-9,]+ labels changed"):
        check_parity(reference, wrong, fp16=False)


def logits_with_a_tie(*, second_wins_by: float) -> Tensor:
    """Blocks of two classes side by side in a background; one voxel at their face is the first's by nearly nothing."""
    logits = torch.zeros(1, 3, 8, 8, 8)
    logits[:, 0] = 1.0
    logits[:, 1, :, :, 2:4] = 4.0
    logits[:, 2, :, :, 4:6] = 4.0
    logits[0, :, 4, 4, 3] = torch.tensor([0.0, 1.0, 1.0 + second_wins_by])
    return logits


def test_a_near_tie_may_take_its_neighbours_into_the_border() -> None:
    """And nothing else may move a confidence."""
    one, other = (logits_with_a_tie(second_wins_by=gap) for gap in (-1e-4, 1e-4))
    difference = np.abs(border_confidence(one).numpy() - border_confidence(other).numpy())
    assert difference.max() > 2 * parity.FP32_CONFIDENCE
    np.testing.assert_allclose(confidence_of_ties(one), difference, atol=1e-5)
    np.testing.assert_allclose(confidence_of_ties(other), difference, atol=1e-5)
    assert not confidence_of_ties(logits_with_a_tie(second_wins_by=-2 * parity.FP32_MARGIN)).any()


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_a_confidence_that_no_tie_explains_is_caught(reference: Reference, factor: float) -> None:
    class Surer(TorchRuntime):
        def infer(self, hu: HounsfieldArray) -> tuple[LabelArray, NDArray[np.float32]]:
            labels, confidence = super().infer(hu)
            return labels, confidence * np.float32(factor)

    ties = confidence_of_ties(reference.coarse).max()
    assert ties < 0.01 * border_confidence(reference.coarse).max() - 2 * parity.FP32_CONFIDENCE
    with pytest.raises(ParityError, match="confidence within"):
        check_parity(reference, Surer(random_network(), random_config()), fp16=False)


@pytest.mark.parametrize(("factor", "largest"), [(3e4, "[0-9]{5,}"), (1e7, "inf")])
def test_activations_beyond_fp16_are_caught(factor: float, largest: str) -> None:
    """The same function in FP32: one layer so much larger, the next so much smaller."""
    network = changed_network()
    with torch.no_grad():
        network.head.norm1.weight.mul_(factor)
        network.head.norm1.bias.mul_(factor)
        network.head.conv2.weight.div_(factor)
    large = draw_reference(network, random_config(), smooth_hu(CALIBRATION_SHAPE))
    with pytest.raises(ParityError, match=f"largest activation {largest}"):
        check_parity(large, TorchRuntime(network, random_config()), fp16=True)


def test_structure_that_the_checkpoint_does_not_find_is_named() -> None:
    network = changed_network()
    shift_class(network, 3, -1000)
    name = random_config().structures[2]
    with pytest.raises(ParityError, match=rf"finds no {name} in this CT.*--parity-input"):
        draw_reference(network, random_config(), smooth_hu(CALIBRATION_SHAPE))


def test_file_of_another_checkpoint_is_refused(reference: Reference) -> None:
    other = dataclasses.replace(random_config(), checkpoint_sha256="0ther" * 12)
    with pytest.raises(ParityError, match="expected 5eed5eed5eed"):
        check_parity(reference, TorchRuntime(random_network(), other), fp16=False)


def test_slabs_are_exact(reference: Reference) -> None:
    assert CALIBRATION_SHAPE[0] > parity.SLAB_SLICES, "one slab only"
    labels, _ = TorchRuntime(random_network(), random_config()).infer(reference.hu)
    np.testing.assert_array_equal(reference.labels, labels)


def test_rounding_is_what_fp16_does() -> None:
    """PyTorch's own FP16 on the CPU is the oracle."""
    served = ServedNetwork(random_network(), random_config()).eval()
    hu = smooth_hu((8, 64, 64))
    rounded, _ = half_rounded_logits(served, hu)
    half = changed_network().half()
    with torch.inference_mode():
        x = served.network_input_from_hu(torch.from_numpy(hu))
        exact = served.network(x)
        in_half = half(x.half()).float()
    torch.testing.assert_close(rounded, in_half, atol=HALF_ERROR, rtol=0.01)
    assert (rounded - exact).abs().max() > FP32_ERROR
