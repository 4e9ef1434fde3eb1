"""What the benchmarks of a server share: the shipped checkpoint to serve, a volume, memory, metrics, percentiles."""

import os
import statistics
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from anatomynet.engine.config import shipped_weights
from anatomynet.engine.contract import MODEL_NAME
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.phantom import make_phantom
from anatomynet.engine.region_runtime import EmbeddedRegionFinder, shipped_region
from anatomynet.engine.runtime import load_runtime
from anatomynet.engine.volume import HounsfieldArray
from anatomynet.export.repository import write_repository
from anatomynet.export.triton_models import python_model, region_model
from benchmarks.common import KIB_PER_GB
from tests.triton_servers import RunningServer

FIELD_MM = (500.0, 500.0, 356.0)  # x, y, z: what a phantom's scan shows, whatever its voxels
SMALL, WHOLE = (64, 256, 256), (178, 512, 512)


def write_shipped_repository(folder: Path, *, checkpoint: Path | None = None) -> Path:
    """A model repository with the shipped weights as ONNX and their region finder, for the Python backend.

    Args:
        checkpoint: the same weights, with which PyTorch computes on a GPU.
    """
    onnx_file, region_file = shipped_weights(".onnx"), shipped_region(".onnx")
    region = region_model(EmbeddedRegionFinder(region_file).config, region_file, backend="python")
    write_repository(folder, [python_model(load_runtime(onnx_file).model, [onnx_file], checkpoint=checkpoint), region])
    return folder


def phantom_hu(shape: tuple[int, int, int]) -> HounsfieldArray:
    """int16 (z, y, x): a synthetic patient in so many voxels."""
    spacing = (FIELD_MM[0] / shape[2], FIELD_MM[1] / shape[1], FIELD_MM[2] / shape[0])
    volume, _ = make_phantom(VolumeGeometry(shape, spacing))
    return volume.hu


def resident_gb(pid: int) -> float:
    """Resident memory of a process and its children (Triton's Python backend is one), in GB; shared pages twice."""
    process = Path(f"/proc/{pid}")
    status = (process / "status").read_text()
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    return own / KIB_PER_GB + sum(map(resident_gb, child_pids(pid)))


def child_pids(pid: int) -> list[int]:
    """The processes that a process has started and that still run."""
    return [int(child) for path in Path(f"/proc/{pid}").glob("task/*/children") for child in path.read_text().split()]


def metric(server: RunningServer, name: str) -> float:
    """One of a server's metrics of the model `anatomynet`; see metric_of."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        return metric_of(answer.read().decode(), name)


def metric_of(metrics: str, name: str) -> float:
    """The same in the text of all metrics; the region finder has its own, which do not count.

    Raises:
        click.ClickException: it is not among them.
    """
    ours = f'{name}{{model="{MODEL_NAME}",'
    for line in metrics.splitlines():
        if line.startswith(ours):
            return float(line.rsplit(" ", 1)[1])
    raise click.ClickException(f"no {name} of {MODEL_NAME} among the server's metrics: expected those of Triton")


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 90th, 95th and 99th percentile, and the largest; nothing of nothing."""
    if not seconds:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 99
    return {f"p{k}": cuts[k - 1] for k in (50, 90, 95, 99)} | {"max": max(seconds)}


def together(threads: Sequence[threading.Thread]) -> float:
    """Starts them all; seconds until all have ended."""
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


@contextmanager
def only_cores(cores: set[int]) -> Iterator[None]:
    """What starts inside the block computes on these cores alone."""
    usual = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, usual)
