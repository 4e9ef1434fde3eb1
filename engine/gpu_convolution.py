"""3 x 3 x 3 convolutions by a kernel of our own, cuda/convolve.cu: one pass for a convolution and what follows it.

cuDNN stays far from what tensor cores can do with this network's 16 to 72 channels. The kernel is CUDA C++, compiled
by NVRTC for the GPU at hand (compute capability 8.0 or later), in a second or two; NVIDIA's cuda-bindings, which a
PyTorch for CUDA brings, reach it. `benchmarks/own_convolution.py` holds it against cuDNN.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from anatomynet.engine.gpu_kernels import SLOPE, KernelOperations
from anatomynet.engine.gpu_operations import Shape, first_line, rows_of, volume_of

SOURCES = ("warp.cuh", "convolve.cu")
TILE_X = 16  # voxels of a matrix
HALO_SLICES = 3  # about what a block's start costs, in slices
CHUNK = 8  # channels
TRIAL, TRIAL_TOLERANCE = (3, 17, 18), 0.02  # before use; values are up to about five
# What a GPU, a driver, a compiler, a PyTorch or cuda-bindings raise that are not there, or other than was expected.
FAILURES = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError)


@dataclass(frozen=True)
class Kind:
    """What is compiled for: channels of one volume or of two one after the other, and channels out; all in eights."""

    inward: tuple[int, ...]
    outward: int


@dataclass(frozen=True)
class Tiling:
    """How a kernel divides its work.

    Attributes:
        warps: of a block, one below the other along y.
        rows: of voxels along y that a warp computes, sixteen along x each.
        planes: slices that it computes at once.
        blocks: of a multiprocessor at once, at least: a thread has no more registers than that allows.
    """

    warps: int
    rows: int
    planes: int
    blocks: int


# What an H200 was fastest with (benchmarks/own_convolution.py), where it fits; others the first that fits twice.
FASTEST = {Kind((32,), 32): Tiling(8, 2, 2, 1), Kind((16,), 16): Tiling(8, 2, 2, 2)}
TILINGS = (Tiling(4, 2, 2, 1), Tiling(4, 2, 1, 1), Tiling(2, 2, 1, 1))


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on this GPU."""
    limit: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return limit


def tiling_of(kind: Kind, limit: int) -> Tiling:
    """For blocks that may have so many bytes of shared memory: so that one block computes while another waits.

    Raises:
        RuntimeError: none fits.
    """
    fastest = FASTEST.get(kind)
    if fastest and fastest.blocks * shared_bytes(kind, fastest) <= limit:
        return fastest
    for times in (2, 1):
        for tiling in TILINGS:
            if times * shared_bytes(kind, tiling) <= limit:
                return tiling
    raise RuntimeError(f"a block has {limit} bytes of shared memory: too little for {kind}")


class Arguments(ctypes.Structure):
    """Of cuda/convolve.cu, where they are explained."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "weights", "shift", "others", "out", "second", "sums")),
        *((name, ctypes.c_int) for name in ("depth", "height", "width", "slices")),
        ("slope", ctypes.c_float),
    )


def macros(kind: Kind, tiling: Tiling) -> list[str]:
    """What the compiler is told."""
    first, second = (*kind.inward, 0)[:2]
    values = {"IN_A": first, "IN_B": second, "OUT": kind.outward}
    values |= {"WARPS": tiling.warps, "ROWS": tiling.rows, "PLANES": tiling.planes, "BLOCKS": tiling.blocks}
    return [f"-D{name}={value}" for name, value in values.items()]


def shared_bytes(kind: Kind, tiling: Tiling) -> int:
    """Of a block: its ring of slices, as cuda/convolve.cu lays it out."""
    voxels = (TILE_X + 2) * (tiling.warps * tiling.rows + 2)
    chunk = 16 * (voxels + (10 - voxels % 8) % 8)
    return (2 * tiling.planes + 2) * sum(kind.inward) // CHUNK * chunk


def packed(weight: Tensor) -> Tensor:
    """FP16 (out, in, 3, 3, 3) -> (steps, 3, 3, 3, out / 8, 32, 4): what each lane of a warp multiplies with.

    A step is sixteen channels in, the last one eight where they are odd eights; then the neighbour along x, z, y; eight
    channels out; the lane; its four numbers of the factor B of mma.m16n8k16, as the PTX manual has them. The channels
    out of a lane (2 x out / 8) follow one another, so that it stores them at once.
    """
    outward, inward = weight.shape[:2]
    lane = torch.arange(32, device=weight.device)
    column, pair = lane // 4, lane % 4 * 2
    tile = torch.arange(outward // 8, device=weight.device)
    channel_out = column // 2 * 2 * len(tile) + column % 2 + 2 * tile[:, None]

    def steps(first: Tensor, places: Sequence[int]) -> Tensor:
        channel_in = first[:, None, None] + pair[:, None] + torch.tensor(places, device=weight.device)
        of_lanes = weight[channel_out[None, :, :, None], channel_in[:, None]]  # (step, tile, lane, place, z, y, x)
        return F.pad(of_lanes.permute(0, 6, 4, 5, 1, 2, 3), (0, 4 - len(places)))

    starts = torch.arange(0, inward // 16 * 16, 16, device=weight.device)
    parts = [steps(starts, (0, 1, 8, 9))]
    if inward % 16:
        parts.append(steps(starts.new_tensor([inward - CHUNK]), (0, 1)))
    return torch.cat(parts).contiguous()


def slices_of_blocks(shape: Shape, tiling: Tiling, at_once: int) -> int:
    """How many slices each block marches through, where `at_once` run at the same time: the last to end end early."""
    depth, height, width = shape
    columns = math.ceil(width / TILE_X) * math.ceil(height / (tiling.warps * tiling.rows))

    def cost(slices: int) -> tuple[int, int]:
        return math.ceil(columns * math.ceil(depth / slices) / at_once) * (slices + HALO_SLICES), -slices

    choices = {math.ceil(math.ceil(depth / parts) / tiling.planes) * tiling.planes for parts in range(1, 33)}
    return min(choices, key=cost)


class Convolution:
    """One kind, compiled.

    Args:
        kind: of its channels.
        tiling: how the work is divided; the result is the same but for the order of sums.
        device: a GPU.

    Raises:
        RuntimeError: this GPU, its driver or the compiler cannot do it.
        ImportError: no cuda-bindings.
    """

    def __init__(self, kind: Kind, tiling: Tiling, device: torch.device) -> None:
        from cuda.bindings import driver

        self.kind, self.tiling = kind, tiling
        properties = torch.cuda.get_device_properties(device)
        self._at_once = properties.multi_processor_count * tiling.blocks
        self._shared = shared_bytes(kind, tiling)
        self._launch = driver.cuLaunchKernel
        cubin = compiled(f"sm_{properties.major}{properties.minor}", tuple(macros(kind, tiling)))
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # so that this thread has PyTorch's context
            self._module = _checked(driver.cuModuleLoadData(cubin))
            self._function = _checked(driver.cuModuleGetFunction(self._module, b"convolve"))
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(self._function, attribute, self._shared))

    def __call__(
        self,
        inputs: Sequence[Tensor],
        shape: Shape,
        weight: Tensor,
        *,
        shift: Tensor | None = None,
        others: Tensor | None = None,
        slope: float = 1.0,
        in_two: bool = False,
        with_sums: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Rows (voxels, channels in), one tensor or two -> rows, and what is asked for besides: the second half of the
        channels (`in_two`) or FP32 (channels out,), the sums of the convolution alone (`with_sums`)."""
        assert all(rows.is_contiguous() and rows.dtype == torch.float16 for rows in inputs)
        assert tuple(rows.shape[1] for rows in inputs) == self.kind.inward
        voxels, outward = len(inputs[0]), self.kind.outward
        assert voxels == math.prod(shape)
        assert others is None or (others.is_contiguous() and others.shape == (voxels, outward))
        width = outward // 2 if in_two else outward
        out = inputs[0].new_empty(voxels, width)
        second = out.new_empty(voxels, width) if in_two else None
        slices = slices_of_blocks(shape, self.tiling, self._at_once)
        grid = self.grid(shape, slices)
        sums = out.new_empty(math.prod(grid), outward, dtype=torch.float32) if with_sums else None
        a, b = (*inputs, None)[:2]
        places = (_place(t) for t in (a, b, weight, shift, others, out, second, sums))
        self._start(grid, Arguments(*places, *shape, slices, slope), out.device)
        return out, sums.sum(dim=0) if sums is not None else second

    def grid(self, shape: Shape, slices: int) -> tuple[int, int, int]:
        """Blocks along x, y, z."""
        depth, height, width = shape
        rows = self.tiling.warps * self.tiling.rows
        return math.ceil(width / TILE_X), math.ceil(height / rows), math.ceil(depth / slices)

    def _start(self, grid: tuple[int, int, int], arguments: Arguments, device: torch.device) -> None:
        places = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = torch.cuda.current_stream(device).cuda_stream
        block = (32 * self.tiling.warps, 1, 1)
        _checked(self._launch(self._function, *grid, *block, self._shared, stream, ctypes.addressof(places), 0))


@functools.cache
def compiled(architecture: str, definitions: tuple[str, ...]) -> bytes:
    """Machine code of the kernel.

    Raises:
        RuntimeError: what the compiler says.
        ImportError: no cuda-bindings, or no NVRTC.
    """
    from cuda.bindings import nvrtc

    folder = files("anatomynet.engine") / "cuda"
    source = "\n".join((folder / name).read_text() for name in SOURCES)
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"convolve.cu", 0, [], []))
    options = [option.encode() for option in (f"--gpu-architecture={architecture}", "--std=c++17", *definitions)]
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"NVRTC did not compile convolve.cu for {architecture}: {log.decode(errors='replace')}")
        code = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))  # writes into the bytes, as the binding's own examples do
    finally:
        _checked(nvrtc.nvrtcDestroyProgram(program))
    return code


def is_right(convolution: Convolution, device: torch.device) -> bool:
    """Whether it computes what PyTorch does on the CPU: a small volume of random numbers."""
    random = torch.Generator().manual_seed(0)
    inward, outward = convolution.kind.inward, convolution.kind.outward
    inputs = [torch.randn(math.prod(TRIAL), channels, generator=random).half() for channels in inward]
    weight = torch.randn(outward, sum(inward), 3, 3, 3, generator=random) / (27 * sum(inward)) ** 0.5
    expected = rows_of(F.conv3d(volume_of(torch.cat(inputs, dim=1).float(), TRIAL), weight, padding=1))
    on_device = [rows.to(device) for rows in inputs]
    found, sums = convolution(on_device, TRIAL, packed(weight.half()).to(device), with_sums=True)
    assert sums is not None
    pairs = ((found, expected), (sums / len(found), expected.mean(dim=0)))
    return all(bool((one.float().cpu() - other).abs().max() < TRIAL_TOLERANCE) for one, other in pairs)


class ConvolutionOperations(KernelOperations):
    """See engine.gpu_operations: the convolutions too are kernels of our own.

    Kernels are compiled side by side, from when their weights are prepared.

    Args:
        device: a GPU.
    """

    without = ""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = ThreadPoolExecutor()
        self._coming: dict[Kind, Future[Convolution]] = {}

    def prepared(self, weight: Tensor, inward: Sequence[int]) -> Tensor:
        """See Operations."""
        kind = Kind(tuple(inward), len(weight))
        if kind not in self._coming:
            self._coming[kind] = self._pool.submit(self._built, kind)
        return packed(weight)

    def fault(self, device: torch.device) -> str:
        """See Operations."""
        try:
            wrong = [kind for kind, coming in self._coming.items() if not is_right(coming.result(), device)]
        except FAILURES as error:
            return first_line(error)
        finally:
            self._pool.shutdown(wait=False)
        return f"{wrong[0]} computes something else than PyTorch" if wrong else super().fault(device)

    def convolved_leaky(
        self, inputs: Sequence[Tensor], shape: Shape, weight: Tensor, shift: Tensor | None, others: Tensor | None = None
    ) -> Tensor:
        """See Operations."""
        return self._of(inputs, weight)(inputs, shape, weight, shift=shift, others=others, slope=SLOPE)[0]

    def convolved(self, inputs: Sequence[Tensor], shape: Shape, weight: Tensor) -> Tensor:
        """See Operations."""
        return self._of(inputs, weight)(inputs, shape, weight)[0]

    def convolved_with_means(self, inputs: Sequence[Tensor], shape: Shape, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See Operations."""
        rows, sums = self._of(inputs, weight)(inputs, shape, weight, with_sums=True)
        assert sums is not None
        return rows, sums / len(rows)

    def convolved_in_two(self, inputs: Sequence[Tensor], shape: Shape, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See Operations."""
        first, second = self._of(inputs, weight)(inputs, shape, weight, slope=SLOPE, in_two=True)
        assert second is not None
        return first, second

    def _of(self, inputs: Sequence[Tensor], weight: Tensor) -> Convolution:
        return self._coming[Kind(tuple(rows.shape[1] for rows in inputs), CHUNK * weight.shape[4])].result()

    def _built(self, kind: Kind) -> Convolution:
        return Convolution(kind, tiling_of(kind, shared_limit(self._device)), self._device)


def _place(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _checked(result: tuple[Any, ...]) -> Any:
    """What a function of cuda-bindings returns, without its status.

    Raises:
        RuntimeError: the status is an error.
    """
    status, *values = result
    if status.value != 0:
        raise RuntimeError(f"{type(status).__name__} {status.name}")
    return values[0] if values else None
