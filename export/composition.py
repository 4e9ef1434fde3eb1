"""What the TensorRT ensemble computes, without TensorRT: its three ONNX graphs in a row, as one runtime.

    prepare -> the network that becomes the plan -> crop

The parity gate holds this against the checkpoint, wherever the export runs; Triton's ensemble only passes tensors on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.contract import CONFIDENCE, CT
from anatomynet.engine.limits import check_size
from anatomynet.engine.onnx_files import CPU_PROVIDER, onnxruntime_options
from anatomynet.engine.output import write_whole
from anatomynet.engine.volume import HounsfieldArray, LabelArray
from anatomynet.export.onnx import check_graph, crop_model, plan_model, prepare_model

# network_input, float16 [1, 1, pz, py, px] -> LABELS, uint8 [pz, fy, fx], and CONFIDENCE, float32 [n].
Middle = Callable[[NDArray[np.float16]], tuple[LabelArray, NDArray[np.float32]]]


@dataclass(frozen=True)
class PlanParts:
    """The graphs around and inside a plan, all in FP16 where they are not in integers."""

    prepare: onnx.ModelProto
    network: onnx.ModelProto
    finish: onnx.ModelProto


def plan_parts(network: onnx.ModelProto, config: ModelConfig) -> PlanParts:
    """The three graphs; `network` is what `network_model` of export.onnx gave, in FP32."""
    return PlanParts(prepare_model(config, fp16=True), plan_model(network, config, fp16=True), crop_model())


class ComposedRuntime:
    """The three graphs in a row: a Runtime of anatomynet.engine.

    Args:
        middle: what computes the network: a plan on a GPU; None for its ONNX graph on the CPU.
        description: of the middle.
    """

    def __init__(
        self, parts: PlanParts, config: ModelConfig, *, middle: Middle | None = None, description: str = ""
    ) -> None:
        self.model = config
        self._prepare, self._finish = _session(parts.prepare), _session(parts.finish)
        self._middle = middle or _on_cpu(parts.network)
        where = description or f"the plan's graph in ONNX Runtime {onnxruntime.__version__}"
        self.description = f"prepare, {where}, finish"

    def infer(self, hu: HounsfieldArray) -> tuple[LabelArray, NDArray[np.float32]]:
        """See Runtime."""
        check_size(hu.shape, self.model)
        hu = np.ascontiguousarray(hu)
        (network_input,) = self._prepare.run(None, {CT: hu})
        labels, confidence = self._middle(network_input)
        (label_map,) = self._finish.run(None, {"LABELS": labels, CT: hu})
        return label_map, confidence


def write_part(model: onnx.ModelProto, path: Path) -> Path:
    """Checks and writes one of the graphs.

    Raises:
        ExportError: it is not valid ONNX.
        OutputError: it cannot be written.
    """
    check_graph(model, path.name)
    write_whole(path, model.SerializeToString(), overwrite=True)
    return path


def _on_cpu(network: onnx.ModelProto) -> Middle:
    session = _session(network)

    def infer(network_input: NDArray[np.float16]) -> tuple[LabelArray, NDArray[np.float32]]:
        labels, confidence = session.run(["LABELS", CONFIDENCE], {"network_input": network_input})
        return labels, confidence

    return infer


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model.SerializeToString(), onnxruntime_options(), providers=[CPU_PROVIDER])
