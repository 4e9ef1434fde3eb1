"""export/repository.py: what lands on disk, and how a repository is replaced."""

import dataclasses
import itertools
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from anatomynet.engine.config import ModelConfig, load_config
from anatomynet.engine.errors import ExportError
from anatomynet.export.manifest import read_manifest
from anatomynet.export.repository import write_repository
from anatomynet.export.triton_models import PlanFile, TritonModel, python_model, tensorrt_models
from tests.full_disk import largest_file

MODEL_FILES = {
    "anatomynet/config.pbtxt",
    "anatomynet/manifest.json",
    "anatomynet/1/model.py",
    "anatomynet/1/anatomynet.onnx",
}


@pytest.fixture
def config() -> ModelConfig:
    return load_config("openkbp7")[0]


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    file = tmp_path / "anatomynet.onnx"
    file.write_bytes(b"the network")
    return file


@pytest.fixture
def model(config: ModelConfig, onnx_file: Path) -> TritonModel:
    return python_model(config, [onnx_file])


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_lands_in_the_repository(tmp_path: Path, model: TritonModel) -> None:
    write_repository(tmp_path / "repo", [model])
    assert files_in(tmp_path / "repo") == MODEL_FILES
    assert (tmp_path / "repo/anatomynet/1/anatomynet.onnx").read_bytes() == b"the network"
    manifest = read_manifest(tmp_path / "repo/anatomynet")
    assert {f"anatomynet/{name}" for name in manifest["sha256"]} == MODEL_FILES - {"anatomynet/manifest.json"}
    assert manifest["plan"] is None


def test_others_may_read_it(tmp_path: Path, model: TritonModel) -> None:
    """A server runs as another user than the one who exports."""
    write_repository(tmp_path / "repo", [model])
    expected = stat.S_IMODE((tmp_path / "repo").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "repo/anatomynet").stat().st_mode) == expected


def test_a_new_model_replaces_the_whole_old_one(tmp_path: Path, config: ModelConfig, onnx_file: Path) -> None:
    repository = tmp_path / "repo"
    write_repository(repository, [python_model(config, [onnx_file])])
    (repository / "README.md").write_text("stays")
    newer = onnx_file.rename(tmp_path / "newer.onnx")
    write_repository(repository, [python_model(config, [newer])])
    assert files_in(repository) == MODEL_FILES - {"anatomynet/1/anatomynet.onnx"} | {
        "README.md",
        "anatomynet/1/newer.onnx",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["newer.onnx", "repo"]


def test_a_new_variant_replaces_all_parts_of_the_old_one(
    tmp_path: Path, config: ModelConfig, onnx_file: Path, model: TritonModel
) -> None:
    """One model that cannot be loaded keeps a server from starting: nothing of the old variant may stay."""
    repository = tmp_path / "repo"
    plan = PlanFile(onnx_file, "10.13.0.35", "9.0", "NVIDIA H100 80GB HBM3", (1022, 512, 512))
    write_repository(repository, tensorrt_models(config, prepare=onnx_file, plan=plan, finish=onnx_file))
    folders = {path.name for path in repository.iterdir()}
    assert folders == {"anatomynet", "anatomynet_prepare", "anatomynet_plan", "anatomynet_finish"}
    assert set(read_manifest(repository / "anatomynet")["needs"]) == folders - {"anatomynet"}
    assert read_manifest(repository / "anatomynet_plan")["plan"] == plan.requirements
    write_repository(repository, [model])
    assert files_in(repository) == MODEL_FILES


def test_a_failed_export_leaves_the_old_model(tmp_path: Path, model: TritonModel) -> None:
    repository = tmp_path / "repo"
    write_repository(repository, [model])
    before = files_in(repository)
    broken = dataclasses.replace(model, files={"missing.onnx": tmp_path / "missing.onnx"})
    with pytest.raises(ExportError, match=r"could not write .*missing\.onnx"):
        write_repository(repository, [broken])
    assert files_in(repository) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anatomynet.onnx", "repo"]


def test_a_full_disk_is_told_of_where_it_is(tmp_path: Path, config: ModelConfig, onnx_file: Path) -> None:
    onnx_file.write_bytes(bytes(10**6))
    with largest_file(100_000), pytest.raises(ExportError, match=r": File too large: ") as caught:
        write_repository(tmp_path / "repo", [python_model(config, [onnx_file])])
    culprit = str(caught.value).rpartition(": ")[2]
    assert culprit.startswith(f"{tmp_path}/.anatomynet-")
    assert str(onnx_file) not in str(caught.value)


@pytest.mark.parametrize("renamed", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("ends", "told"),
    [(OSError(28, "No space left on device", "a model"), ExportError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["by the disk", "by Ctrl-C"],
)
def test_the_old_models_come_back_where_the_swap_ends(
    tmp_path: Path,
    config: ModelConfig,
    onnx_file: Path,
    model: TritonModel,
    monkeypatch: pytest.MonkeyPatch,
    ends: BaseException,
    told: type[BaseException],
    renamed: bool,
) -> None:
    repository = tmp_path / "repo"
    plan = PlanFile(onnx_file, "10.13.0.35", "9.0", "NVIDIA H100 80GB HBM3", (1022, 512, 512))
    write_repository(repository, tensorrt_models(config, prepare=onnx_file, plan=plan, finish=onnx_file))
    before = files_in(repository)
    rename, renames = Path.rename, []

    def failing_fifth(self: Path, target: Path) -> Path:
        renames.append(target)
        if len(renames) == 5:  # the four old parts are out of the way
            if renamed:
                rename(self, target)
            raise ends
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing_fifth)
    with pytest.raises(told):
        write_repository(repository, [model])
    assert files_in(repository) == before


def test_two_exports_at_once_leave_the_models_of_one(
    tmp_path: Path, config: ModelConfig, onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server would take the region finder of one for that of the other."""
    rename = Path.rename

    def slow_rename(self: Path, target: Path) -> Path:
        time.sleep(0.02)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", slow_rename)
    plan = PlanFile(onnx_file, "10.13.0.35", "9.0", "NVIDIA H100 80GB HBM3", (1022, 512, 512))
    exports = [
        tensorrt_models(config, prepare=onnx_file, plan=plan, finish=onnx_file),
        (python_model(config, [onnx_file]),),
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write_repository, itertools.repeat(tmp_path / "repo"), exports))
    left = {path.name for path in (tmp_path / "repo").iterdir()}
    assert left in [{model.name for model in models} for models in exports]


def test_a_file_in_the_way(tmp_path: Path, model: TritonModel) -> None:
    (tmp_path / "repo").write_text("not a folder")
    with pytest.raises(ExportError, match="could not write"):
        write_repository(tmp_path / "repo", [model])


def test_no_onnx_file(config: ModelConfig) -> None:
    with pytest.raises(ExportError, match="at least one"):
        python_model(config, [])


def test_two_files_of_one_name(config: ModelConfig, onnx_file: Path) -> None:
    with pytest.raises(ExportError, match="two files of one name"):
        python_model(config, [onnx_file, onnx_file])
