"""A served model without a network, for Triton's Python backend: what a volume's way to the server and back costs."""

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The contract of `anatomynet`: every voxel is background."""

    def initialize(self, args: dict[str, str]) -> None:
        """Learns how many structures the model has."""
        configuration = pb_utils.get_output_config_by_name(json.loads(args["model_config"]), "CONFIDENCE")
        self.confidence = np.zeros(configuration["dims"], np.float32)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        hu = pb_utils.get_input_tensor_by_name(request, "CT").as_numpy()
        label_map = pb_utils.Tensor("LABEL_MAP", np.zeros(hu.shape, np.uint8))
        return pb_utils.InferenceResponse([label_map, pb_utils.Tensor("CONFIDENCE", self.confidence)])
