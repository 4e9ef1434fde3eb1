"""Embedded runtimes: what computes the served model in this process. The middle of `segment`, where no server runs.

    OpenVinoRuntime   an ONNX file on a CPU; the fastest there
    OnnxRuntime       an ONNX file on an NVIDIA GPU, or on a CPU
    TorchRuntime      a network in PyTorch: the reference, and what training validates with

and engine.gpu_runtime.GpuRuntime, a checkpoint on an NVIDIA GPU through PyTorch. A Triton server is a runtime too
(anatomynet.client.triton), and its Python backend loads one of these itself.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.config import ModelConfig, model_config_from_json, shipped_weights
from anatomynet.engine.contract import CONFIDENCE, CT, LABEL_MAP, METADATA_KEY
from anatomynet.engine.errors import GeometryError, ModelError
from anatomynet.engine.limits import check_size
from anatomynet.engine.machine import MemoryGuard, available_cores
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
from anatomynet.engine.preprocess import smallest_shape
from anatomynet.engine.region_runtime import EmbeddedRegionFinder
from anatomynet.engine.volume import HounsfieldArray, LabelArray

if TYPE_CHECKING:
    import openvino
    import torch

    from anatomynet.engine.region import RegionFinder

CUDA_PROVIDER = "CUDAExecutionProvider"
# Measured (benchmarks.native_resolution): of a voxel of the CT, and of one of the network, which are fewer; OpenVINO
# needs less where it compiles for one size.
CT_BYTES, NETWORK_BYTES, ONE_SIZE_BYTES, ONNX_RUNTIME_BYTES = 12, 320, 170, 400
PROVIDER_OPTIONS: dict[str, dict[str, str]] = {
    # By default every new shape first times every algorithm of every convolution, the arena doubles when it grows, and
    # FP32 is computed in TF32, which moves contours: who wants speed takes the FP16 file.
    CUDA_PROVIDER: {
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",
    },
}


class Runtime(Protocol):
    """Anything that computes the served model."""

    @property
    def model(self) -> ModelConfig:
        """What it draws."""
        ...

    @property
    def description(self) -> str:
        """One phrase for the user: "OpenVINO 2026.4.1 on 2 CPU threads"."""
        ...

    def infer(self, hu: HounsfieldArray) -> tuple[LabelArray, NDArray[np.float32]]:
        """The structures of one CT; may be called from several threads at once.

        Args:
            hu: int16 (z, y, x), Hounsfield units; z to the head, y to the back, x to the patient's left.

        Returns:
            The label map, uint8 (z, y, x), and the confidence, float32 (structures,), 0 where absent.

        Raises:
            GeometryError: an array of another type, too small for the network, or too large for any runtime.
            ModelError: a volume that cannot be computed, as for want of memory.
        """
        ...


def load_runtime(path: Path | None = None) -> Runtime:
    """The fastest runtime that this machine has for an ONNX file; None is the shipped one.

    An NVIDIA GPU through ONNX Runtime, else OpenVINO, else ONNX Runtime on the CPU.

    Raises:
        ModelError: no runtime installed; no such file, a damaged one, or one that anatomynet-export did not write.
    """
    path = path or shipped_weights(".onnx")
    if _has_cuda_provider():
        runtime = OnnxRuntime(path, providers=(CUDA_PROVIDER, CPU_PROVIDER))
        if CUDA_PROVIDER in runtime.providers:  # the build may know CUDA where no GPU is
            return runtime
    for runtime_class in (OpenVinoRuntime, OnnxRuntime):
        try:
            return runtime_class(path)
        except ImportError:
            continue
    raise ModelError(f"nothing here can run {path.name}: expected OpenVINO or ONNX Runtime; {INSTALL_HINT}")


class OpenVinoRuntime:
    """An ONNX file on this machine's CPU, in FP32; one volume at a time, on every core.

    A compiled model is not cached on disk: compiling takes a fifth of a second. At native resolution memory is short,
    and what is compiled for one size needs less of it: there it is compiled for each size.

    Raises:
        ImportError: OpenVINO is not installed.
        ModelError: no such file, a damaged one, or one that anatomynet-export did not write.
    """

    def __init__(self, path: Path) -> None:
        import openvino

        graph = openvino_graph(path)
        key = ["framework", METADATA_KEY]  # where OpenVINO keeps an ONNX file's metadata
        self.model = _config_from_metadata(path, graph.get_rt_info(key).value if graph.has_rt_info(key) else None)
        self._options = openvino_options()
        self._path, self._graph = path, graph
        one_size = self.model.in_plane_stride == 1
        self._memory = MemoryGuard(_bytes_a_voxel(self.model, ONE_SIZE_BYTES if one_size else NETWORK_BYTES))
        self._shape: tuple[int, ...] = ()
        self._request: openvino.InferRequest | None = None
        # Compiled beside the reading of the first volume, and the region finder beside this.
        self._threads = ThreadPoolExecutor(2)
        self._any_size = None if one_size else self._threads.submit(self._compiled, graph)
        self.description = f"OpenVINO {openvino.__version__.split('-')[0]} on {available_cores()} CPU threads"
        self._lock = threading.Lock()

    @property
    def region_finder(self) -> RegionFinder:
        """See engine.region.

        Raises:
            ModelError: its file is missing or damaged.
        """
        return self._coming_finder.result()

    def begin_region_finder(self) -> None:
        """Loads it in a thread, beside the reading of the first volume: for who will want it."""
        _ = self._coming_finder

    @functools.cached_property
    def _coming_finder(self) -> Future[RegionFinder]:
        return self._threads.submit(EmbeddedRegionFinder)

    def infer(self, hu: HounsfieldArray) -> tuple[LabelArray, NDArray[np.float32]]:
        """See Runtime; releases the GIL while it computes."""
        check_input(hu, self.model)
        with self._lock:
            self._memory.check(hu.shape)
            request = self._request_for(hu.shape)
            try:
                results = request.infer({CT: np.ascontiguousarray(hu)}, share_inputs=True)
            except RuntimeError as error:
                raise failed(hu, self.description, error) from error
            label_map, confidence = results[LABEL_MAP], results[CONFIDENCE]
        return label_map, confidence

    def _request_for(self, shape: tuple[int, ...]) -> openvino.InferRequest:
        try:
            if self._any_size:
                return self._any_size.result()
            if self._request is None or shape != self._shape:
                self._request = None  # its memory goes before the next one's comes
                graph = self._graph.clone()
                graph.reshape({CT: list(shape)})
                self._request, self._shape = self._compiled(graph), shape
            return self._request
        except RuntimeError as error:
            raise damaged_file(self._path, error) from error

    def _compiled(self, graph: openvino.Model) -> openvino.InferRequest:
        return openvino_core().compile_model(graph, "CPU", self._options).create_infer_request()


class OnnxRuntime:
    """An ONNX file through ONNX Runtime.

    Args:
        providers: execution providers, best first; one that does not start is left out. None: the CPU.

    Attributes:
        providers: those that did start.

    Raises:
        ImportError: ONNX Runtime is not installed.
        ModelError: no such file, a damaged one, or one that anatomynet-export did not write.
    """

    def __init__(self, path: Path, *, providers: Sequence[str] | None = None) -> None:
        import onnxruntime

        check_file(path)
        options, self._failures = onnxruntime_options(), onnxruntime_failures()
        wanted = [(name, PROVIDER_OPTIONS.get(name, {})) for name in providers or (CPU_PROVIDER,)]
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=wanted)
        except self._failures as error:
            raise damaged_file(path, error) from error
        self.model = _config_from_metadata(path, self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY))
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        device = (
            f"{options.intra_op_num_threads} CPU threads"
            if self.providers[0] == CPU_PROVIDER
            else self.providers[0].removesuffix("ExecutionProvider")
        )
        self.description = f"ONNX Runtime {onnxruntime.__version__} on {device}"
        self._memory = MemoryGuard(_bytes_a_voxel(self.model, ONNX_RUNTIME_BYTES))

    @functools.cached_property
    def region_finder(self) -> RegionFinder:
        """See engine.region; loaded when it is first wanted.

        Raises:
            ModelError: its file is missing or damaged.
        """
        return EmbeddedRegionFinder()

    def infer(self, hu: HounsfieldArray) -> tuple[LabelArray, NDArray[np.float32]]:
        """See Runtime; releases the GIL while it computes."""
        check_input(hu, self.model)
        if self.providers[0] == CPU_PROVIDER:
            self._memory.check(hu.shape)
        try:
            label_map, confidence = self._session.run([LABEL_MAP, CONFIDENCE], {CT: np.ascontiguousarray(hu)})
        except self._failures as error:
            raise failed(hu, self.description, error) from error
        return label_map, confidence


class TorchRuntime:
    """A network in PyTorch; holds the logits of the CT's whole grid, 4 bytes a class and voxel.

    Args:
        network: AnatomyNet, or another that maps its input to its output.
        config: of it.
        device: where it computes.
        region_finder: cuts the box that it is shown, as where it is served; None shows it the whole body.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        config: ModelConfig,
        device: torch.device | str = "cpu",
        *,
        region_finder: RegionFinder | None = None,
    ) -> None:
        import torch

        from anatomynet.engine.network import ServedNetwork

        self.model = config
        self.region_finder = region_finder
        self.description = f"PyTorch {torch.__version__} on {device}"
        self._device = device
        self._served = ServedNetwork(network, config).to(device).eval()

    def infer(self, hu: HounsfieldArray) -> tuple[LabelArray, NDArray[np.float32]]:
        """See Runtime."""
        import torch

        check_input(hu, self.model)
        with torch.inference_mode():
            label_map, confidence = self._served(torch.from_numpy(np.ascontiguousarray(hu)).to(self._device))
        return label_map.cpu().numpy(), confidence.cpu().numpy()


def _has_cuda_provider() -> bool:
    package = find_spec("onnxruntime")
    folders = package.submodule_search_locations if package else None
    # Told by its file: to import it takes 0.03 s, which who computes with OpenVINO need not wait for.
    if not any(any(Path(folder, "capi").glob("*onnxruntime_providers_cuda.*")) for folder in folders or ()):
        return False
    import onnxruntime

    return CUDA_PROVIDER in onnxruntime.get_available_providers()


def _config_from_metadata(path: Path, text: str | None) -> ModelConfig:
    if text is None:
        raise ModelError(
            f"{path} says nothing of its structures: expected the metadata '{METADATA_KEY}' in an ONNX file "
            "that anatomynet-export wrote"
        )
    return model_config_from_json(text)


def check_input(hu: HounsfieldArray, config: ModelConfig) -> None:
    """Raises GeometryError for an array of another type, too small for the network, or too large for any runtime."""
    smallest = smallest_shape(config)
    if hu.dtype != np.int16 or hu.ndim != 3 or any(side < s for side, s in zip(hu.shape, smallest, strict=True)):
        raise GeometryError(
            f"expected int16 of at least {smallest} voxels (z, y, x), found {hu.dtype} of shape {hu.shape}"
        )
    check_size(hu.shape, config)


def _bytes_a_voxel(config: ModelConfig, network_bytes: int) -> float:
    return CT_BYTES + network_bytes / config.in_plane_stride**2
