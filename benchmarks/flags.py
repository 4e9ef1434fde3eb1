"""Do the findings point at what went wrong? Flagged or not, against a DSC below 0.7, on a folder of cases.

    python -m benchmarks.flags OPENKBP/validation

Every case is drawn by the shipped checkpoint as `segment` draws it; a structure is flagged where a finding names it.
Prints a table and writes benchmarks/results/flags.json.
"""

from collections import Counter
from pathlib import Path

import click
from tqdm import tqdm

from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.command import reports_errors
from anatomynet.engine.data import find_cases, read_case
from anatomynet.engine.findings import find_warnings
from anatomynet.engine.metrics import dice
from anatomynet.engine.resolution import draw_reduced
from anatomynet.engine.runtime import TorchRuntime
from anatomynet.engine.structure_region import regions_from_label_map
from benchmarks.common import machine, write_result

POOR = 0.7


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@reports_errors
def main(data: Path) -> None:
    """Count flagged and unflagged structures by how well they agree with the physicians."""
    network, model = load_checkpoint()
    runtime = TorchRuntime(network, model)
    counts: dict[str, Counter[tuple[bool, bool]]] = {name: Counter() for name in model.structures}
    for folder in tqdm(find_cases(data), unit="case"):
        case = read_case(folder, model.structures)
        drawn = draw_reduced(case.volume, runtime)
        flagged = {finding.name for finding in find_warnings(case.volume, regions_from_label_map(drawn))}
        for label, structure in enumerate(drawn.structures, start=1):
            if case.annotated[label - 1]:
                poor = dice(drawn.labels == label, case.labels == label) < POOR
                counts[structure.name][(structure.tg263_name in flagged, poor)] += 1
    rows = {name: row_of(count) for name, count in counts.items()}
    rows["all"] = row_of(sum(counts.values(), Counter()))
    for name, row in rows.items():
        click.echo(f"{name:<12}" + "".join(f"  {key}: {value}" for key, value in row.items()))
    write_result("flags", {**machine(), "checkpoint_sha256": model.checkpoint_sha256, "poor": POOR, "rows": rows})


def row_of(count: Counter[tuple[bool, bool]]) -> dict[str, int]:
    """The four fields of the table, in words."""
    return {
        "poor and flagged": count[True, True],
        "poor, not flagged": count[False, True],
        "good, flagged": count[True, False],
        "good, not flagged": count[False, False],
    }


if __name__ == "__main__":
    main()
