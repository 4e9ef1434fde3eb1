"""export/python_backend/model.py: which of all runtimes it takes, and what it does before it is READY. What it answers,
on a real server: test_triton.py."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="the checkpoint needs PyTorch")

from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.config import ModelConfig, shipped_weights
from anatomynet.engine.errors import ModelError
from anatomynet.engine.gpu_runtime import GpuRuntime
from anatomynet.engine.onnx_files import CPU_PROVIDER
from anatomynet.engine.runtime import CUDA_PROVIDER, OnnxRuntime, Runtime, load_runtime
from anatomynet.engine.volume import HounsfieldArray, LabelArray
from anatomynet.export.gpu import Gpu
from anatomynet.export.repository import write_repository
from anatomynet.export.triton_models import COMMON_SHAPES, python_model, shipped_model_source

WHOLE = (178, 512, 512)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The Python backend's model.py, as on a machine with a GPU."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
    spec = importlib.util.spec_from_file_location("served_model", shipped_model_source())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "visible_gpus", lambda: (Gpu("an H100", "9.0"),))
    monkeypatch.setattr("anatomynet.engine.gpu_runtime.has_gpu", lambda: True)
    on_cpu = lambda path: GpuRuntime(*load_checkpoint(path), device="cpu")  # noqa: E731
    monkeypatch.setattr("anatomynet.engine.gpu_runtime.load_gpu_runtime", on_cpu)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A version's folder, as `anatomynet-export --fp16` fills it."""
    for suffix in (".onnx", ".safetensors"):
        shutil.copyfile(shipped_weights(suffix), tmp_path / f"openkbp7{suffix}")
    return tmp_path


class OnnxRuntimeOnGpu(OnnxRuntime):
    """As where ONNX Runtime has CUDA; computes on the CPU."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path = path
        self.providers = (CUDA_PROVIDER, CPU_PROVIDER)


def test_a_gpu_is_reached_through_pytorch_whatever_else_is_there(
    backend: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has been timed there; ONNX Runtime's CUDA has not."""
    monkeypatch.setattr(backend, "load_runtime", OnnxRuntimeOnGpu)
    runtime, on_gpu = backend.chosen_runtime(folder)
    assert isinstance(runtime, GpuRuntime)
    assert on_gpu
    assert runtime.model == load_runtime(folder / "openkbp7.onnx").model  # the checkpoint's hash too


@pytest.mark.parametrize("lacking", ["checkpoint", "PyTorch with CUDA", "PyTorch"])
def test_then_through_onnx_runtime_in_fp16(
    lacking: str, backend: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(folder / "openkbp7.onnx", folder / "openkbp7-fp16.onnx")
    monkeypatch.setattr(backend, "load_runtime", OnnxRuntimeOnGpu)
    take_away(lacking, backend, folder, monkeypatch)
    runtime, on_gpu = backend.chosen_runtime(folder)
    assert (runtime.path.name, on_gpu) == ("openkbp7-fp16.onnx", True)


@pytest.mark.parametrize("lacking", ["checkpoint", "GPU", "PyTorch with CUDA", "PyTorch"])
def test_served_on_the_cpu_else(
    lacking: str, backend: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def load(path: Path) -> Runtime:
        asked.append(path.name)
        return OnnxRuntime(path)

    shutil.copyfile(folder / "openkbp7.onnx", folder / "openkbp7-fp16.onnx")
    monkeypatch.setattr(backend, "load_runtime", load)
    take_away(lacking, backend, folder, monkeypatch)
    runtime, on_gpu = backend.chosen_runtime(folder)
    assert isinstance(runtime, OnnxRuntime)
    assert not on_gpu
    assert asked == ["openkbp7.onnx"]


def test_a_model_may_be_named_after_a_precision(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for precision in ("fp32", "fp16"):
        shutil.copyfile(shipped_weights(".onnx"), tmp_path / f"site-fp16-{precision}.onnx")
    names: list[str] = []

    def load(path: Path) -> Runtime:
        names.append(path.name)
        return OnnxRuntime(path)

    monkeypatch.setattr(backend, "load_runtime", load)
    for listing in (sorted, lambda files: sorted(files, reverse=True)):
        found = listing(tmp_path.glob("*.onnx"))
        monkeypatch.setattr(Path, "glob", lambda folder, pattern, found=found: found if "onnx" in pattern else [])
        backend.chosen_runtime(tmp_path)
    assert names == ["site-fp16-fp32.onnx"] * 2


def take_away(lacking: str, backend: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacking == "checkpoint":
        (folder / "openkbp7.safetensors").unlink()
    elif lacking == "GPU":
        monkeypatch.setattr(backend, "visible_gpus", lambda: ())
    elif lacking == "PyTorch with CUDA":
        monkeypatch.setattr("anatomynet.engine.gpu_runtime.has_gpu", lambda: False)
    else:
        monkeypatch.setitem(sys.modules, "anatomynet.engine.gpu_runtime", None)


# --- before READY


class Log:
    """The server's."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log_info(self, line: str) -> None:
        self.lines.append(f"I {line}")

    def log_warn(self, line: str) -> None:
        self.lines.append(f"W {line}")


class NotingRuntime:
    """Computes nothing; its memory holds no whole volume."""

    description = "what was chosen"

    def __init__(self, config: ModelConfig) -> None:
        self.model = config
        self.drawn: list[tuple[int, ...]] = []

    def infer(self, hu: HounsfieldArray) -> tuple[LabelArray, NDArray[np.float32]]:
        self.drawn.append(hu.shape)
        if hu.shape == WHOLE:
            raise ModelError("too little memory for a whole volume")
        return np.zeros(1, np.uint8), np.zeros(1, np.float32)


Initialize = Callable[[bool], tuple[NotingRuntime, list[str]]]


@pytest.fixture
def initialize(backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Initialize:
    """The model of a repository as it is loaded, on what is, or is not, a GPU; and the server's log."""
    checkpoint, onnx_file = shipped_weights(".safetensors"), shipped_weights(".onnx")
    _, config = load_checkpoint(checkpoint)
    write_repository(tmp_path / "repository", [python_model(config, [onnx_file], checkpoint=checkpoint)])
    parameters = {"model_config": {"string_value": config.to_json()}}
    arguments = {
        "model_repository": str(tmp_path / "repository" / "anatomynet"),
        "model_version": "1",
        "model_config": json.dumps({"parameters": parameters}),
    }
    runtime, log = NotingRuntime(config), Log()
    keep = lambda: log.lines.append("memory is kept")  # noqa: E731

    def initialized(on_gpu: bool) -> tuple[NotingRuntime, list[str]]:
        monkeypatch.setattr(backend, "chosen_runtime", lambda folder: (runtime, on_gpu))
        monkeypatch.setattr(backend, "keep_freed_memory", keep)  # for good, and this process has other tests
        monkeypatch.setattr(backend.pb_utils, "Logger", log, raising=False)
        backend.TritonPythonModel().initialize(arguments)
        return runtime, log.lines

    return initialized


def test_a_gpu_has_drawn_the_common_sizes(initialize: Initialize) -> None:
    """What does not fit is no reason not to serve."""
    runtime, log = initialize(True)
    assert sorted(runtime.drawn) == sorted(COMMON_SHAPES)
    assert log == [
        "memory is kept",
        "W not drawn before READY: too little memory for a whole volume",
        "I anatomynet runs on what was chosen",
    ]


def test_a_cpu_has_not(initialize: Initialize, backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "visible_gpus", lambda: ())
    runtime, log = initialize(False)
    assert runtime.drawn == []
    assert log == ["I anatomynet runs on what was chosen"]


def test_a_gpu_that_lies_idle_is_told(initialize: Initialize) -> None:
    runtime, log = initialize(False)
    assert runtime.drawn == []
    assert log == [
        "W nothing here computes on an H100: expected PyTorch for CUDA (pip install 'anatomynet[gpu]') and the "
        "checkpoint that anatomynet-export --fp16 adds",
        "I anatomynet runs on what was chosen",
    ]
