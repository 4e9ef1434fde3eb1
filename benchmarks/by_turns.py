"""How much faster is a study than with another checkout? The two by turns, on the same study and machine.

    git worktree add ../earlier COMMIT
    python -m benchmarks.by_turns ../earlier [--study FOLDER] [--repeats 9]

Each run is the command of one checkout in a process of its own, from its start to an RTSTRUCT on disk, with this
environment's packages: embedded, through Triton's shared memory, and so with --whole-volume. The server is this
checkout's. By turns, since such machines are slower in one minute than in the next. Prints a table of medians, writes
benchmarks/results/by_turns.json.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from tqdm import tqdm

import anatomynet
from anatomynet.engine.command import reports_errors
from benchmarks.common import machine, study_or_phantom, table_lines, write_result
from benchmarks.served import write_shipped_repository
from benchmarks.stages import STAGES, Run, run_once
from tests.triton_servers import running_server

HERE = Path(anatomynet.__file__).resolve().parents[2]


@click.command()
@click.argument("earlier", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--study", type=click.Path(path_type=Path, exists=True), help="A CT study; the phantom if not given.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=9, show_default=True, help="Timed runs each, after one to warm up."
)
@reports_errors
def main(earlier: Path, study: Path | None, repeats: int) -> None:
    """Time this checkout and the one in the folder EARLIER by turns."""
    checkouts = {"earlier": earlier.resolve(), "now": HERE}
    with tempfile.TemporaryDirectory() as temporary, study_or_phantom(study) as study:
        folder = Path(temporary)
        rows = {"embedded engine": by_turns(checkouts, study, [], repeats)}
        with running_server(write_shipped_repository(folder / "repository"), folder=folder) as server:
            served = ["--url", server.url, "--shared-memory", "on"]
            rows["Triton, shared memory"] = by_turns(checkouts, study, served, repeats)
            rows["Triton, --whole-volume"] = by_turns(checkouts, study, [*served, "--whole-volume"], repeats)
    cells = [
        (
            f"{way}, {name}",
            *(f"{row[stage]:.2f}" for stage in (*STAGES, "wall")),
            f"{row['wall'] / of['now']['wall']:.2f}",
        )
        for way, of in rows.items()
        for name, row in of.items()
    ]
    for line in table_lines(("through", *STAGES, "whole process", "times now's"), cells):
        click.echo(line)
    commits = {name: commit_of(folder) for name, folder in checkouts.items()}
    write_result("by_turns", {"machine": machine(), "commits": commits, "repeats": repeats, "rows": rows})


def by_turns(checkouts: dict[str, Path], study: Path, options: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """Checkout -> median seconds of each stage and of the whole process."""
    runs: dict[str, list[Run]] = {name: [] for name in checkouts}
    for _ in tqdm(range(repeats + 1), desc=" ".join(options[2:]) or "embedded"):
        for name, checkout in checkouts.items():
            runs[name].append(run_once(study, options, command=command_of(checkout)))
    return {
        name: {stage: statistics.median(run["seconds"][stage] for run in of[1:]) for stage in STAGES}
        | {"wall": statistics.median(run["wall"] for run in of[1:])}
        for name, of in runs.items()
    }


def command_of(checkout: Path) -> list[str]:
    """The client's command of a checkout, whichever this environment has installed."""
    code = "import sys; from anatomynet.client.cli import main; sys.exit(main())"
    return ["env", f"PYTHONPATH={checkout / 'src'}", sys.executable, "-c", code]


def commit_of(checkout: Path) -> str:
    """Its commit, with what was changed since marked; empty outside git."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return told.stdout.strip()


if __name__ == "__main__":
    main()
