"""engine/gpu_convolution.py and its kernel against PyTorch's convolutions: on a GPU, and thread by thread on a CPU."""

import ctypes
import functools
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="needs Triton's compiler: a PyTorch for CUDA, or see .ci/run")

from anatomynet.engine.gpu_convolution import (
    FASTEST,
    TILINGS,
    Arguments,
    Convolution,
    ConvolutionOperations,
    Kind,
    Tiling,
    compiled,
    macros,
    packed,
    shared_bytes,
    slices_of_blocks,
    tiling_of,
)
from anatomynet.engine.gpu_kernels import KernelOperations
from anatomynet.engine.gpu_network import TensorCoreNetwork
from anatomynet.engine.gpu_operations import Shape, TorchOperations, rows_of, volume_of
from tests.random_network import random_network

SLOPE = 0.01
HALF_ROUNDING = 0.05  # of logits of about 10
TOLERANCE = 0.01  # of FP16, whose values here are up to about five
SPILLED_BYTES = 12  # of the head's last but one: two blocks at once were the fastest on an H200 all the same
SOURCE = Path(__file__).with_name("convolve_on_cpu.cpp")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a PyTorch with CUDA")
# Every shape of the network's, and none whose blocks are full.
CASES = [
    (Kind((32,), 32), Tiling(1, 2, 2, 1), (5, 3, 17)),
    (Kind((32,), 40), Tiling(2, 2, 1, 1), (3, 5, 17)),
    (Kind((40,), 40), Tiling(1, 2, 2, 1), (3, 5, 17)),
    (Kind((32, 32), 32), Tiling(2, 1, 1, 1), (2, 3, 17)),
    (Kind((40, 32), 32), Tiling(2, 2, 1, 1), (2, 5, 9)),
    (Kind((16,), 32), Tiling(2, 2, 2, 1), (5, 5, 17)),
    (Kind((16,), 16), Tiling(2, 4, 1, 1), (5, 9, 21)),
    (Kind((16,), 24), Tiling(1, 1, 1, 1), (3, 3, 17)),
]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind, Tiling], ctypes.CDLL]:
    """The kernel of one kind as a library for this CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("kernels")

    @functools.cache
    def build(kind: Kind, tiling: Tiling) -> ctypes.CDLL:
        library = folder / f"{abs(hash((kind, tiling)))}.so"
        # This processor's own conversions of FP16 to FP32: in software they were two thirds of the time.
        fast = ["-O2", "-march=native"]
        command = [compiler, "-std=c++17", *fast, "-w", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
        if subprocess.run([*command, *macros(kind, tiling)], check=False, stderr=subprocess.DEVNULL).returncode:
            raise RuntimeError(f"g++ does not compile {kind}")
        return ctypes.CDLL(str(library))

    return build


class OnCpu(Convolution):
    """A Convolution whose kernel a CPU runs."""

    def __init__(self, library: ctypes.CDLL, kind: Kind, tiling: Tiling, at_once: int) -> None:
        self.kind, self.tiling, self._at_once = kind, tiling, at_once
        self._library = library

    def _start(self, grid: tuple[int, int, int], arguments: Arguments, device: torch.device) -> None:
        self._library.run.argtypes = [ctypes.POINTER(Arguments), *[ctypes.c_int] * 3, ctypes.c_size_t]
        self._library.run(ctypes.byref(arguments), *grid, shared_bytes(self.kind, self.tiling))


class Given:
    """Random rows, a kernel and all that may follow it."""

    def __init__(self, kind: Kind, shape: Shape, device: str = "cpu") -> None:
        random = torch.Generator().manual_seed(0)
        voxels, inward = math.prod(shape), sum(kind.inward)
        self.shape = shape
        self.inputs = [torch.randn(voxels, c, generator=random).half().to(device) for c in kind.inward]
        weight = torch.randn(kind.outward, inward, 3, 3, 3, generator=random) / (27 * inward) ** 0.5
        self.weight = weight.half().to(device)
        self.shift = torch.randn(kind.outward, generator=random).to(device)
        self.others = torch.randn(voxels, kind.outward, generator=random).half().to(device)
        volume = volume_of(torch.cat(self.inputs, dim=1).float(), shape)
        self.convolved = rows_of(F.conv3d(volume, self.weight.float(), padding=1))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.float(), expected.float(), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("kind", "tiling", "shape"), CASES, ids=str)
@pytest.mark.parametrize("at_once", [1, 64], ids=["one block along z", "several"])
def test_the_kernel_is_pytorchs_convolution(
    built: Callable[[Kind, Tiling], ctypes.CDLL], kind: Kind, tiling: Tiling, shape: Shape, at_once: int
) -> None:
    given, kernel = Given(kind, shape), OnCpu(built(kind, tiling), kind, tiling, at_once)
    weight = packed(given.weight)
    rows, sums = kernel(given.inputs, shape, weight, with_sums=True)
    assert sums is not None
    close(rows, given.convolved)
    close(sums, given.convolved.sum(dim=0))
    found, _ = kernel(given.inputs, shape, weight, shift=given.shift, others=given.others, slope=SLOPE)
    close(found, F.leaky_relu(given.convolved + given.shift + given.others, SLOPE))


def test_the_second_half_goes_elsewhere_as_it_is(built: Callable[[Kind, Tiling], ctypes.CDLL]) -> None:
    kind, tiling, shape = Kind((16,), 32), Tiling(2, 2, 2, 1), (5, 5, 17)
    given, kernel = Given(kind, shape), OnCpu(built(kind, tiling), kind, tiling, 1)
    first, second = kernel(given.inputs, shape, packed(given.weight), slope=SLOPE, in_two=True)
    assert second is not None
    close(first, F.leaky_relu(given.convolved[:, :16], SLOPE))
    close(second, given.convolved[:, 16:])


class OperationsOnCpu(ConvolutionOperations):
    """What a GPU would compute with: these convolutions, and the interpreter's passes between them."""

    def __init__(self, build: Callable[[Kind, Tiling], ctypes.CDLL]) -> None:
        super().__init__(torch.device("cpu"))
        self._build = build

    def _built(self, kind: Kind) -> Convolution:
        tiling = Tiling(1, 2, 2, 1)
        return OnCpu(self._build(kind, tiling), kind, tiling, 1)


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # the interpreter's
def test_the_whole_network_is_drawn_with_them(built: Callable[[Kind, Tiling], ctypes.CDLL]) -> None:
    """Every convolution gets its own weights, in the order of its inputs."""
    x = torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        form = TensorCoreNetwork(random_network(), OperationsOnCpu(built), torch.float16)
        blocks = form.blocks_of(x)
        found = form.logits(form.features(blocks), blocks)[:, : form.classes]
        expected = random_network()(x)
    torch.testing.assert_close(found.float(), expected, atol=HALF_ROUNDING, rtol=HALF_ROUNDING)


@on_gpu
@pytest.mark.parametrize(("kind", "shape"), [(kind, shape) for kind, _, shape in CASES] + [(CASES[0][0], (37, 70, 90))])
def test_on_a_gpu_it_is_pytorchs(kind: Kind, shape: Shape) -> None:
    given = Given(kind, shape, "cuda")
    own, torchs = ConvolutionOperations(torch.device("cuda")), TorchOperations()
    weights = [by.prepared(given.weight, kind.inward) for by in (own, torchs)]

    def both(name: str, *more: Tensor) -> list[Sequence[Tensor]]:
        results = (
            getattr(by, name)(given.inputs, shape, w, *more) for by, w in zip((own, torchs), weights, strict=True)
        )
        return [(result,) if isinstance(result, Tensor) else result for result in results]

    calls = {"convolved": (), "convolved_leaky": (given.shift, given.others), "convolved_with_means": ()}
    calls |= {"convolved_in_two": ()} if kind.outward == 32 else {}
    for name, more in calls.items():
        for found, expected in zip(*both(name, *more), strict=True):
            close(found, expected)


@on_gpu
def test_a_gpu_finds_them_right() -> None:
    operations, device = ConvolutionOperations(torch.device("cuda")), torch.device("cuda")
    for kind, _, _ in CASES:
        prepare(operations, kind)
    assert operations.fault(device) == ""


def prepare(operations: ConvolutionOperations, kind: Kind) -> None:
    operations.prepared(torch.zeros(kind.outward, sum(kind.inward), 3, 3, 3), kind.inward)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("no cuda"),
        RuntimeError("CUresult CUDA_ERROR_INVALID_VALUE\nand a log"),
        AttributeError("a PyTorch that does not tell of shared memory"),
        TypeError("a cuda-bindings that takes other arguments"),
    ],
    ids=repr,
)
def test_without_compiler_or_driver_they_are_not_right(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(ConvolutionOperations, "_built", fails)
    operations, device = ConvolutionOperations(torch.device("cpu")), torch.device("cpu")
    prepare(operations, Kind((32,), 32))
    assert operations.fault(device) == str(error).splitlines()[0]


def test_one_kernel_that_computes_something_else_makes_none_right(
    built: Callable[[Kind, Tiling], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = Kind((16,), 16), Kind((16,), 24)
    operations, device = OperationsOnCpu(built), torch.device("cpu")
    monkeypatch.setattr(KernelOperations, "fault", lambda *_: "")  # a minute's work for the interpreter
    prepare(operations, right)
    prepare(operations, wrong)
    assert operations.fault(device) == ""
    really_call = OnCpu.__call__

    def call(self: OnCpu, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        rows, sums = really_call(self, *arguments, **options)
        return (rows.flip(1) if self.kind == wrong else rows), sums

    monkeypatch.setattr(OnCpu, "__call__", call)
    assert operations.fault(device) == f"{wrong} computes something else than PyTorch"


def test_one_that_does_not_compile_is_found_before_it_is_needed(
    built: Callable[[Kind, Tiling], ctypes.CDLL],
) -> None:
    operations, device = OperationsOnCpu(built), torch.device("cpu")
    operations.prepared(torch.zeros(20, 16, 3, 3, 3), [16])  # of no eights
    assert operations.fault(device) == f"g++ does not compile {Kind((16,), 20)}"


# KiB of an H100, an A100, an L4
@pytest.mark.parametrize(
    ("limit", "trunk", "deep"),
    [
        (227, FASTEST[Kind((32,), 32)], Tiling(4, 2, 1, 1)),
        (163, FASTEST[Kind((32,), 32)], Tiling(2, 2, 1, 1)),
        (99, Tiling(4, 2, 1, 1), Tiling(4, 2, 1, 1)),
    ],
)
def test_the_best_tiling_that_fits_is_taken(limit: int, trunk: Tiling, deep: Tiling) -> None:
    assert tiling_of(Kind((32,), 32), 1024 * limit) == trunk
    assert tiling_of(Kind((32, 32), 32), 1024 * limit) == deep


@pytest.mark.parametrize("limit", [227, 163, 99])
def test_every_kind_has_a_tiling_that_fits(limit: int) -> None:
    for kind, _, _ in CASES:
        assert shared_bytes(kind, tiling_of(kind, 1024 * limit)) <= 1024 * limit


@pytest.mark.parametrize(("limit", "head"), [(227, FASTEST[Kind((16,), 16)]), (99, TILINGS[0])])
def test_one_for_two_blocks_at_once_is_taken_where_both_fit(limit: int, head: Tiling) -> None:
    assert tiling_of(Kind((16,), 16), 1024 * limit) == head


def spilled_bytes(architecture: str, kind: Kind, tiling: Tiling) -> int:
    """What a thread keeps in memory for want of registers, where the kernel is compiled by the compiler that a GPU's
    machine has."""
    refuse = ("--ptxas-options=--warn-on-spills", "--ptxas-options=-Werror")
    try:
        compiled(architecture, (*macros(kind, tiling), *refuse))
    except RuntimeError as error:
        spilled = re.search(r"(\d+) bytes spill stores", str(error))
        if spilled is None:
            raise
        return int(spilled[1])
    return 0


# The oldest that they are for, what was measured, and the newest; KiB of a block.
@pytest.mark.parametrize(("architecture", "limit"), [("sm_80", 163), ("sm_90", 227), ("sm_120", 99)])
def test_they_compile_for_gpus_that_are_not_here(architecture: str, limit: int) -> None:
    for package in ("cuda.bindings", "nvidia.cu13"):
        pytest.importorskip(package, reason="needs NVRTC: see .ci/run")
    kinds = [kind for kind, _, _ in CASES]
    with ThreadPoolExecutor() as pool:
        spilled = list(pool.map(lambda kind: spilled_bytes(architecture, kind, tiling_of(kind, 1024 * limit)), kinds))
    assert max(spilled) <= SPILLED_BYTES, dict(zip(kinds, spilled, strict=True))


def test_too_little_shared_memory_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"a block has 1024 bytes of shared memory: too little for Kind"):
        tiling_of(Kind((32,), 32), 1024)


@pytest.mark.parametrize("shape", [(89, 256, 256), (178, 512, 512), (1, 8, 8), (30, 64, 64)])
def test_blocks_march_through_all_slices_and_fill_the_gpu(shape: Shape) -> None:
    tiling, at_once = TILINGS[0], 132
    slices = slices_of_blocks(shape, tiling, at_once)
    columns = math.ceil(shape[1] / 16) * math.ceil(shape[2] / 16)
    blocks = columns * math.ceil(shape[0] / slices)
    assert slices % tiling.planes == 0
    if blocks > at_once:
        assert blocks / at_once / math.ceil(blocks / at_once) > 0.8
