"""ONNX -> TensorRT plan, FP16, for one GPU architecture. An optional step of `anatomynet-export`.

The graph goes in as `plan_model` of export.onnx makes it: TensorRT knows no INT16, and refuses padding together with
interpolation, so it begins behind `prepare`, and does not crop. Whichever `trt` is given builds it:

    tensorrt                 for the GPU it runs on; Triton's tensorrt backend loads the plan
    tensorrt_rtx_bindings    for RTX workstations, also on a machine without a GPU
"""

import ctypes
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import ExportError

# TensorRT indexes a tensor of a convolution with 32 bits.
LARGEST_TENSOR = 2**31 - 1
# At the network's full resolution: the up-sampled features and the CT.
CHANNELS_AT_FULL_RESOLUTION = 15
IN_PLANE_VOXELS = 512
SMALLEST_SIDE = 8
TYPICAL_SLICES = 178

Shape = tuple[int, int, int, int, int]


def build_plan(
    trt: ModuleType, onnx_model: bytes, config: ModelConfig, *, compute_capabilities: Sequence[str] = ()
) -> bytes:
    """Builds a plan whose convolutions are in FP16 and whose sums over the volume are in FP32.

    Args:
        trt: the module `tensorrt` (10.12 or later) or `tensorrt_rtx_bindings`.
        onnx_model: `plan_model(...).SerializeToString()` of FP16.
        compute_capabilities: "SM89" and the like, to build without the GPU; tensorrt_rtx_bindings only.

    Raises:
        ExportError: a graph that TensorRT refuses, a layer in another precision, or no GPU.
    """
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    # From 11 on networks are always strongly typed, and the flag may go; before, the types of the ONNX count only so.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx_model):
        problems = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise ExportError(f"TensorRT {trt.__version__} does not take the graph: {problems}")
    check_precision(trt, network)
    plan = builder.build_serialized_network(network, _builder_config(trt, builder, config, compute_capabilities))
    if plan is None:
        raise ExportError(f"TensorRT {trt.__version__} built no plan; its own messages are above")
    return bytes(plan)


def check_precision(trt: ModuleType, network: Any) -> None:
    """Demands FP16 of every convolution and FP32 of every sum over the volume, before anything is built.

    Raises:
        ExportError: a layer in another precision, or no convolution at all.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    kinds = trt.LayerType
    convolutions = [layer for layer in layers if layer.type in (kinds.CONVOLUTION, kinds.DECONVOLUTION)]
    reductions = [layer for layer in layers if layer.type == kinds.REDUCE]
    if not convolutions:
        raise ExportError("the graph has no convolution: expected AnatomyNet's")
    for group, expected in ((convolutions, trt.float16), (reductions, trt.float32)):
        for layer in group:
            found = layer.get_input(0).dtype
            if found != expected:
                raise ExportError(f"layer {layer.name} computes in {found}, expected {expected}: export with --fp16")


def largest_shape(config: ModelConfig) -> Shape:
    """The largest network_input a plan takes: 512 x 512 in the CT's plane, and as many slices as 32 bits can index."""
    stride = config.in_plane_stride
    side = IN_PLANE_VOXELS // stride
    elements_a_slice = max(CHANNELS_AT_FULL_RESOLUTION * side**2, config.classes * IN_PLANE_VOXELS**2)
    return (1, 1, LARGEST_TENSOR // elements_a_slice // 2 * 2, side, side)


def has_gpu() -> bool:
    """Whether an NVIDIA driver answers here, with at least one GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _builder_config(trt: ModuleType, builder: Any, config: ModelConfig, compute_capabilities: Sequence[str]) -> Any:
    builder_config = builder.create_builder_config()
    side = IN_PLANE_VOXELS // config.in_plane_stride
    smallest: Shape = (1, 1, SMALLEST_SIDE, SMALLEST_SIDE, SMALLEST_SIDE)
    typical: Shape = (1, 1, TYPICAL_SLICES, side, side)
    profile = builder.create_optimization_profile()
    profile.set_shape("network_input", smallest, typical, largest_shape(config))
    builder_config.add_optimization_profile(profile)
    if compute_capabilities:
        builder_config.num_compute_capabilities = len(compute_capabilities)
        for index, name in enumerate(compute_capabilities):
            builder_config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    return builder_config
