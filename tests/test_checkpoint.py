"""Weights and configuration travel together, and nothing else is ever read."""

import errno
import hashlib
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from anatomynet.engine.checkpoint import load_checkpoint, load_region_checkpoint, save_checkpoint
from anatomynet.engine.config import ModelConfig, model_config_from_json
from anatomynet.engine.contract import CONFIG_KEY
from anatomynet.engine.errors import ModelError, OutputError
from anatomynet.engine.network import AnatomyNet
from tests.full_disk import largest_file

CONFIG = ModelConfig("test", ("BrainStem", "Parotid_L"), 1, (1.0, 1.0, 2.0), (2.0, 2.0, 3.0), (-250.0, 550.0))


@pytest.fixture
def network() -> AnatomyNet:
    torch.manual_seed(0)
    network = AnatomyNet(CONFIG.classes)
    network(torch.randn(1, 1, 8, 8, 8))  # moves the batch norms' means
    return network


@pytest.fixture
def checkpoint(network: AnatomyNet, tmp_path: Path) -> Path:
    path = tmp_path / "test.safetensors"
    save_checkpoint(path, network, CONFIG)
    return path


def test_every_bit_comes_back(network: AnatomyNet, checkpoint: Path) -> None:
    loaded, config = load_checkpoint(checkpoint)
    assert not loaded.training
    for (name, saved), (loaded_name, tensor) in zip(
        network.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == loaded_name
        assert torch.equal(saved, tensor)
    assert config.structures == CONFIG.structures


def test_the_layout_in_memory_does_not_matter(network: AnatomyNet, checkpoint: Path) -> None:
    again = checkpoint.with_name("again.safetensors")
    save_checkpoint(again, network.to(memory_format=torch.channels_last_3d), CONFIG)  # type: ignore[call-overload]
    assert again.read_bytes() == checkpoint.read_bytes()


def test_the_configuration_knows_the_files_hash(network: AnatomyNet, checkpoint: Path) -> None:
    _, config = load_checkpoint(checkpoint)
    assert config.checkpoint_sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    # The hash is not part of what is hashed: saved again, the file is the same.
    again = checkpoint.with_name("again.safetensors")
    save_checkpoint(again, network, config)
    assert again.read_bytes() == checkpoint.read_bytes()


def test_nothing_is_left_beside(checkpoint: Path) -> None:
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_failed_write_leaves_the_last_checkpoint(network: AnatomyNet, checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    with largest_file(1024), pytest.raises(OutputError, match=r"test\.safetensors could not be written"):
        save_checkpoint(checkpoint, network, CONFIG)
    assert checkpoint.read_bytes() == before


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "exploded",)

    for name, data in (("bomb.safetensors", pickle.dumps(Bomb())), ("bomb.pt", b"")):
        path = tmp_path / name
        path.write_bytes(data)
        if not data:
            torch.save({"bomb": Bomb()}, path)
        with pytest.raises(ModelError, match="not safetensors"):
            load_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(checkpoint: Path, kept: float) -> None:
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(kept * len(data)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(ModelError, match="not safetensors"):
        load_checkpoint(checkpoint)


def test_weights_of_another_size_are_refused(checkpoint: Path) -> None:
    save_checkpoint(checkpoint, AnatomyNet(8), CONFIG)
    with pytest.raises(ModelError, match="do not fit a network of 3 classes"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(network: AnatomyNet, checkpoint: Path, value: float) -> None:
    weights = dict(network.named_parameters())
    name = list(weights)[3]
    with torch.no_grad():
        weights[name].view(-1)[-1] = value
    save_checkpoint(checkpoint, network, CONFIG)
    with pytest.raises(ModelError, match=f"{name} .*not finite numbers.*train it again") as caught:
        load_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_configuration_is_refused(network: AnatomyNet, tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    save_file(network.state_dict(), path)
    with pytest.raises(ModelError, match="carries no model_config"):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["", "{}", "not JSON"])
def test_a_damaged_configuration_is_refused(network: AnatomyNet, tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.safetensors"
    save_file(network.state_dict(), path, metadata={CONFIG_KEY: text})
    with pytest.raises(ModelError):
        load_checkpoint(path)


def test_an_absent_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(ModelError, match="no checkpoint"):
            load_checkpoint(path)


def test_a_file_that_may_not_be_read_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)  # not by its mode: root may read everything
    with pytest.raises(ModelError, match=r"test\.safetensors could not be read: Permission denied$"):
        load_checkpoint(checkpoint)


def test_a_name_that_no_file_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="could not be read: File name too long"):
        load_region_checkpoint(tmp_path / f"{'x' * 300}.safetensors")


def test_metadata_is_all_that_is_not_weights(checkpoint: Path) -> None:
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
    assert set(metadata) == {CONFIG_KEY}
    assert model_config_from_json(metadata[CONFIG_KEY]) == CONFIG  # its hash empty
