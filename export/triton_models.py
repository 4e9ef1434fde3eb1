"""What Triton is told of a model: its config.pbtxt and the files beside it, for each backend that can serve it.

    python_model        model.py calls anatomynet.engine, with the files beside it; runs anywhere
    onnxruntime_model   Triton's own ONNX Runtime, with model.onnx
    tensorrt_models     an ensemble: prepare.onnx -> plan -> finish.onnx
    region_model        beside any of them, the region finder: `anatomynet_region`

One contract whatever runs behind it: CT -> LABEL_MAP, CONFIDENCE, under the name `anatomynet`. None has a response
cache: it would hash 93 MB a volume, and no patient is scanned the same twice.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from anatomynet import __version__
from anatomynet.engine import contract
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.contract import CONFIG_KEY, MODEL_NAME, REGION_CONFIG_KEY, REGION_NAME
from anatomynet.engine.errors import ExportError
from anatomynet.engine.limits import SIDES_KEY, VOXELS_KEY, largest_voxels
from anatomynet.engine.region import RegionConfig
from anatomynet.engine.runtime import CUDA_PROVIDER, PROVIDER_OPTIONS

PREPARE_NAME, PLAN_NAME, FINISH_NAME = (f"{MODEL_NAME}_{step}" for step in ("prepare", "plan", "finish"))
MODEL_SOURCE, REGION_SOURCE = "model.py", "region_model.py"
# Waiting requests hold their volumes in memory, 93 MB each for 178 x 512 x 512.
LARGEST_QUEUE = 8
# Longer than a full queue of whole volumes takes on two CPU cores, shorter than a clinic waits.
QUEUE_TIMEOUT_S = 120
# Voxels a side at the network's resolution: enough to compile and to allocate, half a second on two cores. On a GPU
# model.py has drawn larger ones by then (export/warm_up.py).
WARM_UP_SIDE = 64
# Of the CT (z, y, x): what the client cuts to head and neck, to the body, and a whole scan. A GPU allocates for them
# and picks kernels.
COMMON_SHAPES = ((144, 224, 192), (178, 320, 320), (178, 512, 512))
# Of CT_COARSE (z, y, x): a planning CT's body.
COARSE_SHAPE = (59, 40, 60)

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class TritonModel:
    """One folder of a model repository.

    Attributes:
        name: of the folder and of the model.
        config_text: its config.pbtxt.
        files: of its version 1, by name: where each is copied from.
        needs: models of the same repository that it calls.
        plan: the one among its files.
    """

    name: str
    config_text: str
    files: Mapping[str, Path]
    needs: tuple[str, ...] = ()
    plan: "PlanFile | None" = None


@dataclass(frozen=True)
class PlanFile:
    """A TensorRT plan and what alone can run it.

    Attributes:
        path: the plan.
        tensorrt_version: that built it; another refuses it.
        compute_capability: of the GPU it was built on and for, "9.0".
        gpu: that GPU's product name, as its driver tells it.
        largest_shape: CT (z, y, x) that its profile takes.
    """

    path: Path
    tensorrt_version: str
    compute_capability: str
    gpu: str
    largest_shape: Shape

    @property
    def requirements(self) -> dict[str, str]:
        """What the launcher holds against the machine before the server starts."""
        return {
            "tensorrt_version": self.tensorrt_version,
            "compute_capability": self.compute_capability,
            "gpu": self.gpu,
        }

    @property
    def marks(self) -> dict[str, str]:
        """The parameters of config.pbtxt that tell of it."""
        return {
            **{f"plan_{key}": value for key, value in self.requirements.items()},
            SIDES_KEY: " ".join(map(str, self.largest_shape)),
        }


@dataclass(frozen=True)
class _Tensor:
    name: str
    kind: str
    dims: Sequence[int]

    def __str__(self) -> str:
        return f'{{ name: "{self.name}", data_type: TYPE_{self.kind}, dims: {list(self.dims)} }}'


@dataclass(frozen=True)
class _Settings:
    """What a config.pbtxt says beside its tensors."""

    backend: str
    inputs: Sequence[_Tensor]
    outputs: Sequence[_Tensor]
    blocks: Sequence[str]
    parameters: Mapping[str, str] = field(default_factory=dict)
    contract: str = ""


VOLUME = (-1, -1, -1)
NETWORK_VOLUME = (1, 1, -1, -1, -1)
CT = _Tensor(contract.CT, "INT16", VOLUME)
NETWORK_INPUT = _Tensor("network_input", "FP16", NETWORK_VOLUME)
LABELS = _Tensor("LABELS", "UINT8", VOLUME)
LABEL_MAP = _Tensor(contract.LABEL_MAP, "UINT8", VOLUME)
CT_COARSE = _Tensor(contract.CT_COARSE, "INT16", VOLUME)
BOX = _Tensor(contract.BOX, "INT64", (6,))

CONTRACT = """# CT: Hounsfield units [z, y, x]; z to the head, y to the back, x to the patient's left; sides of 8 voxels
# or more, in plane of 8 times the stride.
# LABEL_MAP: 0 background, 1..n the structures, in the order of the parameter "structures".
# CONFIDENCE: mean top probability over each structure's border voxels; 0 where absent."""

REGION_CONTRACT = """# CT_COARSE: Hounsfield units [z, y, x], any size, axes as CT's; means of
# blocks of so many voxels as come nearest to the parameter "coarse_spacing_mm_xyz".
# BOX: of the structures, start z, y, x and stop z, y, x in voxels of CT_COARSE, half-open; six zeros where none is."""

# Only for its queue: with max_batch_size 0 nothing is batched.
QUEUE = f"""# A full queue refuses at once, and a request that nobody waits for any more is not computed; a client may
# ask for a shorter time-out.
dynamic_batching {{
  default_queue_policy {{
    max_queue_size: {LARGEST_QUEUE}
    default_timeout_microseconds: {QUEUE_TIMEOUT_S * 1_000_000}
    timeout_action: REJECT
    allow_timeout_override: true
  }}
}}"""

PYTHON_INSTANCE = """# A volume fills the machine: one at a time. KIND_CPU says only where the tensors lie; the engine
# finds a GPU itself.
instance_group [{ count: 1, kind: KIND_CPU }]"""

CPU_INSTANCE = """# A few hundredths of a second each.
instance_group [{ count: 1, kind: KIND_CPU }]"""

AUTO_INSTANCE = """# A volume fills a GPU: a second instance would make both wait. One on each GPU, or on the CPU where
# there is none.
instance_group [{ count: 1, kind: KIND_AUTO }]"""

GPU_INSTANCE = """# A volume fills a GPU: a second instance would make both wait. One on each GPU.
instance_group [{ count: 1, kind: KIND_GPU }]"""

CUDA_PARAMETERS = "\n".join(
    f'  parameters {{ key: "{key}", value: "{value}" }}' for key, value in PROVIDER_OPTIONS[CUDA_PROVIDER].items()
)
CUDA_OPTIONS = f"""# By default every new size first times every algorithm of every convolution, memory doubles when it
# grows, and FP32 is computed in TF32, which moves contours.
optimization {{ execution_accelerators {{ gpu_execution_accelerator [{{
  name: "cuda"
{CUDA_PARAMETERS}
}}] }} }}"""


def python_model(config: ModelConfig, onnx_files: Sequence[Path], *, checkpoint: Path | None = None) -> TritonModel:
    """For Triton's Python backend: model.py runs what the machine has.

    Args:
        config: of the checkpoint the files were exported from; becomes parameters of config.pbtxt.
        onnx_files: the served graph, one or more (FP32, FP16); kept under their own names.
        checkpoint: its file, what PyTorch computes on a GPU; None leaves that to ONNX Runtime's CUDA, or to the CPU.

    Raises:
        ExportError: no ONNX file, or two of one name.
    """
    if not onnx_files:
        raise ExportError(f"no ONNX file for {MODEL_NAME}: expected at least one")
    if len({file.name for file in onnx_files}) < len(onnx_files):
        raise ExportError(f"two files of one name for {MODEL_NAME}: {', '.join(file.name for file in onnx_files)}")
    stride = config.in_plane_stride
    small = (WARM_UP_SIDE, WARM_UP_SIDE * stride, WARM_UP_SIDE * stride)
    warm_up = _warm_ups({"small volume": {CT: small}})
    settings = _Settings(
        "python", [CT], [LABEL_MAP, _confidence(config)], [PYTHON_INSTANCE, QUEUE, warm_up], _parameters(config)
    )
    weights = {f"{config.name}.safetensors": checkpoint} if checkpoint else {}
    files = {MODEL_SOURCE: shipped_model_source(), **{file.name: file for file in onnx_files}, **weights}
    return TritonModel(MODEL_NAME, _config_text(MODEL_NAME, settings), files)


def onnxruntime_model(config: ModelConfig, onnx_file: Path) -> TritonModel:
    """For Triton's ONNX Runtime backend: the served graph itself, no Python in between."""
    warm_up = _warm_ups({_said(shape): {CT: shape} for shape in COMMON_SHAPES})
    settings = _Settings(
        "onnxruntime",
        [CT],
        [LABEL_MAP, _confidence(config)],
        [AUTO_INSTANCE, QUEUE, CUDA_OPTIONS, warm_up],
        _parameters(config),
    )
    return TritonModel(MODEL_NAME, _config_text(MODEL_NAME, settings), {"model.onnx": onnx_file})


def tensorrt_models(config: ModelConfig, *, prepare: Path, plan: PlanFile, finish: Path) -> tuple[TritonModel, ...]:
    """For Triton's TensorRT backend: an ensemble of three, since a plan takes neither INT16 nor any size.

    Args:
        prepare: ONNX, CT -> network_input: `prepare_model` of export.onnx in FP16.
        plan: network_input -> LABELS, CONFIDENCE: built of `plan_model`.
        finish: ONNX, LABELS and CT -> LABEL_MAP: `crop_model`.
    """
    return (
        _ensemble(config, plan),
        _prepare_step(config, prepare),
        _plan_step(config, plan),
        _finish_step(config, finish),
    )


def region_model(config: RegionConfig, onnx_file: Path, *, backend: str) -> TritonModel:
    """The region finder, on the CPU whatever computes the network: a GPU gains nothing, and the box stays the same.

    Args:
        config: its own; becomes parameters of config.pbtxt.
        onnx_file: the served graph.
        backend: "python" or "onnxruntime".
    """
    settings = _Settings(
        backend,
        [CT_COARSE],
        [BOX],
        [CPU_INSTANCE, QUEUE, _warm_ups({"coarse volume": {CT_COARSE: COARSE_SHAPE}})],
        {
            REGION_CONFIG_KEY: config.to_json(),
            "structures": ",".join(config.structures),
            "coarse_spacing_mm_xyz": " ".join(map(str, config.coarse_spacing)),
            "checkpoint_sha256": config.checkpoint_sha256,
            "anatomynet_version": __version__,
        },
        REGION_CONTRACT,
    )
    code = {MODEL_SOURCE: shipped_model_source(REGION_SOURCE)} if backend == "python" else {}
    return TritonModel(REGION_NAME, _config_text(REGION_NAME, settings), {**code, "model.onnx": onnx_file})


def shipped_model_source(name: str = MODEL_SOURCE) -> Path:
    """The model.py of this package, or another's: the only code that a repository may hold."""
    return Path(str(resources.files("anatomynet.export") / "python_backend" / name))


def _ensemble(config: ModelConfig, plan: PlanFile) -> TritonModel:
    confidence = _confidence(config)
    steps = f"""# Each step has its own queue; the plan's is the one that fills.
ensemble_scheduling {{ step [
  {_step(PREPARE_NAME, [CT], [NETWORK_INPUT])},
  {_step(PLAN_NAME, [NETWORK_INPUT], [LABELS, confidence])},
  {_step(FINISH_NAME, [LABELS, CT], [LABEL_MAP])}
] }}"""
    settings = _Settings("", [CT], [LABEL_MAP, confidence], [steps], _parameters(config) | plan.marks)
    needs = (PREPARE_NAME, PLAN_NAME, FINISH_NAME)
    return TritonModel(MODEL_NAME, _config_text(MODEL_NAME, settings), {}, needs)


def _prepare_step(config: ModelConfig, file: Path) -> TritonModel:
    warm_up = _warm_ups({_said(shape): {CT: shape} for shape in COMMON_SHAPES})
    settings = _Settings("onnxruntime", [CT], [NETWORK_INPUT], [AUTO_INSTANCE, QUEUE, CUDA_OPTIONS, warm_up])
    return TritonModel(PREPARE_NAME, _config_text(PREPARE_NAME, settings), {"model.onnx": file})


def _plan_step(config: ModelConfig, plan: PlanFile) -> TritonModel:
    stride = config.in_plane_stride
    warm_up = _warm_ups(
        {_said((z, y, x)): {NETWORK_INPUT: (1, 1, z, y // stride, x // stride)} for z, y, x in COMMON_SHAPES}
    )
    file = f'# Named after what built it and for which GPU.\ndefault_model_filename: "{plan.path.name}"'
    settings = _Settings(
        "tensorrt",
        [NETWORK_INPUT],
        [LABELS, _confidence(config)],
        [file, GPU_INSTANCE, QUEUE, warm_up],
        plan.marks,
    )
    return TritonModel(PLAN_NAME, _config_text(PLAN_NAME, settings), {plan.path.name: plan.path}, plan=plan)


def _finish_step(config: ModelConfig, file: Path) -> TritonModel:
    warm_up = _warm_ups({_said(shape): {LABELS: shape, CT: shape} for shape in COMMON_SHAPES})
    settings = _Settings("onnxruntime", [LABELS, CT], [LABEL_MAP], [AUTO_INSTANCE, QUEUE, CUDA_OPTIONS, warm_up])
    return TritonModel(FINISH_NAME, _config_text(FINISH_NAME, settings), {"model.onnx": file})


def _config_text(name: str, settings: _Settings) -> str:
    """The text of config.pbtxt: Triton's ModelConfig, which carries ours in its parameters."""
    backend = f'backend: "{settings.backend}"' if settings.backend else 'platform: "ensemble"'
    inputs = ",\n  ".join(map(str, settings.inputs))
    outputs = ",\n  ".join(map(str, settings.outputs))
    blocks = "\n\n".join(settings.blocks)
    text = f"""# Written by anatomynet-export: change the checkpoint and export again rather than this file.
name: "{name}"
{backend}
# One volume a request: volumes differ in size, so there is nothing to batch.
max_batch_size: 0

{settings.contract or CONTRACT}
input [
  {inputs}
]
output [
  {outputs}
]

{blocks}
"""
    if not settings.parameters:
        return text
    lines = "\n".join(_parameter(key, value) for key, value in settings.parameters.items())
    return f"""{text}
# What a client needs to know, so that it hard-codes nothing; "{CONFIG_KEY}" is the whole, as JSON.
{lines}
"""


def _confidence(config: ModelConfig) -> _Tensor:
    return _Tensor(contract.CONFIDENCE, "FP32", (len(config.structures),))


def _parameters(config: ModelConfig) -> dict[str, str]:
    return {
        CONFIG_KEY: config.to_json(),
        "structures": ",".join(config.structures),
        "in_plane_stride": str(config.in_plane_stride),
        "smallest_spacing_mm_xyz": " ".join(map(str, config.smallest_spacing)),
        "largest_spacing_mm_xyz": " ".join(map(str, config.largest_spacing)),
        VOXELS_KEY: str(largest_voxels(config)),
        "checkpoint_sha256": config.checkpoint_sha256,
        "anatomynet_version": __version__,
    }


def _parameter(key: str, value: str) -> str:
    # A JSON string is a protobuf text string too, as long as it is ASCII.
    return f"parameters {{ key: {json.dumps(key)}, value: {{ string_value: {json.dumps(value)} }} }}"


def _warm_ups(requests: Mapping[str, Mapping[_Tensor, Sequence[int]]]) -> str:
    samples = ",\n".join(
        f'  {{ name: "{name}", batch_size: 1, {", ".join(_warm_up_input(*item) for item in inputs.items())} }}'
        for name, inputs in requests.items()
    )
    return (
        f"# READY means compiled and allocated: the first patient does not wait for that.\nmodel_warmup [\n{samples}\n]"
    )


def _warm_up_input(tensor: _Tensor, shape: Sequence[int]) -> str:
    value = f"{{ data_type: TYPE_{tensor.kind}, dims: {list(shape)}, zero_data: true }}"
    return f'inputs {{ key: "{tensor.name}", value: {value} }}'


def _step(model: str, inputs: Sequence[_Tensor], outputs: Sequence[_Tensor]) -> str:
    maps = [f'input_map {{ key: "{t.name}", value: "{t.name}" }}' for t in inputs]
    maps += [f'output_map {{ key: "{t.name}", value: "{t.name}" }}' for t in outputs]
    return f'{{ model_name: "{model}", model_version: -1, {", ".join(maps)} }}'


def _said(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
