"""Why do network and physicians agree no better? How much lies in where a structure begins and ends, how much in size.

    python -m benchmarks.shortfall OPENKBP [--checkpoint FILE] [--every N]

For each structure, on the validation patients and on every Nth of those it learnt from: DSC; DSC without the cases that
training's survey refuses; DSC within the slices that the physician drew on, which forgives the first and last slice; by
how much the volumes differ. What is as low on cases it learnt from is not a want of patients. Writes
benchmarks/results/shortfall.json, with every case by name.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from anatomynet.engine.command import reports_errors
from anatomynet.engine.data import find_cases, read_case
from anatomynet.engine.metrics import Mask, dice
from anatomynet.engine.runtime import Runtime, load_runtime
from anatomynet.engine.segment import draw_reduced
from anatomynet.engine.survey import survey_cases
from benchmarks.accuracy import runtime_from_checkpoint
from benchmarks.common import machine, write_result

SPLITS = ("validation", "train")
WORST = 3  # named for each structure


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help=".safetensors or .onnx; the shipped ONNX file.")
@click.option("--every", default=5, show_default=True, help="Of the cases to train on, each Nth.")
@click.option("--name", default="shortfall", show_default=True, help="Of the JSON in benchmarks/results; '' is none.")
@reports_errors
def main(data: Path, checkpoint: Path | None, every: int, name: str) -> None:
    """Look into the agreement on DATA/validation and DATA/train, of cases reduced to the network's resolution."""
    runtime = runtime_from_checkpoint(checkpoint) if checkpoint else load_runtime()
    rows = []
    for split in SPLITS:
        folders = find_cases(data / split)[:: every if split == "train" else 1]
        survey = survey_cases(data / split, runtime.model)
        refused = {report.name for report in survey.skipped}
        with click.progressbar(folders, label=f"drawing {split}", show_pos=True) as bar:
            for folder in bar:
                rows += [
                    {"split": split, "case": folder.name, "refused": folder.name in refused, **row}
                    for row in rows_of_case(folder, runtime)
                ]
    summaries = [summary_of(rows, split, structure) for split in SPLITS for structure in runtime.model.structures]
    for line in table(summaries):
        click.echo(line)
    if name:
        told = {"runtime": runtime.description, "checkpoint_sha256": runtime.model.checkpoint_sha256}
        write_result(name, {**machine(), **told, "every": every, "structures": summaries, "rows": rows})


def rows_of_case(folder: Path, runtime: Runtime) -> list[dict[str, Any]]:
    """For each structure that is annotated: the agreement, and where it and the drawing begin and end."""
    case = read_case(folder, runtime.model.structures)
    drawn = draw_reduced(case.volume, runtime).labels
    return [
        {"structure": name, **agreement(drawn == label, case.labels == label)}
        for label, (name, known) in enumerate(zip(runtime.model.structures, case.annotated, strict=True), start=1)
        if known
    ]


def agreement(drawn: Mask, truth: Mask) -> dict[str, Any]:
    """DSC of two masks (z, y, x), everywhere and in the slices of the truth; volume drawn / true; their ends."""
    slices = truth.any(axis=(1, 2))
    return {
        "dice": round(dice(drawn, truth), 4),
        "dice_in_its_slices": round(dice(drawn & slices[:, None, None], truth), 4),
        "volume_ratio": round(float(drawn.sum() / truth.sum()), 3) if slices.any() else None,
        "slices": _ends(truth),
        "slices_drawn": _ends(drawn),
    }


def summary_of(rows: Iterable[dict[str, Any]], split: str, structure: str) -> dict[str, Any]:
    """Means of a structure in a split, and its worst cases."""
    own = sorted(
        (r for r in rows if (r["split"], r["structure"]) == (split, structure)), key=lambda r: float(r["dice"])
    )
    ratios = [row["volume_ratio"] for row in own if row["volume_ratio"] is not None]
    return {
        "split": split,
        "structure": structure,
        "cases": len(own),
        "dice": _mean([row["dice"] for row in own]),
        "dice_without_refused": _mean([row["dice"] for row in own if not row["refused"]]),
        "dice_in_its_slices": _mean([row["dice_in_its_slices"] for row in own]),
        "volume_ratio": [round(float(q), 2) for q in np.percentile(ratios, (25, 50, 75))] if ratios else None,
        "worst": [row["case"] for row in own[:WORST]],
    }


def table(summaries: Sequence[dict[str, Any]]) -> Iterable[str]:
    """What is printed: a line a structure and split."""
    yield (
        f"{'':<11} {'':<14}{'cases':>6}{'DSC':>8}{'sound ones':>12}{'in its slices':>15}"
        "   volume drawn / true, quartiles   worst"
    )
    for row in summaries:
        values = [row[key] for key in ("dice", "dice_without_refused", "dice_in_its_slices")]
        cells = [f"{value:.3f}" if value is not None else "" for value in values]
        quartiles = " ".join(f"{q:.2f}" for q in row["volume_ratio"] or ())
        yield (
            f"{row['split']:<11} {row['structure']:<14}{row['cases']:>6}{cells[0]:>8}{cells[1]:>12}{cells[2]:>15}"
            f"   {quartiles:<33}{', '.join(row['worst'])}"
        )


def _ends(mask: Mask) -> list[int] | None:
    slices = np.flatnonzero(mask.any(axis=(1, 2)))
    return [int(slices[0]), int(slices[-1])] if slices.size else None


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 4) if values else None


if __name__ == "__main__":
    main()
