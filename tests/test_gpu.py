"""export/gpu.py: what the driver and TensorRT's own library say of this machine."""

import shutil
import subprocess
from pathlib import Path

import pytest

from anatomynet.export import gpu
from anatomynet.export.gpu import Gpu, tensorrt_versions

COMPILER = shutil.which("cc")


def library(folder: Path, major: int, body: str) -> None:
    source = folder / "source.c"
    source.write_text(body)
    path = folder / f"libnvinfer.so.{major}"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-o", path, source], check=True)


@pytest.fixture
def beside_the_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if COMPILER is None:
        pytest.skip("needs a C compiler")
    if tensorrt_versions():
        pytest.skip("needs a machine without TensorRT")
    monkeypatch.setattr(gpu, "BACKEND_FOLDER", tmp_path)
    return tmp_path


def test_the_library_says_its_version_itself(beside_the_backend: Path) -> None:
    """Its file's name says no more than the major one."""
    library(beside_the_backend, 10, "int getInferLibVersion(void) { return 101303; }")
    assert tensorrt_versions() == ((10, 13, 3),)


def test_each_library_is_asked(beside_the_backend: Path) -> None:
    """Which of them a backend was linked to, its own library alone knows."""
    library(beside_the_backend, 10, "int getInferLibVersion(void) { return 101200; }")
    library(beside_the_backend, 11, "int getInferLibVersion(void) { return 110001; }")
    assert tensorrt_versions() == ((11, 0, 1), (10, 12, 0))


def test_another_library_of_that_name_is_passed_over(beside_the_backend: Path) -> None:
    library(beside_the_backend, 10, "int something_else(void) { return 101200; }")
    (beside_the_backend / "libnvinfer.so.11").write_text("no library")
    assert tensorrt_versions() == ()


@pytest.mark.parametrize(
    ("found", "label"),
    [
        (Gpu("NVIDIA H100 80GB HBM3", "9.0"), "sm90-nvidia-h100-80gb-hbm3"),
        (Gpu("NVIDIA RTX PRO 6000 Blackwell / MIG 1g.24gb", "12.0"), "sm120-nvidia-rtx-pro-6000-blackwell-mig-1g-24gb"),
    ],
)
def test_a_gpus_name_in_a_files_name(found: Gpu, label: str) -> None:
    assert found.label == label
