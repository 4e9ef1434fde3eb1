"""ModelConfig and TrainConfig: what varies, frozen, read from TOML; the former travels with the weights.

Configurations that ship lie in engine/configs; `load_config("openkbp7")` finds them by name.
"""

import dataclasses
import json
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from anatomynet.engine.errors import ModelError
from anatomynet.engine.structures import structures_by_name

SHIPPED_NAME = "openkbp7"

Vector = tuple[float, float, float]
Config = TypeVar("Config")


@dataclass(frozen=True)
class ModelConfig:
    """What a network draws, and on what it was trained.

    Attributes:
        name: of the configuration.
        structures: names from engine.structures; label i is structures[i - 1].
        in_plane_stride: 1 is the paper's native resolution; n averages the CT n x n in plane at the graph's entrance.
        smallest_spacing, largest_spacing: mm (x, y, z), 5th and 95th percentile of the training cases; a study
            outside is resampled to the nearer end.
        hu_window: Hounsfield units mapped to -1..1, clipped outside.
        checkpoint_sha256: of the safetensors file, empty before it is written; never stored inside that file.
    """

    name: str
    structures: tuple[str, ...]
    in_plane_stride: int
    smallest_spacing: Vector
    largest_spacing: Vector
    hu_window: tuple[float, float]
    checkpoint_sha256: str = ""

    def __post_init__(self) -> None:
        structures_by_name(self.structures)
        if not self.structures or len(set(self.structures)) != len(self.structures):
            raise ModelError(f"structures of {self.name}: expected one or more, each once, found {self.structures}")
        if self.in_plane_stride not in (1, 2, 4):
            raise ModelError(f"in_plane_stride of {self.name}: expected 1, 2 or 4, found {self.in_plane_stride}")
        if not self.hu_window[0] < self.hu_window[1]:
            raise ModelError(f"hu_window of {self.name}: expected low < high, found {self.hu_window}")
        if any(not 0 < low <= high for low, high in zip(self.smallest_spacing, self.largest_spacing, strict=True)):
            raise ModelError(
                f"spacing of {self.name}: expected 0 < smallest <= largest, "
                f"found {self.smallest_spacing} and {self.largest_spacing}"
            )

    @property
    def classes(self) -> int:
        """Background and structures."""
        return len(self.structures) + 1

    def to_json(self) -> str:
        """One line of JSON; `model_config_from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


@dataclass(frozen=True)
class TrainConfig:
    """How a network learns. The defaults are the paper's, or say why not.

    Attributes:
        steps: optimiser steps in all; the learning rate falls over them.
        steps_per_epoch: validation and a saved state after so many.
        learning_rate: at its highest, after `warmup_steps`.
        focal_weight: lambda of L_Dice + lambda L_focal (section 2.3).
        focal_gamma: gamma of the focal loss (section 2.3).
        class_weights: of the loss, background first, one a class; empty for all ones.
        missing: "mask" drops the terms of what is not annotated, the background with it (section 2.4); "marginal"
            counts what is not annotated as background, so that the background still teaches.
        precision: "bfloat16" computes convolutions in it; twice as fast on GPUs and on CPUs with AVX512-BF16.
        crop: voxels (z, y, x) of a training crop at the network's resolution; the whole body box where smaller.
        whole_share: share of steps that see the whole body box instead of a crop.
        phantom_share: share of steps on synthetic phantoms.
        ema_decay: of the averaged weights that are validated and shipped; 0 ships the last.
        seed: of every random choice.
    """

    steps: int = 2000
    steps_per_epoch: int = 100
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 1e-4
    focal_weight: float = 0.5
    focal_gamma: float = 2.0
    class_weights: tuple[float, ...] = ()
    missing: str = "marginal"
    precision: str = "float32"
    crop: tuple[int, int, int] = (56, 80, 96)
    whole_share: float = 0.1
    phantom_share: float = 0.05
    ema_decay: float = 0.99
    seed: int = 1808

    def __post_init__(self) -> None:
        if self.missing not in ("mask", "marginal"):
            raise ModelError(f"missing: expected 'mask' or 'marginal', found {self.missing!r}")
        if min(self.steps, self.steps_per_epoch) < 1:
            raise ModelError(f"steps: expected 1 or more, found {self.steps} and {self.steps_per_epoch} per epoch")
        if min(self.crop) < 8:
            raise ModelError(f"crop: expected at least 8 voxels a side, found {self.crop}")


def shipped_weights(suffix: str) -> Path:
    """The shipped file engine/weights/openkbp7 + suffix, `.safetensors` or `.onnx`."""
    return Path(str(resources.files("anatomynet.engine") / "weights" / f"{SHIPPED_NAME}{suffix}"))


def load_config(source: str | Path) -> tuple[ModelConfig, TrainConfig]:
    """The tables [model] and [train] of a TOML file, or of a shipped configuration by its name.

    Raises:
        ModelError: a file that is not there or not TOML, an unknown key, a value out of range.
    """
    shipped = resources.files("anatomynet.engine") / "configs" / f"{source}.toml"
    path = shipped if shipped.is_file() else Path(source)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        names = sorted(
            p.name.removesuffix(".toml") for p in (resources.files("anatomynet.engine") / "configs").iterdir()
        )
        raise ModelError(f"no configuration {source}: expected a TOML file or one of {', '.join(names)}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{source} is not TOML: {error}") from error
    return _config_from_table(ModelConfig, tables.get("model", {}), source), _config_from_table(
        TrainConfig, tables.get("train", {}), source
    )


def model_config_from_json(text: str) -> ModelConfig:
    """What ModelConfig.to_json wrote.

    Raises:
        ModelError: text that is not such JSON.
    """
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(f"the model's configuration is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ModelError(f"the model's configuration: expected a JSON object, found {type(table).__name__}")
    return _config_from_table(ModelConfig, table, "the model's configuration")


def _config_from_table(cls: type[Config], table: dict[str, Any], source: object) -> Config:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise ModelError(f"{source}: {error}") from error
