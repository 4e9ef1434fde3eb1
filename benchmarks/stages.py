"""Where do the seconds of one study go? Whole 178 x 512 x 512, through Triton with and without shared memory, embedded.

    python -m benchmarks.stages [--study FOLDER] [--repeats 5]

Runs the real command in a fresh process each time, everything counted from process start to RTSTRUCT on disk.
Without --study, the phantom. Prints a table of medians, writes benchmarks/results/stages.json.
"""

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from anatomynet.engine.command import reports_errors
from benchmarks.common import BIN, KIB_PER_GB, machine, run_and_measure, study_or_phantom, table_lines, write_result
from benchmarks.served import write_shipped_repository
from tests.triton_servers import running_server

STAGES = ("read", "connect", "infer", "check", "contours", "write")

Run = dict[str, Any]


@click.command()
@click.option("--study", type=click.Path(path_type=Path), help="A CT study; the phantom if not given.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Timed runs each, after one to warm up."
)
@reports_errors
def main(study: Path | None, repeats: int) -> None:
    """Time `anatomynet-client segment` by stage."""
    with tempfile.TemporaryDirectory() as temporary, study_or_phantom(study) as study:
        folder = Path(temporary)
        with running_server(write_shipped_repository(folder / "repository"), folder=folder) as server:
            rows = {
                "Triton, shared memory": measure(study, ["--url", server.url, "--shared-memory", "on"], repeats),
                "Triton, gRPC": measure(study, ["--url", server.url, "--shared-memory", "off"], repeats),
            }
            server_gb = peak_gb_of_tree(server.process.pid)
        rows["embedded engine"] = measure(study, [], repeats)
    header = ("through", *STAGES, "whole process", "client's peak memory")
    for line in table_lines(header, [(name, *cells_of(row)) for name, row in rows.items()]):
        click.echo(line)
    shares = sorted({f"{row['computed_share']:.0%}" for row in rows.values()})
    click.echo(f"seconds; server's peak {server_gb:.2f} GB; computed: {', '.join(shares)} of the scan's voxels")
    write_result("stages", {"machine": machine(), "rows": rows, "server_peak_gb": server_gb, "repeats": repeats})


def cells_of(row: Run) -> list[str]:
    """A row of the table, in seconds and GB."""
    return [*(f"{row['seconds'][stage]:.2f}" for stage in STAGES), f"{row['wall']:.2f}", f"{row['peak_gb']:.2f} GB"]


def measure(study: Path, options: list[str], repeats: int) -> Run:
    """Medians of the command's own stages, of its wall-clock time, and its largest memory."""
    runs = [run_once(study, options) for _ in tqdm(range(repeats + 1), desc=" ".join(options) or "embedded")][1:]
    seconds = {stage: statistics.median(run["seconds"][stage] for run in runs) for stage in STAGES}
    return {
        "seconds": seconds,
        "wall": statistics.median(run["wall"] for run in runs),
        "peak_gb": max(run["peak_gb"] for run in runs),
        "runtime": runs[0]["runtime"],
        "computed_share": runs[0]["computed_share"],
        "checkpoint_sha256": runs[0]["model"]["checkpoint_sha256"],
    }


def run_once(study: Path, options: list[str], *, command: Sequence[str] = (str(BIN / "anatomynet-client"),)) -> Run:
    """One run of the client's command, in a process of its own; embedded, unless the options name a server.

    Raises:
        click.ClickException: it fails, or finds a server where none was named.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        words = [*command, "segment", study, "--output", Path(folder) / "rs.dcm", "--report", report, *options]
        measured = run_and_measure(words)
        run: Run = json.loads(report.read_text())
    if "--url" not in options and run["runtime"].startswith("Triton"):
        raise click.ClickException(
            "a server answers on this machine's port 8001: stop it to measure the embedded engine"
        )
    return run | measured


def peak_gb_of_tree(pid: int) -> float:
    """Largest resident memory of a process and its children (Triton's Python backend is one), in GB."""
    process = Path(f"/proc/{pid}")
    status = (process / "status").read_text()
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    children = " ".join(path.read_text() for path in process.glob("task/*/children")).split()
    return own / KIB_PER_GB + sum(peak_gb_of_tree(int(child)) for child in children)


if __name__ == "__main__":
    main()
