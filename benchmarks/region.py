"""Is anything lost by the region finder, and what does it save?

    python -m benchmarks.region OPENKBP/validation [--checkpoint FILE.onnx] [--limit N]

Every case of the folder is drawn twice by the `segment` that serves, with and without the region finder, and held
against the physicians both times; and so is a synthetic planning CT of 178 x 512 x 512, against the truth. The two are
timed one after the other in the same process, so that their ratio means something where the seconds do not.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from anatomynet.engine.command import reports_errors
from anatomynet.engine.data import find_cases, read_case
from anatomynet.engine.metrics import dice
from anatomynet.engine.phantom import make_phantom
from anatomynet.engine.preprocess import prepare
from anatomynet.engine.region import coarse_factors, coarse_from_hu, finder_of
from anatomynet.engine.resolution import enlarged, reduced_labels
from anatomynet.engine.runtime import Runtime, load_runtime
from anatomynet.engine.segment import segment
from anatomynet.engine.volume import CTVolume, LabelArray, LabelMap
from benchmarks.common import machine, write_result

LARGEST_LOSS = 0.005  # of a structure's mean DSC
PHANTOM_SEED = 3
WAYS = ("region", "whole")


@dataclass(frozen=True)
class Row:
    """One CT, drawn both ways: seconds, DSC by structure, and share of the scan, by way; what the finder took."""

    name: str
    seconds: dict[str, float]
    dsc: dict[str, dict[str, float]]
    share: dict[str, float]
    notes: tuple[str, ...]
    coarse_seconds: float
    find_seconds: float


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="ONNX file; the shipped one.")
@click.option("--name", default="region", show_default=True, help="Of the file in benchmarks/results.")
@click.option("--limit", type=click.IntRange(min=1), help="Only so many cases.")
@reports_errors
def main(data: Path, checkpoint: Path | None, name: str, limit: int | None) -> None:
    """Measure the region finder on the cases in the folder DATA, and on a phantom."""
    runtime = load_runtime(checkpoint)
    if finder_of(runtime) is None:
        raise click.UsageError(f"the region finder does not know all that {runtime.model.name} draws")
    rows = []
    with click.progressbar(find_cases(data)[:limit], label="drawing twice", show_pos=True) as bar:
        for folder in bar:
            case = read_case(folder, runtime.model.structures)
            rows.append(drawn_twice(case.name, case.volume, case.labels, runtime, reduced=True))
    volume, truth = make_phantom(seed=PHANTOM_SEED, structures=runtime.model.structures)
    phantom = drawn_twice("phantom", volume, truth.labels, runtime, reduced=False)
    result = {
        **machine(),
        "runtime": runtime.description,
        "checkpoint_sha256": runtime.model.checkpoint_sha256,
        "region_sha256": finder_sha256(runtime),
        "data": f"{data.resolve().parent.name}/{data.name}",
        "dsc": agreement(rows, runtime.model.structures),
        "box": summary(rows),
        "cases": {row.name: told(row) for row in rows},
        "phantom": {"shape": list(volume.hu.shape), "seed": PHANTOM_SEED, **told(phantom)},
    }
    write_result(name, result)
    for line in table(result):
        click.echo(line)


def drawn_twice(name: str, volume: CTVolume, truth: LabelArray, runtime: Runtime, *, reduced: bool) -> Row:
    """Draws a CT with the region finder and on the whole body.

    Args:
        truth: uint8 (z, y, x); a structure that is not in it is not judged.
        reduced: the CT and its truth are those of the network's resolution; it is enlarged first.
    """
    stride = runtime.model.in_plane_stride
    given = enlarged(volume, stride) if reduced else volume
    drawn, seconds = {}, {}
    for way in WAYS:
        start = time.perf_counter()
        drawn[way] = segment(given, runtime, whole_volume=way == "whole")
        seconds[way] = time.perf_counter() - start
    dsc = {way: dsc_by_structure(drawn[way], truth, stride if reduced else 1) for way in WAYS}
    share = {way: float(drawn[way].computed_share or 0) for way in WAYS}
    notes = tuple(note for note in drawn["region"].notes if note not in drawn["whole"].notes)
    return Row(name, seconds, dsc, share, notes, *finding_seconds(given, runtime))


def dsc_by_structure(drawn: LabelMap, truth: LabelArray, stride: int) -> dict[str, float]:
    """DSC of each structure that the truth has; of one that was not drawn, 0."""
    labels = reduced_labels(drawn.labels, stride, count=len(drawn.structures))
    names = enumerate((structure.name for structure in drawn.structures), start=1)
    return {name: dice(labels == label, truth == label) for label, name in names if (truth == label).any()}


def finding_seconds(volume: CTVolume, runtime: Runtime) -> tuple[float, float]:
    """Of averaging the body box, and of the finder's network."""
    finder = finder_of(runtime)
    assert finder is not None
    given = prepare(volume, runtime.model)
    start = time.perf_counter()
    coarse = coarse_from_hu(given.hu, coarse_factors(given.grid.spacing, finder.config))
    averaged = time.perf_counter()
    finder.find(coarse)
    return averaged - start, time.perf_counter() - averaged


def finder_sha256(runtime: Runtime) -> str:
    """Of the region finder's checkpoint."""
    finder = finder_of(runtime)
    return finder.config.checkpoint_sha256 if finder else ""


def agreement(rows: Sequence[Row], structures: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each structure the mean DSC both ways, how many were missed, and whether the finder cost too much."""
    told = {}
    for name in structures:
        scores = {way: [row.dsc[way][name] for row in rows if name in row.dsc[way]] for way in WAYS}
        if not scores["whole"]:
            continue
        means = {way: float(np.mean(scores[way])) for way in WAYS}
        missed = {way: sum(score == 0 for score in scores[way]) for way in WAYS}
        told[name] = {
            "patients": len(scores["whole"]),
            **{way: round(means[way], 4) for way in WAYS},
            "worst_loss": round(float(np.max(np.subtract(scores["whole"], scores["region"]))), 4),
            "missed": missed,
            "kept": means["whole"] - means["region"] <= LARGEST_LOSS and missed["region"] <= missed["whole"],
        }
    return told


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """How large the boxes are, how often one grew or was given up, and the ratio of times."""
    of_body = [row.share["region"] / row.share["whole"] for row in rows]
    return {
        "share_of_body_box": spread(of_body),
        "share_of_scan": spread([row.share["region"] for row in rows]),
        "body_box_share_of_scan": spread([row.share["whole"] for row in rows]),
        "grew": sum(any("on a larger one" in note for note in row.notes) for row in rows),
        "whole_body": sum(any("on the whole body" in note for note in row.notes) for row in rows),
        "seconds_averaging": spread([row.coarse_seconds for row in rows]),
        "seconds_finding": spread([row.find_seconds for row in rows]),
        "seconds": {way: spread([row.seconds[way] for row in rows]) for way in WAYS},
        "times_faster": spread([row.seconds["whole"] / row.seconds["region"] for row in rows]),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, least and largest."""
    mean, median = float(np.mean(values)), float(np.median(values))
    measures = {"mean": mean, "median": median, "least": min(values), "largest": max(values)}
    return {kind: round(value, 4) for kind, value in measures.items()}


def told(row: Row) -> dict[str, Any]:
    """One CT as the JSON keeps it."""
    return {
        "seconds": {way: round(row.seconds[way], 3) for way in WAYS},
        "times_faster": round(row.seconds["whole"] / row.seconds["region"], 2),
        "share_of_scan": {way: round(row.share[way], 4) for way in WAYS},
        "dsc": {way: {name: round(value, 4) for name, value in row.dsc[way].items()} for way in WAYS},
        "seconds_averaging": round(row.coarse_seconds, 4),
        "seconds_finding": round(row.find_seconds, 4),
        "notes": list(row.notes),
    }


def table(result: dict[str, Any]) -> list[str]:
    """What a reader wants first."""
    lines = [f"{'structure':<14}{'patients':>9}{'region':>9}{'whole':>9}{'worst loss':>12}  kept"]
    for name, of in result["dsc"].items():
        numbers = f"{of['patients']:>9}{of['region']:>9.3f}{of['whole']:>9.3f}{of['worst_loss']:>12.3f}"
        lines.append(f"{name:<14}{numbers}  {'yes' if of['kept'] else 'NO'}")
    box = result["box"]
    for key in ("share_of_body_box", "share_of_scan", "seconds_averaging", "seconds_finding", "times_faster"):
        lines.append(f"{key}: " + ", ".join(f"{kind} {value:.3f}" for kind, value in box[key].items()))
    lines.append(f"of {len(result['cases'])} boxes {box['grew']} grew, {box['whole_body']} gave way to the whole body")
    phantom = result["phantom"]
    lines.append(
        f"phantom: {phantom['seconds']['region']} s against {phantom['seconds']['whole']} s, share of the scan "
        f"{phantom['share_of_scan']['region']} against {phantom['share_of_scan']['whole']}; {phantom['notes']}"
    )
    return lines


if __name__ == "__main__":
    main()
