"""What would a user pick instead, and how long would that take? Peers on the same study, in the same run.

    python -m benchmarks.peers [--study FOLDER] [--repeats 3]

Each run is a process of its own, from its start to an RTSTRUCT on disk, on this machine's CPU: our command as it
ships; the same weights through PyTorch eager, and through MONAI's sliding window (see benchmarks.one_peer); SimpleITK
and rt-utils for reading and writing; nnU-Net v2's own predictor, untrained, of which a few tiles are timed and
multiplied. rt-utils and nnunetv2 are run where they are installed. Without --study, the phantom. Prints a table of
medians and their ratio to ours, writes benchmarks/results/peers.json.
"""

import importlib.util
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from anatomynet.engine.command import reports_errors
from anatomynet.engine.metrics import dice
from benchmarks.common import machine, run_and_measure, study_or_phantom, table_lines, write_result
from benchmarks.one_peer import OVERLAP, ROI, WINDOWS_AT_ONCE
from benchmarks.simple_itk import has_rt_utils
from benchmarks.stages import run_once

OURS = "anatomynet-client segment"
OURS_WHOLE = f"{OURS} --whole-volume"
OUR_WAYS: dict[str, list[str]] = {OURS: [], OURS_WHOLE: ["--whole-volume"]}  # row -> options of the command
EAGER = "PyTorch eager, whole volume"
MONAI = "MONAI sliding_window_inference"
SIMPLE_ITK = "SimpleITK, our engine, rt-utils"
NNUNET, MIRRORED = "nnU-Net v2, without mirroring", "nnU-Net v2, mirrored as by default"
STAGES = ("read", "load", "infer", "write")

Row = dict[str, Any]


@click.command()
@click.option("--study", type=click.Path(path_type=Path, exists=True), help="A CT study; the phantom if not given.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Timed runs each.")
@click.option("--warm-ups", type=click.IntRange(min=0), default=1, show_default=True, help="Runs each before them.")
@click.option("--tiles", type=click.IntRange(min=1), default=2, show_default=True, help="Of nnU-Net, timed.")
@click.option("--roi", type=int, nargs=3, default=ROI, show_default=True, help="Of MONAI's window, z y x.")
@reports_errors
def main(study: Path | None, repeats: int, warm_ups: int, tiles: int, roi: tuple[int, int, int]) -> None:
    """Time each peer on one study."""
    not_measured: dict[str, str] = {}
    with study_or_phantom(study) as study, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        peers: dict[str, list[str]] = {EAGER: ["eager"], MONAI: ["monai", "--roi", *map(str, roi)]}
        if has_rt_utils():
            peers[SIMPLE_ITK] = ["simple-itk"]
        else:
            not_measured[SIMPLE_ITK] = "not installed: pip install rt-utils"
        runs = {name: partial(our_row, study, options) for name, options in OUR_WAYS.items()}
        runs |= {name: partial(peer_row, study, folder, words) for name, words in peers.items()}
        rows = {
            name: median_row([run() for _ in tqdm(range(warm_ups + repeats), desc=name)][warm_ups:])
            for name, run in runs.items()
        }
        rows[MONAI]["agreement_with_whole"] = agreement(folder / "monai.npy", folder / "eager.npy")
        if has_nnunet():
            rows |= nnunet_rows(study, folder / "nnunet.json", tiles)
        else:
            not_measured[NNUNET] = not_measured[MIRRORED] = "not installed: pip install -c constraints.txt nnunetv2"
    for row in rows.values():
        row["ratio_to_ours"] = row["wall"] / rows[OURS]["wall"]
    tell(rows, not_measured)
    settings = {"roi": roi, "windows_at_once": WINDOWS_AT_ONCE, "overlap": OVERLAP}
    result = {"machine": machine(), "repeats": repeats, "monai": settings, "rows": rows}
    write_result("peers", result | {"not_measured": not_measured})


def has_nnunet() -> bool:
    """Whether nnU-Net is there. It is in no extra of this project: it brings forty packages along."""
    return importlib.util.find_spec("nnunetv2") is not None


def tell(rows: dict[str, Row], not_measured: dict[str, str]) -> None:
    """The table, and what its numbers leave unsaid."""
    header = ("way", *STAGES, "whole, s", "peak memory", "times ours")
    cells = [
        (
            name,
            *(f"{row['seconds'][stage]:.2f}" if stage in row["seconds"] else "" for stage in STAGES),
            f"{row['wall']:.1f}",
            f"{row['peak_gb']:.2f} GB",
            f"{row['ratio_to_ours']:.1f}",
        )
        for name, row in rows.items()
    ]
    cells += [(name, *[""] * len(STAGES), "not measured", "", "") for name in not_measured]
    for line in table_lines(header, cells):
        click.echo(line)
    if NNUNET in rows:
        row = rows[NNUNET]
        click.echo(
            f"nnU-Net: {row['tiles_timed']} tiles of {' x '.join(map(str, row['patch']))} timed, "
            f"{row['seconds_a_tile']:.1f} s each; the whole has {row['tiles_of_the_whole']}, mirrored "
            f"{row['mirrored_passes']} passes each. Its logits' way back to the CT's grid is not counted."
        )
    if "agreement_with_whole" in rows.get(MONAI, {}):
        click.echo(f"the sliding window's structures agree with the whole's: DSC {rows[MONAI]['agreement_with_whole']}")
    for name in OUR_WAYS:
        click.echo(f"{name} computed {rows[name]['computed_share']:.0%} of the scan's voxels")
    for name, reason in not_measured.items():
        click.echo(f"not measured: {name}: {reason}")


def our_row(study: Path, options: list[str]) -> Row:
    """One run of our command, embedded, its stages named as the peers' are."""
    run = run_once(study, options)
    seconds = run["seconds"]
    named = {
        "read": seconds["read"],
        "load": seconds["connect"],
        "infer": seconds["infer"],
        "write": seconds["check"] + seconds["contours"] + seconds["write"],
    }
    return {"seconds": named, **{key: run[key] for key in ("wall", "peak_gb", "runtime", "computed_share")}}


def peer_row(study: Path, folder: Path, words: list[str]) -> Row:
    """One run of a peer: its name and options."""
    way, *options = words
    result = folder / f"{way}.json"
    measured = run_and_measure([sys.executable, "-m", "benchmarks.one_peer", way, study, result, *options])
    return {"seconds": json.loads(result.read_text()), **measured}


def median_row(runs: list[Row]) -> Row:
    """Medians of the times, the largest memory."""
    seconds = {stage: statistics.median(run["seconds"][stage] for run in runs) for stage in STAGES}
    wall, peak = statistics.median(run["wall"] for run in runs), max(run["peak_gb"] for run in runs)
    return runs[0] | {"seconds": seconds, "wall": wall, "peak_gb": peak}


def nnunet_rows(study: Path, result: Path, tiles: int) -> dict[str, Row]:
    """nnU-Net's two rows: the few tiles of one run, multiplied."""
    click.echo(f"{NNUNET}: {tiles} tiles")
    command = [sys.executable, "-m", "benchmarks.nnunet", study, result, "--tiles", str(tiles)]
    measured = run_and_measure(command)
    found: Row = json.loads(result.read_text())
    seconds = found["seconds"]
    rows = {}
    for name, passes in ((NNUNET, 1), (MIRRORED, found["mirrored_passes"])):
        infer = seconds["preprocess"] + found["seconds_a_tile"] * found["tiles_of_the_whole"] * passes
        # Its planning is training's: a user has the network ready.
        rows[name] = found | {
            "seconds": {"read": seconds["read"], "infer": infer},
            "wall": seconds["read"] + infer,
            "peak_gb": measured["peak_gb"],
        }
    return rows


def agreement(labels: Path, others: Path) -> list[float]:
    """DSC of each structure that one of two label maps has."""
    a, b = np.load(labels), np.load(others)
    present = [label for label in range(1, 256) if (a == label).any() or (b == label).any()]
    return [round(dice(a == label, b == label), 3) for label in present]


if __name__ == "__main__":
    main()
