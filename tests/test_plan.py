"""TensorRT's own builder judges the graph, by tensorrt_rtx, which builds without a GPU. Running a plan takes one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import ExportError
from anatomynet.engine.limits import CHANNELS_AT_FULL_RESOLUTION, IN_PLANE_VOXELS
from anatomynet.export.onnx import plan_model
from anatomynet.export.plan import (
    build_plan,
    check_engine_precision,
    check_tensorrt_version,
    largest_shape,
    plan_version,
)
from tests.random_network import STRIDES, random_config, random_graph

trt = pytest.importorskip("tensorrt_rtx_bindings", reason="needs pip install 'anatomynet[tensorrt-rtx]'")
WORKSTATION = ("SM89",)
WORKSTATIONS = ("sm86", "sm89", "sm120")


def fp16_graph(config: ModelConfig) -> bytes:
    graph: bytes = plan_model(random_graph(), config, fp16=True).SerializeToString()
    return graph


@pytest.mark.parametrize("stride", STRIDES)
def test_fp16_plan_is_built(stride: int) -> None:
    config = random_config(stride)
    plan = build_plan(trt, fp16_graph(config), config, compute_capabilities=WORKSTATION)
    assert len(plan) > 1e6, "smaller than the weights in FP16"
    assert plan_version(plan) == trt.__version__


def test_one_plan_for_several_gpus() -> None:
    config = random_config()
    plans = [
        build_plan(trt, fp16_graph(config), config, compute_capabilities=names) for names in (("sm89",), WORKSTATIONS)
    ]
    assert plans[0] != plans[1]


def test_unknown_gpu_is_named() -> None:
    with pytest.raises(ExportError, match=r"no GPU 'sm90': expected one or more of .*sm89"):
        build_plan(trt, fp16_graph(random_config()), random_config(), compute_capabilities=("sm89", "sm90"))


def test_fp32_graph_is_refused() -> None:
    model = plan_model(random_graph(), random_config(), fp16=False)
    with pytest.raises(ExportError, match=r"computes in DataType.FLOAT, expected DataType.HALF: .*--fp16"):
        build_plan(trt, model.SerializeToString(), random_config(), compute_capabilities=WORKSTATION)


def test_mean_in_half_is_refused() -> None:
    model = plan_model(random_graph(), random_config(), fp16=True)
    mean = next(node for node in model.graph.node if node.op_type == "ReduceMean")
    before, after = (next(n for n in model.graph.node if n.output[0] == mean.input[0]), mean)
    cast = next(n for n in model.graph.node if n.op_type == "Cast" and n.input[0] == mean.output[0])
    mean.input[0], after.output[0] = before.input[0], cast.output[0]
    model.graph.node.remove(before)
    model.graph.node.remove(cast)
    with pytest.raises(ExportError, match=r"computes in DataType.HALF, expected DataType.FLOAT"):
        build_plan(trt, model.SerializeToString(), random_config(), compute_capabilities=WORKSTATION)


def test_what_is_not_onnx_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportError, match="does not take the graph"):
        build_plan(trt, b"not ONNX", random_config(), compute_capabilities=WORKSTATION)
    capfd.readouterr()  # TensorRT's own complaint


# TensorRT-RTX times nothing, and says so; the same lines keep TensorRT's timings.
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
@pytest.mark.parametrize("before", [None, b"damaged"], ids=["none", "damaged"])
def test_timings_are_kept(tmp_path: Path, before: bytes | None, capfd: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "trt.timing"
    if before is not None:
        cache.write_bytes(before)
    config = random_config()
    graph = fp16_graph(config)
    build_plan(trt, graph, config, compute_capabilities=WORKSTATION, timing_cache=cache)
    assert len(cache.read_bytes()) > len(b"damaged")
    build_plan(trt, graph, config, compute_capabilities=WORKSTATION, timing_cache=cache)
    assert list(tmp_path.iterdir()) == [cache]
    capfd.readouterr()


@pytest.mark.parametrize("stride", STRIDES)
def test_largest_tensor_can_be_indexed(stride: int) -> None:
    config = random_config(stride)
    shape = largest_shape(config)
    assert shape[-1] * stride == IN_PLANE_VOXELS
    assert all(side % 2 == 0 for side in shape[2:])
    assert shape[2] >= 178
    assert CHANNELS_AT_FULL_RESOLUTION * math.prod(shape) < 2**31
    assert config.classes * math.prod(shape) * stride**2 < 2**31


def engine_layer(kind: str, format_: str, **more: Any) -> dict[str, Any]:
    return {"Name": f"a {kind}", "LayerType": kind, "Inputs": [{"Name": "x", "Format/Datatype": format_}], **more}


def inspected(*layers: Any) -> str:
    return json.dumps({"Layers": layers, "Bindings": []})


# What engine inspectors of TensorRT 8 to 10 have been seen to say.
IN_HALF = ("Half", "Row major linear FP16 format", "Channel major FP16 format where channel % 4 == 0")
IN_FLOAT = ("Float", "Row major linear FP32", "Channel major FP32 format where channel % 4 == 0")
UNTOLD = "N/A due to dynamic shapes"


@pytest.mark.parametrize("format_", IN_HALF)
def test_engine_in_half_passes(format_: str) -> None:
    layers = [
        engine_layer("CaskConvolution", format_),
        engine_layer("cask", format_, ParameterType="Deconvolution"),
        engine_layer("correlation", format_),
        engine_layer("CaskConvolution", UNTOLD, Weights={"Type": "Half", "Count": 756}),
        engine_layer("Reduce", IN_FLOAT[0]),
    ]
    assert check_engine_precision(inspected(*layers)) == 4


@pytest.mark.parametrize("format_", IN_FLOAT)
@pytest.mark.parametrize("kind", ["CaskConvolution", "CaskDeconvolutionV2", "conv", "correlation"])
def test_engine_that_fell_back_to_fp32_is_refused(kind: str, format_: str) -> None:
    layers = [engine_layer("CaskConvolution", "Half"), engine_layer(kind, format_)]
    with pytest.raises(ExportError, match=f"a {kind} of the built engine computes in FP32"):
        check_engine_precision(inspected(*layers))


def test_engine_with_weights_in_fp32_is_refused() -> None:
    with pytest.raises(ExportError, match="a conv of the built engine computes in FP32"):
        check_engine_precision(inspected(engine_layer("conv", UNTOLD, Weights={"Type": "Float", "Count": 756})))


UNREADABLE = {
    "no layer": (inspected(), "tells of no convolution"),
    "no convolution": (inspected(engine_layer("Reduce", "Float")), "tells of no convolution"),
    "names alone": (inspected("stem/conv", "head/conv"), "names 2 of 2 layers and tells no more"),
    "one name alone": (inspected(engine_layer("conv", "Half"), "head/conv"), "names 1 of 2 layers"),
    "no formats": (inspected(engine_layer("conv", "Half"), engine_layer("deconv", UNTOLD)), "a deconv .* in what"),
    "no inputs": (inspected({"Name": "a conv", "LayerType": "conv"}), "a conv .* in what"),
    "nothing": ("", "said nothing that can be read"),
    "no list of layers": ("{}", "said nothing that can be read"),
}


@pytest.mark.parametrize(("layer_information", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_engine_that_tells_nothing_is_refused(layer_information: str, message: str) -> None:
    """Silence is no proof of FP16."""
    with pytest.raises(ExportError, match=message) as caught:
        check_engine_precision(layer_information)
    assert "\n" not in str(caught.value)


def test_plan_that_is_cut_short() -> None:
    with pytest.raises(ExportError, match="a plan of 20 bytes"):
        plan_version(bytes(20))


@pytest.mark.parametrize("version", ["10.12.0.36", "11.0.0.1", trt.__version__.replace("1.", "12.", 1)])
def test_tensorrt_new_enough(version: str) -> None:
    check_tensorrt_version(version)


@pytest.mark.parametrize("version", ["8.6.1", "10.9.0.34"])
def test_tensorrt_too_old(version: str) -> None:
    with pytest.raises(ExportError, match=r"expected 10\.12 or later"):
        check_tensorrt_version(version)


def test_plan_draws_what_its_graph_draws() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and PyTorch with CUDA")
    tensorrt = pytest.importorskip("tensorrt", reason="needs pip install 'anatomynet[tensorrt]'")

    from anatomynet.export.composition import ComposedRuntime, plan_parts
    from anatomynet.export.parity import check_parity, draw_reference
    from anatomynet.export.plan_on_gpu import PlanOnGpu
    from tests.random_network import CALIBRATION_SHAPE, random_network, smooth_hu

    config = random_config()
    plan = PlanOnGpu(tensorrt, build_plan(tensorrt, fp16_graph(config), config))
    check_engine_precision(plan.layer_information())
    reference = draw_reference(random_network(), config, smooth_hu(CALIBRATION_SHAPE))
    runtime = ComposedRuntime(plan_parts(random_graph(), config), config, middle=plan, description=plan.description)
    check_parity(reference, runtime, fp16=True)
