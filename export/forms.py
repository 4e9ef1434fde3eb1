"""Every form that a checkpoint is exported to, one function each: written, and proven against the checkpoint.

    onnx_file            the served graph, FP32 or FP16
    python_form          for Triton's Python backend: those files, the checkpoint, and model.py
    onnxruntime_form     for Triton's ONNX Runtime backend: one of those files
    tensorrt_form        for Triton's TensorRT backend: a plan for this machine's GPU, between two small graphs
    region_form          the region finder, beside any of these three
    rtx_form             for RTX workstations: such a plan for TensorRT-RTX, built with or without a GPU

`anatomynet-export` (export.cli) puts them together.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import click
import onnx
import torch

from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.config import ModelConfig, shipped_weights
from anatomynet.engine.contract import CONFIG_KEY
from anatomynet.engine.data import read_case
from anatomynet.engine.errors import ExportError, OutputError
from anatomynet.engine.gpu_runtime import has_gpu, load_gpu_runtime
from anatomynet.engine.limits import IN_PLANE_VOXELS, SIDES_KEY, largest_slices
from anatomynet.engine.output import write_whole
from anatomynet.engine.phantom import make_phantom
from anatomynet.engine.preprocess import prepare
from anatomynet.engine.region import RegionConfig
from anatomynet.engine.region_network import RegionNetwork
from anatomynet.engine.runtime import OnnxRuntime, Runtime, load_runtime
from anatomynet.engine.volume import HounsfieldArray
from anatomynet.export.composition import ComposedRuntime, PlanParts, plan_parts, write_part
from anatomynet.export.gpu import Gpu, visible_gpus
from anatomynet.export.manifest import RTX_VERSION_KEY, write_manifest
from anatomynet.export.onnx import network_model, served_model, write_onnx
from anatomynet.export.parity import Reference, check_parity, draw_reference
from anatomynet.export.plan import (
    build_plan,
    check_architectures,
    check_engine_precision,
    check_tensorrt_version,
    plan_version,
)
from anatomynet.export.plan_on_gpu import PlanOnGpu
from anatomynet.export.region import export_region
from anatomynet.export.triton_models import (
    PlanFile,
    TritonModel,
    onnxruntime_model,
    python_model,
    region_model,
    tensorrt_models,
)

PHANTOM_SEED = 0
RTX_MODULE = "tensorrt_rtx_bindings"

FinderCheckpoint = tuple[RegionNetwork, RegionConfig]


@dataclass(frozen=True, eq=False)
class Source:
    """What is exported: the network as ONNX, its configuration, what the checkpoint itself draws, and its file."""

    graph: onnx.ModelProto
    config: ModelConfig
    reference: Reference
    checkpoint: Path


def read_source(checkpoint: Path | None, parity_input: Path | None) -> Source:
    """Reads the checkpoint, runs it on the CT of the proof, and exports its network.

    Raises:
        ModelError: a checkpoint that cannot be read.
        DataError: a `parity_input` that cannot be read.
        ParityError: a structure that the checkpoint does not find there.
    """
    network, config = load_checkpoint(checkpoint)
    click.echo(f"checkpoint {config.name}, sha256 {config.checkpoint_sha256}: {', '.join(config.structures)}")
    hu = parity_volume(config, parity_input)
    click.echo(f"proof on {parity_input or 'a synthetic patient'}, {' x '.join(map(str, hu.shape))} voxels")
    reference = draw_reference(network, config, hu)
    return Source(network_model(network), config, reference, checkpoint or shipped_weights(".safetensors"))


def parity_volume(config: ModelConfig, case: Path | None) -> HounsfieldArray:
    """int16 (z, y, x): what the network is shown of a case, or the whole of a synthetic patient.

    Raises:
        DataError: a case that cannot be read.
        GeometryError: a CT on which the network cannot run.
    """
    if case is None:
        volume, _ = make_phantom(seed=PHANTOM_SEED, structures=config.structures)
        return volume.hu
    return prepare(read_case(case, config.structures).volume, config).hu


def onnx_file(
    source: Source, folder: Path, *, fp16: bool, runtime_of: Callable[[Path], Runtime] = load_runtime
) -> Path:
    """Writes the served graph and proves it.

    Args:
        runtime_of: what runs it for the proof; by default the fastest that is here.

    Raises:
        ExportError: a graph that does not run.
        ParityError: it does not draw what the checkpoint draws.
        OutputError: a temporary folder that is full.
    """
    precision = "fp16" if fp16 else "fp32"
    path = folder / f"{source.config.name}-{precision}.onnx"
    write_onnx(served_model(source.graph, source.config, fp16=fp16), path)
    click.echo(f"{path.name}, {path.stat().st_size / 1e6:.1f} MB")
    _prove(source, runtime_of(path), fp16=fp16)
    return path


def python_form(source: Source, folder: Path, *, fp16: bool) -> list[TritonModel]:
    """FP32 for CPUs; with `fp16` for GPUs the checkpoint beside it, which PyTorch computes in FP16, and FP16 for those
    that only ONNX Runtime reaches. See `onnx_file` for what it raises."""
    if not fp16:
        return [python_model(source.config, [onnx_file(source, folder, fp16=False)])]
    files = [onnx_file(source, folder, fp16=half) for half in (False, True)]
    if has_gpu():
        _prove(source, load_gpu_runtime(source.checkpoint), fp16=True)
    return [python_model(source.config, files, checkpoint=source.checkpoint)]


def onnxruntime_form(source: Source, folder: Path, *, fp16: bool) -> list[TritonModel]:
    """One file, FP32 or FP16, proven by ONNX Runtime itself; see `onnx_file` for what it raises."""
    return [onnxruntime_model(source.config, onnx_file(source, folder, fp16=fp16, runtime_of=OnnxRuntime))]


def region_form(finder: FinderCheckpoint, config: ModelConfig, folder: Path, *, backend: str) -> list[TritonModel]:
    """The region finder, where it knows all that the model draws; see `export_region` for what it raises.

    Args:
        finder: what `load_region_checkpoint` gave.
        config: of the model.
        backend: of the model; a plan's repository has ONNX Runtime's at hand.
    """
    network, region = finder
    unknown = sorted(set(config.structures) - set(region.structures))
    if unknown:
        click.echo(f"without a region finder: it does not know {', '.join(unknown)}")
        return []
    path = folder / "region.onnx"
    export_region(network, region, path)
    click.echo(f"{path.name}, {path.stat().st_size / 1e6:.1f} MB; finds the checkpoint's boxes")
    return [region_model(region, path, backend="python" if backend == "python" else "onnxruntime")]


def tensorrt_form(source: Source, folder: Path, *, timing_cache_folder: Path) -> list[TritonModel]:
    """A plan for this machine's GPU, and the graphs around it; proven without the plan, then with it.

    Raises:
        ExportError: no GPU or no TensorRT here, a graph that it refuses, a layer in another precision.
        ParityError: it does not draw what the checkpoint draws.
        OutputError: a timing cache that cannot be written.
    """
    trt, gpu = require_tensorrt()
    parts = _proven_parts(source)
    try:
        timing_cache_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{timing_cache_folder} could not be made: {error.strerror}") from error
    label = f"trt{trt.__version__}-{gpu.label}"
    plan = build_plan(
        trt, parts.network.SerializeToString(), source.config, timing_cache=timing_cache_folder / f"{label}.timing"
    )
    on_gpu = PlanOnGpu(trt, plan)
    convolutions = check_engine_precision(on_gpu.layer_information())
    path = folder / f"{source.config.name}-fp16-{label}.plan"
    write_whole(path, plan, overwrite=True)
    click.echo(f"{path.name}, {len(plan) / 1e6:.1f} MB; the engine names {convolutions} convolutions, none in FP32")
    _prove(source, ComposedRuntime(parts, source.config, middle=on_gpu, description=on_gpu.description), fp16=True)
    prepare_file, finish_file = _written_around(parts, folder)
    plan_file = PlanFile(path, plan_version(plan), gpu.compute_capability, gpu.name, _largest_ct(source.config))
    return list(tensorrt_models(source.config, prepare=prepare_file, plan=plan_file, finish=finish_file))


def rtx_form(source: Source, folder: Path, *, architectures: Sequence[str]) -> Path:
    """A TensorRT-RTX plan for the named architectures ("sm89"), and the graphs around it, in a folder of their own.

    Returns:
        That folder; prepare.onnx, the plan, finish.onnx, and their manifest, which says what runs the plan, on what,
        up to which CT, and what it draws.

    Raises:
        ExportError: no TensorRT-RTX here, an architecture it does not know, a graph that it refuses.
        ParityError: the graphs do not draw what the checkpoint draws.
    """
    trt = require_rtx(architectures)
    parts = _proven_parts(source)
    plan = build_plan(trt, parts.network.SerializeToString(), source.config, compute_capabilities=architectures)
    label = "-".join((source.config.name, "fp16", f"rtx{plan_version(plan)}", *architectures))
    home = folder / label
    home.mkdir()
    write_whole(home / f"{label}.plan", plan, overwrite=True)
    _written_around(parts, home)
    click.echo(f"{label}.plan, {len(plan) / 1e6:.1f} MB; its graph is proven, the plan itself has not run here")
    write_manifest(home, plan=_rtx_requirements(plan, source.config, architectures))
    return home


def require_tensorrt() -> tuple[ModuleType, Gpu]:
    """TensorRT, and this machine's GPU, the first where there are several; asked before anything is computed.

    Raises:
        ExportError: what is missing, and how to get it.
    """
    gpus = visible_gpus()
    if not gpus:
        raise ExportError(
            "--backend tensorrt builds its plan on the NVIDIA GPU that will serve it, and none is here: export there, "
            "or give --backend onnxruntime, which runs on any"
        )
    if importlib.util.find_spec("tensorrt") is None:
        raise ExportError("--backend tensorrt needs TensorRT: pip install 'anatomynet[tensorrt]'")
    if not torch.cuda.is_available():
        raise ExportError("--backend tensorrt proves its plan on the GPU, and needs a PyTorch built with CUDA for that")
    trt = importlib.import_module("tensorrt")
    check_tensorrt_version(trt.__version__)
    return trt, gpus[0]


def require_rtx(architectures: Sequence[str]) -> ModuleType:
    """TensorRT-RTX; asked before anything is computed.

    Raises:
        ExportError: it is not installed, or does not know one of the architectures.
    """
    if importlib.util.find_spec(RTX_MODULE) is None:
        raise ExportError("--rtx needs TensorRT-RTX: pip install 'anatomynet[tensorrt-rtx]'")
    trt = importlib.import_module(RTX_MODULE)
    check_architectures(trt, architectures)
    return trt


def _proven_parts(source: Source) -> PlanParts:
    """The graphs around and inside a plan, proven in ONNX Runtime before anything is built."""
    parts = plan_parts(source.graph, source.config)
    _prove(source, ComposedRuntime(parts, source.config), fp16=True)
    return parts


def _largest_ct(config: ModelConfig) -> tuple[int, int, int]:
    return largest_slices(config), IN_PLANE_VOXELS, IN_PLANE_VOXELS


def _rtx_requirements(plan: bytes, config: ModelConfig, architectures: Sequence[str]) -> dict[str, str]:
    numbers = [name.lower().removeprefix("sm") for name in architectures]
    return {
        RTX_VERSION_KEY: plan_version(plan),
        "compute_capabilities": " ".join(f"{number[:-1]}.{number[-1]}" for number in numbers),
        "precision": "fp16",
        SIDES_KEY: " ".join(map(str, _largest_ct(config))),
        CONFIG_KEY: config.to_json(),
    }


def _written_around(parts: PlanParts, folder: Path) -> tuple[Path, Path]:
    return write_part(parts.prepare, folder / "prepare.onnx"), write_part(parts.finish, folder / "finish.onnx")


def _prove(source: Source, runtime: Runtime, *, fp16: bool) -> None:
    for report in check_parity(source.reference, runtime, fp16=fp16):
        click.echo(f"  {report}")
