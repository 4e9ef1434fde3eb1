"""Each variant is AnatomyNet but for one thing, learns, and lands in one table with mean and spread."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from anatomynet.engine.config import ModelConfig, TrainConfig, load_config
from anatomynet.engine.data import Case
from anatomynet.engine.errors import DataError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.network import AnatomyNet
from anatomynet.engine.region_runtime import EmbeddedRegionFinder
from anatomynet.engine.train import finder_for
from anatomynet.engine.volume import CTVolume
from benchmarks import ablations, common
from benchmarks.ablations import (
    CONFIG,
    PAPER,
    RECIPES,
    Recipe,
    Task,
    TwoDownSamplings,
    Variant,
    mean_and_spread,
    rows_of,
    run_line,
    run_of,
    scores_of,
    table_line,
    variants_named,
    without_residuals,
    without_squeeze_excitation,
)

MODEL = ModelConfig("test", ("Parotid_L", "Parotid_R"), 1, (1.0, 1.0, 2.0), (2.0, 2.0, 3.0), (-250.0, 550.0))
VARIANTS = list({variant.name: variant for recipe in RECIPES.values() for variant in recipe.variants}.values())
TRAIN = TrainConfig(steps=2, crop=(8, 12, 12), whole_share=0.0, phantom_share=0.0, warmup_steps=0, **PAPER)


def parameters(network: torch.nn.Module) -> int:
    return sum(weights.numel() for weights in network.parameters())


def case() -> Case:
    geometry = VolumeGeometry((10, 18, 22), (1.5, 1.5, 2.5))
    labels = np.zeros(geometry.shape, np.uint8)
    labels[3:7, 5:10, 13:18], labels[3:7, 5:10, 3:8] = 1, 2
    hu = (200 * labels.astype(np.int16)) - 50
    return Case("case", CTVolume(hu.astype(np.int16), geometry), labels, (True, False))


def test_the_papers_recipe_has_the_papers_loss() -> None:
    assert PAPER == {"focal_weight": 0.5, "focal_gamma": 2.0, "missing": "mask", "class_weights": ()}
    assert RECIPES["paper"].train == PAPER
    assert load_config(str(CONFIG))[1].missing == "marginal"  # which it replaces by the paper's masks


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_recipes_first_variant_changes_nothing_and_each_other_one_thing(recipe: Recipe) -> None:
    nothing = Variant("")
    configured = asdict(replace(load_config(str(CONFIG))[1], **recipe.train))
    first, *others = recipe.variants
    assert replace(first, name="") == nothing
    for variant in others:
        assert all(configured[key] != value for key, value in variant.train.items())
        changed = (variant.new_network is not AnatomyNet) + len(variant.train) + variant.blind
        assert changed == 1, variant.name
    assert len({variant.name for variant in recipe.variants}) == len(recipe.variants)


def test_weights_that_learn_the_region_finders_boxes_are_validated_in_them() -> None:
    assert load_config(str(CONFIG))[1].region_share == 1
    assert isinstance(finder_for(load_config(str(CONFIG))[1]), EmbeddedRegionFinder)
    assert finder_for(TRAIN) is None


def test_what_is_left_out_has_no_weights() -> None:
    published = parameters(AnatomyNet(10))
    assert parameters(TwoDownSamplings(10)) == published
    assert parameters(without_squeeze_excitation(10)) < published
    assert parameters(without_residuals(10)) < parameters(AnatomyNet(10))
    assert not any("shortcut" in name for name, _ in without_residuals(10).named_parameters())
    assert not any("squeeze" in name for name, _ in without_squeeze_excitation(10).named_parameters())


@pytest.mark.parametrize("shape", [(8, 8, 8), (10, 12, 14), (9, 11, 13)])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_answers_at_the_size_it_was_asked(variant: Variant, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 1, *shape)
    network = variant.new_network(3).eval()
    published = AnatomyNet(3).eval()
    published.load_state_dict(network.state_dict(), strict=False)
    with torch.inference_mode():
        assert network(x).shape == (1, 3, *shape)
        same = torch.equal(network(x), published(x))
    assert same == (variant.new_network is AnatomyNet)


def task() -> Task:
    return Task([case()], [case()], MODEL, TRAIN, torch.device("cpu"))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_learns(variant: Variant) -> None:
    scores = scores_of(variant, task(), 1)
    assert scores.keys() == {"Parotid_L"}  # the other is not annotated where it is validated
    assert 0 <= scores["Parotid_L"] <= 1


def run(variant: str, seed: int, dice: dict[str, float]) -> dict[str, Any]:
    return {"variant": variant, "seed": seed, "seconds": 1, "dice": dice}


def test_mean_and_spread_by_hand() -> None:
    runs = [run("x", 1, {"Larynx": 0.4, "Chiasm": 0.6}), run("x", 2, {"Larynx": 0.6, "Chiasm": 0.8})]
    row = mean_and_spread(runs)
    assert row == {"seeds": [1, 2], "dice": 0.6, "spread": 0.1414, "structures": {"Larynx": 0.5, "Chiasm": 0.7}}
    assert mean_and_spread(runs[:1])["spread"] is None
    line = table_line({"variant": "x", **row}, replace(MODEL, structures=("Larynx", "Chiasm")))
    assert line.split() == ["x", "0.600", "±", "0.141", "Larynx", "0.500", "Chiasm", "0.700"]


def test_an_unknown_variant_is_refused() -> None:
    assert variants_named(["no masks"], RECIPES["paper"])[0].blind
    with pytest.raises(DataError, match="no variant 'no mask': expected one of as published"):
        variants_named(["no mask"], RECIPES["paper"])


def test_seeds_that_not_all_variants_have_are_not_counted() -> None:
    done = [run("a", 1, {"Larynx": 0.2}), run("b", 1, {"Larynx": 0.4}), run("b", 2, {"Larynx": 0.8})]
    rows = rows_of(done, ["b", "a"])
    assert [(row["variant"], row["seeds"], row["dice"], len(row["runs"])) for row in rows] == [
        ("b", [1], 0.4, 2),
        ("a", [1], 0.2, 1),
    ]
    assert [row["variant"] for row in rows_of(done[1:], ["b", "a"])] == ["b"]
    assert rows_of(done[1:], ["b", "a"])[0]["seeds"] == [1, 2]  # no seed is common yet


def test_a_run_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(ablations, "scores_of", full)
    failed = run_of(task(), (Variant("no masks"), 7))
    assert failed == {"variant": "no masks", "seed": 7, "seconds": 0, "failed": "CUDA out of memory."}
    assert run_line(failed) == "no masks, seed 7, 0 s: CUDA out of memory."
    assert rows_of([failed], ["no masks"]) == []


NAMES = ["as published", "Dice alone"]
ARGUMENTS = [
    "--recipe",
    "paper",
    "--phantoms",
    "2",
    "--seeds",
    "2",
    *(part for name in NAMES for part in ("--variant", name)),
]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(ablations, "cases_of", lambda *_: ([case()], [case()]))
    monkeypatch.setattr(ablations, "load_config", lambda _: (MODEL, TRAIN))
    return tmp_path / "ablations.json"


def test_what_is_cut_short_leaves_what_is_done(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_short(_: Task, planned: list[tuple[Variant, int]], __: int) -> Iterator[dict[str, Any]]:
        yield from (run(variant.name, seed, {"Larynx": 0.5}) for variant, seed in planned[:3])
        raise SystemExit(143)

    monkeypatch.setattr(ablations, "finished_runs", cut_short)
    assert CliRunner().invoke(ablations.main, ARGUMENTS).exit_code == 143
    written = json.loads(results.read_text())
    assert (written["complete"], written["done"], written["planned"]) == (False, 3, 4)
    assert [[one["seed"] for one in row["runs"]] for row in written["variants"]] == [[1808, 1809], [1808]]
    assert [row["seeds"] for row in written["variants"]] == [[1808], [1808]]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_one_table_is_written(results: Path, jobs: str) -> None:
    outcome = CliRunner().invoke(ablations.main, [*ARGUMENTS, "--jobs", jobs])
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.count(" of 4  ") == 4
    written = json.loads(results.read_text())
    assert written["complete"]
    assert written["failed"] == []
    assert [row["variant"] for row in written["variants"]] == NAMES
    assert [row["seeds"] for row in written["variants"]] == [[1808, 1809]] * 2


def test_phantoms_or_a_folder() -> None:
    for arguments in ([], ["--phantoms", "2", "--data", "x"]):
        outcome = CliRunner().invoke(ablations.main, arguments)
        assert outcome.exit_code == 1
        assert "expected --data FOLDER or --phantoms N" in outcome.stderr
