"""The exported graphs: each part, and the whole, against the PyTorch reference of the served contract."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from anatomynet.engine.config import ModelConfig, model_config_from_json
from anatomynet.engine.contract import METADATA_KEY
from anatomynet.engine.errors import ExportError
from anatomynet.engine.folding import folded
from anatomynet.engine.network import AnatomyNet, ServedNetwork, border_confidence
from anatomynet.engine.runtime import OnnxRuntime, OpenVinoRuntime, TorchRuntime
from anatomynet.export.onnx import (
    finish_model,
    half_model,
    network_model,
    plan_model,
    prepare_model,
    served_model,
    write_onnx,
    write_proven,
)
from tests.random_network import STRIDES, random_config, random_graph, random_network, smooth_hu

ROOT = Path(__file__).resolve().parent.parent
LARGEST_FILE_MB = 4
FOLDING_ERROR = 1e-4  # of logits of about 10, in FP32
CONFIDENCE_ERROR = 1e-5
TIPPED_SHARE = 1e-4
TIPPED_CONFIDENCE_ERROR = 1e-3  # one border voxel of a few hundred may tip
# Between the two best logits: other sums in another order may tip what is closer.
MARGIN = 1e-3
Voxels = tuple[tuple[int, int, int], ...]
# Odd everywhere; multiples of everything; the smallest; one voxel into the next stride.
SHAPES = ((21, 67, 83), (16, 64, 64), (8, 32, 32), (9, 33, 41))


def run_model(model: onnx.ModelProto, **inputs: NDArray[Any]) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    results: list[NDArray[Any]] = session.run(None, inputs)
    return results


def served(config: ModelConfig) -> ServedNetwork:
    return ServedNetwork(random_network(), config).eval()


@pytest.fixture(scope="module", params=STRIDES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Path]:
    config = random_config(request.param)
    path = tmp_path_factory.mktemp("onnx") / f"stride{request.param}.onnx"
    write_onnx(served_model(random_graph(), config, fp16=False), path)
    return config, path


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("runtime_class", [OpenVinoRuntime, OnnxRuntime])
def test_draws_what_pytorch_draws(
    exported: tuple[ModelConfig, Path],
    runtime_class: type[OpenVinoRuntime] | type[OnnxRuntime],
    shape: tuple[int, int, int],
) -> None:
    config, path = exported
    hu = smooth_hu(shape)
    expected, expected_confidence = TorchRuntime(random_network(), config).infer(hu)
    labels, confidence = runtime_class(path).infer(hu)
    assert labels.dtype == np.uint8
    assert labels.shape == shape
    assert len(np.unique(expected)) > 2, "the case proves too little"
    changed = torch.from_numpy(labels != expected)
    reference = served(config)
    with torch.inference_mode():
        coarse = reference.network(reference.network_input_from_hu(torch.from_numpy(hu)))
        best, second = reference.logits_on_grid(coarse, torch.Size(shape))[0].topk(2, dim=0).values
    assert not (changed & (best - second > MARGIN)).any()
    np.testing.assert_allclose(confidence, expected_confidence, atol=TIPPED_CONFIDENCE_ERROR)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prepare_is_the_references_own_input(stride: int, shape: tuple[int, int, int]) -> None:
    config = random_config(stride)
    hu = smooth_hu(shape)
    (found,) = run_model(prepare_model(config, fp16=False), CT=hu)
    expected = served(config).network_input_from_hu(torch.from_numpy(hu)).numpy()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize(
    "foreground",
    [
        (),
        ((0, 0, 0),),
        ((9, 10, 12),),  # the last voxel of the padded grid: part of it lies beyond the CT
        ((0, 5, 12), (9, 0, 3)),
        ((4, 5, 6),),
        ((4, 5, 6), (4, 5, 7), (5, 5, 6)),
        "everywhere",
    ],
)
def test_finish_cuts_a_box_without_a_trace(stride: int, foreground: Voxels | str) -> None:
    config = random_config(stride)
    padded = (10, 12, 14)
    shape = (9, (padded[1] - 2) * stride + 1, (padded[2] - 2) * stride + 1)
    random = np.random.default_rng(len(foreground))
    logits = random.normal(0, 1, (1, config.classes, *padded)).astype(np.float32)
    if not isinstance(foreground, str):
        logits[:, 0] += 20
        for number, (z, y, x) in enumerate(foreground):
            logits[0, 1 + number % 7, z, y, x] += 40
    hu = np.zeros(shape, np.int16)
    labels, confidence = run_model(finish_model(config, fp16=False), logits=logits, CT=hu)
    coarse = torch.from_numpy(logits)
    expected = served(config).logits_on_grid(coarse, torch.Size(shape)).argmax(dim=1)[0].numpy()
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_allclose(confidence, border_confidence(coarse).numpy(), atol=CONFIDENCE_ERROR)
    if not foreground:
        assert not labels.any()
        assert not confidence.any()


@pytest.mark.parametrize("stride", STRIDES)
def test_plan_model_draws_the_same_on_the_padded_grid(stride: int) -> None:
    config = random_config(stride)
    shape = (16, 64, 48)  # nothing to pad
    hu = smooth_hu(shape)
    expected, expected_confidence = TorchRuntime(random_network(), config).infer(hu)
    (x,) = run_model(prepare_model(config, fp16=False), CT=hu)
    labels, confidence = run_model(plan_model(random_graph(), config, fp16=False), network_input=x)
    assert (labels != expected).mean() < TIPPED_SHARE
    np.testing.assert_allclose(confidence, expected_confidence, atol=TIPPED_CONFIDENCE_ERROR)


def test_folding_keeps_the_logits() -> None:
    network = random_network()
    x = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (1, 1, 10, 12, 14)).astype(np.float32))
    lean = folded(network)
    assert not any(isinstance(module, torch.nn.BatchNorm3d) for module in lean.modules())
    assert any(isinstance(module, torch.nn.BatchNorm3d) for module in network.modules())
    with torch.inference_mode():
        torch.testing.assert_close(lean(x), network(x), atol=FOLDING_ERROR, rtol=FOLDING_ERROR)


def test_half_model_computes_in_half_and_sums_in_float() -> None:
    model = onnx.shape_inference.infer_shapes(half_model(random_graph()), strict_mode=True, data_prop=True)
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {weight.name: weight.data_type for weight in model.graph.initializer}
    kinds = {node.op_type: set[int]() for node in model.graph.node}
    for node in model.graph.node:
        kinds[node.op_type] |= {types[name] for name in node.input if types[name] != TensorProto.INT64}
    assert kinds.pop("ReduceMean") == {TensorProto.FLOAT}
    assert kinds.pop("Cast") == {TensorProto.FLOAT, TensorProto.FLOAT16}
    assert set(kinds) >= {"Conv", "ConvTranspose", "Gemm", "LeakyRelu"}
    assert all(found == {TensorProto.FLOAT16} for found in kinds.values())


def test_fp16_file_is_half_the_size_and_answers_in_float(tmp_path: Path) -> None:
    config = random_config()
    sizes = {}
    for fp16 in (False, True):
        path = tmp_path / f"{fp16}.onnx"
        write_onnx(served_model(random_graph(), config, fp16=fp16), path)
        sizes[fp16] = path.stat().st_size
    assert sizes[True] < 0.55 * sizes[False]
    labels, confidence = OnnxRuntime(tmp_path / "True.onnx").infer(smooth_hu((21, 67, 83)))
    assert labels.dtype == np.uint8
    assert confidence.dtype == np.float32


def test_file_is_whole_and_carries_the_configuration(exported: tuple[ModelConfig, Path]) -> None:
    config, path = exported
    model = onnx.load(path, load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert model_config_from_json(metadata[METADATA_KEY]) == config
    assert OnnxRuntime(path).model == config
    assert OpenVinoRuntime(path).model == config
    assert not any(weight.external_data for weight in model.graph.initializer)
    assert path.stat().st_size < LARGEST_FILE_MB * 1e6
    assert str(ROOT).encode() not in path.read_bytes(), "the file tells where it was made"
    signature = {
        value.name: (value.type.tensor_type.elem_type, len(value.type.tensor_type.shape.dim))
        for value in (*model.graph.input, *model.graph.output)
    }
    assert signature == {
        "CT": (TensorProto.INT16, 3),
        "LABEL_MAP": (TensorProto.UINT8, 3),
        "CONFIDENCE": (TensorProto.FLOAT, 1),
    }


def test_no_normalisation_is_left(exported: tuple[ModelConfig, Path]) -> None:
    model = onnx.load(exported[1])
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}


def test_export_says_nothing_and_leaves_the_network_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    network = AnatomyNet(random_config().classes)  # in training mode, as train.py holds it
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    write_onnx(served_model(network_model(network), random_config(), fp16=False), tmp_path / "quiet.onnx")
    assert capfd.readouterr() == ("", "")
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["quiet.onnx"]


def test_two_exports_onto_one_file_do_not_take_each_others(tmp_path: Path) -> None:
    path, graph = tmp_path / "model.onnx", prepare_model(random_config(), fp16=False)
    write_proven(graph, path, prove=lambda _: write_proven(graph, path, prove=onnx.load))
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_what_swallows_signals_is_imported_before_the_export() -> None:
    """PyTorch's exporter imports it where whatever interrupts that ends in a traceback."""
    command = (
        "import sys, torch\n"
        "from anatomynet.engine.network import AnatomyNet\n"
        "from anatomynet.export.onnx import network_model\n"
        "def export(*given, **options): sys.exit(0 if 'torch._dynamo' in sys.modules else 1)\n"
        "torch.onnx.export = export\n"
        "network_model(AnatomyNet(3))"
    )
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


def test_what_pytorch_cannot_export_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*given: object, **options: object) -> None:
        raise torch.onnx.OnnxExporterError("Failed to export the model.\n\nmany lines")

    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(ExportError, match="PyTorch could not export the network: Failed to export the model") as caught:
        network_model(AnatomyNet(3))
    assert "\n" not in str(caught.value)


def test_graph_that_is_not_valid_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the one before")
    model = served_model(random_graph(), random_config(), fp16=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ExportError, match="NoSuchOperator"):
        write_onnx(model, path)
    assert path.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [path]


def test_graph_that_does_not_run_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the one before")
    model = served_model(random_graph(), random_config(), fp16=False)
    for name, sides in (("step", [1, 1, 1]), ("step_less_one", [0, 0, 0])):  # nothing is padded
        node = next(node for node in model.graph.node if node.output[0] == f"prepare/{name}")
        node.attribute[0].CopyFrom(onnx.helper.make_attribute("value_ints", sides))
    with pytest.raises(ExportError, match="does not run"):
        write_onnx(model, path)
    assert path.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [path]
