"""The embedded runtimes: one contract, whatever computes it; damaged files and wrong input are told in one line."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from anatomynet.engine.config import shipped_weights
from anatomynet.engine.errors import GeometryError, ModelError
from anatomynet.engine.onnx_files import CPU_PROVIDER
from anatomynet.engine.runtime import (
    CUDA_PROVIDER,
    OnnxRuntime,
    OpenVinoRuntime,
    Runtime,
    TorchRuntime,
    load_runtime,
)
from anatomynet.export.onnx import served_model, write_onnx
from tests.random_network import random_config, random_graph, random_network, smooth_hu

SHAPE = (13, 67, 83)
THREADS = 4
FILE_RUNTIMES = (OpenVinoRuntime, OnnxRuntime)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    write_onnx(served_model(random_graph(), random_config(), fp16=False), path)
    return path


@pytest.fixture(params=[*FILE_RUNTIMES, TorchRuntime])
def runtime(request: pytest.FixtureRequest, model_file: Path) -> Runtime:
    loaded: Runtime = (
        TorchRuntime(random_network(), random_config()) if request.param is TorchRuntime else request.param(model_file)
    )
    return loaded


def test_says_what_it_is_and_what_it_draws(runtime: Runtime) -> None:
    assert runtime.model == random_config()
    assert runtime.description.split()[0] in ("OpenVINO", "ONNX", "PyTorch")
    assert "CPU" in runtime.description.upper()


def test_answer_is_an_array_of_its_own(runtime: Runtime) -> None:
    """A second volume must not write over the answer to the first; the first is not to be read-only either."""
    first, confidence = runtime.infer(smooth_hu(SHAPE, seed=1))
    kept, kept_confidence = first.copy(), confidence.copy()
    runtime.infer(smooth_hu(SHAPE, seed=2))
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(confidence, kept_confidence)
    first[0, 0, 0] = 1
    assert first.dtype == np.uint8
    assert confidence.dtype == np.float32
    assert confidence.shape == (len(runtime.model.structures),)


def test_several_threads_get_their_own_answers(runtime: Runtime) -> None:
    volumes = [smooth_hu((13, 67, 83 + 8 * seed), seed=seed) for seed in range(THREADS)]
    expected = [runtime.infer(hu) for hu in volumes]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(runtime.infer, volumes))
    for (labels, confidence), (expected_labels, expected_confidence) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(labels, expected_labels)
        np.testing.assert_array_equal(confidence, expected_confidence)


def test_views_are_read_as_they_look(runtime: Runtime) -> None:
    hu = smooth_hu(SHAPE)
    view = hu[::-1, :, ::-1]
    labels, confidence = runtime.infer(view)
    expected_labels, expected_confidence = runtime.infer(view.copy())
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_array_equal(confidence, expected_confidence)


@pytest.mark.parametrize(
    "hu",
    [
        np.zeros((8, 32, 32), np.float32),
        np.zeros((32, 32), np.int16),
        np.zeros((7, 32, 32), np.int16),
        np.zeros((8, 31, 32), np.int16),
        np.zeros((0, 32, 32), np.int16),
    ],
    ids=lambda hu: f"{hu.dtype}{hu.shape}",
)
def test_wrong_input_is_told(runtime: Runtime, hu: NDArray[Any]) -> None:
    with pytest.raises(GeometryError, match=r"expected int16 of at least \(8, 32, 32\) voxels"):
        runtime.infer(hu)


@pytest.mark.parametrize("runtime_class", FILE_RUNTIMES)
@pytest.mark.parametrize("damage", ["cut short", "other bytes", "empty"])
def test_damaged_file_is_told_in_one_line(
    runtime_class: type[OpenVinoRuntime] | type[OnnxRuntime],
    damage: str,
    model_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    whole = model_file.read_bytes()
    path = tmp_path / "damaged.onnx"
    path.write_bytes({"cut short": whole[: len(whole) // 2], "other bytes": b"not ONNX " * 999, "empty": b""}[damage])
    with pytest.raises(ModelError, match=r"damaged\.onnx .*expected .*anatomynet-export") as raised:
        runtime_class(path)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("runtime_class", FILE_RUNTIMES)
def test_file_of_someone_else_is_told(runtime_class: type[OpenVinoRuntime] | type[OnnxRuntime], tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "other", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    with pytest.raises(ModelError, match="says nothing of its structures"):
        runtime_class(path)


@pytest.mark.parametrize("runtime_class", FILE_RUNTIMES)
def test_missing_file_is_told(runtime_class: type[OpenVinoRuntime] | type[OnnxRuntime], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model .*none\.onnx"):
        runtime_class(tmp_path / "none.onnx")


def test_openvino_is_taken_on_a_cpu(model_file: Path) -> None:
    runtime = load_runtime(model_file)
    if isinstance(runtime, OnnxRuntime):
        pytest.skip("a GPU is here, and is taken")
    assert isinstance(runtime, OpenVinoRuntime)


def test_onnx_runtime_is_taken_without_openvino(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    runtime = load_runtime(model_file)
    assert isinstance(runtime, OnnxRuntime)
    assert runtime.providers[-1] == CPU_PROVIDER


def test_no_runtime_says_what_to_install(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("openvino", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModelError, match=r"pip install 'anatomynet\[local\]'"):
        load_runtime(model_file)


def test_shipped_model_is_the_default() -> None:
    if not shipped_weights(".onnx").is_file():
        pytest.skip("no weights are shipped yet")
    runtime = load_runtime()
    assert runtime.model.name == "openkbp7"
    assert len(runtime.model.checkpoint_sha256) == 64


def test_gpu_draws_what_the_cpu_draws(model_file: Path) -> None:
    runtime = OnnxRuntime(model_file, providers=(CUDA_PROVIDER, CPU_PROVIDER)) if _cuda() else None
    if runtime is None or CUDA_PROVIDER not in runtime.providers:
        pytest.skip("needs an NVIDIA GPU and onnxruntime-gpu")
    hu = smooth_hu(SHAPE)
    assert (runtime.infer(hu)[0] != OnnxRuntime(model_file).infer(hu)[0]).mean() < 1e-4


def test_import_takes_neither_torch_nor_a_runtime() -> None:
    command = (
        "import sys, anatomynet.engine.runtime; "
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'openvino', 'scipy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_openvino_does_without_onnxruntime() -> None:
    command = (
        "import sys; from anatomynet.engine.runtime import load_runtime; "
        "print(load_runtime().description.split()[0], 'onnxruntime' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "OpenVINO False"


@pytest.mark.parametrize(
    ("library", "providers", "chosen"),
    [
        ("libonnxruntime_providers_cuda.so", [CUDA_PROVIDER, CPU_PROVIDER], True),
        ("onnxruntime_providers_cuda.dll", [CUDA_PROVIDER, CPU_PROVIDER], True),
        ("libonnxruntime_providers_cuda.so", [CPU_PROVIDER], False),
        ("libonnxruntime_providers_shared.so", [CPU_PROVIDER], False),
    ],
)
def test_onnxruntime_for_cuda_is_told_by_its_files(
    tmp_path: Path, library: str, providers: list[str], chosen: bool
) -> None:
    package = tmp_path / "onnxruntime"
    (package / "capi").mkdir(parents=True)
    (package / "capi" / library).touch()
    (package / "__init__.py").write_text(f"def get_available_providers(): return {providers}", encoding="ascii")
    command = "from anatomynet.engine import runtime; print(runtime._has_cuda_provider())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True, env=environment)
    assert found.stdout.strip() == str(chosen)


def _cuda() -> bool:
    import onnxruntime

    return CUDA_PROVIDER in onnxruntime.get_available_providers()
