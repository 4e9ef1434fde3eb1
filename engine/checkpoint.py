"""Weights (safetensors) and their configuration, together in one file. Never a pickle: pickles run code."""

import dataclasses
import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from anatomynet.engine.config import ModelConfig, model_config_from_json, shipped_weights
from anatomynet.engine.contract import CONFIG_KEY, REGION_CONFIG_KEY
from anatomynet.engine.errors import ModelError
from anatomynet.engine.network import AnatomyNet
from anatomynet.engine.output import write_whole
from anatomynet.engine.region import RegionConfig, region_config_from_json
from anatomynet.engine.region_network import RegionNetwork
from anatomynet.engine.region_runtime import shipped_region


def save_checkpoint(path: Path, network: nn.Module, config: ModelConfig) -> None:
    """Writes weights and configuration, whole or not at all.

    Raises:
        OutputError: it could not be written.
    """
    _write(path, network, CONFIG_KEY, dataclasses.replace(config, checkpoint_sha256="").to_json())


def load_checkpoint(path: Path | None = None) -> tuple[AnatomyNet, ModelConfig]:
    """The network, in eval mode, and its configuration with the file's own sha256; None is the shipped checkpoint.

    Raises:
        ModelError: no such file, one that cannot be read, not safetensors, no configuration inside, or weights that do
            not fit it or are no numbers.
    """
    path = path or shipped_weights(".safetensors")
    tensors, text, sha256 = _read(path, CONFIG_KEY, "anatomynet-train")
    config = model_config_from_json(text)
    network = AnatomyNet(config.classes)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ModelError(f"the weights of {path} do not fit a network of {config.classes} classes") from error
    return network.eval(), dataclasses.replace(config, checkpoint_sha256=sha256)


def save_region_checkpoint(path: Path, network: RegionNetwork, config: RegionConfig) -> None:
    """As `save_checkpoint`, of a region finder.

    Raises:
        OutputError: it could not be written.
    """
    _write(path, network, REGION_CONFIG_KEY, dataclasses.replace(config, checkpoint_sha256="").to_json())


def load_region_checkpoint(path: Path | None = None) -> tuple[RegionNetwork, RegionConfig]:
    """As `load_checkpoint`, of a region finder; None is the shipped one.

    Raises:
        ModelError: no such file, one that cannot be read, not safetensors, no configuration inside, or weights that do
            not fit it or are no numbers.
    """
    path = path or shipped_region(".safetensors")
    tensors, text, sha256 = _read(path, REGION_CONFIG_KEY, "anatomynet.engine.train_region")
    network = RegionNetwork()
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ModelError(f"the weights of {path} do not fit a region finder") from error
    return network.eval(), dataclasses.replace(region_config_from_json(text), checkpoint_sha256=sha256)


def _write(path: Path, network: nn.Module, key: str, config: str) -> None:
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in network.state_dict().items()}
    write_whole(path, save(tensors, metadata={key: config}), overwrite=True)


def _read(path: Path, key: str, writer: str) -> tuple[dict[str, Tensor], str, str]:
    """The weights, the configuration as JSON, and the file's sha256."""
    try:
        if not path.is_file():
            raise ModelError(f"no checkpoint {path}: expected a .safetensors file that {writer} wrote")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()  # first: safe_open calls all that is not read absent
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except OSError as error:
        raise ModelError(f"{path} could not be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ModelError(
            f"{path} is not safetensors ({error}): expected a file that {writer} wrote; "
            "a pickled .pt or .pth is never read, since it can run code"
        ) from error
    if key not in metadata:
        raise ModelError(f"{path} carries no {key}: expected a checkpoint that {writer} wrote")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{name} of {path} holds weights that are not finite numbers: train it again")
    return tensors, metadata[key], sha256
