"""The embedded region finder: its ONNX file on this machine's CPU, also where a GPU computes the network.

So the box is the same everywhere, and there is little to gain: it takes a fiftieth of the network's time.
"""

import threading
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.contract import BOX, CT_COARSE, REGION_METADATA_KEY
from anatomynet.engine.errors import GeometryError, ModelError
from anatomynet.engine.machine import MemoryGuard
from anatomynet.engine.onnx_files import (
    CPU_PROVIDER,
    INSTALL_HINT,
    check_file,
    damaged_file,
    failed,
    onnxruntime_failures,
    onnxruntime_options,
    openvino_core,
    openvino_graph,
    openvino_options,
)
from anatomynet.engine.region import region_config_from_json
from anatomynet.engine.volume import HounsfieldArray

Find = Callable[[HounsfieldArray], NDArray[np.int64]]
Failures = tuple[type[Exception], ...]
# Five seconds; the largest CT that a model takes, averaged, is two thirds of it (tests/test_region_finder.py).
LARGEST_COARSE = 2**22
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
                self._find, text, self._failures = opened(path)
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
            GeometryError: an array of another type, an empty one, or one that is too large, as a whole CT that was not
                averaged.
            ModelError: it cannot be computed, as for want of memory.
        """
        if coarse.dtype != np.int16 or coarse.ndim != 3 or not 0 < coarse.size <= LARGEST_COARSE:
            raise GeometryError(
                f"expected a coarse CT, int16 of at least (1, 1, 1) voxels (z, y, x) and at most {LARGEST_COARSE} in "
                f"all, found {coarse.dtype} of shape {coarse.shape}"
            )
        with self._lock:
            self._memory.check(coarse.shape)
            try:
                return self._find(np.ascontiguousarray(coarse))
            except self._failures as error:
                raise failed(coarse, "the region finder", error) from error


def _opened_by_openvino(path: Path) -> tuple[Find, str, Failures]:
    """What runs the file; its configuration as JSON, "" where it has none; what running it may raise."""
    graph = openvino_graph(path)
    key = ["framework", REGION_METADATA_KEY]
    try:
        request = openvino_core().compile_model(graph, "CPU", openvino_options()).create_infer_request()
    except RuntimeError as error:
        raise damaged_file(path, error) from error
    text = graph.get_rt_info(key).value if graph.has_rt_info(key) else ""
    return lambda coarse: request.infer({CT_COARSE: coarse})[BOX].copy(), text, (RuntimeError,)


def _opened_by_onnxruntime(path: Path) -> tuple[Find, str, Failures]:
    import onnxruntime

    failures = onnxruntime_failures()
    try:
        session = onnxruntime.InferenceSession(path, onnxruntime_options(), providers=[CPU_PROVIDER])
    except failures as error:
        raise damaged_file(path, error) from error
    text = session.get_modelmeta().custom_metadata_map.get(REGION_METADATA_KEY, "")
    return lambda coarse: session.run([BOX], {CT_COARSE: coarse})[0], text, failures
