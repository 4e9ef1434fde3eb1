"""The embedded region finder: its ONNX file on this machine's CPU, also where a GPU computes the network.

So the box is the same everywhere, and there is little to gain: it takes a fiftieth of the network's time.
"""

import threading
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.errors import GeometryError, ModelError
from anatomynet.engine.limits import MemoryGuard
from anatomynet.engine.region import REGION_METADATA_KEY, region_config_from_json
from anatomynet.engine.runtime import (
    CPU_PROVIDER,
    INSTALL_HINT,
    available_cores,
    check_file,
    damaged_file,
    openvino_graph,
)
from anatomynet.engine.volume import HounsfieldArray

Find = Callable[[HounsfieldArray], NDArray[np.int64]]
INPUT_NAME, OUTPUT_NAME = "CT_COARSE", "BOX"
BYTES_A_VOXEL = 300  # measured: OpenVINO takes 220, ONNX Runtime 280


def shipped_region(suffix: str) -> Path:
    """The shipped file engine/weights/region + suffix, `.safetensors` or `.onnx`."""
    return Path(str(resources.files("anatomynet.engine") / "weights" / f"region{suffix}"))


class EmbeddedRegionFinder:
    """An ONNX file of a region finder, by OpenVINO or else ONNX Runtime; a RegionFinder.

    Args:
        path: None is the shipped one.

    Attributes:
        config: what it was trained for.

    Raises:
        ModelError: no runtime installed; no such file, a damaged one, or one of another model.
    """

    def __init__(self, path: Path | None = None) -> None:
        path = path or shipped_region(".onnx")
        check_file(path)
        for opened in (_opened_by_openvino, _opened_by_onnxruntime):
            try:
                self._find, text = opened(path)
                break
            except ImportError:
                continue
        else:
            raise ModelError(f"nothing here can run {path.name}: expected OpenVINO or ONNX Runtime; {INSTALL_HINT}")
        if not text:
            raise ModelError(f"{path} is no region finder: expected the metadata '{REGION_METADATA_KEY}' in it")
        self.config = region_config_from_json(text)
        self._lock = threading.Lock()
        self._memory = MemoryGuard(BYTES_A_VOXEL)

    def find(self, coarse: HounsfieldArray) -> NDArray[np.int64]:
        """See RegionFinder; may be called from several threads at once.

        Raises:
            GeometryError: an array of another type, or an empty one.
            ModelError: too little memory for it, as for a whole CT that was not averaged.
        """
        if coarse.dtype != np.int16 or coarse.ndim != 3 or not coarse.size:
            raise GeometryError(
                f"expected a coarse CT, int16 of at least (1, 1, 1) voxels (z, y, x), found {coarse.dtype} of shape "
                f"{coarse.shape}"
            )
        with self._lock:
            self._memory.check(coarse.shape)
            return self._find(np.ascontiguousarray(coarse))


def _opened_by_openvino(path: Path) -> tuple[Find, str]:
    """What runs the file, and its configuration as JSON; "" where it has none."""
    import openvino
    from openvino import properties

    graph = openvino_graph(path)
    key = ["framework", REGION_METADATA_KEY]
    options = {
        # On CPUs with AMX or AVX512-BF16 the default is bfloat16, which would move the box.
        properties.hint.inference_precision(): openvino.Type.f32,
        properties.hint.performance_mode(): properties.hint.PerformanceMode.LATENCY,
        properties.inference_num_threads(): available_cores(),
    }
    try:
        request = openvino.Core().compile_model(graph, "CPU", options).create_infer_request()
    except RuntimeError as error:
        raise damaged_file(path, error) from error
    text = graph.get_rt_info(key).value if graph.has_rt_info(key) else ""
    return lambda coarse: request.infer({INPUT_NAME: coarse})[OUTPUT_NAME].copy(), text


def _opened_by_onnxruntime(path: Path) -> tuple[Find, str]:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.log_severity_level = 4  # fatal: errors are raised, and told once
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[CPU_PROVIDER])
    except (states.Fail, states.InvalidGraph, states.InvalidProtobuf, states.NotImplemented) as error:
        raise damaged_file(path, error) from error
    text = session.get_modelmeta().custom_metadata_map.get(REGION_METADATA_KEY, "")
    return lambda coarse: session.run([OUTPUT_NAME], {INPUT_NAME: coarse})[0], text
