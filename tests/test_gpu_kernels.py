"""engine/gpu_kernels.py against PyTorch: on a GPU, or else in the interpreter of Triton's compiler (conftest.py)."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anatomynet.engine.gpu_operations import TorchOperations

pytest.importorskip("triton", reason="needs Triton's compiler: a PyTorch for CUDA, or see .ci/run")

from anatomynet.engine import gpu_kernels
from anatomynet.engine.gpu_kernels import KernelOperations

# The interpreter's: of lanes beyond the last voxel, and of a loop's bounds.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOXELS = 3001
PROGRAMS = 4  # of a reduction, which so goes round more than once
BORDER_SHAPE = (3, 19, 37)  # more rows than a program has
# FP16 keeps eleven binary digits; values are up to about ten.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 0.02}


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs one after another."""
    monkeypatch.setattr(gpu_kernels, "PROGRAMS", PROGRAMS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [16, 32, 40])
@pytest.mark.parametrize("name", ["shift_leaky", "leaky", "add_leaky", "scale_add_leaky", "channel_means"])
def test_rows(name: str, channels: int, dtype: torch.dtype) -> None:
    rows = random(VOXELS, 2 * channels).to(dtype)[:, :channels]
    others = random(VOXELS, 2 * channels, seed=1).to(dtype)[:, channels:]
    scale, shift = random(channels, seed=2), random(channels, seed=3)

    def computed(by: TorchOperations | KernelOperations) -> Tensor:
        whole = rows.contiguous()
        results = {
            "shift_leaky": lambda: by.shift_leaky(whole, shift),
            "leaky": lambda: by.leaky(rows),
            "add_leaky": lambda: by.add_leaky(whole, others),
            "scale_add_leaky": lambda: by.scale_add_leaky(whole, scale, others, shift),
            "channel_means": lambda: by.channel_means(whole),
        }
        return results[name]().float()

    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        computed(KernelOperations()), computed(TorchOperations()), atol=tolerance, rtol=tolerance / 10
    )


@pytest.mark.parametrize(("classes", "width"), [(10, 16), (8, 8), (3, 8), (17, 24)])
def test_winners(classes: int, width: int) -> None:
    logits = (random(VOXELS, width) * 3).half()
    (labels, top), (expected_labels, expected_top) = (
        by.winners(logits, classes) for by in (KernelOperations(), TorchOperations())
    )
    assert bool((labels == expected_labels).all())
    torch.testing.assert_close(top, expected_top)


@pytest.mark.parametrize("classes", [8, 10])  # as many as the kernel counts at once, and fewer
def test_border_confidence(classes: int) -> None:
    voxels = math.prod(BORDER_SHAPE)
    top = random(voxels).sigmoid().view(BORDER_SHAPE)
    blobs = torch.arange(voxels, device=DEVICE).view(BORDER_SHAPE) // 61 % classes
    by_kernel, by_torch = (
        by.border_confidence(blobs.to(torch.uint8), top, classes) for by in (KernelOperations(), TorchOperations())
    )
    torch.testing.assert_close(by_kernel, by_torch)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler."),
        subprocess.CalledProcessError(1, ["gcc"]),
        PermissionError(13, "Permission denied"),
        ImportError("cuda_utils.so: failed to map segment from shared object"),
        AssertionError("libcuda.so cannot found!\nPlease make sure GPU is set up"),
    ],
    ids=repr,
)
def test_what_keeps_them_from_being_compiled_is_their_fault(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler, no headers, a cache that cannot be written, or whose files may not be run, a driver not found."""

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(gpu_kernels, "_combined", fails)
    assert KernelOperations().fault(torch.device(DEVICE)) == str(error).splitlines()[0]


def test_they_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """The interpreter takes what the compiler refuses. For the oldest that it is for, what was measured, the newest."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compiled_kernels", "80", "90", "120"]
    run = subprocess.run(
        command,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    compiled = [line.split() for line in run.stdout.splitlines()]
    kernels = ("_combine", "_channel_sums", "_winners", "_border_sums")
    assert {(capability, name) for capability, name, _ in compiled} == {
        (capability, name) for capability in ("80", "90", "120") for name in kernels
    }
    assert all(int(size) > 0 for *_, size in compiled)
