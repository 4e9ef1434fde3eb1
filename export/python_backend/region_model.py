"""What Triton's Python backend runs for the region finder: unpacks a tensor, calls anatomynet.engine, packs a tensor.

anatomynet-export copies this file into the model repository as model.py, beside the ONNX file; see model.py.
"""

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from anatomynet.engine.contract import BOX, CT_COARSE, REGION_CONFIG_KEY
from anatomynet.engine.errors import AnatomyNetError, ModelError
from anatomynet.engine.region import region_config_from_json
from anatomynet.engine.region_runtime import EmbeddedRegionFinder
from anatomynet.export.manifest import check_files


class TritonPythonModel:
    """The model `anatomynet_region`: CT_COARSE -> BOX. Triton itself checks names, types and dimensions."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the ONNX file.

        Raises:
            TritonModelException: files that do not fit this machine, or config.pbtxt; the model is not READY then.
        """
        home = Path(args["model_repository"])
        parameters = json.loads(args["model_config"])["parameters"]
        try:
            check_files(home)
            self.finder = EmbeddedRegionFinder(home / args["model_version"] / "model.onnx")
            if self.finder.config != region_config_from_json(parameters[REGION_CONFIG_KEY]["string_value"]):
                raise ModelError("config.pbtxt and the ONNX file beside it are of two models: run anatomynet-export")
        except AnatomyNetError as error:
            raise pb_utils.TritonModelException(str(error)) from error

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request; a request that cannot be answered gets one line that says why."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        coarse = pb_utils.get_input_tensor_by_name(request, CT_COARSE).as_numpy()
        try:
            box = self.finder.find(coarse)
        except AnatomyNetError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse([pb_utils.Tensor(BOX, box)])
