"""What Triton's Python backend runs: unpacks tensors, calls anatomynet.engine, packs tensors.

anatomynet-export copies this file into the model repository, beside the ONNX files and the checkpoint. It runs in the
environment whose `python3` is first on tritonserver's PATH; anatomynet must be installed there.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from anatomynet.engine.config import model_config_from_json
from anatomynet.engine.contract import CONFIDENCE, CONFIG_KEY, CT, LABEL_MAP
from anatomynet.engine.errors import AnatomyNetError, ModelError
from anatomynet.engine.limits import size_limit_from_parameters
from anatomynet.engine.runtime import CUDA_PROVIDER, OnnxRuntime, Runtime, load_runtime
from anatomynet.export.gpu import visible_gpus
from anatomynet.export.heap import keep_freed_memory
from anatomynet.export.manifest import check_files
from anatomynet.export.warm_up import warm_up


class TritonPythonModel:
    """The model `anatomynet`: CT -> LABEL_MAP, CONFIDENCE. Triton itself checks names, types and dimensions."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads what computes here.

        Raises:
            TritonModelException: files that do not fit this machine, or config.pbtxt; the model is not READY then.
        """
        home = Path(args["model_repository"])
        folder = home / args["model_version"]
        parameters = json.loads(args["model_config"])["parameters"]
        values = {key: value["string_value"] for key, value in parameters.items()}
        try:
            check_files(home)
            self.runtime, on_gpu = chosen_runtime(folder)
            if self.runtime.model != model_config_from_json(values[CONFIG_KEY]):
                raise ModelError("config.pbtxt and what lies beside it are of two models: run anatomynet-export")
            self.size_limit = size_limit_from_parameters(values, self.runtime.model)
        except AnatomyNetError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        if on_gpu:
            self._prepare_gpu()
        elif gpus := visible_gpus():
            pb_utils.Logger.log_warn(
                f"nothing here computes on {gpus[0].name}: expected PyTorch for CUDA (pip install 'anatomynet[gpu]') "
                "and the checkpoint that anatomynet-export --fp16 adds"
            )
        pb_utils.Logger.log_info(f"anatomynet runs on {self.runtime.description}")

    def _prepare_gpu(self) -> None:
        """What pays only there: on a CPU the network takes too long, and too much memory."""
        keep_freed_memory()
        for fault in warm_up(self.runtime, self.size_limit):
            pb_utils.Logger.log_warn(f"not drawn before READY: {fault}")

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request; a request that cannot be answered gets one line that says why."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        if request.is_cancelled():
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError("cancelled by the client", pb_utils.TritonError.CANCELLED)
            )
        hu = pb_utils.get_input_tensor_by_name(request, CT).as_numpy()
        try:
            self.size_limit.check(hu.shape, self.runtime.model)
            label_map, confidence = self.runtime.infer(hu)
        except AnatomyNetError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor(LABEL_MAP, np.ascontiguousarray(label_map)),
                pb_utils.Tensor(CONFIDENCE, np.ascontiguousarray(confidence)),
            ]
        )


def chosen_runtime(folder: Path) -> tuple[Runtime, bool]:
    """What computes here, and whether that is a GPU.

    On a GPU the checkpoint through PyTorch, which has been timed there, or else the FP16 graph through ONNX Runtime,
    which has not; the FP32 graph on a CPU, which computes FP16 in FP32 and gains nothing.

    Raises:
        ModelError: no ONNX file, or one that cannot be run here.
    """
    # By what the export ends their names with: a model may be named after a precision itself.
    files = sorted(folder.glob("*.onnx"), key=lambda file: (file.stem.endswith("-fp16"), file.name))
    if not files:
        raise ModelError(f"no ONNX file in {folder}: run anatomynet-export")
    by_torch = _torch_on_gpu(folder)
    if by_torch:
        return by_torch, True
    runtime = load_runtime(files[0])
    if isinstance(runtime, OnnxRuntime) and CUDA_PROVIDER in runtime.providers:
        return load_runtime(files[-1]) if len(files) > 1 else runtime, True
    return runtime, False


def _torch_on_gpu(folder: Path) -> Runtime | None:
    """None where there is no checkpoint in the folder, no GPU, or no PyTorch that reaches it."""
    checkpoints = sorted(folder.glob("*.safetensors"))
    if not checkpoints or not visible_gpus():  # PyTorch takes seconds to import
        return None
    try:
        from anatomynet.engine.gpu_runtime import has_gpu, load_gpu_runtime
    except ImportError:
        return None
    return load_gpu_runtime(checkpoints[0]) if has_gpu() else None
