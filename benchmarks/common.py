"""What every benchmark shares: the machine in words, a study, a command's time and memory, tables, where results go."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from anatomynet.engine.output import write_whole

BIN = Path(sys.executable).parent
RESULTS_VARIABLE = "ANATOMYNET_BENCHMARK_RESULTS"  # another folder for what is written
RESULTS = Path(os.environ.get(RESULTS_VARIABLE) or Path(__file__).resolve().parent / "results")
PACKAGES = (
    *("anatomynet", "numpy", "torch", "onnxruntime", "openvino", "tritonclient", "nvidia-pytriton", "pydicom"),
    *("monai", "SimpleITK", "rt-utils", "nnunetv2"),
)
KIB_PER_GB = 1e6
# A process that was just started counts the largest memory of the one that started it as its own: so a small one does.
SMALL_STARTER = """
import json, os, sys, time
silent = os.open(os.devnull, os.O_WRONLY)
start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, silent, 1)])
_, status, usage = os.wait4(pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), time.perf_counter() - start, usage.ru_maxrss]))
"""


def machine() -> dict[str, Any]:
    """Device, versions and date, to stand beside every figure."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
    }


@contextmanager
def study_or_phantom(study: Path | None) -> Iterator[Path]:
    """The study that was given, else the phantom's, 178 x 512 x 512, for as long as the block lasts."""
    if study is not None:
        yield study
        return
    with tempfile.TemporaryDirectory() as folder:
        phantom = Path(folder) / "study"
        subprocess.run([BIN / "anatomynet-client", "phantom", phantom], check=True, stdout=subprocess.DEVNULL)
        yield phantom


def run_and_measure(command: Sequence[Any]) -> dict[str, float]:
    """Runs a command: its wall-clock seconds as "wall", its largest resident memory as "peak_gb".

    Raises:
        click.ClickException: it leaves with another status than 0; says its last line.
    """
    words = [*map(str, command)]
    starter = [sys.executable, "-I", "-S", "-c", SMALL_STARTER, *words]
    run = subprocess.run(starter, capture_output=True, text=True, check=True)
    status, wall, peak_kib = json.loads(run.stdout.splitlines()[-1])
    if status:
        said = run.stderr.strip().splitlines()
        raise click.ClickException(f"{' '.join(words[:4])} left with status {status}: {said[-1] if said else ''}")
    return {"wall": wall, "peak_gb": peak_kib / KIB_PER_GB}


def table_lines(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table as Markdown has it, its columns aligned."""
    cells = [tuple(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return lines


def write_result(name: str, result: dict[str, Any]) -> None:
    """Writes benchmarks/results/NAME.json, whole or not at all: it may be written again as more comes in.

    Raises:
        OutputError: it could not be written.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_whole(RESULTS / f"{name}.json", (json.dumps(result, indent=2) + "\n").encode(), overwrite=True)


def read_result(name: str) -> dict[str, Any]:
    """benchmarks/results/NAME.json; nothing where there is none."""
    file = RESULTS / f"{name}.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return result
