"""A real tritonserver beside benchmarks.gpu, which shares the GPU with it: what it runs on and takes."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.gpu_trial import Trial
from tests.triton_servers import RunningServer, running_server


@contextmanager
def served_on_gpu(trial: Trial, part: str, repository: Path) -> Iterator[RunningServer]:
    """A server, with this process' own memory of the GPU given back before it starts."""
    if trial.on_gpu:
        torch.cuda.empty_cache()
    start, before = time.perf_counter(), gpu_memory_mib()
    with running_server(repository, folder=trial.folder) as server:
        ready = time.perf_counter() - start
        trial.result.setdefault("servers", {})[part] = {"ready_seconds": ready, "gpu_mib_before": before}
        yield server


def runtime_line(server: RunningServer) -> str:
    """What the model said it computes with, when it started."""
    lines = [line for line in server.log.read_text(errors="replace").splitlines() if "anatomynet runs on" in line]
    return lines[-1].split("anatomynet runs on ")[-1].rstrip('"') if lines else ""


def gpu_memory_mib() -> str:
    """Of all processes on each GPU, as the driver says; empty without one."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().replace("\n", " ")
    except (OSError, subprocess.CalledProcessError):
        return ""
