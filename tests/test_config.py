"""A configuration is checked at the border, and travels unchanged."""

import dataclasses
import json
from pathlib import Path

import pytest

from anatomynet.engine.config import ModelConfig, TrainConfig, load_config, model_config_from_json
from anatomynet.engine.errors import ModelError

MODEL_TABLE = """
[model]
name = "small"
structures = ["BrainStem", "Parotid_L", "Parotid_R"]
in_plane_stride = 1
smallest_spacing = [1, 1, 2]
largest_spacing = [2.0, 2.0, 3.0]
hu_window = [-250, 550]
"""
SMALL = ModelConfig(
    "small", ("BrainStem", "Parotid_L", "Parotid_R"), 1, (1.0, 1.0, 2.0), (2.0, 2.0, 3.0), (-250.0, 550.0)
)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "small.toml"


@pytest.mark.parametrize(
    ("name", "classes", "stride"),
    [("oar9", 10, 1), ("openkbp7", 8, 4), ("openkbp7-tuning", 8, 4), ("openkbp7-volumetric", 8, 4)],
)
def test_shipped_configurations_load(name: str, classes: int, stride: int) -> None:
    model, train = load_config(name)
    assert (model.name, model.classes, model.in_plane_stride) == (name.split("-")[0], classes, stride)
    assert isinstance(train, TrainConfig)


def test_the_papers_nine_organs_learn_by_the_papers_recipe() -> None:
    model, train = load_config("oar9")
    assert (train.focal_weight, train.focal_gamma) == (0.5, 2.0)
    assert (train.missing, train.optimiser) == ("mask", "rmsprop-sgd")
    assert (train.whole_share, train.phantom_share, train.balanced_share) == (
        1.0,
        0.0,
        0.0,
    )  # each whole, each as often
    assert (train.learning_rate, train.second_rate) == (2e-3, 1e-3)
    assert train.steps / train.steps_per_epoch == 200
    weights = dict(zip(("background", *model.structures), train.class_weights, strict=True))
    assert weights["Chiasm"] == 1.99
    assert weights["Parotid_L"] == weights["Parotid_R"] == 1.0


def test_what_a_file_does_not_set_is_as_in_its_base(toml: Path) -> None:
    toml.write_text('base = "openkbp7"\n[train]\nsteps = 7\n')
    model, train = load_config("openkbp7")
    assert load_config(toml) == (model, dataclasses.replace(train, steps=7))


def test_a_base_lies_beside_the_file_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever training is started."""
    site = tmp_path / "site"
    (site / "runs").mkdir(parents=True)
    (site / "common.toml").write_text(f"{MODEL_TABLE}[train]\nsteps = 7\n")
    (site / "runs" / "long.toml").write_text('base = "../common.toml"\n[train]\nsteps_per_epoch = 3\n')
    (site / "runs" / "longest.toml").write_text('base = "long.toml"\n')
    expected = (SMALL, TrainConfig(steps=7, steps_per_epoch=3))
    assert load_config(site / "runs" / "longest.toml") == expected
    monkeypatch.chdir(site)
    assert load_config("runs/longest.toml") == expected


@pytest.mark.parametrize(
    "base", ["3", '"{toml}"', '"small.toml"', '"../{toml.parent.name}/small.toml"', '"absent.toml"']
)
def test_a_base_must_be_another_configuration(toml: Path, base: str) -> None:
    toml.write_text(f"base = {base.format(toml=toml)}")
    with pytest.raises(ModelError, match=r"base of .*small.toml: expected another|no configuration .*absent.toml"):
        load_config(toml)


def test_toml_becomes_a_configuration(toml: Path) -> None:
    toml.write_text(MODEL_TABLE + "[train]\nsteps = 7\ncrop = [16, 24, 32]\nclass_weights = [1, 2, 2, 2]\n")
    model, train = load_config(toml)
    assert model == SMALL
    assert train == TrainConfig(steps=7, crop=(16, 24, 32), class_weights=(1.0, 2.0, 2.0, 2.0))


def test_whole_numbers_become_floats(toml: Path) -> None:
    # Otherwise two equal configurations would differ in their JSON, and a run could not be resumed.
    toml.write_text(MODEL_TABLE)
    assert load_config(toml)[0].to_json() == SMALL.to_json()


def test_json_round_trip() -> None:
    model = dataclasses.replace(load_config("openkbp7")[0], checkpoint_sha256="ab" * 32)
    assert model_config_from_json(model.to_json()) == model
    assert "\n" not in model.to_json()


def test_who_was_never_taught_by_a_patient_is_known() -> None:
    counted = dataclasses.replace(SMALL, patients=(3, 0, 12))
    assert counted.unvalidated == ("Parotid_L",)
    assert model_config_from_json(counted.to_json()) == counted


def test_without_a_count_every_structure_was_taught_by_patients() -> None:
    assert SMALL.unvalidated == ()
    assert "patients" not in SMALL.to_json()  # as it was written before there was a count
    assert model_config_from_json(SMALL.to_json()).patients == ()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("in_plane_strid = 4", "unknown key in_plane_strid"),
        ("in_plane_stride = 3", "expected 1, 2 or 4, found 3"),
        ("in_plane_stride = 2.0", "in_plane_stride of .*expected int"),
        ("in_plane_stride = true", "in_plane_stride of .*expected int"),
        ('structures = ["BrainStem", "Thyroid"]', "unknown structure Thyroid"),
        ('structures = ["BrainStem", "BrainStem"]', "each once"),
        ('structures = "BrainStem"', "structures of "),
        ("structures = []", "one or more"),
        ("hu_window = [550, -250]", "expected low < high"),
        ("hu_window = [-250, nan]", "expected low < high"),
        ("hu_window = [-250, inf]", "expected low < high"),
        ("hu_window = [-250, 0, 550]", "hu_window of "),
        ("smallest_spacing = [1, 1]", "smallest_spacing of "),
        ("smallest_spacing = [0, 1, 2]", "0 < smallest <= largest"),
        ("smallest_spacing = [1, 1, 4]", "0 < smallest <= largest"),
        ("largest_spacing = [2, 2, nan]", "0 < smallest <= largest"),
        ("name = 4", "name of .*expected str"),
        ('name = ""', "name: expected letters, digits"),
        ('name = "../other"', r"name: expected letters, digits.*found '\.\./other'"),
        (f'name = "{"x" * 300}"', "name: expected at most 100 bytes, .*found one of 300"),
        (f'name = "{"é" * 60}"', "name: expected at most 100 bytes, .*found one of 120"),
        ('name = "small\\n"', "name: expected letters, digits"),
        ("patients = [1, 2]", "patients of small: expected 3 numbers"),
        ("patients = [1, 2, -1]", "patients of small: expected 3 numbers"),
        ("patients = 3", "patients of "),
    ],
)
def test_bad_model_values_are_named(toml: Path, line: str, complaint: str) -> None:
    kept = [old for old in MODEL_TABLE.splitlines() if old.split(" = ")[0] != line.split(" = ")[0]]
    toml.write_text("\n".join([*kept, line]))
    with pytest.raises(ModelError, match=complaint):
        load_config(toml)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("step = 4", "unknown key step"),
        ("steps = 0", "steps: expected 1"),
        ("steps = 1e3", "steps of .*expected int"),
        ("steps_per_epoch = 0", "steps_per_epoch"),
        ("warmup_steps = -1", "warmup_steps"),
        ("learning_rate = 0", "learning_rate"),
        ("learning_rate = nan", "learning_rate"),
        ("second_rate = 0", "second_rate"),
        ("second_share = 1.1", "second_share"),
        ('optimiser = "sgd"', "optimiser: expected one of adamw, rmsprop-sgd"),
        ("ema_decay = 1", "ema_decay"),
        ("ema_decay = 1.5", "ema_decay"),
        ("whole_share = -0.1", "whole_share"),
        ("phantom_share = 2", "phantom_share"),
        ("region_share = -0.1", "region_share: expected 0 to 1"),
        ("region_share = 0.6\nwhole_share = 0.5", "of 1 at most together, found 0.5 and 0.6"),
        ("region_crop = [96, 48, 4]", "region_crop: expected at least 8"),
        ("region_crop = [96, 48]", "region_crop of "),
        ("focal_gamma = -1", "focal_gamma"),
        ("focal_gamma = 0.5", "focal_gamma: expected 0, or 1 to 10, found 0.5"),
        ("seed = -1", "seed"),
        ("seed = 18446744073709551616", "seed: expected 0 to"),
        ('missing = "ignore"', "missing: expected one of mask, marginal, found 'ignore'"),
        ('precision = "float16"', "precision: expected one of float32, bfloat16"),
        ("crop = [4, 64, 64]", "crop: expected at least 8"),
        ("crop = [8, 8, 100000]", "crop: expected at least 8 and at most 1024"),
        ("crop = [64, 64]", "crop of "),
        ("crop = 64", "crop of "),
        ("class_weights = [1, 1, 1]", "class_weights of .*expected 4.*found 3"),
        ("class_weights = [1, 1, 1, -1]", "class_weights: expected 0 or more"),
        ("class_weights = [1, 0, 0, 0]", "class_weights: expected one of a structure above 0"),
    ],
)
def test_bad_training_values_are_named(toml: Path, line: str, complaint: str) -> None:
    toml.write_text(f"{MODEL_TABLE}[train]\n{line}\n")
    with pytest.raises(ModelError, match=complaint):
        load_config(toml)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[model\n", "not TOML"),
        ("", r"small\.toml: missing name, structures, in_plane_stride, smallest_spacing, largest_spacing, hu_window$"),
        ("model = 3\n", "expected a table"),
        (f"{MODEL_TABLE}[trian]\nsteps = 3\n", "unknown table trian"),
    ],
)
def test_bad_files_are_named(toml: Path, text: str, complaint: str) -> None:
    toml.write_text(text)
    with pytest.raises(ModelError, match=complaint):
        load_config(toml)


def test_bytes_that_are_not_text(toml: Path) -> None:
    toml.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="not TOML"):
        load_config(toml)


def test_an_absent_file_names_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"expected a TOML file or one of openkbp7, openkbp7-tuning, openkbp7-volumetric, oar9$"
    ):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ModelError, match="oar9"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2]",
        '"text"',
        "{}",
        json.dumps({**dataclasses.asdict(SMALL), "colour": 1}),
        json.dumps({**dataclasses.asdict(SMALL), "in_plane_stride": "4"}),
        json.dumps({**dataclasses.asdict(SMALL), "structures": [1]}),
    ],
)
def test_bad_json_is_refused(text: str) -> None:
    with pytest.raises(ModelError):
        model_config_from_json(text)


def test_configurations_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.name = "other"  # type: ignore[misc]  # what is tested
