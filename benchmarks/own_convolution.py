"""How much faster than cuDNN is the convolution of our own (engine.gpu_convolution), and with which tiling?

    python -m benchmarks.own_convolution [--slices 178] [--side 512] [--repeats 5] [--seconds 30]

For each kind of 3 x 3 x 3 convolution that the network has, in FP16, with the bias and LeakyReLU that follow it: the
milliseconds of cuDNN and of the pass after it (engine.gpu_kernels), those of our kernel with each of several tilings,
both as TFLOP/s, and how far apart the results are; last the sum over the network. Prints a table, writes
benchmarks/results/own_convolution.json.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import torch
from torch import Tensor

from anatomynet.engine.gpu_convolution import Convolution, Kind, Tiling, packed, shared_bytes, shared_limit, tiling_of
from anatomynet.engine.gpu_kernels import SLOPE, KernelOperations
from benchmarks.common import machine, table_lines, write_result

WARM_UPS = 2


@dataclass(frozen=True)
class Place:
    """A convolution of the network as engine.gpu_network has it.

    Attributes:
        name: where it stands.
        kind: its channels.
        full: at the CT's resolution; else at half of it.
        times: how often the network has it.
    """

    name: str
    kind: Kind
    full: bool
    times: int


PLACES = (
    Place("trunk", Kind((32,), 32), full=False, times=17),
    Place("deepest level", Kind((40,), 40), full=False, times=3),
    Place("to the deepest level", Kind((32,), 40), full=False, times=1),
    Place("after a concatenation", Kind((32, 32), 32), full=False, times=2),
    Place("after the deepest level", Kind((40, 32), 32), full=False, times=1),
    Place("head, two at once", Kind((16,), 32), full=True, times=1),
    Place("head", Kind((16,), 16), full=True, times=2),
)
TRIED = tuple(
    Tiling(warps, rows, planes, blocks)
    for (warps, rows), planes, blocks in itertools.product(((8, 2), (4, 2), (8, 4), (4, 4), (8, 1)), (2, 1), (1, 2))
)


@click.command()
@click.option("--slices", default=178, show_default=True)
@click.option("--side", default=512, show_default=True)
@click.option("--repeats", default=5, show_default=True, help="Timed runs each, after two to warm up.")
@click.option("--seconds", default=30.0, show_default=True, help="After these no more tilings are tried.")
def main(slices: int, side: int, repeats: int, seconds: float) -> None:
    """Time every kind of convolution both ways, on an NVIDIA GPU."""
    if not torch.cuda.is_available():
        raise click.ClickException("no NVIDIA GPU that PyTorch reaches: there is nothing to compare")
    stop = time.monotonic() + seconds
    result: dict[str, Any] = {**machine(), "gpu": torch.cuda.get_device_name(), "shape": [slices, side, side]}
    result |= {"repeats": repeats, "kinds": []}
    with torch.inference_mode():
        for left, place in zip(range(len(PLACES), 0, -1), PLACES, strict=True):
            until = time.monotonic() + (stop - time.monotonic()) / left
            result["kinds"].append(compared(place, (slices, side, side), repeats, until))
            write_result("own_convolution", result)  # what there is, if the next one ends the process
    for line in table(result["kinds"]):
        click.echo(line)


def compared(place: Place, ct_shape: tuple[int, int, int], repeats: int, until: float) -> dict[str, Any]:
    """One row: milliseconds of cuDNN and its pass, of the kernel by tiling, and how far apart their results are."""
    depth, height, width = ct_shape if place.full else (side // 2 for side in ct_shape)
    shape, kind = (depth, height, width), place.kind
    inward = sum(kind.inward)
    random = partial(torch.randn, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    inputs = [random(depth * height * width, channels, dtype=torch.float16) for channels in kind.inward]
    weight, shift = (random(kind.outward, inward, 3, 3, 3) / (27 * inward) ** 0.5).half(), random(kind.outward)
    cudnn = KernelOperations()
    by_cudnn = partial(cudnn.convolved_leaky, inputs, shape, cudnn.prepared(weight, kind.inward), shift)
    expected = by_cudnn()
    cudnn_ms = median_ms(by_cudnn, repeats)

    def ours(tiling: Tiling) -> Callable[[], Tensor]:
        convolution, weights = Convolution(kind, tiling, expected.device), packed(weight)
        return lambda: convolution(inputs, shape, weights, shift=shift, slope=SLOPE)[0]

    own = dict(timed_tilings(ours, kind, expected, repeats, until))
    return {
        "name": place.name,
        "channels": f"{' + '.join(map(str, kind.inward))} -> {kind.outward}",
        "times": place.times,
        "shape": shape,
        "flop": 2 * 27 * inward * kind.outward * len(expected),
        "cudnn_ms": cudnn_ms,
        "own": own,
        "best": min(own, key=lambda name: own[name]["ms"], default=None),
    }


def timed_tilings(
    ours: Callable[[Tiling], Callable[[], Tensor]], kind: Kind, expected: Tensor, repeats: int, until: float
) -> Iterator[tuple[str, dict[str, float]]]:
    """For the shipped tiling, then for others that this GPU can hold, as long as there is time: ms, and the largest
    difference."""
    limit = shared_limit(expected.device)
    shipped = tiling_of(kind, limit)
    for tiling in (shipped, *(other for other in TRIED if other != shipped)):
        if shared_bytes(kind, tiling) > limit:
            continue
        if tiling != shipped and time.monotonic() > until:
            return
        try:
            run = ours(tiling)
            difference = (run().float() - expected.float()).abs().max().item()
        except RuntimeError as error:  # too many registers, say
            click.echo(f"{tiling}: {str(error).splitlines()[0]}", err=True)
            continue
        yield repr(tiling), {"ms": median_ms(run, repeats), "difference": difference}


def median_ms(work: Callable[[], object], repeats: int) -> float:
    """By the GPU's own clock."""
    for _ in range(WARM_UPS):
        work()
    taken: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
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
                kind["channels"],
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
