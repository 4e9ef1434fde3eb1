"""The Triton model repository: one model, `anatomynet`, that any client can call. Last step of `anatomynet-export`.

    OUTPUT/anatomynet/config.pbtxt      the contract, the ModelConfig, queue limits, warm-up
    OUTPUT/anatomynet/1/model.py        unpacks tensors and calls anatomynet.engine
    OUTPUT/anatomynet/1/*.onnx, *.plan  the network; model.py takes what runs fastest on the machine

Written beside and swapped in, so that a server never finds half a model.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from anatomynet import __version__
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import ExportError

MODEL_NAME = "anatomynet"
# Waiting requests hold their volumes in memory, 93 MB each for 178 x 512 x 512.
LARGEST_QUEUE = 8
# Longer than a full queue of whole volumes takes on two CPU cores, shorter than a clinic waits.
QUEUE_TIMEOUT_S = 120
# 1024 slices of 512 x 512: beyond any CT of head and neck.
LARGEST_VOXELS = 2**28
# Convolutions index with 32 bits, and the network has 15 channels at its full resolution.
LARGEST_NETWORK_VOXELS = 2**31 // 15
# Voxels a side at the network's resolution: enough to compile and to allocate, half a second on two cores.
WARM_UP_SIDE = 64


def write_repository(
    output: Path, *, config: ModelConfig, onnx_files: Sequence[Path], plan_files: Sequence[Path] = ()
) -> None:
    """Fills a Triton model repository with the model `anatomynet`; whatever else lies in `output` stays.

    Args:
        output: the repository's folder, made where it is missing.
        config: of the checkpoint the files were exported from; becomes parameters of config.pbtxt.
        onnx_files: the served graph, one or more (FP32, FP16); copied under their own names.
        plan_files: TensorRT plans, copied likewise.

    Raises:
        ExportError: no ONNX file, a file that is missing or named twice, a folder that cannot be written.
    """
    files = [*onnx_files, *plan_files]
    if not onnx_files:
        raise ExportError(f"no ONNX file for {output / MODEL_NAME}: expected at least one")
    if len({file.name for file in files}) < len(files):
        raise ExportError(f"two files of one name for {output / MODEL_NAME}: {', '.join(f.name for f in files)}")
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{MODEL_NAME}-", dir=_folder_beside(output)) as beside:
            model = Path(beside) / MODEL_NAME
            _write_model(model, config, files)
            _swap_in(model, output / MODEL_NAME)
    except OSError as error:
        raise ExportError(f"could not write {output / MODEL_NAME}: {error.strerror}: {error.filename}") from error


def config_text(config: ModelConfig) -> str:
    """The text of config.pbtxt: Triton's ModelConfig, which carries ours in its parameters."""
    stride = config.in_plane_stride
    warm_up = ", ".join(str(side) for side in (WARM_UP_SIDE, WARM_UP_SIDE * stride, WARM_UP_SIDE * stride))
    parameters = "\n".join(_parameter(key, value) for key, value in _parameters(config).items())
    return f"""# Written by anatomynet-export: change the checkpoint and export again rather than this file.
name: "{MODEL_NAME}"
backend: "python"
# One volume a request: volumes differ in size, so there is nothing to batch.
max_batch_size: 0

# Hounsfield units [z, y, x], any size; z to the head, y to the back, x to the patient's left.
input [{{ name: "CT", data_type: TYPE_INT16, dims: [-1, -1, -1] }}]
output [
  # 0 background, 1..n the structures, in the order of the parameter "structures".
  {{ name: "LABEL_MAP", data_type: TYPE_UINT8, dims: [-1, -1, -1] }},
  # Mean top probability over each structure's border voxels; 0 where absent.
  {{ name: "CONFIDENCE", data_type: TYPE_FP32, dims: [{len(config.structures)}] }}
]

# A volume fills the machine: one at a time. KIND_CPU says only where the tensors lie; the engine finds a GPU itself.
instance_group [{{ count: 1, kind: KIND_CPU }}]

# Only for its queue: with max_batch_size 0 nothing is batched. A full queue refuses at once, and a request that nobody
# waits for any more is not computed; a client may ask for a shorter time-out.
dynamic_batching {{
  default_queue_policy {{
    max_queue_size: {LARGEST_QUEUE}
    default_timeout_microseconds: {QUEUE_TIMEOUT_S * 1_000_000}
    timeout_action: REJECT
    allow_timeout_override: true
  }}
}}

# READY means compiled and allocated: the first patient does not wait for that.
model_warmup [{{
  name: "small volume"
  batch_size: 1
  inputs {{ key: "CT", value: {{ data_type: TYPE_INT16, dims: [{warm_up}], zero_data: true }} }}
}}]

# What a client needs to know, so that it hard-codes nothing; "model_config" is the whole, as JSON.
{parameters}
"""


def _parameters(config: ModelConfig) -> dict[str, str]:
    return {
        "model_config": config.to_json(),
        "structures": ",".join(config.structures),
        "in_plane_stride": str(config.in_plane_stride),
        "smallest_spacing_mm_xyz": " ".join(map(str, config.smallest_spacing)),
        "largest_spacing_mm_xyz": " ".join(map(str, config.largest_spacing)),
        "largest_voxels": str(min(LARGEST_VOXELS, LARGEST_NETWORK_VOXELS * config.in_plane_stride**2)),
        "checkpoint_sha256": config.checkpoint_sha256,
        "anatomynet_version": __version__,
    }


def _parameter(key: str, value: str) -> str:
    # A JSON string is a protobuf text string too, as long as it is ASCII.
    return f"parameters {{ key: {json.dumps(key)}, value: {{ string_value: {json.dumps(value)} }} }}"


def _write_model(model: Path, config: ModelConfig, files: Sequence[Path]) -> None:
    version = model / "1"
    version.mkdir(parents=True)
    (model / "config.pbtxt").write_text(config_text(config), encoding="utf-8")
    source = resources.files("anatomynet.export") / "python_backend" / "model.py"
    (version / "model.py").write_bytes(source.read_bytes())
    for file in files:
        shutil.copyfile(file, version / file.name)


def _folder_beside(output: Path) -> Path:
    """Where a model can be written and then moved to `output` by a rename.

    Beside the repository: a server takes every folder inside for a model, and fails on half of one. Inside where it
    must be: where the repository is a mount of its own, or the folder around it belongs to someone else.
    """
    around = output.absolute().parent
    same_file_system = around.stat().st_dev == output.stat().st_dev
    return around if same_file_system and os.access(around, os.W_OK) else output


def _swap_in(new: Path, place: Path) -> None:
    """Two renames; the old model comes back where the second fails, and goes with new's folder where it does not."""
    old = new.with_name("old")
    if place.exists():
        place.rename(old)
    try:
        new.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise
