"""The part `study` of benchmarks.gpu: DICOM to RTSTRUCT through a real server of the trained checkpoint."""

import json
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from anatomynet.client.connection import ServerOptions
from anatomynet.client.pipeline import SegmentOptions, segment_study
from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.config import shipped_weights
from benchmarks.common import BIN, run_and_measure
from benchmarks.gpu_server import runtime_line, served_on_gpu
from benchmarks.gpu_trial import PART_LIMIT_S, Row, Trial
from benchmarks.served import write_shipped_repository

STUDY_REPEATS = 5


@contextmanager
def coming_study(folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """The phantom's study, 178 x 512 x 512, is written by a process beside, while the forms are timed."""
    process = subprocess.Popen([BIN / "anatomynet-client", "phantom", folder], stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def measure_study(trial: Trial, *, study: "subprocess.Popen[bytes] | None") -> None:
    """DICOM to RTSTRUCT through a server of the trained checkpoint: in this process, and in one of its own."""
    if study is None or study.wait(timeout=PART_LIMIT_S):
        raise click.ClickException("the phantom's study could not be written")
    repository = write_shipped_repository(trial.folder / "shipped", checkpoint=shipped_weights(".safetensors"))
    with served_on_gpu(trial, "study", repository) as server:
        rows: Row = {"on": runtime_line(server)}
        trial.result["study"] = rows
        scopes = {"head and neck": False, "whole volume": True} if trial.on_gpu else {"head and neck": False}
        for name, whole in scopes.items():
            rows[name] = {
                "in_process": study_stages(trial, server.url, whole_volume=whole),
                "process": study_process(trial, server.url, whole_volume=whole),
            }


def study_stages(trial: Trial, url: str, *, whole_volume: bool) -> dict[str, float]:
    """Median seconds of each stage, and in all, in this process, with a connection that stays open."""
    runs: list[dict[str, float]] = []
    options = SegmentOptions(
        server=ServerOptions(urls=(url,)),
        whole_volume=whole_volume,
        output=trial.folder / "in_process.dcm",
        overwrite=True,
    )
    with TritonRuntime(url, timeout_s=60.0) as runtime:
        for _ in range(1 + min(trial.repeats, STUDY_REPEATS)):
            start = time.perf_counter()
            drawn = segment_study(trial.folder / "study", options, runtime=runtime)
            runs.append({"all": time.perf_counter() - start, **drawn.clock.seconds})
    return medians(runs[1:])


def study_process(trial: Trial, url: str, *, whole_volume: bool) -> dict[str, float]:
    """Medians of `anatomynet-client segment` from start to end: its own stages, and everything."""
    runs = []
    report = trial.folder / "report.json"
    command = [BIN / "anatomynet-client", "segment", trial.folder / "study", "--url", url, "--overwrite"]
    command += ["--output", trial.folder / "process.dcm", "--report", report]
    for _ in range(1 + min(trial.repeats, STUDY_REPEATS)):
        measured = run_and_measure([*command, *(["--whole-volume"] if whole_volume else [])])
        runs.append({"all": measured["wall"], **json.loads(report.read_text())["seconds"]})
    return medians(runs[1:])


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of each stage."""
    return {stage: statistics.median(run[stage] for run in runs) for stage in runs[-1]}
