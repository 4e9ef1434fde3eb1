"""Weights (safetensors) and ModelConfig, together in one file. Never a pickle: pickles run code."""

import dataclasses
import hashlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from anatomynet.engine.config import ModelConfig, model_config_from_json, shipped_weights
from anatomynet.engine.errors import ModelError
from anatomynet.engine.network import AnatomyNet
from anatomynet.engine.output import write_whole

CONFIG_KEY = "model_config"


def save_checkpoint(path: Path, network: nn.Module, config: ModelConfig) -> None:
    """Writes weights and configuration, whole or not at all.

    Raises:
        OutputError: it could not be written.
    """
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in network.state_dict().items()}
    metadata = {CONFIG_KEY: dataclasses.replace(config, checkpoint_sha256="").to_json()}
    write_whole(path, save(tensors, metadata=metadata), overwrite=True)


def load_checkpoint(path: Path | None = None) -> tuple[AnatomyNet, ModelConfig]:
    """The network, in eval mode, and its configuration with the file's own sha256; None is the shipped checkpoint.

    Raises:
        ModelError: no such file, not safetensors, no configuration inside, or weights that do not fit it.
    """
    path = path or shipped_weights(".safetensors")
    if not path.is_file():
        raise ModelError(f"no checkpoint {path}: expected a .safetensors file that anatomynet-train wrote")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise ModelError(
            f"{path} is not safetensors ({error}): expected a file that anatomynet-train wrote; "
            "a pickled .pt or .pth is never read, since it can run code"
        ) from error
    if CONFIG_KEY not in metadata:
        raise ModelError(f"{path} carries no {CONFIG_KEY}: expected a checkpoint that anatomynet-train wrote")
    config = model_config_from_json(metadata[CONFIG_KEY])
    network = AnatomyNet(config.classes)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ModelError(f"the weights of {path} do not fit a network of {config.classes} classes") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return network.eval(), dataclasses.replace(config, checkpoint_sha256=digest)
