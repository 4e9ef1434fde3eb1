"""How do time and memory grow with the number of slices, the in-plane size and the clients at once? It must be linear.

    python -m benchmarks.growth [--slices 64,128,192,256,320] [--sides 256,384,512,640,768] [--clients 1,2,4,8]

A real server on this machine, a fresh one for each point. Slices and sides: `anatomynet-client segment --whole-volume`
on the same patient in more or fewer voxels, from process start to RTSTRUCT; each study says that its voxels have the
usual size, so that none is resampled. Clients: that many ask for one such volume at once; the time until the last is
answered. Of each curve y = a + b x the R2, and the exponent p of the best y = a + b x^p. Writes
benchmarks/results/growth.json and growth.png.
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from anatomynet.client.ct_writer import write_ct_series
from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.command import reports_errors
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.phantom import PLANNING_SPACING
from anatomynet.engine.preprocess import prepare
from anatomynet.engine.volume import CTVolume, HounsfieldArray
from benchmarks import common
from benchmarks.common import machine, table_lines, write_result
from benchmarks.served import WHOLE, phantom_hu, write_shipped_repository
from benchmarks.stages import peak_gb_of_tree, run_once
from tests.triton_servers import RunningServer, running_server

# Quantity of a point -> its name in the plot.
QUANTITIES = {
    "whole_s": "whole process, s",
    "infer_s": "its inference, s",
    "client_gb": "client's peak, GB",
    "server_gb": "server's peak, GB",
}
AXES = {"slices": "slices of 512 x 512", "pixels": "pixels of each of 178 slices", "clients": "clients at once"}
CONNECT_S = 60.0
EXPONENTS = np.arange(0.5, 2.51, 0.01)

Point = dict[str, float]


def whole_numbers(_context: click.Context, _parameter: click.Parameter, text: str) -> list[int]:
    """Of an option, with commas between, the smallest first."""
    try:
        numbers = sorted(map(int, text.split(",")))
    except ValueError as error:
        raise click.BadParameter(f"expected whole numbers with commas between, found {text!r}") from error
    if numbers[0] < 1:
        raise click.BadParameter(f"expected 1 or more, found {numbers[0]}")
    return numbers


@click.command()
@click.option("--slices", callback=whole_numbers, default="64,128,192,256,320", show_default=True, help="Of 512 x 512.")
@click.option(
    "--sides",
    callback=whole_numbers,
    default="256,384,512,640,768",
    show_default=True,
    help="Of each of 178 slices, in pixels.",
)
@click.option(
    "--clients", callback=whole_numbers, default="1,2,4,8", show_default=True, help="At once, on 178 x 512 x 512."
)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=2, show_default=True, help="Timed runs each, after one to warm up."
)
@click.option(
    "--scale",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Of the side 512 and the 178 slices: smaller is sooner.",
)
@reports_errors
def main(slices: list[int], sides: list[int], clients: list[int], repeats: int, scale: float) -> None:
    """Measure every curve, fit it, and draw it."""
    depth, height, width = (round(side * scale) for side in WHOLE)
    hu = phantom_hu((depth, height, width))
    shapes = {
        "slices": {count: (count, height, width) for count in slices},
        "pixels": {side**2: (depth, side, side) for side in sides},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        repository = write_shipped_repository(folder / "repository")
        curves: dict[str, list[Point]] = {
            axis: [
                {"x": x, **time_study(stretched(hu, shape), repository, repeats)}
                for x, shape in tqdm(of_axis.items(), desc=AXES[axis])
            ]
            for axis, of_axis in shapes.items()
        }
        curves["clients"] = [
            {"x": count, **time_clients(count, hu, repository, repeats)}
            for count in tqdm(clients, desc=AXES["clients"])
        ]
    fits = {
        axis: {name: fit(points, name) for name in QUANTITIES if name in points[0]} for axis, points in curves.items()
    }
    tell(fits)
    draw(curves, fits)
    write_result("growth", {"machine": machine(), "repeats": repeats, "scale": scale, "curves": curves, "fits": fits})


def stretched(hu: HounsfieldArray, shape: tuple[int, int, int]) -> CTVolume:
    """The same patient in more or fewer voxels, told as the usual ones."""
    indices = (np.arange(new) * old // new for new, old in zip(shape, hu.shape, strict=True))
    return CTVolume(hu[np.ix_(*indices)], VolumeGeometry(shape, PLANNING_SPACING))


def time_study(volume: CTVolume, repository: Path, repeats: int) -> Point:
    """The whole command on a study of these voxels, through a fresh server."""
    with tempfile.TemporaryDirectory() as temporary:
        study = Path(temporary) / "study"
        write_ct_series(study, volume)
        with fresh_server(repository) as server:
            runs = [run_once(study, ["--url", server.url, "--whole-volume"]) for _ in range(repeats + 1)]
            server_gb = peak_gb_of_tree(server.process.pid)
    return {
        "whole_s": statistics.median(run["wall"] for run in runs[1:]),
        "infer_s": statistics.median(run["seconds"]["infer"] for run in runs[1:]),
        "client_gb": max(run["peak_gb"] for run in runs),
        "server_gb": server_gb,
    }


def time_clients(count: int, hu: HounsfieldArray, repository: Path, repeats: int) -> Point:
    """So many clients that ask a fresh server for one volume each, at once."""
    with fresh_server(repository) as server:
        with TritonRuntime(server.url) as runtime:
            box = prepare(CTVolume(hu, VolumeGeometry(wide(hu.shape), PLANNING_SPACING)), runtime.model).hu
        seconds = [seconds_of_all(count, server, box) for _ in range(repeats + 1)]
        return {"infer_s": statistics.median(seconds[1:]), "server_gb": peak_gb_of_tree(server.process.pid)}


def seconds_of_all(count: int, server: RunningServer, box: HounsfieldArray) -> float:
    """Until the last of so many is answered.

    Raises:
        click.ClickException: one was not.
    """
    answered: list[bool] = []

    def ask() -> None:
        with TritonRuntime(server.url) as runtime:
            ready.wait()
            runtime.infer(box)
            answered.append(True)

    ready = threading.Barrier(count + 1, timeout=CONNECT_S)
    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    ready.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    if len(answered) < count:
        raise click.ClickException(f"{count - len(answered)} of {count} clients had no answer")
    return time.perf_counter() - start


@contextmanager
def fresh_server(repository: Path) -> Iterator[RunningServer]:
    """A server that has computed nothing yet: its peak memory is this point's."""
    with tempfile.TemporaryDirectory() as folder, running_server(repository, folder=Path(folder)) as server:
        yield server


def wide(shape: Sequence[int]) -> tuple[int, int, int]:
    """An array's shape as geometry has it."""
    z, y, x = shape
    return (z, y, x)


def fit(points: Sequence[Point], name: str) -> dict[str, float]:
    """Of y = a + b x: a, b and R2. Of y = a + b x^p: the p that fits best."""
    x, y = (np.array([point[key] for point in points], float) for key in ("x", name))
    a, b, left = line_through(x, y)
    spread = float(((y - y.mean()) ** 2).sum())
    exponent = min(EXPONENTS, key=lambda p: line_through((x / x.max()) ** p, y)[2])
    return {"a": a, "b": b, "r2": 1 - left / spread if spread else 1.0, "exponent": round(float(exponent), 2)}


def line_through(x: Any, y: Any) -> tuple[float, float, float]:
    """Least squares: a and b of y = a + b x, and the sum of squares that it leaves."""
    columns = np.stack([np.ones_like(x), x], axis=1)
    (a, b), *_ = np.linalg.lstsq(columns, y, rcond=None)
    return float(a), float(b), float(((y - a - b * x) ** 2).sum())


def tell(fits: dict[str, dict[str, dict[str, float]]]) -> None:
    """The table."""
    digits_of = {"r2": ".4f", "exponent": ".2f", "a": ".2f", "b": ".3g"}
    rows = [
        (AXES[axis], QUANTITIES[name], *(f"{found[key]:{digits}}" for key, digits in digits_of.items()))
        for axis, of_axis in fits.items()
        for name, found in of_axis.items()
    ]
    for line in table_lines(("grows with", "what", "R2 of a line", "exponent", "at none", "for each"), rows):
        click.echo(line)


def draw(curves: dict[str, list[Point]], fits: dict[str, dict[str, dict[str, float]]]) -> None:
    """Every curve and its line as growth.png: seconds above, memory below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, len(curves), squeeze=False, sharex="col")
    for column, (axis, points) in enumerate(curves.items()):
        x = [point["x"] for point in points]
        for name in fits[axis]:
            panel = panels[int(name.endswith("_gb"))][column]
            found = fits[axis][name]
            label = f"{QUANTITIES[name].split(',')[0]} (R² {found['r2']:.3f}, exponent {found['exponent']:.2f})"
            (dots,) = panel.plot(x, [point[name] for point in points], "o", label=label)
            ends = np.array([0, max(x)])
            panel.plot(ends, found["a"] + found["b"] * ends, "-", color=dots.get_color(), linewidth=1)
        panels[1][column].set_xlabel(AXES[axis])
    for row, unit in zip(panels, ("seconds", "GB"), strict=True):
        row[0].set_ylabel(unit)
        for panel in row:
            panel.set(xlim=(0, None), ylim=(0, 1.3 * panel.get_ylim()[1]))  # room for the legend
            panel.xaxis.set_major_formatter(EngFormatter())
            panel.legend(fontsize="small", loc="upper left")
            panel.grid(alpha=0.3)
    common.RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(common.RESULTS / "growth.png", dpi=120)


if __name__ == "__main__":
    main()
