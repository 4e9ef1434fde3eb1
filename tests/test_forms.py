"""export/forms.py: the TensorRT form whole, on a machine without a GPU.

In TensorRT's place stands TensorRT-RTX, whose builder and ONNX parser are the same and need no GPU; in the plan's, once
it is built, its graph in OpenVINO. Which GPU, names, manifest, config.pbtxt, the proofs and the repository are real.
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from numpy.typing import NDArray

from anatomynet.engine.contract import MODEL_NAME
from anatomynet.engine.errors import AnatomyNetError, ModelError, OutputError
from anatomynet.engine.limits import largest_slices
from anatomynet.engine.onnx_files import openvino_core
from anatomynet.engine.volume import LabelArray
from anatomynet.export import forms, manifest
from anatomynet.export.cli import main, plans_of
from anatomynet.export.composition import plan_parts
from anatomynet.export.gpu import Gpu
from anatomynet.export.manifest import check_repository, read_manifest
from anatomynet.export.onnx import plan_model
from anatomynet.export.parity import draw_reference
from anatomynet.export.plan import VERSION_BYTES, plan_version
from anatomynet.export.triton_models import FINISH_NAME, PLAN_NAME, PREPARE_NAME
from tests.random_network import CALIBRATION_SHAPE, random_config, random_graph, random_network, smooth_hu

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="needs pip install 'anatomynet[tensorrt-rtx]'")
model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
# TensorRT-RTX times nothing, and says so; the same lines keep TensorRT's timings.
pytestmark = pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")

H100, H200 = Gpu("NVIDIA H100 80GB HBM3", "9.0"), Gpu("NVIDIA H200", "9.0")
VERSION = (10, 13, 0, 35)
LABEL = "trt10.13.0.35-sm90-nvidia-h100-80gb-hbm3"
PLAN = f"openkbp7-fp16-{LABEL}.plan"


class Builder:
    """TensorRT-RTX's own, whose plans say that TensorRT built them."""

    def __init__(self, logger: Any) -> None:
        self._builder = rtx.Builder(logger)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder, name)

    def build_serialized_network(self, network: Any, config: Any) -> bytes:
        assert config.profiling_verbosity == rtx.ProfilingVerbosity.DETAILED
        plan = bytearray(self._builder.build_serialized_network(network, config))
        plan[VERSION_BYTES] = bytes(VERSION)
        return bytes(plan)


def tensorrt_of_rtx() -> ModuleType:
    """The module `tensorrt`, such as 10.13 is, as far as a plan's making goes."""
    module = ModuleType("tensorrt")
    vars(module).update({name: value for name, value in vars(rtx).items() if not name.startswith("__")})
    vars(module).update(__spec__=ModuleSpec("tensorrt", None), __version__=".".join(map(str, VERSION)), Builder=Builder)
    return module


class PlanInOpenVino:
    """PlanOnGpu's stand-in: what the plan was built of, in OpenVINO, and what an engine of it would say."""

    format = "Half"
    shift = 0

    def __init__(self, trt: ModuleType, plan: bytes) -> None:
        assert plan_version(plan) == trt.__version__
        self.description = f"the plan in TensorRT {trt.__version__}"
        self._graph = plan_model(random_graph(), random_config(), fp16=True)
        core = openvino_core()
        network = core.read_model(self._graph.SerializeToString(), b"")
        self._compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def layer_information(self) -> str:
        layers = [
            {"Name": node.name, "LayerType": f"Cask{node.op_type}", "Inputs": [{"Format/Datatype": self.format}]}
            for node in self._graph.graph.node
            if node.op_type.startswith("Conv")
        ]
        return json.dumps({"Layers": layers})

    def __call__(self, network_input: NDArray[np.float16]) -> tuple[LabelArray, NDArray[np.float32]]:
        results = self._compiled({"network_input": network_input})
        return results["LABELS"] + np.uint8(self.shift), results["CONFIDENCE"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> forms.Source:
    config = random_config()
    reference = draw_reference(random_network(), config, smooth_hu(CALIBRATION_SHAPE))
    return forms.Source(random_graph(), config, reference, tmp_path_factory.mktemp("source") / "random.safetensors")


@pytest.fixture(autouse=True)
def _machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_of_rtx())
    monkeypatch.setattr(forms, "visible_gpus", lambda: (H100,))
    monkeypatch.setattr(forms, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True)))
    monkeypatch.setattr(forms, "PlanOnGpu", PlanInOpenVino)
    monkeypatch.setattr(manifest, "visible_gpus", lambda: (H100,))
    monkeypatch.setattr(manifest, "tensorrt_versions", lambda: (VERSION[:3],))


@pytest.fixture
def repository(source: forms.Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """What the command writes, and what it says; without the region finder, which is the same beside any model."""
    monkeypatch.setattr(forms, "read_source", lambda checkpoint, parity_input: source)
    monkeypatch.setattr(forms, "region_form", lambda *given, **named: [])
    output = tmp_path / "triton_repo"
    run = CliRunner().invoke(main, ["--fp16", "--backend", "tensorrt", "--output", str(output)])
    assert run.exit_code == 0, run.output
    return output, run.output


def test_timings_that_can_no_longer_be_written_are_told(source: forms.Source, tmp_path: Path) -> None:
    (tmp_path / "in the way").touch()
    with pytest.raises(OutputError, match=r"in the way/plans could not be made: Not a directory"):
        forms.tensorrt_form(source, tmp_path, timing_cache_folder=tmp_path / "in the way" / "plans")


def described(model: Path) -> Any:
    return text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_a_repository_with_a_plan(
    repository: tuple[Path, str], source: forms.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, said = repository
    assert {folder.name for folder in output.iterdir()} == {MODEL_NAME, PREPARE_NAME, PLAN_NAME, FINISH_NAME}
    assert read_manifest(output / MODEL_NAME)["needs"] == [PREPARE_NAME, PLAN_NAME, FINISH_NAME]

    assert [path.name for path in (output / PLAN_NAME / "1").iterdir()] == [PLAN]
    assert described(output / PLAN_NAME).default_model_filename == PLAN
    plan = read_manifest(output / PLAN_NAME)["plan"]
    assert plan == {"tensorrt_version": "10.13.0.35", "compute_capability": "9.0", "gpu": H100.name}
    parameters = {key: value.string_value for key, value in described(output / MODEL_NAME).parameters.items()}
    assert parameters["largest_shape_zyx"] == f"{largest_slices(source.config)} 512 512"
    assert [path.name for path in plans_of(output).iterdir()] == [f"{LABEL}.timing"]

    for name in (PREPARE_NAME, FINISH_NAME):
        graph = onnx.load(output / name / "1" / "model.onnx").graph
        config = described(output / name)
        assert {tensor.name for tensor in graph.input} == {tensor.name for tensor in config.input}
        assert {tensor.name for tensor in graph.output} == {tensor.name for tensor in config.output}

    convolutions = [node for node in source.graph.graph.node if node.op_type.startswith("Conv")]
    assert f"the engine names {len(convolutions)} convolutions, none in FP32" in said
    # The graphs around it with the plan's own graph, then with the plan, each after the rounded network.
    assert said.count("labels changed") == 4
    assert "prepare, the plan in TensorRT 10.13.0.35, finish:" in said

    assert check_repository(output) == []
    monkeypatch.setattr(manifest, "visible_gpus", lambda: (H200,))
    with pytest.raises(ModelError, match=f"built on {H100.name}, found {H200.name}"):
        check_repository(output)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "Float"}, "of the built engine computes in FP32"),
        ({"format": "N/A due to dynamic shapes"}, "does not say in what it computes"),
        ({"shift": 1}, "does not draw what its checkpoint draws. prepare, the plan in TensorRT"),
    ],
)
def test_a_plan_that_is_not_what_it_should_be(
    changed: Mapping[str, Any], message: str, source: forms.Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in changed.items():
        monkeypatch.setattr(PlanInOpenVino, name, value)
    monkeypatch.setattr(forms, "_proven_parts", lambda source: plan_parts(source.graph, source.config))
    with pytest.raises(AnatomyNetError, match=message):
        forms.tensorrt_form(source, tmp_path, timing_cache_folder=tmp_path / "plans")


def without(name: str) -> Callable[..., object]:
    find = importlib.util.find_spec
    return lambda asked, *given: None if asked == name else find(asked, *given)


@pytest.mark.parametrize(
    ("place", "name", "value", "message"),
    [
        (forms, "visible_gpus", lambda: (), "none is here"),
        (importlib.util, "find_spec", without("tensorrt"), r"pip install 'anatomynet\[tensorrt\]'"),
        (forms, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False)), "PyTorch built with CUDA"),
    ],
)
def test_what_a_plan_takes_is_asked_first(
    place: Any, name: str, value: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, value)
    with pytest.raises(AnatomyNetError, match=message):
        forms.require_tensorrt()
