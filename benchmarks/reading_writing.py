"""How long does the client take for what is not the network: reading slices, writing contours, starting?

    python -m benchmarks.reading_writing [--repeats 5]

The phantom, 178 raw slices of 512 x 512; its nine structures of oar9 as RTSTRUCT; `anatomynet-client --help` from
process start to end. SimpleITK reads the same slices, and rt-utils, where it is installed, writes the same structures.
Prints a table of medians with goals and ratios, writes benchmarks/results/reading_writing.json.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from anatomynet.client.contours import trace_contours
from anatomynet.client.ct_writer import write_ct_series
from anatomynet.client.rtstruct import write_rtstruct
from anatomynet.client.study import CTSeries, read_ct_series, volume_from_series
from anatomynet.engine.command import reports_errors
from anatomynet.engine.config import load_config
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.phantom import PLANNING_SHAPE, PLANNING_SPACING, make_phantom
from anatomynet.engine.volume import CTVolume, LabelMap
from benchmarks.common import BIN, machine, table_lines, write_result
from benchmarks.simple_itk import has_rt_utils, read_with_simple_itk, write_with_rt_utils

GOALS_S = {"read 178 slices": 0.5, "contours and RTSTRUCT of nine structures": 0.4, "start of the command line": 0.4}
READ, WRITE, START = GOALS_S
NOT_INSTALLED = "not installed: pip install rt-utils"

Row = dict[str, Any]


@click.command()
@click.option(
    "--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Timed runs each, after one to warm up."
)
@click.option("--shape", type=int, nargs=3, default=PLANNING_SHAPE, show_default=True, help="Of the phantom, z y x.")
@reports_errors
def main(repeats: int, shape: tuple[int, int, int]) -> None:
    """Time reading, writing and starting."""
    spacing = np.multiply(PLANNING_SPACING, PLANNING_SHAPE[::-1]) / shape[::-1]
    x, y, z = spacing.tolist()
    volume, truth = make_phantom(VolumeGeometry(shape, (x, y, z)), structures=load_config("oar9")[0].structures)
    not_measured = {} if has_rt_utils() else {f"{WRITE}, rt-utils": NOT_INSTALLED, f"{START}, rt-utils": NOT_INSTALLED}
    with tempfile.TemporaryDirectory() as temporary:
        study, output = Path(temporary) / "study", Path(temporary) / "rs.dcm"
        series = write_ct_series(study, volume)
        seconds = time_all(study, series, truth, output, repeats)
    rows = [row_of(what, name, taken, seconds) for (what, name), taken in seconds.items()]
    tell(rows, not_measured)
    result = {"machine": machine(), "repeats": repeats, "shape": shape, "rows": rows, "not_measured": not_measured}
    write_result("reading_writing", result)


def time_all(
    study: Path, series: CTSeries, truth: LabelMap, output: Path, repeats: int
) -> dict[tuple[str, str], dict[str, float]]:
    """(What, by which way) -> median and fastest seconds."""
    ways: dict[tuple[str, str], Callable[[], object]] = {
        (READ, "ours"): lambda: read_ours(study),
        (READ, "SimpleITK"): lambda: read_with_simple_itk(study),
        (WRITE, "ours"): lambda: write_ours(output, series, truth),
        (START, "ours"): lambda: run([BIN / "anatomynet-client", "--help"]),
        (START, "SimpleITK"): lambda: run([sys.executable, "-c", "import SimpleITK"]),
    }
    if has_rt_utils():
        ways[WRITE, "rt-utils"] = lambda: write_with_rt_utils(output, study, truth)
        ways[START, "rt-utils"] = lambda: run([sys.executable, "-c", "import rt_utils"])
    return {
        key: seconds_of(way, repeats) for key, way in tqdm(sorted(ways.items(), key=order), desc="reading, writing")
    }


def order(item: tuple[tuple[str, str], object]) -> tuple[int, bool]:
    """Of the rows: by what they do, ours first."""
    (what, name), _ = item
    return list(GOALS_S).index(what), name != "ours"


def seconds_of(way: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median and fastest, after one run to warm up."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        way()
        taken.append(time.perf_counter() - start)
    return {"median": statistics.median(taken[1:]), "fastest": min(taken[1:])}


def row_of(what: str, name: str, taken: dict[str, float], seconds: dict[tuple[str, str], dict[str, float]]) -> Row:
    """One row; its goal is ours to keep."""
    ratio = taken["median"] / seconds[what, "ours"]["median"]
    return {"what": what, "by": name, **taken, "goal": GOALS_S[what] if name == "ours" else None, "ratio": ratio}


def tell(rows: list[Row], not_measured: dict[str, str]) -> None:
    """The table."""
    cells = [
        (
            row["what"],
            row["by"],
            f"{row['median']:.2f}",
            f"{row['fastest']:.2f}",
            "" if row["goal"] is None else f"{row['goal']:.1f}{'' if row['median'] <= row['goal'] else ' missed'}",
            f"{row['ratio']:.1f}",
        )
        for row in rows
    ]
    for line in table_lines(("what", "by", "median s", "fastest s", "goal s", "times ours"), cells):
        click.echo(line)
    for name, reason in not_measured.items():
        click.echo(f"not measured: {name}: {reason}")


def read_ours(study: Path) -> CTVolume:
    """Headers, checks and pixels."""
    return volume_from_series(read_ct_series(study))


def write_ours(output: Path, series: CTSeries, truth: LabelMap) -> None:
    """Contours and file."""
    write_rtstruct(output, series, trace_contours(truth), overwrite=True)


def run(command: list[Any]) -> None:
    """A process from start to end."""
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
