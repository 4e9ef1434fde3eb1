"""ModelConfig and TrainConfig: what varies, frozen, read from TOML; the former travels with the weights.

Configurations that ship lie in engine/configs; `load_config("openkbp7")` finds them by name.
"""

import dataclasses
import json
import math
import os
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from anatomynet.engine.errors import ModelError
from anatomynet.engine.structures import structures_by_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SHIPPED_NAME = "openkbp7"  # whose weights ship too
SHIPPED_CONFIGS = (SHIPPED_NAME, f"{SHIPPED_NAME}-tuning", f"{SHIPPED_NAME}-volumetric", "oar9")
# What a TrainConfig may hold, both ends allowed.
TRAIN_RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, math.inf),
    "steps_per_epoch": (1, math.inf),
    "warmup_steps": (0, math.inf),
    "weight_decay": (0, 1),
    "second_share": (0, 1),
    "focal_weight": (0, 100),
    "focal_gamma": (0, 10),
    "whole_share": (0, 1),
    "region_share": (0, 1),
    "phantom_share": (0, 1),
    "balanced_share": (0, 1),
    "frozen_norm_share": (0, 1),
    "ema_decay": (0, 1),
    "seed": (0, 2**63 - 1),  # what PyTorch takes
}
CROP_SIDES = (8, 1024)  # voxels
NAME = re.compile(r"\w[\w.-]*")  # files are named by it
LONGEST_NAME = 100  # bytes; file systems take 255, and a plan's name ends with what it was built for
CHOICES = {
    "missing": ("mask", "marginal"),
    "precision": ("float32", "bfloat16"),
    "optimiser": ("adamw", "rmsprop-sgd"),
    "augmentation": ("in-plane", "volumetric"),
}

Vector = tuple[float, float, float]
Config = TypeVar("Config", bound="DataclassInstance")


@dataclass(frozen=True)
class ModelConfig:
    """What a network draws, and on what it was trained.

    Attributes:
        name: of the configuration: letters, digits, and _ . - after the first of them; files are named by it; at most
            100 bytes.
        structures: names from engine.structures; label i is structures[i - 1].
        in_plane_stride: 1 is the paper's native resolution; n averages the CT n x n in plane at the graph's entrance.
        smallest_spacing, largest_spacing: mm (x, y, z), 5th and 95th percentile of the training cases; a study
            outside is resampled to the nearer end.
        hu_window: Hounsfield units mapped to -1..1, clipped outside.
        patients: for each structure, how many patients taught it: training cases on disk that had its contours,
            phantoms not counted. Empty where no count was kept, as in checkpoints older than it: then every structure
            counts as taught by patients.
        checkpoint_sha256: of the safetensors file, empty before it is written; never stored inside that file.
    """

    name: str
    structures: tuple[str, ...]
    in_plane_stride: int
    smallest_spacing: Vector
    largest_spacing: Vector
    hu_window: tuple[float, float]
    checkpoint_sha256: str = ""
    patients: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # A checkpoint from elsewhere names the files it is exported to: nothing in it may lead to another folder.
        if not NAME.fullmatch(self.name):
            raise ModelError(
                f"name: expected letters, digits, _ . and -, since files are named by it, found {self.name!r}"
            )
        if (length := len(self.name.encode())) > LONGEST_NAME:
            raise ModelError(
                f"name: expected at most {LONGEST_NAME} bytes, since files are named by it, found one of {length}"
            )
        structures_by_name(self.structures)
        if not self.structures or len(set(self.structures)) != len(self.structures):
            raise ModelError(f"structures of {self.name}: expected one or more, each once, found {self.structures}")
        if self.in_plane_stride not in (1, 2, 4):
            raise ModelError(f"in_plane_stride of {self.name}: expected 1, 2 or 4, found {self.in_plane_stride}")
        if not -math.inf < self.hu_window[0] < self.hu_window[1] < math.inf:
            raise ModelError(f"hu_window of {self.name}: expected low < high, found {self.hu_window}")
        if any(
            not 0 < low <= high < math.inf
            for low, high in zip(self.smallest_spacing, self.largest_spacing, strict=True)
        ):
            raise ModelError(
                f"spacing of {self.name}: expected 0 < smallest <= largest, "
                f"found {self.smallest_spacing} and {self.largest_spacing}"
            )
        if self.patients and (len(self.patients) != len(self.structures) or min(self.patients) < 0):
            raise ModelError(
                f"patients of {self.name}: expected {len(self.structures)} numbers of 0 or more, one a structure, or "
                f"none, found {self.patients}"
            )

    @property
    def classes(self) -> int:
        """Background and structures."""
        return len(self.structures) + 1

    @property
    def unvalidated(self) -> tuple[str, ...]:
        """Structures that no patient taught; phantoms may have."""
        return tuple(name for name, count in zip(self.structures, self.patients, strict=False) if count == 0)

    def to_json(self) -> str:
        """One line of JSON; `model_config_from_json` reads it back."""
        table = dataclasses.asdict(self)
        if not self.patients:  # what was written before there was a count stays as it was, byte for byte
            del table["patients"]
        return json.dumps(table, sort_keys=True)


@dataclass(frozen=True)
class TrainConfig:
    """How a network learns. The defaults are the paper's, or say why not.

    Attributes:
        steps: optimiser steps in all; the learning rate falls over them.
        steps_per_epoch: validation and a saved state after so many.
        optimiser: "adamw" warms up, then lets its rate fall as half a cosine; "rmsprop-sgd" is the paper's two stages,
            RMSprop at `learning_rate`, then SGD with momentum 0.9 at `second_rate`, neither of which falls.
        learning_rate: at its highest, after `warmup_steps`.
        second_rate: of the second stage.
        second_share: share of the steps, at the end, that are the second stage.
        focal_weight: lambda of L_Dice + lambda L_focal (section 2.3).
        focal_gamma: gamma of the focal loss (section 2.3).
        class_weights: of the loss, background first, one a class; empty for all ones.
        missing: "mask" drops the terms of what is not annotated, the background with it (section 2.4); "marginal"
            counts what is not annotated as background, so that the background still teaches.
        precision: "bfloat16" computes convolutions in it, twice as fast on GPUs and on CPUs with AVX512-BF16; "float32"
            where a CPU has no AVX-512.
        augmentation: "in-plane" is the paper's affine and elastic, the same on every slice (section 3.1); "volumetric"
            also stretches and tilts along the slices, and changes sharpness and grey values.
        crop: voxels (z, y, x) of a training crop at the network's resolution, in plane with air around a smaller case.
        whole_share: share of steps that see the whole body box instead of a crop.
        region_share: share of steps that see a crop as large as the region finder's boxes, and where such a box would
            lie: squeeze-and-excitation averages over what it sees, and serving shows it such boxes.
        region_crop: voxels (z, y, x) of such a crop, as `crop`; the default is about the median of the finder's
            boxes at openkbp7's stride 4.
        phantom_share: share of steps on synthetic phantoms.
        balanced_share: share of the other steps that choose a structure first, as likely as its class weight, then a
            case that has it.
        frozen_norm_share: share of the steps, at the end, in which batch normalisation keeps its statistics.
        ema_decay: of the averaged weights that are validated and shipped; 0 ships the last.
        seed: of every random choice.
    """

    steps: int = 2000
    steps_per_epoch: int = 100
    optimiser: str = "adamw"
    learning_rate: float = 1e-3
    second_rate: float = 1e-3  # the paper's
    second_share: float = 0.25  # 50 of the paper's 200 epochs
    warmup_steps: int = 50
    weight_decay: float = 1e-4
    focal_weight: float = 0.5
    focal_gamma: float = 2.0
    class_weights: tuple[float, ...] = ()
    missing: str = "marginal"
    precision: str = "float32"
    augmentation: str = "in-plane"
    crop: tuple[int, int, int] = (56, 80, 96)
    whole_share: float = 0.1
    region_share: float = 0.0
    region_crop: tuple[int, int, int] = (96, 48, 48)
    phantom_share: float = 0.05
    balanced_share: float = 0.0
    frozen_norm_share: float = 0.5
    ema_decay: float = 0.99
    seed: int = 1808

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ModelError(f"{name}: expected one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        for name, (low, high) in TRAIN_RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ModelError(f"{name}: expected {low:g} to {high:g}, found {getattr(self, name)}")
        if 0 < self.focal_gamma < 1:  # where an answer is certain, (1 - p) ** gamma has no gradient
            raise ModelError(f"focal_gamma: expected 0, or 1 to 10, found {self.focal_gamma}")
        rates = (self.learning_rate, self.second_rate)
        if not all(0 < rate < math.inf for rate in rates) or self.ema_decay == 1:
            raise ModelError(
                f"expected learning_rate and second_rate above 0 and ema_decay below 1, found {rates[0]}, {rates[1]} "
                f"and {self.ema_decay}"
            )
        if self.whole_share + self.region_share > 1:
            raise ModelError(
                f"expected whole_share and region_share of 1 at most together, found {self.whole_share} and "
                f"{self.region_share}"
            )
        for name in ("crop", "region_crop"):
            sides, (smallest, largest) = getattr(self, name), CROP_SIDES
            if min(sides) < smallest or max(sides) > largest:
                raise ModelError(
                    f"{name}: expected at least {smallest} and at most {largest} voxels a side, found {sides}"
                )
        if any(not 0 <= weight < math.inf for weight in self.class_weights):
            raise ModelError(f"class_weights: expected 0 or more each, found {self.class_weights}")
        if self.class_weights and not any(self.class_weights[1:]):
            raise ModelError(f"class_weights: expected one of a structure above 0, found {self.class_weights}")


def shipped_weights(suffix: str) -> Path:
    """The shipped file engine/weights/openkbp7 + suffix, `.safetensors` or `.onnx`."""
    return Path(str(resources.files("anatomynet.engine") / "weights" / f"{SHIPPED_NAME}{suffix}"))


def load_config(source: str | Path) -> tuple[ModelConfig, TrainConfig]:
    """The tables [model] and [train] of a TOML file, or of a shipped configuration by its name.

    A file may say `base = "openkbp7"`, or another file's path, from its own folder: what it does not set itself is as
    there.

    Raises:
        ModelError: a file that is not there or not TOML, an unknown key, a value out of range.
    """
    tables = _tables_of(source)
    model = config_from_table(ModelConfig, tables["model"], source)
    train = config_from_table(TrainConfig, tables["train"], source)
    if train.class_weights and len(train.class_weights) != model.classes:
        raise ModelError(
            f"class_weights of {source}: expected {model.classes}, background first, found {len(train.class_weights)}"
        )
    return model, train


def _tables_of(source: str | Path, *, bases: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """[model] and [train] of a file, laid over those of its base; `bases` are the files that led here."""
    shipped = resources.files("anatomynet.engine") / "configs" / f"{source}.toml"
    path = shipped if source in SHIPPED_CONFIGS else Path(source)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"no configuration {source}: expected a TOML file or one of {', '.join(SHIPPED_CONFIGS)}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{source} is not TOML: {error}") from error
    unknown = sorted(set(tables) - {"base", "model", "train"})
    if unknown:
        raise ModelError(f"{source}: unknown table {', '.join(unknown)}: expected [model] and [train]")
    base = tables.get("base")
    if isinstance(base, str) and base not in SHIPPED_CONFIGS:
        base = os.path.normpath(Path(source).parent / base)
    if base is not None and (not isinstance(base, str) or base in bases):
        raise ModelError(f"base of {source}: expected another configuration that does not lead back, found {base!r}")
    under = _tables_of(base, bases=(*bases, base)) if base else {"model": {}, "train": {}}
    return {name: {**under[name], **_table(tables, name, source)} for name in ("model", "train")}


def _table(tables: dict[str, Any], name: str, source: object) -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise ModelError(f"{source}: expected a table of keys [{name}], found {type(table).__name__}")
    return table


def model_config_from_json(text: str) -> ModelConfig:
    """What ModelConfig.to_json wrote.

    Raises:
        ModelError: text that is not such JSON.
    """
    return config_from_json(ModelConfig, text, "the model's configuration")


def config_from_json(cls: type[Config], text: str, source: object) -> Config:
    """JSON as the dataclass whose fields are its keys.

    Raises:
        ModelError: text that is not JSON, or a table that `config_from_table` refuses; `source` names it.
    """
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(f"{source} is not JSON: {error}") from error
    return config_from_table(cls, table, source)


def config_from_table(cls: type[Config], table: object, source: object) -> Config:
    """A table of TOML or JSON as the dataclass whose fields are its keys.

    Raises:
        ModelError: no table, an unknown or missing key, a value of another type or out of range; `source` names it.
    """
    if not isinstance(table, dict):
        raise ModelError(f"{source}: expected a table of keys, found {type(table).__name__}")
    kinds = get_type_hints(cls)
    unknown = sorted(set(table) - set(kinds))
    if unknown:
        raise ModelError(f"{source}: unknown key {', '.join(unknown)}: expected keys from {', '.join(kinds)}")
    missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in table]
    if missing:
        raise ModelError(f"{source}: missing {', '.join(missing)}")
    values = {key: _value_of_kind(value, kinds[key], f"{key} of {source}") for key, value in table.items()}
    return cls(**values)


def _value_of_kind(value: object, kind: Any, place: str) -> Any:
    """A value of TOML or JSON as the type that a dataclass names: an int will do for a float, a list for a tuple."""
    if get_origin(kind) is tuple and isinstance(value, list):
        kinds = get_args(kind)
        kinds = (kinds[0],) * len(value) if kinds[-1] is ... else kinds
        if len(kinds) == len(value):
            return tuple(_value_of_kind(v, k, place) for v, k in zip(value, kinds, strict=True))
    elif kind is float and type(value) is int:
        return float(value)
    elif get_origin(kind) is None and type(value) is kind:
        return value
    raise ModelError(f"{place}: expected {kind.__name__ if get_origin(kind) is None else kind}, found {value!r}")
