"""Every benchmark of speed, one after the other: `python -m benchmarks [--study FOLDER] [--only peers,growth]`.

Under a quarter of an hour on two quiet cores. Each writes its JSON, and growth its plot, to benchmarks/results; their
tables are printed as they come, and at the end what was not measured, and why. Those that need a data set, a GPU or
hours are not among them: benchmarks/README.md lists all.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
from tqdm import tqdm

from benchmarks.common import RESULTS, RESULTS_VARIABLE, study_or_phantom

POLL_S = 0.5
BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed}"


@dataclass(frozen=True)
class Script:
    """One of them.

    Attributes:
        seconds: it takes about so long on two quiet cores.
        arguments: instead of its own defaults, for the time to suffice.
        takes_study: whether it asks for one.
    """

    seconds: int
    arguments: tuple[str, ...] = ()
    takes_study: bool = False


SCRIPTS = {
    "stages": Script(90, ("--repeats", "3"), takes_study=True),
    "reading_writing": Script(50),
    "transport": Script(25),
    "engines": Script(80, takes_study=True),
    "peers": Script(270, ("--repeats", "2"), takes_study=True),
    "growth": Script(260),
}


@click.command()
@click.option("--study", type=click.Path(path_type=Path, exists=True), help="A CT study; the phantom if not given.")
@click.option("--only", help=f"Some of {','.join(SCRIPTS)}, with commas between.")
@click.option("--results", type=click.Path(path_type=Path), help="Another folder than benchmarks/results.")
def main(study: Path | None, only: str | None, results: Path | None) -> None:
    """Run every benchmark of speed."""
    chosen = only.split(",") if only else list(SCRIPTS)
    if unknown := sorted(set(chosen) - set(SCRIPTS)):
        raise click.UsageError(f"no benchmark {', '.join(unknown)}: expected some of {', '.join(SCRIPTS)}")
    results = (results or RESULTS).absolute()
    not_measured: dict[str, str] = {}
    start = time.perf_counter()
    total = sum(SCRIPTS[name].seconds for name in chosen)
    with (
        study_or_phantom(study) as study,
        tqdm(total=total, bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}") as bar,
    ):
        for name in chosen:
            not_measured |= run(name, study, results, bar)
    click.echo(f"\n{time.perf_counter() - start:.0f} s in all; figures in {results}")
    for what, reason in not_measured.items():
        click.echo(f"not measured: {what}: {reason}")
    if any(name in not_measured for name in chosen):
        raise SystemExit(1)


def run(name: str, study: Path, results: Path, bar: "tqdm[object]") -> dict[str, str]:
    """One script in a process of its own; prints what it printed.

    Returns:
        What it did not measure, and why: itself, if it failed.
    """
    script = SCRIPTS[name]
    command = [sys.executable, "-m", f"benchmarks.{name}", *script.arguments]
    command += ["--study", str(study)] if script.takes_study else []
    bar.set_description_str(name)
    done = bar.n
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        environment = {**os.environ, RESULTS_VARIABLE: str(results)}
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        try:
            while process.poll() is None:
                time.sleep(POLL_S)
                bar.update(min(POLL_S, done + script.seconds - bar.n))
        except BaseException:
            process.terminate()
            raise
        bar.update(done + script.seconds - bar.n)
        output.seek(0)
        errors.seek(0)
        bar.write(f"\n## {name}\n\n{output.read().strip()}")
        said = errors.read().strip().splitlines()
    if process.returncode:
        return {name: f"failed with status {process.returncode}: {said[-1] if said else 'it said nothing'}"}
    written = json.loads((results / f"{name}.json").read_text())
    missing: dict[str, str] = written.get("not_measured", {})
    return {f"{name}: {what}": reason for what, reason in missing.items()}


if __name__ == "__main__":
    main()
