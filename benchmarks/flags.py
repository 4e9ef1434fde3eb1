"""Do the findings point at what went wrong, and does the border confidence? Against a DSC below 0.7.

    python -m benchmarks.flags OPENKBP/validation

Every case is drawn by the shipped model as `segment` draws it; a structure is flagged where a finding names it. The
border confidence is judged by how often a poor structure has a lower one than a good one of the same kind: 1 is always,
0.5 is chance. Prints a table and writes benchmarks/results/flags.json.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import click
from tqdm import tqdm

from anatomynet.engine.command import reports_errors
from anatomynet.engine.data import find_cases, read_case
from anatomynet.engine.findings import find_warnings
from anatomynet.engine.metrics import dice
from anatomynet.engine.runtime import Runtime, load_runtime
from anatomynet.engine.segment import draw_reduced
from anatomynet.engine.structure_region import regions_from_label_map
from benchmarks.common import machine, table_lines, write_result

POOR = 0.7

Row = dict[str, int | float | None]


@dataclass(frozen=True)
class Drawn:
    """One structure of one case.

    Attributes:
        name: of the structure.
        flagged: a finding names it.
        poor: its DSC is below POOR.
        confidence: along its border; None where it was not found.
    """

    name: str
    flagged: bool
    poor: bool
    confidence: float | None


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@reports_errors
def main(data: Path) -> None:
    """Count flagged and unflagged structures by how well they agree with the physicians."""
    runtime = load_runtime()
    drawn = [structure for folder in tqdm(find_cases(data), unit="case") for structure in drawn_of(folder, runtime)]
    names = runtime.model.structures
    rows = {name: row_of([structure for structure in drawn if structure.name == name]) for name in names}
    rows["all"] = row_of(drawn)
    for line in table_lines(("structure", *rows["all"]), [(name, *row.values()) for name, row in rows.items()]):
        click.echo(line)
    sha256 = runtime.model.checkpoint_sha256
    write_result("flags", {**machine(), "checkpoint_sha256": sha256, "poor": POOR, "rows": rows})


def drawn_of(folder: Path, runtime: Runtime) -> list[Drawn]:
    """What is drawn of a case's annotated structures."""
    case = read_case(folder, runtime.model.structures)
    label_map = draw_reduced(case.volume, runtime)
    flagged = {finding.name for finding in find_warnings(case.volume, regions_from_label_map(label_map))}
    drawn = []
    for label, (structure, annotated) in enumerate(zip(label_map.structures, case.annotated, strict=True), start=1):
        if annotated:
            mask = label_map.labels == label
            poor = dice(mask, case.labels == label) < POOR
            confidence = label_map.confidence[label - 1] if label_map.confidence and mask.any() else None
            drawn.append(Drawn(structure.name, structure.tg263_name in flagged, poor, confidence))
    return drawn


def row_of(drawn: Sequence[Drawn]) -> Row:
    """The four fields of the table, and what the confidence tells."""
    counts = {
        f"{'poor' if poor else 'good'}, {'' if flagged else 'not '}flagged": sum(
            (structure.poor, structure.flagged) == (poor, flagged) for structure in drawn
        )
        for poor, flagged in product((True, False), repeat=2)
    }
    return {**counts, "poor has the lower confidence": lower_confidence_share(drawn)}


def lower_confidence_share(drawn: Sequence[Drawn]) -> float | None:
    """Of all pairs of a poor and a good structure of one kind, how many in which the poor one has the lower confidence.

    A tie counts half: the area under the ROC curve. None where there is no pair.
    """
    pairs = [
        (poor.confidence, good.confidence)
        for poor, good in product(drawn, repeat=2)
        if poor.poor and not good.poor and poor.name == good.name
        if poor.confidence is not None and good.confidence is not None
    ]
    lower = sum((poor < good) + (poor == good) / 2 for poor, good in pairs)
    return round(lower / len(pairs), 2) if pairs else None


if __name__ == "__main__":
    main()
