"""export/slabs.py: a label is the same, whichever slab it was drawn in."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from anatomynet.engine.network import ServedNetwork
from anatomynet.engine.runtime import OnnxRuntime, OpenVinoRuntime, TorchRuntime
from anatomynet.export.onnx import served_model, write_onnx
from anatomynet.export.slabs import SLAB, split_network
from tests.random_network import (
    random_config,
    random_graph,
    random_network,
    smooth_hu,
)

CONFIDENCE_ERROR = 1e-5
MARGIN = 1e-3  # between the two best logits: other sums in another order may tip what is closer
TWO_SLABS = 4 * SLAB
# Many slabs, of which the last is one slice; none too many; one slice more; a second slab of two; a single one.
DEPTHS = (8 * SLAB + 3, TWO_SLABS, TWO_SLABS + 1, 2 * SLAB + 2, 9)
CONFIG = random_config(1)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slabs") / "native.onnx"
    write_onnx(served_model(random_graph(), CONFIG, fp16=False), path)
    return path


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("runtime_class", [OpenVinoRuntime, OnnxRuntime])
def test_draws_what_pytorch_draws_whole(
    model_file: Path, runtime_class: type[OpenVinoRuntime] | type[OnnxRuntime], depth: int
) -> None:
    hu = smooth_hu((depth, 25, 34))
    labels, confidence = runtime_class(model_file).infer(hu)
    expected, expected_confidence = TorchRuntime(random_network(), CONFIG).infer(hu)
    assert len(np.unique(expected)) > 2, "the case proves too little"
    served = ServedNetwork(random_network(), CONFIG)
    with torch.inference_mode():
        coarse = served.network(served.network_input_from_hu(torch.from_numpy(hu)))
        best, second = served.logits_on_grid(coarse, torch.Size(hu.shape))[0].topk(2, dim=0).values
    assert not ((labels != expected) & ((best - second) > MARGIN).numpy()).any()
    np.testing.assert_allclose(confidence, expected_confidence, atol=CONFIDENCE_ERROR)


def test_sizes_one_after_another_get_their_own_answers(model_file: Path) -> None:
    """OpenVINO compiles for each size: what was compiled for the one before must not answer."""
    runtime = OpenVinoRuntime(model_file)
    for shape in ((20, 24, 32), (20, 32, 24), (20, 24, 32)):
        hu = smooth_hu(shape)
        expected, _ = OnnxRuntime(model_file).infer(hu)
        assert (runtime.infer(hu)[0] != expected).mean() < 1e-4


def test_slabs_without_structures(tmp_path: Path) -> None:
    """Their boxes of foreground are empty, and their sums are nothing."""
    graph = random_graph()
    last = [node for node in graph.graph.node if node.op_type == "Conv"][-1]  # to the classes
    (bias,) = (tensor for tensor in graph.graph.initializer if tensor.name == last.input[2])
    values = onnx.numpy_helper.to_array(bias) + np.array([1000, *[0] * (CONFIG.classes - 1)], np.float32)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    path = tmp_path / "empty.onnx"
    write_onnx(served_model(graph, CONFIG, fp16=False), path)
    for runtime in (OpenVinoRuntime(path), OnnxRuntime(path)):
        labels, confidence = runtime.infer(smooth_hu((TWO_SLABS + 1, 24, 32)))
        assert not labels.any()
        assert not confidence.any()


def test_the_means_run_over_the_whole_volume() -> None:
    """Nothing that a slab computes depends on the whole: all twelve means come before."""
    trunk, head = split_network(random_graph())
    assert sum(node.op_type == "ReduceMean" for node in trunk.graph.node) == 12
    assert not any(node.op_type.startswith("Reduce") for node in head.graph.node)
    assert [value.name for value in head.graph.input] == ["features", "network_input"]


def test_fp16_file_draws_too(tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    write_onnx(served_model(random_graph(), CONFIG, fp16=True), path)
    hu = smooth_hu((4 * SLAB + 3, 25, 34))
    labels, _ = OnnxRuntime(path).infer(hu)
    expected, _ = TorchRuntime(random_network(), CONFIG).infer(hu)
    assert (labels != expected).mean() < 0.01
    weights = onnx.load(path).graph.initializer
    assert not any(weight.data_type == onnx.TensorProto.FLOAT for weight in weights)
