"""ONNX -> TensorRT plan, FP16, for one GPU architecture. A step of `anatomynet-export --backend tensorrt` and `--rtx`.

The graph goes in as `plan_model` of export.onnx makes it: TensorRT knows no INT16, and refuses padding together with
interpolation, so it begins behind `prepare`, and does not crop. Whichever `trt` is given builds it:

    tensorrt                 for the GPU it runs on; Triton's tensorrt backend loads the plan
    tensorrt_rtx_bindings    for RTX workstations, also on a machine without a GPU
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import ExportError
from anatomynet.engine.limits import IN_PLANE_VOXELS, largest_slices
from anatomynet.engine.output import write_whole
from anatomynet.engine.preprocess import SMALLEST_NETWORK_SIDE

OLDEST_TENSORRT = (10, 12)
TYPICAL_SLICES = 178
# Where a plan tells who built it, a byte for each of four numbers; `trtexec --getPlanVersionOnly` reads the same.
VERSION_BYTES = slice(24, 28)
FP32_FORMAT = re.compile(r"\b(FP32|Float)\b", re.IGNORECASE)
FP16_FORMAT = re.compile(r"\b(FP16|Half)\b", re.IGNORECASE)
# What convolutions are called among an engine's layers; "correlation" by TensorRT's compiler, since 10.
CONVOLUTION_KINDS = ("conv", "correlation")

Shape = tuple[int, int, int, int, int]


def build_plan(
    trt: ModuleType,
    onnx_model: bytes,
    config: ModelConfig,
    *,
    compute_capabilities: Sequence[str] = (),
    timing_cache: Path | None = None,
) -> bytes:
    """Builds a plan whose convolutions are in FP16 and whose sums over the volume are in FP32.

    Args:
        trt: the module `tensorrt` (10.12 or later) or `tensorrt_rtx_bindings`.
        onnx_model: `plan_model(...).SerializeToString()` of FP16.
        compute_capabilities: "SM89" and the like, to build without the GPU; tensorrt_rtx_bindings only.
        timing_cache: file of what was timed on this GPU before; made, and brought up to date. TensorRT-RTX times
            nothing, and has no use for it.

    Raises:
        ExportError: a graph that TensorRT refuses, a layer in another precision, an unknown GPU, or none.
        OutputError: a timing cache that cannot be written.
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
    builder_config = _builder_config(trt, builder, config)
    _set_compute_capabilities(trt, builder_config, compute_capabilities)
    if timing_cache:
        _read_timing_cache(builder_config, timing_cache)
    plan = builder.build_serialized_network(network, builder_config)
    if plan is None:
        raise ExportError(f"TensorRT {trt.__version__} built no plan; its own messages are above")
    if timing_cache:
        write_whole(timing_cache, bytes(builder_config.get_timing_cache().serialize()), overwrite=True)
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


def check_engine_precision(layer_information: str) -> int:
    """Demands that every convolution of a built engine says that it is in FP16: builders have silently fallen back.

    Args:
        layer_information: JSON of TensorRT's engine inspector, built with detailed profiling verbosity, and asked for
            one size of input: for many at once it tells no formats.

    Returns:
        Convolutions that the engine names as such; what it fused under other names is not counted.

    Raises:
        ExportError: a convolution in FP32, or one that does not say what it computes in; no convolution.
    """
    convolutions = [layer for layer in _described_layers(layer_information) if _is_convolution(layer)]
    if not convolutions:
        raise ExportError(
            "the built engine tells of no convolution, so nothing shows that it computes in FP16: expected AnatomyNet's"
        )
    for layer in convolutions:
        formats = _formats(layer)
        if any(map(FP32_FORMAT.search, formats)):
            raise ExportError(f"layer {layer.get('Name')} of the built engine computes in FP32: expected FP16")
        if not any(map(FP16_FORMAT.search, formats)):
            raise ExportError(
                f"layer {layer.get('Name')} of the built engine does not say in what it computes "
                f"({', '.join(formats) or 'no format'}): expected FP16"
            )
    return len(convolutions)


def plan_version(plan: bytes) -> str:
    """Who built a plan, as "10.13.0.35": TensorRT reads only its own version's.

    Raises:
        ExportError: too short for a plan.
    """
    numbers = plan[VERSION_BYTES]
    if len(numbers) < 4:
        raise ExportError(f"a plan of {len(plan)} bytes: expected one that TensorRT built")
    return ".".join(map(str, numbers))


def check_tensorrt_version(version: str) -> None:
    """Raises ExportError where TensorRT is older than what was written for."""
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TENSORRT:
        raise ExportError(
            f"TensorRT {version}: expected {'.'.join(map(str, OLDEST_TENSORRT))} or later; "
            "pip install 'anatomynet[tensorrt]'"
        )


def check_architectures(trt: ModuleType, names: Sequence[str]) -> None:
    """Raises ExportError where TensorRT-RTX does not know one of the architectures, "SM89" and the like."""
    known = [name for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    unknown = [name for name in names if name.upper() not in known]
    if unknown:
        raise ExportError(
            f"TensorRT-RTX {trt.__version__} builds for no GPU '{unknown[0]}': expected one or more of "
            f"{', '.join(known).lower()}"
        )


def largest_shape(config: ModelConfig) -> Shape:
    """The largest network_input a plan takes: 512 x 512 in the CT's plane, and as many slices as 32 bits can index."""
    side = IN_PLANE_VOXELS // config.in_plane_stride
    return (1, 1, largest_slices(config), side, side)


def _described_layers(layer_information: str) -> list[dict[str, Any]]:
    """All layers of an engine; without detailed profiling verbosity it gives their names alone, or nothing."""
    try:
        layers = list(json.loads(layer_information)["Layers"])
    except (ValueError, TypeError, KeyError) as error:
        raise ExportError(
            f"TensorRT's engine inspector said nothing that can be read ({type(error).__name__}), so nothing shows "
            "that the plan computes in FP16"
        ) from error
    described = [layer for layer in layers if isinstance(layer, dict)]
    if len(described) < len(layers):
        raise ExportError(
            f"TensorRT's engine inspector names {len(layers) - len(described)} of {len(layers)} layers and tells no "
            "more, so nothing shows that they compute in FP16: expected a plan built with detailed profiling verbosity"
        )
    return described


def _is_convolution(layer: dict[str, Any]) -> bool:
    kinds = " ".join(str(layer.get(key, "")) for key in ("LayerType", "ParameterType")).lower()
    return any(kind in kinds for kind in CONVOLUTION_KINDS)


def _formats(layer: dict[str, Any]) -> list[str]:
    """What a layer reads: of its inputs, "Half" or "Row major linear FP16 format", and of its weights, "Half"."""
    formats = [tensor.get("Format/Datatype") for tensor in layer.get("Inputs", [])]
    weights = layer.get("Weights")
    if isinstance(weights, dict):
        formats.append(weights.get("Type"))
    return [str(text) for text in formats if text]


def _builder_config(trt: ModuleType, builder: Any, config: ModelConfig) -> Any:
    builder_config = builder.create_builder_config()
    # So that the engine can be asked which precision its layers got.
    builder_config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    side, least = IN_PLANE_VOXELS // config.in_plane_stride, SMALLEST_NETWORK_SIDE
    smallest: Shape = (1, 1, least, least, least)
    typical: Shape = (1, 1, TYPICAL_SLICES, side, side)
    profile = builder.create_optimization_profile()
    profile.set_shape("network_input", smallest, typical, largest_shape(config))
    builder_config.add_optimization_profile(profile)
    return builder_config


def _set_compute_capabilities(trt: ModuleType, builder_config: Any, names: Sequence[str]) -> None:
    if not names:
        return
    check_architectures(trt, names)
    builder_config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        builder_config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)


def _read_timing_cache(builder_config: Any, path: Path) -> None:
    known = path.read_bytes() if path.is_file() else b""
    if not builder_config.set_timing_cache(builder_config.create_timing_cache(known), False):
        # Of another version or GPU, or damaged: what was timed is timed again.
        builder_config.set_timing_cache(builder_config.create_timing_cache(b""), False)
