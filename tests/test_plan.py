"""TensorRT's own builder judges the graph, by tensorrt_rtx, which builds without a GPU. Running a plan takes one."""

import math

import pytest

from anatomynet.engine.errors import ExportError
from anatomynet.export.onnx import plan_model
from anatomynet.export.plan import CHANNELS_AT_FULL_RESOLUTION, IN_PLANE_VOXELS, build_plan, has_gpu, largest_shape
from tests.random_network import STRIDES, random_config, random_graph

trt = pytest.importorskip("tensorrt_rtx_bindings", reason="needs pip install 'anatomynet[tensorrt-rtx]'")
WORKSTATION = ("SM89",)


@pytest.mark.parametrize("stride", STRIDES)
def test_fp16_plan_is_built(stride: int) -> None:
    config = random_config(stride)
    model = plan_model(random_graph(), config, fp16=True)
    plan = build_plan(trt, model.SerializeToString(), config, compute_capabilities=WORKSTATION)
    assert len(plan) > 1e6, "smaller than the weights in FP16"


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


@pytest.mark.parametrize("stride", STRIDES)
def test_largest_tensor_can_be_indexed(stride: int) -> None:
    config = random_config(stride)
    shape = largest_shape(config)
    assert shape[-1] * stride == IN_PLANE_VOXELS
    assert all(side % 2 == 0 for side in shape[2:])
    assert shape[2] >= 178
    assert CHANNELS_AT_FULL_RESOLUTION * math.prod(shape) < 2**31
    assert config.classes * math.prod(shape) * stride**2 < 2**31


def test_gpu_is_found_where_there_is_one() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and PyTorch with CUDA")
    assert has_gpu()
