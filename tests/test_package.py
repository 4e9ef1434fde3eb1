"""What is built is what is promised: wheel, sdist, and a base install that needs neither torch nor numpy 1."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from anatomynet.client.ct_writer import write_ct_series
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.volume import CTVolume
from tests.random_network import CALIBRATION_SHAPE, smooth_hu
from tests.triton_servers import RunningServer

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    f"anatomynet/{path.relative_to(ROOT).as_posix()}"
    for package in ("engine", "export", "client")
    for path in (ROOT / package).rglob("*.py")
)
DATA = (
    "anatomynet/py.typed",
    "anatomynet/client/review_page/page.html",
    "anatomynet/engine/configs/aliases.toml",
    "anatomynet/engine/configs/oar9.toml",
    "anatomynet/engine/configs/openkbp7.toml",
    "anatomynet/engine/configs/usual_ranges.toml",
    "anatomynet/engine/weights/openkbp7.safetensors",
    "anatomynet/engine/weights/openkbp7.onnx",
    "anatomynet/engine/weights/openkbp7.md",
    "anatomynet/export/python_backend/model.py",
)
SCRIPTS = {"anatomynet-train", "anatomynet-export", "anatomynet-client", "tritonserver"}
LARGEST_WHEEL_MB = 12
LOCK = ROOT / "requirements.lock"
NUMPY_2 = "2.4.6"  # the lock's is for the wheel's Triton server


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, made from the sdist, and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
        env={**os.environ, "PIP_CONSTRAINT": str(LOCK)},
    )
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def test_wheel_holds_every_module_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
        entry_points = next(wheel.read(n).decode() for n in names if n.endswith("entry_points.txt"))
    modules = [n for n in names if n.endswith(".py")]
    assert sorted(modules) == sorted(["anatomynet/__init__.py", "anatomynet/start.py", *MODULES])
    assert set(DATA) <= set(names)
    assert {line.split(" = ")[0] for line in entry_points.splitlines() if " = " in line} == SCRIPTS
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert built[0].stat().st_size < LARGEST_WHEEL_MB * 1e6


def test_sdist_holds_what_builds_it(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert {f"src/{name}" for name in (*MODULES, *DATA)} <= names


def pip_of(bin_folder: Path) -> list[str | Path]:
    """Ours, for an environment without one of its own, which would take long to make."""
    return [sys.executable, "-m", "pip", "--python", bin_folder / "python"]


@pytest.fixture(scope="module")
def base_install(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with the wheel alone."""
    folder = tmp_path_factory.mktemp("base")
    venv.create(folder)
    constraints = folder / "constraints.txt"
    constraints.write_text(re.sub(r"(?m)^numpy==.*$", f"numpy=={NUMPY_2}", LOCK.read_text()))
    options: list[str | Path] = ["--quiet", "--disable-pip-version-check", "--no-compile", "--constraint", constraints]
    subprocess.run(
        [*pip_of(folder / "bin"), "install", *options, built[0]],
        check=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    return folder / "bin"


def test_base_install_has_what_it_takes_alone(base_install: Path) -> None:
    listed = subprocess.run(
        [*pip_of(base_install), "list", "--format", "freeze"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.lower()
    assert "numpy==2." in listed
    for left_out in ("torch", "openvino", "scikit-image", "aiohttp"):
        assert f"{left_out}==" not in listed


def test_base_install_says_what_is_missing(base_install: Path) -> None:
    run = subprocess.run([base_install / "anatomynet-client", "info"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "anatomynet[local]" in run.stderr
    assert "Traceback" not in run.stderr


def test_base_install_segments_through_a_server(
    base_install: Path, triton_server: RunningServer, tmp_path: Path
) -> None:
    geometry = VolumeGeometry(CALIBRATION_SHAPE, (1.0, 1.0, 2.5))
    write_ct_series(tmp_path / "study", CTVolume(smooth_hu(CALIBRATION_SHAPE), geometry))
    output, picture = tmp_path / "rs.dcm", tmp_path / "picture.png"
    command: list[str | Path] = [base_install / "anatomynet-client", "segment", tmp_path / "study"]
    run = subprocess.run(
        [*command, "--url", triton_server.url, "--output", output, "--picture", picture],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert output.is_file()
    assert picture.is_file()
    assert "Triton" in run.stdout
