"""export/manifest.py: what of a repository is refused before a server starts."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from anatomynet.engine.config import load_config
from anatomynet.engine.errors import ModelError
from anatomynet.export import manifest
from anatomynet.export.gpu import Gpu
from anatomynet.export.manifest import check_files, check_repository
from anatomynet.export.repository import write_repository
from anatomynet.export.triton_models import PlanFile, python_model, tensorrt_models

H100, H200, RTX = Gpu("NVIDIA H100 80GB HBM3", "9.0"), Gpu("NVIDIA H200", "9.0"), Gpu("an RTX 4090", "8.9")
OURS = (10, 13, 0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "network.onnx"
    path.write_bytes(b"the network")
    return path


@pytest.fixture
def repository(tmp_path: Path, file: Path) -> Path:
    write_repository(tmp_path / "repo", [python_model(load_config("openkbp7")[0], [file])])
    return tmp_path / "repo"


@pytest.fixture
def plan_repository(tmp_path: Path, file: Path) -> Path:
    plan = PlanFile(file, "10.13.0.35", "9.0", "NVIDIA H100 80GB HBM3", (1022, 512, 512))
    config = load_config("openkbp7")[0]
    write_repository(tmp_path / "plans", tensorrt_models(config, prepare=file, plan=plan, finish=file))
    return tmp_path / "plans"


def relisted(model: Path) -> None:
    """What someone who knows of the manifest would do."""
    old = json.loads((model / "manifest.json").read_text())
    (model / "manifest.json").unlink()
    manifest.write_manifest(model, needs=old["needs"])


def foreign_code(model: Path) -> None:
    (model / "1" / "model.py").write_text("print('anything')\n")
    relisted(model)


def foreign_library(model: Path) -> None:
    (model / "1" / "libtriton_python.so").write_bytes(b"code")
    relisted(model)


def said_otherwise(**values: object) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        path = model / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "damaged": (lambda model: (model / "1" / "network.onnx").write_bytes(b"the netwprk"), r"network\.onnx is damaged"),
    "missing": (lambda model: (model / "1" / "network.onnx").unlink(), r"network\.onnx is missing"),
    "config": (lambda model: (model / "config.pbtxt").write_text(""), r"config\.pbtxt is damaged or was changed"),
    "added": (lambda model: (model / "1" / "more.onnx").write_bytes(b""), r"more\.onnx is not what anatomynet-export"),
    "no manifest": (lambda model: (model / "manifest.json").unlink(), r"no manifest\.json"),
    "half a manifest": (lambda model: (model / "manifest.json").write_text("{"), r"cannot be read"),
    "no such manifest": (lambda model: (model / "manifest.json").write_text("[]"), r"is no manifest"),
    "deep manifest": (lambda model: (model / "manifest.json").write_text("[" * 200_000), r"cannot be read"),
    "files no table": (said_otherwise(sha256=["config.pbtxt"]), r"is no manifest"),
    "no files": (said_otherwise(sha256=None), r"is no manifest"),
    "needs no list": (said_otherwise(needs=3), r"is no manifest"),
    "needs no names": (said_otherwise(needs=[1]), r"is no manifest"),
    "plan no table": (said_otherwise(plan="10.13"), r"is no manifest"),
    "half a plan": (said_otherwise(plan={"tensorrt_version": "10.13.0.35"}), r"is no manifest"),
    "a plan for any product": (
        said_otherwise(plan={"tensorrt_version": "10.13.0.35", "compute_capability": "9.0"}),
        r"is no manifest: expected .*, of a plan tensorrt_version, compute_capability, gpu",
    ),
    "a plan for RTX": (
        said_otherwise(plan={"tensorrt_rtx_version": "1.7.1.116"}),
        r"a plan of TensorRT-RTX 1\.7\.1\.116, which no Triton backend loads",
    ),
    "foreign code": (foreign_code, r"model\.py is not that of the installed anatomynet"),
    "foreign library": (foreign_library, r"libtriton_python\.so is not what"),
    "foreign model": (lambda model: (model.parent / "other" / "1").mkdir(parents=True), r"other has no manifest"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_refused_in_one_line(repository: Path, damage: Callable[[Path], object], message: str) -> None:
    assert check_repository(repository) == []
    damage(repository / "anatomynet")
    with pytest.raises(ModelError, match=message) as caught:
        check_repository(repository)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_swapped_out_meanwhile_is_one_line(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = manifest._sha256

    def sha256(path: Path) -> str:
        (repository / "anatomynet").rename(repository.parent / "old")  # as an export does
        return real(path)

    monkeypatch.setattr(manifest, "_sha256", sha256)
    with pytest.raises(ModelError, match=r"cannot be read: No such file .*start the server again") as caught:
        check_repository(repository)
    assert "\n" not in str(caught.value)


def test_half_a_repository_is_not_served(repository: Path) -> None:
    """What an export leaves that is killed between the region finder and the model: READY, and good for nothing."""
    (repository / "anatomynet").rename(repository / "anatomynet_region")
    with pytest.raises(ModelError, match=r"no model anatomynet in .*, only anatomynet_region"):
        check_repository(repository)


def test_the_launcher_refuses_before_a_server_starts(repository: Path) -> None:
    (repository / "anatomynet" / "1" / "network.onnx").write_bytes(b"the netwprk")
    launcher = Path(sys.executable).with_name("tritonserver")
    run = subprocess.run([launcher, f"--model-repository={repository}"], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr.count("\n"), run.stdout) == (1, 1, "")
    assert "damaged" in run.stderr
    assert "anatomynet-export" in run.stderr


def test_models_own_check_finds_damage(repository: Path) -> None:
    check_files(repository / "anatomynet")
    (repository / "anatomynet" / "1" / "network.onnx").write_bytes(b"the netwprk")
    with pytest.raises(ModelError, match="damaged"):
        check_files(repository / "anatomynet")


def test_a_checkpoint_is_covered(tmp_path: Path, file: Path) -> None:
    checkpoint = tmp_path / "given.safetensors"
    checkpoint.write_bytes(b"the weights")
    write_repository(tmp_path / "repo", [python_model(load_config("openkbp7")[0], [file], checkpoint=checkpoint)])
    check_repository(tmp_path / "repo")
    (tmp_path / "repo" / "anatomynet" / "1" / "openkbp7.safetensors").write_bytes(b"the weigths")
    with pytest.raises(ModelError, match=r"openkbp7\.safetensors is damaged"):
        check_repository(tmp_path / "repo")


def machine(
    monkeypatch: pytest.MonkeyPatch, gpus: tuple[Gpu, ...], versions: tuple[tuple[int, int, int], ...] = (OURS,)
) -> None:
    monkeypatch.setattr(manifest, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(manifest, "tensorrt_versions", lambda: versions)


@pytest.mark.parametrize("versions", [(OURS,), ((11, 0, 1), OURS)], ids=["alone", "beside another"])
def test_a_plan_for_this_machine(
    plan_repository: Path, monkeypatch: pytest.MonkeyPatch, versions: tuple[tuple[int, int, int], ...]
) -> None:
    machine(monkeypatch, (H100, H100), versions)
    assert check_repository(plan_repository) == []


def test_a_plan_whose_tensorrt_is_not_found_is_remarked_on(
    plan_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT itself refuses what it did not build, as it loads: no reason to keep a server from starting."""
    machine(monkeypatch, (H100,), ())
    (remark,) = check_repository(plan_repository)
    assert "anatomynet_plan holds a plan of TensorRT 10.13.0.35" in remark
    assert "no libnvinfer" in remark
    assert "\n" not in remark


@pytest.mark.parametrize(
    ("gpus", "versions", "message"),
    [
        ((), (), "no NVIDIA GPU is here"),
        ((H100, RTX), (OURS,), r"compute capability 9\.0, found 8\.9 \(an RTX 4090\)"),
        ((H200,), (OURS,), r"anatomynet_plan holds a TensorRT plan built on NVIDIA H100 80GB HBM3, found NVIDIA H200"),
        ((H100, H200), (OURS,), r"built on NVIDIA H100 80GB HBM3, found NVIDIA H200.*: build it on this machine"),
        ((H100,), ((10, 14, 1),), r"plan of TensorRT 10\.13\.0\.35, found 10\.14\.1"),
        ((H100,), ((11, 0, 1), (10, 12, 0)), r"plan of TensorRT 10\.13\.0\.35, found 11\.0\.1 and 10\.12\.0"),
    ],
)
def test_a_plan_for_another_machine(
    plan_repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: tuple[Gpu, ...],
    versions: tuple[tuple[int, int, int], ...],
    message: str,
) -> None:
    machine(monkeypatch, gpus, versions)
    with pytest.raises(ModelError, match=message) as caught:
        check_repository(plan_repository)
    assert "\n" not in str(caught.value)


def test_a_step_that_is_missing(plan_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, (H100,))
    (plan_repository / "anatomynet_finish").rename(plan_repository.parent / "elsewhere")
    with pytest.raises(ModelError, match=r"no model anatomynet_finish .* which anatomynet calls"):
        check_repository(plan_repository)
