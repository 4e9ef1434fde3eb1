"""Would a convolution of our own beat cuDNN's on this network's few channels? A candidate, which no server runs.

    python -m benchmarks.own_convolution [--slices 178] [--side 512] [--repeats 5] [--seconds 60]

The network's 3 x 3 x 3 convolutions have 16 to 72 channels, with which cuDNN stays far from a GPU's rate, and what
follows each (bias, LeakyReLU) is a pass over memory of its own. `convolved` is one kernel for both: an implicit matrix
product, 27 neighbours times channels, in OpenAI's Triton, on rows (voxels, channels) as in engine.gpu_operations. For
each kind of convolution of the network, in FP16: the time of cuDNN and its pass (engine.gpu_kernels), that of the
kernel with the best of several tilings, both as TFLOP/s, and how far apart the results are; last the sum over the
network. Prints a table, writes benchmarks/results/own_convolution.json. Not measured so far.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import click
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from anatomynet.engine.gpu_kernels import SLOPE, KernelOperations
from benchmarks.common import machine, table_lines, write_result

LAST = torch.channels_last_3d
WARM_UPS = 2


@dataclass(frozen=True)
class Kind:
    """A convolution of the network as engine.gpu_network has it.

    Attributes:
        name: where it stands.
        channels: in, out.
        full: at the CT's resolution; else at half of it.
        times: how often the network has it.
    """

    name: str
    channels: tuple[int, int]
    full: bool
    times: int


KINDS = (
    Kind("trunk", (32, 32), full=False, times=16),
    Kind("deepest level", (40, 40), full=False, times=3),
    Kind("to the deepest level", (32, 40), full=False, times=1),
    Kind("after a concatenation", (64, 32), full=False, times=2),
    Kind("after the deepest level", (72, 32), full=False, times=1),
    Kind("head, two at once", (16, 32), full=True, times=1),
    Kind("head", (16, 16), full=True, times=2),
)


@dataclass(frozen=True)
class Tiling:
    """How a kernel divides its work: voxels of a program, along x and in all, its warps, and loads under way."""

    columns: int
    voxels: int
    warps: int
    stages: int


TILINGS = tuple(
    Tiling(columns, voxels, warps, stages)
    for columns, voxels, warps, stages in product((32, 128), (128, 256), (4, 8), (2, 3, 4))
)


@triton.jit(do_not_specialize=["depth", "height", "width"])
def _convolve(
    rows,
    weight,
    shift,
    out,
    depth,
    height,
    width,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    VOXELS: tl.constexpr,
    SLOPE: tl.constexpr,
):
    # A program has VOXELS / COLUMNS rows of one slice, COLUMNS of each; x first, so that neighbours share their cache.
    local = tl.arange(0, VOXELS)
    x = tl.program_id(0) * COLUMNS + local % COLUMNS
    y = tl.program_id(1) * (VOXELS // COLUMNS) + local // COLUMNS
    z = tl.program_id(2)
    here = (z.to(tl.int64) * height + y) * width + x
    chunk, column = tl.arange(0, CHUNK), tl.arange(0, OUT_WIDTH)
    total = tl.zeros((VOXELS, OUT_WIDTH), tl.float32)
    for tap in range(27):
        dz, dy, dx = tap // 9 - 1, tap // 3 % 3 - 1, tap % 3 - 1
        known = (z + dz >= 0) & (z + dz < depth) & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        there = here + (dz * height + dy) * width + dx
        for first in tl.static_range(0, IN, CHUNK):
            channel = first + chunk
            mask = known[:, None] & (channel < IN)[None, :]
            values = tl.load(rows + there[:, None] * IN + channel[None, :], mask=mask, other=0.0)
            mask = (channel < IN)[:, None] & (column < OUT)[None, :]
            kernel = tl.load(weight + (tap * IN + channel[:, None]) * OUT + column[None, :], mask=mask, other=0.0)
            total = tl.dot(values, kernel, total, input_precision="ieee")  # of FP32, which tests use
    total += tl.load(shift + column, mask=column < OUT, other=0.0)[None, :]
    total = tl.where(total > 0, total, total * SLOPE)
    inside = ((x < width) & (y < height))[:, None] & (column < OUT)[None, :]
    tl.store(out + here[:, None] * OUT + column[None, :], total.to(out.dtype.element_ty), mask=inside)


def convolved(
    rows: Tensor, weight: Tensor, shift: Tensor, shape: tuple[int, int, int], tiling: Tiling = TILINGS[0]
) -> Tensor:
    """leaky(3 x 3 x 3 convolution + shift), zeros around the volume.

    Args:
        rows: (voxels, channels in), FP16 or FP32, contiguous; the volume (z, y, x) with its channels last.
        weight: (27, channels in, channels out): as `taps_of` makes it.
        shift: FP32 (channels out,).
        shape: of the volume.
        tiling: how the work is divided; the result is the same but for the order of sums.

    Returns:
        (voxels, channels out), as precise as the rows; sums are in FP32.
    """
    assert rows.is_contiguous()
    assert rows.shape[0] == math.prod(shape)
    depth, height, width = shape
    _, inward, outward = weight.shape
    out = rows.new_empty(rows.shape[0], outward)
    grid = (triton.cdiv(width, tiling.columns), triton.cdiv(height, tiling.voxels // tiling.columns), depth)
    _convolve[grid](
        rows,
        weight,
        shift,
        out,
        depth,
        height,
        width,
        inward,
        outward,
        max(16, triton.next_power_of_2(outward)),
        32 if inward % 32 == 0 else 16,
        tiling.columns,
        tiling.voxels,
        SLOPE,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return out


def taps_of(weight: Tensor) -> Tensor:
    """(channels out, channels in, 3, 3, 3), PyTorch's -> (27, channels in, channels out), contiguous."""
    return weight.permute(2, 3, 4, 1, 0).reshape(27, weight.shape[1], weight.shape[0]).contiguous()


@click.command()
@click.option("--slices", default=178, show_default=True)
@click.option("--side", default=512, show_default=True)
@click.option("--repeats", default=5, show_default=True, help="Timed runs each, after two to warm up.")
@click.option("--seconds", default=60.0, show_default=True, help="After these no more tilings are tried.")
def main(slices: int, side: int, repeats: int, seconds: float) -> None:
    """Time every kind of convolution both ways, on an NVIDIA GPU."""
    if not torch.cuda.is_available():
        raise click.ClickException("no NVIDIA GPU that PyTorch reaches: there is nothing to compare")
    stop = time.monotonic() + seconds
    result: dict[str, Any] = {**machine(), "gpu": torch.cuda.get_device_name(), "shape": [slices, side, side]}
    result |= {"repeats": repeats, "kinds": []}
    with torch.inference_mode():
        for left, kind in zip(range(len(KINDS), 0, -1), KINDS, strict=True):
            until = time.monotonic() + (stop - time.monotonic()) / left
            result["kinds"].append(compared(kind, (slices, side, side), repeats, until))
            write_result("own_convolution", result)  # what there is, if the next one ends the process
    for line in table(result["kinds"]):
        click.echo(line)


def compared(kind: Kind, ct_shape: tuple[int, int, int], repeats: int, until: float) -> dict[str, Any]:
    """One row: milliseconds of cuDNN and its pass, of the kernel by tiling, and how far apart their results are."""
    shape = ct_shape if kind.full else (ct_shape[0] // 2, ct_shape[1] // 2, ct_shape[2] // 2)
    inward, outward = kind.channels
    generator = torch.Generator("cuda").manual_seed(0)
    random = partial(torch.randn, generator=generator, device="cuda")
    x = random(1, inward, *shape, dtype=torch.float16).contiguous(memory_format=LAST)
    weight = (random(outward, inward, 3, 3, 3) / (27 * inward) ** 0.5).half().contiguous(memory_format=LAST)
    shift = random(outward)
    taps, rows = taps_of(weight), x.permute(0, 2, 3, 4, 1).reshape(-1, inward)
    operations = KernelOperations()

    def by_cudnn() -> Tensor:
        y = F.conv3d(x, weight, padding=1)
        return operations.shift_leaky(y.permute(0, 2, 3, 4, 1).reshape(-1, outward), shift)

    expected = by_cudnn()
    cudnn_ms = median_ms(by_cudnn, repeats)
    own = dict(timed_tilings(partial(convolved, rows, taps, shift, shape), expected, repeats, until))
    best = min(own, key=lambda name: own[name]["ms"], default=None)
    flop = 2 * 27 * inward * outward * rows.shape[0]
    return {
        "name": kind.name,
        "channels": kind.channels,
        "times": kind.times,
        "shape": shape,
        "flop": flop,
        "cudnn_ms": cudnn_ms,
        "own": own,
        "best": best,
    }


def timed_tilings(
    run: Callable[[Tiling], Tensor], expected: Tensor, repeats: int, until: float
) -> Iterator[tuple[str, dict[str, float]]]:
    """For each tiling that this GPU can compile and hold, as long as there is time: ms, and the largest difference."""
    for tiling in TILINGS:
        if time.monotonic() > until:
            return
        try:
            difference = (run(tiling).float() - expected.float()).abs().max().item()
        except (triton.errors.TritonError, RuntimeError) as error:  # too much shared memory, say
            click.echo(f"{tiling}: {str(error).splitlines()[0]}", err=True)
            continue
        yield repr(tiling), {"ms": median_ms(partial(run, tiling), repeats), "difference": difference}


def median_ms(work: Callable[[], object], repeats: int) -> float:
    """By the GPU's own clock."""
    for _ in range(WARM_UPS):
        work()
    taken: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def table(kinds: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each kind, and one for all of them as often as the network has them."""
    header = ("convolution", "channels", "times", "cuDNN ms", "TFLOP/s", "own ms", "TFLOP/s", "ratio", "difference")
    rows = []
    cudnn_ms = own_ms = 0.0
    for kind in kinds:
        best = kind["own"][kind["best"]] if kind["best"] else {"ms": float("nan"), "difference": float("nan")}
        cudnn_ms += kind["times"] * kind["cudnn_ms"]
        own_ms += kind["times"] * min(best["ms"], kind["cudnn_ms"])
        rows.append(
            (
                kind["name"],
                " -> ".join(map(str, kind["channels"])),
                str(kind["times"]),
                f"{kind['cudnn_ms']:.2f}",
                f"{kind['flop'] / kind['cudnn_ms'] / 1e9:.0f}",
                f"{best['ms']:.2f}",
                f"{kind['flop'] / best['ms'] / 1e9:.0f}",
                f"{kind['cudnn_ms'] / best['ms']:.2f}",
                f"{best['difference']:.4f}",
            )
        )
    rows.append(("all, the faster of both", "", "", f"{cudnn_ms:.1f}", "", f"{own_ms:.1f}", "", "", ""))
    yield from table_lines(header, rows)


if __name__ == "__main__":
    main()
