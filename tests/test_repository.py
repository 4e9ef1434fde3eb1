"""export/repository.py: what config.pbtxt says, read by Triton's own protobuf, and how a repository is replaced."""

import stat
from pathlib import Path

import pytest
from google.protobuf import text_format

from anatomynet import __version__
from anatomynet.engine.config import ModelConfig, load_config, model_config_from_json
from anatomynet.engine.errors import ExportError
from anatomynet.export.repository import config_text, write_repository

model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")

VOLUME = [-1, -1, -1]


@pytest.fixture
def config() -> ModelConfig:
    return load_config("openkbp7")[0]


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    file = tmp_path / "anatomynet.onnx"
    file.write_bytes(b"the network")
    return file


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["openkbp7", "oar9"])
def test_config_pbtxt_says_the_contract(name: str) -> None:
    config, _ = load_config(name)
    parsed = text_format.Parse(config_text(config), model_config_pb2.ModelConfig())
    assert (parsed.name, parsed.backend, parsed.max_batch_size) == ("anatomynet", "python", 0)
    tensors = [(t.name, model_config_pb2.DataType.Name(t.data_type), list(t.dims)) for t in parsed.input]
    assert tensors == [("CT", "TYPE_INT16", VOLUME)]
    tensors = [(t.name, model_config_pb2.DataType.Name(t.data_type), list(t.dims)) for t in parsed.output]
    assert tensors == [
        ("LABEL_MAP", "TYPE_UINT8", VOLUME),
        ("CONFIDENCE", "TYPE_FP32", [len(config.structures)]),
    ]


@pytest.mark.parametrize("name", ["openkbp7", "oar9"])
def test_config_pbtxt_carries_the_model_config(name: str) -> None:
    config, _ = load_config(name)
    parsed = text_format.Parse(config_text(config), model_config_pb2.ModelConfig())
    parameters = {key: value.string_value for key, value in parsed.parameters.items()}
    assert model_config_from_json(parameters["model_config"]) == config
    assert parameters["structures"].split(",") == list(config.structures)
    assert parameters["in_plane_stride"] == str(config.in_plane_stride)
    assert [float(mm) for mm in parameters["smallest_spacing_mm_xyz"].split()] == list(config.smallest_spacing)
    assert parameters["anatomynet_version"] == __version__


def test_config_pbtxt_bounds_the_queue_and_warms_up(config: ModelConfig) -> None:
    parsed = text_format.Parse(config_text(config), model_config_pb2.ModelConfig())
    policy = parsed.dynamic_batching.default_queue_policy
    assert policy.max_queue_size > 0
    assert policy.default_timeout_microseconds > 0
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    assert [list(w.inputs["CT"].dims) for w in parsed.model_warmup] == [[64, 256, 256]]


def test_native_resolution_has_a_lower_size_limit(config: ModelConfig) -> None:
    def limit(of: ModelConfig) -> int:
        parsed = text_format.Parse(config_text(of), model_config_pb2.ModelConfig())
        return int(parsed.parameters["largest_voxels"].string_value)

    assert limit(load_config("oar9")[0]) * 15 <= 2**31 < limit(config) * 15


def test_what_lands_in_the_repository(tmp_path: Path, config: ModelConfig, onnx_file: Path) -> None:
    plan = tmp_path / "anatomynet_sm90.plan"
    plan.write_bytes(b"an engine")
    write_repository(tmp_path / "repo", config=config, onnx_files=[onnx_file], plan_files=[plan])
    assert files_in(tmp_path / "repo") == {
        "anatomynet/config.pbtxt",
        "anatomynet/1/model.py",
        "anatomynet/1/anatomynet.onnx",
        "anatomynet/1/anatomynet_sm90.plan",
    }
    assert (tmp_path / "repo/anatomynet/1/anatomynet.onnx").read_bytes() == b"the network"


def test_others_may_read_it(tmp_path: Path, config: ModelConfig, onnx_file: Path) -> None:
    """A server runs as another user than the one who exports."""
    write_repository(tmp_path / "repo", config=config, onnx_files=[onnx_file])
    expected = stat.S_IMODE(onnx_file.parent.joinpath("repo").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "repo/anatomynet").stat().st_mode) == expected


def test_a_new_model_replaces_the_whole_old_one(tmp_path: Path, config: ModelConfig, onnx_file: Path) -> None:
    repository = tmp_path / "repo"
    write_repository(repository, config=config, onnx_files=[onnx_file])
    (repository / "README.md").write_text("stays")
    newer = onnx_file.rename(tmp_path / "newer.onnx")
    write_repository(repository, config=config, onnx_files=[newer])
    assert files_in(repository) == {
        "README.md",
        "anatomynet/config.pbtxt",
        "anatomynet/1/model.py",
        "anatomynet/1/newer.onnx",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["newer.onnx", "repo"]


def test_a_failed_export_leaves_the_old_model(tmp_path: Path, config: ModelConfig, onnx_file: Path) -> None:
    repository = tmp_path / "repo"
    write_repository(repository, config=config, onnx_files=[onnx_file])
    before = files_in(repository)
    with pytest.raises(ExportError, match=r"could not write .*missing\.onnx"):
        write_repository(repository, config=config, onnx_files=[onnx_file, tmp_path / "missing.onnx"])
    assert files_in(repository) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anatomynet.onnx", "repo"]


def test_the_old_model_comes_back_where_the_swap_fails(
    tmp_path: Path, config: ModelConfig, onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repo"
    write_repository(repository, config=config, onnx_files=[onnx_file])
    rename, renames = Path.rename, []

    def failing_second(self: Path, target: Path) -> Path:
        renames.append(target)
        if len(renames) == 2:
            raise OSError(28, "No space left on device", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing_second)
    with pytest.raises(ExportError, match="No space left"):
        write_repository(repository, config=config, onnx_files=[onnx_file])
    assert "anatomynet/1/anatomynet.onnx" in files_in(repository)


def test_a_file_in_the_way(tmp_path: Path, config: ModelConfig, onnx_file: Path) -> None:
    (tmp_path / "repo").write_text("not a folder")
    with pytest.raises(ExportError, match="could not write"):
        write_repository(tmp_path / "repo", config=config, onnx_files=[onnx_file])


def test_no_onnx_file(tmp_path: Path, config: ModelConfig) -> None:
    with pytest.raises(ExportError, match="at least one"):
        write_repository(tmp_path / "repo", config=config, onnx_files=[])


def test_two_files_of_one_name(tmp_path: Path, config: ModelConfig, onnx_file: Path) -> None:
    with pytest.raises(ExportError, match="two files of one name"):
        write_repository(tmp_path / "repo", config=config, onnx_files=[onnx_file, onnx_file])
