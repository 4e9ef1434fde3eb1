"""engine/machine.py: the cores and the memory that a process may take, and a CT for which there is too little."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from anatomynet.engine import machine
from anatomynet.engine.errors import ModelError
from anatomynet.engine.machine import UNLIMITED, MemoryGuard, available_cores, available_memory
from anatomynet.engine.runtime import OnnxRuntime, OpenVinoRuntime
from anatomynet.export.onnx import served_model, write_onnx
from tests.random_network import random_config, random_graph, smooth_hu


def test_cores_are_those_of_this_process() -> None:
    assert available_cores() >= 1
    command = "from anatomynet.engine.machine import available_cores; print(available_cores())"
    alone = subprocess.run(
        ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0))), sys.executable, "-c", command],
        check=True,
        capture_output=True,
        text=True,
    )
    assert alone.stdout.strip() == "1"


def test_memory_is_what_the_machine_and_the_container_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 << 20 < available_memory() < UNLIMITED
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert available_memory() == UNLIMITED
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert available_memory() == 8000 << 10
    for name, text in (("max", "5000000"), ("current", "4000000"), ("stat", "anon 3\ninactive_file 1000")):
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    assert available_memory() == 1_001_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() == 8000 << 10


def test_too_little_memory_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a runtime may use again what it holds."""
    path, hu = tmp_path / "model.onnx", smooth_hu((16, 64, 64))
    write_onnx(served_model(random_graph(), random_config(), fp16=False), path)
    for runtime in (OpenVinoRuntime(path), OnnxRuntime(path)):
        with monkeypatch.context() as patch:
            patch.setattr(machine, "available_memory", lambda: 100_000)
            with pytest.raises(ModelError, match=r"takes about \d+\.\d GB of memory, found 0\.0 GB free"):
                runtime.infer(hu)
        runtime.infer(hu)
        with monkeypatch.context() as patch:
            patch.setattr(machine, "available_memory", lambda: 0)
            runtime.infer(hu)


def test_guard_counts_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = MemoryGuard(10)
    monkeypatch.setattr(machine, "available_memory", lambda: 1000)
    guard.check((10, 10, 1))
    guard.check((20, 10, 1))
    with pytest.raises(ModelError):
        guard.check((31, 10, 1))
