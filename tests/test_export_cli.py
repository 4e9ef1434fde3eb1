"""`anatomynet-export` as a user runs it: what it writes, what it says, and what it leaves alone when it fails."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nrrd
import numpy as np
import pytest
from click.testing import CliRunner

from anatomynet.engine.checkpoint import load_checkpoint, save_checkpoint
from anatomynet.engine.config import model_config_from_json
from anatomynet.engine.errors import ExportError
from anatomynet.engine.limits import largest_slices
from anatomynet.engine.runtime import load_runtime
from anatomynet.export.cli import main, move_in_place
from anatomynet.export.forms import parity_volume
from anatomynet.export.manifest import read_manifest
from tests.full_disk import largest_file
from tests.random_network import (
    CALIBRATION_SHAPE,
    changed_network,
    random_config,
    random_graph,
    random_network,
    shift_class,
    smooth_hu,
)

SPACING = (1.0, 1.0, 2.5)  # was trained, so nothing is resampled


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "random.safetensors"
    save_checkpoint(path, random_network(), random_config())
    return path


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A case folder on which the random network finds every structure."""
    folder = tmp_path_factory.mktemp("case")
    (folder / "structures").mkdir()
    hu = smooth_hu(CALIBRATION_SHAPE).clip(-400, None)
    header = {"space": "left-posterior-superior", "space directions": np.diag(SPACING), "space origin": np.zeros(3)}
    nrrd.write(str(folder / "img.nrrd"), hu, header, index_order="C")
    nrrd.write(str(folder / "structures" / "Mandible.nrrd"), (hu > 500).astype(np.uint8), header, index_order="C")
    return folder


@pytest.fixture
def _graph_of_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own export takes long: it is proved once, by the command in a process of its own."""
    monkeypatch.setattr("anatomynet.export.forms.network_model", lambda network: random_graph())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_fills_a_repository_and_says_so(checkpoint: Path, case: Path, tmp_path: Path) -> None:
    output = tmp_path / "triton_repo"
    script = Path(sys.executable).with_name("anatomynet-export")
    run = subprocess.run(
        [script, checkpoint, "--fp16", "--output", output, "--parity-input", case], capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")
    _, config = load_checkpoint(checkpoint)
    assert config.checkpoint_sha256 in run.stdout
    assert len(re.findall(r"[0-9,]+ of [0-9,]+ labels changed", run.stdout)) == 3  # FP32, FP16, and FP16 rounded
    assert f"tritonserver --model-repository {output}" in run.stdout
    version = output / "anatomynet" / "1"
    assert {path.name for path in version.glob("*.onnx")} == {"openkbp7-fp32.onnx", "openkbp7-fp16.onnx"}
    assert all(load_runtime(path).model == config for path in version.glob("*.onnx"))
    assert (version / "openkbp7.safetensors").read_bytes() == checkpoint.read_bytes()
    assert (output / "anatomynet" / "config.pbtxt").is_file()


def test_without_a_case_the_proof_is_on_a_whole_synthetic_patient() -> None:
    hu = parity_volume(random_config(), None)
    assert (hu.shape, hu.dtype.name) == ((178, 512, 512), "int16")
    assert (hu > -200).mean() > 0.1, "a body"


@pytest.mark.usefixtures("_graph_of_the_session")
def test_writes_one_onnx_file(checkpoint: Path, case: Path, tmp_path: Path) -> None:
    """How engine/weights/openkbp7.onnx is made."""
    path = tmp_path / "model.onnx"
    run = CliRunner().invoke(main, [str(checkpoint), "--onnx", str(path), "--parity-input", str(case)])
    assert run.exit_code == 0, run.output
    assert load_runtime(path).model == load_checkpoint(checkpoint)[1]
    assert list(tmp_path.iterdir()) == [path]


def test_failure_leaves_the_repository_as_it_was(case: Path, tmp_path: Path) -> None:
    network = changed_network()
    shift_class(network, 2, -1000)
    checkpoint, output = tmp_path / "blind.safetensors", tmp_path / "triton_repo"
    save_checkpoint(checkpoint, network, random_config())
    (output / "anatomynet" / "1").mkdir(parents=True)
    (output / "anatomynet" / "config.pbtxt").write_text("the one before")
    before = contents(output)
    run = CliRunner().invoke(main, [str(checkpoint), "--output", str(output), "--parity-input", str(case)])
    assert run.exit_code == 1
    assert run.stderr.startswith("error: the checkpoint itself finds no SpinalCord")
    assert run.stderr.count("\n") == 1
    assert contents(output) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.safetensors"], r"error: no checkpoint none\.safetensors"),
        (["{checkpoint}", "--parity-input", "none"], r"error: none.*img\.nrrd"),
    ],
)
def test_missing_input_is_told_in_one_line(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(main, [argument.format(checkpoint=checkpoint) for argument in arguments])
    assert run.exit_code == 1
    assert re.match(message, run.stderr)
    assert run.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "a_file"], "a_file is no folder"),
        (["--output", "a_file/repo"], "a_file is no folder"),
        (["--output", "read_only/deep/repo"], "read_only is read-only here"),
        (["--rtx", "sm89", "--output", "a_file/repo"], "a_file is no folder"),
        (["--onnx", "none/model.onnx"], "its folder does not exist"),
        (["--onnx", "folder"], "is a folder"),
        (["--region", "none.safetensors"], "no checkpoint none.safetensors"),
        (["--onnx", "read_only/model.onnx"], "read_only is read-only here"),
    ],
)
def test_what_would_fail_at_the_end_is_told_before_anything_is_computed(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("anatomynet.export.forms.read_source", lambda *given: pytest.fail("the proof began"))
    (tmp_path / "a_file").write_text("kept")
    for folder in ("folder", "read_only"):
        (tmp_path / folder).mkdir()
    access = os.access  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: "read_only" not in str(path) and access(path, mode))
    run = CliRunner().invoke(main, [str(checkpoint), *arguments])
    assert run.exit_code == 1
    assert message in run.stderr
    assert run.stderr.count("\n") == 1
    assert contents(tmp_path) == {"a_file": b"kept"}


def test_a_repository_beside_which_no_timings_can_lie_is_told_before_anything_is_computed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is a mount of its own; only a plan needs the folder around it."""
    monkeypatch.setattr("anatomynet.export.forms.read_source", lambda *given: pytest.fail("the proof began"))
    output = tmp_path / "mount"
    output.mkdir()
    access = os.access  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    arguments = [str(checkpoint), "--fp16", "--backend", "tensorrt", "--output", str(output)]
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 1
    assert run.stderr == f"error: could not write {output}.plans: {tmp_path} is read-only here; give another folder\n"


@pytest.mark.usefixtures("_graph_of_the_session")
def test_a_full_temporary_folder_is_told_in_one_line(checkpoint: Path, case: Path, tmp_path: Path) -> None:
    with largest_file(1_000_000):
        run = CliRunner().invoke(
            main, [str(checkpoint), "--output", str(tmp_path / "repo"), "--parity-input", str(case)]
        )
    assert run.exit_code == 1
    assert re.match(r"error: .*openkbp7-fp32.* could not be written: File too large", run.stderr)
    assert run.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    run = CliRunner().invoke(main, [])
    assert run.exit_code == 1
    assert run.stderr == "error: export needs onnxscript: pip install 'anatomynet[export]'\n"


@pytest.mark.parametrize(
    "arguments", [["--no-such-option"], ["--backend", "tensorrt"], ["--onnx", "a.onnx", "--rtx", "sm89"]]
)
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(main, arguments).exit_code == 2


@pytest.mark.usefixtures("_graph_of_the_session")
def test_onnxruntime_repository(checkpoint: Path, case: Path, tmp_path: Path) -> None:
    output = tmp_path / "repo"
    run = CliRunner().invoke(
        main, [str(checkpoint), "--backend", "onnxruntime", "--output", str(output), "--parity-input", str(case)]
    )
    assert run.exit_code == 0, run.output
    assert "ONNX Runtime" in run.output
    assert {path.name for path in (output / "anatomynet" / "1").iterdir()} == {"model.onnx"}


@pytest.mark.usefixtures("_graph_of_the_session")
def test_rtx_plan_without_a_gpu(checkpoint: Path, case: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="needs pip install 'anatomynet[tensorrt-rtx]'")
    output = tmp_path / "repo"
    arguments = [str(checkpoint), "--rtx", "sm86,sm89", "--output", str(output), "--parity-input", str(case)]
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 0, run.output
    (folder,) = (tmp_path / "repo.plans").iterdir()
    assert folder.name.endswith("-sm86-sm89")
    assert {path.name for path in folder.iterdir()} == {
        "prepare.onnx",
        f"{folder.name}.plan",
        "finish.onnx",
        "manifest.json",
    }
    plan = read_manifest(folder)["plan"]
    assert f"rtx{plan['tensorrt_rtx_version']}-" in folder.name
    assert (plan["compute_capabilities"], plan["precision"]) == ("8.6 8.9", "fp16")
    config = load_checkpoint(checkpoint)[1]
    assert plan["largest_shape_zyx"] == f"{largest_slices(config)} 512 512"
    assert model_config_from_json(plan["model_config"]) == config
    assert not output.exists()


@pytest.mark.parametrize("names", ["sm90", "sm89,", ""])
def test_unknown_gpu_is_told_before_anything_is_computed(checkpoint: Path, names: str) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="needs pip install 'anatomynet[tensorrt-rtx]'")
    run = CliRunner().invoke(main, [str(checkpoint), "--rtx", names])
    assert run.exit_code == 1
    assert run.stderr.startswith("error: TensorRT-RTX")
    assert "proof on" not in run.stdout


def test_tensorrt_without_a_gpu_is_told_before_anything_is_computed(checkpoint: Path) -> None:
    from anatomynet.export.gpu import visible_gpus

    if visible_gpus():
        pytest.skip("needs a machine without a GPU")
    run = CliRunner().invoke(main, [str(checkpoint), "--fp16", "--backend", "tensorrt"])
    assert run.exit_code == 1
    assert "NVIDIA GPU" in run.stderr
    assert "proof on" not in run.stdout


def test_two_that_move_one_folder_in_place_at_once_both_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "model.plan").write_bytes(b"a plan")
    copy, others = shutil.copyfile, ["the other"]

    def copyfile(source: Path, target: Path) -> Path:
        copied = copy(source, target)
        if others:
            others.clear()
            move_in_place(tmp_path / "plan", tmp_path / "plans")
        return copied

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    assert move_in_place(tmp_path / "plan", tmp_path / "plans") == tmp_path / "plans" / "plan"
    assert contents(tmp_path / "plans") == {"plan/model.plan": b"a plan"}
    assert [path.name for path in (tmp_path / "plans").iterdir()] == ["plan"]


def test_a_full_disk_is_told_of_a_folder_that_is_moved(tmp_path: Path) -> None:
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "model.plan").write_bytes(bytes(10**6))
    with largest_file(10_000), pytest.raises(ExportError) as caught:
        move_in_place(tmp_path / "plan", tmp_path / "plans")
    assert str(caught.value) == f"could not write {tmp_path / 'plans' / 'plan'}: File too large"
    assert not list((tmp_path / "plans").iterdir())


def test_one_architecture_named_twice_is_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[list[str]] = []

    def require(architectures: list[str]) -> None:
        named.append(architectures)
        raise ExportError("none here")

    monkeypatch.setattr("anatomynet.export.forms.require_rtx", require)
    CliRunner().invoke(main, [str(checkpoint), "--rtx", "sm89, SM89,sm86"])
    assert named == [["sm89", "sm86"]]


@pytest.mark.parametrize("precision", [[], ["--fp16"]])
def test_one_onnx_file_needs_no_gpu_whatever_the_backend(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: list[str]
) -> None:
    def begin(*given: object) -> None:
        raise ExportError("begun")

    monkeypatch.setattr("anatomynet.export.forms.read_source", begin)
    target = str(tmp_path / "model.onnx")
    run = CliRunner().invoke(main, [str(checkpoint), "--onnx", target, *precision, "--backend", "tensorrt"])
    assert run.stderr == "error: begun\n"


def test_help_imports_no_torch() -> None:
    command = (
        "import sys; from click.testing import CliRunner; from anatomynet.export.cli import main; "
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0; print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "False"
