"""Where do the seconds of one study go? Whole 178 x 512 x 512, through Triton with and without shared memory, embedded.

    python -m benchmarks.stages [--study FOLDER] [--repeats 5]

Runs the real command in a fresh process each time, everything counted from process start to RTSTRUCT on disk.
Without --study, the phantom. Prints a table of medians, writes benchmarks/results/stages.json.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from benchmarks.common import machine, write_result
from tests.triton_servers import running_server

BIN = Path(sys.executable).parent
STAGES = ("read", "connect", "infer", "check", "contours", "write")
KIB_PER_GB = 1e6


@click.command()
@click.option("--study", type=click.Path(path_type=Path), help="A CT study; the phantom if not given.")
@click.option("--repeats", default=5, show_default=True, help="Timed runs each, after one to warm up.")
def main(study: Path | None, repeats: int) -> None:
    """Time `anatomynet-client segment` by stage."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if study is None:
            study = folder / "study"
            subprocess.run([BIN / "anatomynet-client", "phantom", study], check=True, stdout=subprocess.DEVNULL)
        repository = folder / "repository"
        export: list[str | Path] = [BIN / "anatomynet-export", "--output", repository]
        subprocess.run(export, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with running_server(repository, folder=folder) as server:
            rows = {
                "Triton, shared memory": measure(study, ["--url", server.url, "--shared-memory", "on"], repeats),
                "Triton, gRPC": measure(study, ["--url", server.url, "--shared-memory", "off"], repeats),
            }
            server_gb = peak_gb_of_tree(server.process.pid)
        # With the server gone, and on a port that nothing listens on, the embedded engine is what is left.
        rows["embedded engine"] = measure(study, [], repeats)
    for name, row in rows.items():
        stages = "  ".join(f"{stage} {row['seconds'][stage]:.2f}" for stage in STAGES)
        click.echo(f"{name:<22} {stages}  whole process {row['wall']:.2f} s  peak {row['peak_gb']:.2f} GB")
    click.echo(f"server's peak {server_gb:.2f} GB")
    write_result("stages", {"machine": machine(), "rows": rows, "server_peak_gb": server_gb, "repeats": repeats})


def measure(study: Path, options: list[str], repeats: int) -> dict[str, Any]:
    """Medians of the command's own stages, of its wall-clock time, and its largest memory."""
    runs = [run_once(study, options) for _ in tqdm(range(repeats + 1), desc=" ".join(options) or "embedded")][1:]
    seconds = {stage: statistics.median(run["seconds"][stage] for run in runs) for stage in STAGES}
    return {
        "seconds": seconds,
        "wall": statistics.median(run["wall"] for run in runs),
        "peak_gb": max(run["peak_gb"] for run in runs),
        "runtime": runs[0]["runtime"],
        "checkpoint_sha256": runs[0]["model"]["checkpoint_sha256"],
    }


def run_once(study: Path, options: list[str]) -> dict[str, Any]:
    """One run of the command, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command: list[str | Path] = [BIN / "anatomynet-client", "segment", study, "--output", Path(folder) / "rs.dcm"]
        start = time.perf_counter()
        process = subprocess.Popen([*command, "--report", report, *options], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        if status:
            raise click.ClickException(f"segment left with status {os.waitstatus_to_exitcode(status)}")
        run: dict[str, Any] = json.loads(report.read_text())
    return run | {"wall": wall, "peak_gb": usage.ru_maxrss / KIB_PER_GB}


def peak_gb_of_tree(pid: int) -> float:
    """Largest resident memory of a process and its children (Triton's Python backend is one), in GB."""
    process = Path(f"/proc/{pid}")
    status = (process / "status").read_text()
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    children = " ".join(path.read_text() for path in process.glob("task/*/children")).split()
    return own / KIB_PER_GB + sum(peak_gb_of_tree(int(child)) for child in children)


if __name__ == "__main__":
    main()
