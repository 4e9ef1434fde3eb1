"""A checkpoint on an NVIDIA GPU through PyTorch, in FP16: what Triton's Python backend computes with where PyTorch
reaches a GPU. The middle of `segment`.

    CT -> pinned memory -> GPU -> blocks -> features -> head, slab by slab -> labels -> pinned memory -> LABEL_MAP

It draws what ServedNetwork draws; the parity gate of anatomynet-export holds it against that where a GPU is.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.gpu_network import HEAD_HALO, HEAD_WIDTH, TensorCoreNetwork
from anatomynet.engine.gpu_operations import Operations, TorchOperations, rows_of
from anatomynet.engine.limits import LARGEST_TENSOR
from anatomynet.engine.machine import available_cores
from anatomynet.engine.network import AnatomyNet, ServedNetwork
from anatomynet.engine.onnx_files import failed
from anatomynet.engine.runtime import check_input
from anatomynet.engine.volume import HounsfieldArray, LabelArray

# What the head takes of a voxel of its own resolution, and how much of the free memory it may have.
HEAD_BYTES, HEAD_SHARE = 200, 0.6
COPIERS, SLICES_A_COPY = 16, 4
TUNE = False  # of what is served: a first volume of a new size would wait for seconds
SLICES_AT_ONCE = 64  # of logits that are interpolated to the CT's grid


def has_gpu() -> bool:
    """Whether PyTorch computes on an NVIDIA GPU: it also sees one that it was not built for."""
    if not torch.cuda.is_available():
        return False
    try:
        return bool(torch.ones(1, device="cuda").sum() == 1)
    except RuntimeError:
        return False


class GpuRuntime:
    """A network on a GPU; one volume at a time. A Runtime.

    Args:
        network: of a checkpoint.
        config: its own.
        device: "cpu" computes the same in FP32, slowly: for tests.
        tune: let cuDNN time its algorithms at each new size: seconds, once a size.
        operations: what computes; without, the fastest that this GPU and what is installed can do.
    """

    def __init__(
        self,
        network: AnatomyNet,
        config: ModelConfig,
        *,
        device: str = "cuda",
        tune: bool = False,
        operations: Operations | None = None,
    ) -> None:
        self.model = config
        on_gpu = torch.device(device).type == "cuda"
        self._device = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        candidates = (operations,) if operations else operations_for(self._device)
        with _current(self._device):
            self._operations, self._network, faults = _working(network, candidates, self._device)
        self._grid = ServedNetwork(nn.Identity(), config)
        self._tune = tune
        self._lock = threading.Lock()
        self._copiers = ThreadPoolExecutor(min(COPIERS, available_cores()))
        where = f"{torch.cuda.get_device_name(self._device)}, FP16" if on_gpu else "CPU, FP32"
        without = f", {self._operations.without}" if on_gpu and self._operations.without else ""
        self.description = f"PyTorch {torch.__version__} on {where}{without}" + "".join(f" ({f})" for f in faults[:1])

    def infer(self, hu: HounsfieldArray) -> tuple[LabelArray, NDArray[np.float32]]:
        """See Runtime."""
        check_input(hu, self.model)
        try:
            with self._lock, torch.inference_mode(), self._set():
                labels, confidence = self._computed(self._uploaded(hu))
                return self._downloaded(labels), confidence.cpu().numpy()
        except RuntimeError as error:
            # Out of memory too, which is not foreseen as on a CPU: here it costs a moment and this volume alone, and
            # how much is needed depends on how much there is (_slab_thickness).
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            raise failed(hu, self.description, error) from error

    def labels_on_device(self, hu: Tensor) -> Tensor:
        """CT, int16 (z, y, x), on the device -> LABEL_MAP there; CONFIDENCE is computed too. For who times it."""
        with torch.inference_mode(), self._set():
            return self._computed(hu)[0]

    def _computed(self, hu: Tensor) -> tuple[Tensor, Tensor]:
        """CT, int16 (z, y, x), on the device -> LABEL_MAP and CONFIDENCE there."""
        blocks = self._network.blocks_of(self._grid.network_input_from_hu(hu))
        features = self._network.features(blocks)
        if self.model.in_plane_stride == 1:
            labels, confidence = self._labels_in_slabs(features, blocks)
        else:
            labels, confidence = self._interpolated_labels(features, blocks)
        depth, height, width = hu.shape
        return labels[:depth, :height, :width], confidence

    def _labels_in_slabs(self, features: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """At the network's resolution, the padding included; never all logits at once where memory is short."""
        shape = [2 * side for side in features.shape[2:]]
        labels = torch.empty(shape, dtype=torch.uint8, device=features.device)
        top = torch.empty(shape, dtype=torch.float32, device=features.device)
        for slab, logits in self._slabs_of_logits(features, blocks):
            part = rows_of(logits)
            winners = self._operations.winners(part, self.model.classes)
            for whole, found in zip((labels, top), winners, strict=True):
                whole[slab] = found.view(-1, *shape[1:])
        return labels, self._operations.border_confidence(labels, top, self.model.classes)

    def _slabs_of_logits(self, features: Tensor, blocks: Tensor) -> Iterator[tuple[slice, Tensor]]:
        depth = features.shape[2]
        thickness = self._slab_thickness(features)
        for start in range(0, depth, thickness):
            stop = min(start + thickness, depth)
            first, last = max(start - HEAD_HALO, 0), min(stop + HEAD_HALO, depth)
            logits = self._network.logits(features[:, :, first:last], blocks[:, :, first:last])
            own = slice(2 * (start - first), 2 * (stop - first))
            yield slice(2 * start, 2 * stop), logits[:, :, own]

    def _slab_thickness(self, features: Tensor) -> int:
        """In slices of features: as many as memory and 32-bit indices bear."""
        voxels = LARGEST_TENSOR // (2 * HEAD_WIDTH)
        if features.is_cuda:
            free, _ = torch.cuda.mem_get_info(features.device)
            kept = torch.cuda.memory_reserved(features.device) - torch.cuda.memory_allocated(features.device)
            voxels = min(voxels, int((free + kept) * HEAD_SHARE / HEAD_BYTES))
        height, width = features.shape[3:]
        return max(voxels // (8 * height * width) - 2 * HEAD_HALO, 1)

    def _interpolated_labels(self, features: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """On the CT's grid. Only a box of the logits is interpolated, one voxel larger than what is no background at
        the network's resolution: between two voxels on which the background wins, it wins too."""
        classes, stride = self.model.classes, self.model.in_plane_stride
        logits = torch.cat([part for _, part in self._slabs_of_logits(features, blocks)], dim=2)
        depth, height, width = logits.shape[2:]
        coarse, top = (t.view(depth, height, width) for t in self._operations.winners(rows_of(logits), classes))
        confidence = self._operations.border_confidence(coarse, top, classes)
        labels = coarse.new_zeros(depth, height * stride, width * stride)
        box = _box_of(coarse)
        if box is None:
            return labels, confidence
        z, y, x = box
        for start in range(z.start, z.stop, SLICES_AT_ONCE):
            part = slice(start, min(start + SLICES_AT_ONCE, z.stop))
            slices = logits[0, :classes, part, y, x].transpose(0, 1).float().contiguous()
            fine = F.interpolate(slices, scale_factor=(stride, stride), mode="bilinear", align_corners=False)
            fine_y, fine_x = (slice(side.start * stride, side.stop * stride) for side in (y, x))
            labels[part, fine_y, fine_x] = fine.argmax(dim=1).to(torch.uint8)
        return labels, confidence

    def _uploaded(self, hu: HounsfieldArray) -> Tensor:
        """Through pinned memory, filled by several threads while what is filled is on its way."""
        pinned = self._host_memory(hu.shape, torch.int16)
        if self._device.type == "cpu":
            np.copyto(pinned.numpy(), hu)
            return pinned
        device = torch.empty(hu.shape, dtype=torch.int16, device=self._device)
        parts = [slice(start, start + SLICES_A_COPY) for start in range(0, len(hu), SLICES_A_COPY)]
        filled = [self._copiers.submit(np.copyto, pinned[part].numpy(), hu[part]) for part in parts]
        for part, copy in zip(parts, filled, strict=True):
            copy.result()
            device[part].copy_(pinned[part], non_blocking=True)
        return device

    def _downloaded(self, labels: Tensor) -> LabelArray:
        """Pinned memory that is the answer's own: PyTorch takes it again once nobody holds it."""
        host = self._host_memory(labels.shape, torch.uint8)
        host.copy_(labels, non_blocking=self._device.type == "cuda")
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        array: LabelArray = host.numpy()
        return array

    def _host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._device.type == "cuda")

    @contextlib.contextmanager
    def _set(self) -> Iterator[None]:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self._tune
        try:
            with _current(self._device):
                yield
        finally:
            torch.backends.cudnn.benchmark = before


def operations_for(device: torch.device) -> Iterator[Operations]:
    """What may compute here, the fastest first, down to PyTorch alone."""
    if device.type == "cuda":
        try:
            from anatomynet.engine.gpu_convolution import ConvolutionOperations
            from anatomynet.engine.gpu_kernels import KernelOperations
        except ImportError:  # a PyTorch without Triton's compiler
            pass
        else:
            yield ConvolutionOperations(device)
            yield KernelOperations()
    yield TorchOperations()


def _working(
    network: AnatomyNet, candidates: Iterable[Operations], device: torch.device
) -> tuple[Operations, TensorCoreNetwork, list[str]]:
    """The first that finds no fault, or else the last; the network with it; and what was wrong with those before."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    faults = []
    for operations in candidates:
        form = TensorCoreNetwork(network, operations, dtype).to(device).eval()
        fault = operations.fault(device)
        if not fault:
            break
        faults.append(fault)
    return operations, form, faults


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Within it kernels are launched on this GPU, where there are several."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def load_gpu_runtime(checkpoint: Path) -> GpuRuntime:
    """A checkpoint on the GPU.

    Raises:
        ModelError: no such file, or none that anatomynet-train wrote.
    """
    return GpuRuntime(*load_checkpoint(checkpoint), tune=TUNE)


def _box_of(labels: Tensor) -> tuple[slice, slice, slice] | None:
    """Of what is no background in labels (z, y, x), and one voxel more on each side; None where all is."""
    foreground = labels != 0
    sides = []
    for axis, others in enumerate(((1, 2), (0, 2), (0, 1))):
        along = foreground.any(dim=others).nonzero()
        if not len(along):
            return None
        sides.append(slice(max(int(along[0]) - 1, 0), min(int(along[-1]) + 2, labels.shape[axis])))
    z, y, x = sides
    return z, y, x
