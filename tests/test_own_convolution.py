"""benchmarks/own_convolution.py: the candidate computes what PyTorch does, on a GPU or in the interpreter."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="needs Triton's compiler: a PyTorch for CUDA, or pip install triton==3.6.0")

from anatomynet.engine.gpu_kernels import SLOPE
from benchmarks.own_convolution import Tiling, convolved, table, taps_of

# The interpreter's own.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (2, 3, 9)  # neither rows nor columns fill a program's


@pytest.mark.parametrize(
    ("channels", "dtype", "tolerance"), [((40, 32), torch.float32, 1e-5), ((16, 8), torch.float16, 5e-3)]
)
def test_it_is_pytorchs_convolution(channels: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels[0], *SHAPE, generator=random).to(DEVICE, dtype)
    weight = (torch.randn(channels[1], channels[0], 3, 3, 3, generator=random) / 30).to(DEVICE, dtype)
    shift = torch.randn(channels[1], generator=random).to(DEVICE)
    rows = x.permute(0, 2, 3, 4, 1).reshape(-1, channels[0]).contiguous()
    found = convolved(rows, taps_of(weight), shift, SHAPE, Tiling(columns=16, voxels=32, warps=4, stages=2))
    expected = F.leaky_relu(F.conv3d(x.float(), weight.float(), shift, padding=1), SLOPE)
    torch.testing.assert_close(
        found.float(), expected.permute(0, 2, 3, 4, 1).reshape(found.shape), atol=tolerance, rtol=tolerance
    )


def test_the_sum_takes_the_faster_of_both_as_often_as_the_network_has_it() -> None:
    kind = {"name": "trunk", "channels": (32, 32), "times": 16, "cudnn_ms": 3.0, "flop": 3e11, "best": "wide"}
    slower = {"name": "head", "channels": (16, 16), "times": 2, "cudnn_ms": 5.0, "flop": 6e11, "best": "wide"}
    kinds = [
        kind | {"own": {"wide": {"ms": 1.5, "difference": 0.01}, "narrow": {"ms": 2.5, "difference": 0.01}}},
        slower | {"own": {"wide": {"ms": 6.0, "difference": 0.01}}},
    ]
    trunk, _, everything = list(table(kinds))[-3:]
    assert [cell for cell in trunk.split() if cell in {"100", "200", "2.00"}] == ["100", "200", "2.00"]
    assert [float(word) for word in everything.split() if word.replace(".", "").isdigit()] == [58.0, 34.0]
