"""The network really learns structures of which no case has all, and only because what is missing is masked.

The small version of benchmarks/oar9_phantoms.py: three structures at 9 mm, one annotated a case.
"""

from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from anatomynet.engine.config import ModelConfig, TrainConfig
from anatomynet.engine.data import Case
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.phantom import make_phantom
from anatomynet.engine.train import validate
from anatomynet.engine.training import Training
from anatomynet.engine.volume import CTVolume
from benchmarks import oar9_phantoms
from benchmarks.oar9_phantoms import FIRST_UNSEEN_SEED, planned_steps, trained, with_structures_withheld

# A second thread gains little on so few voxels, and costs another process its core.
pytestmark = pytest.mark.usefixtures("one_thread")

SPACING = (9.0, 9.0, 9.0)
MODEL = ModelConfig("small", ("Mandible", "Parotid_L", "Parotid_R"), 1, SPACING, SPACING, (-250.0, 550.0))
JAW = np.s_[1:13, 0:14, 2:22]  # where these structures lie in 24 x 24 x 24 voxels
JAW_SHAPE = (12, 14, 20)
CASES, UNSEEN = 16, 4
LEARNT = 0.55  # DSC of each structure: 0.66 to 0.83 in eight runs, of four seeds
NOT_LEARNT = 0.3  # 0.00 in both runs in which nothing was masked
# The paper's loss: lambda 0.5. In float32, so that every processor learns alike.
TRAIN = TrainConfig(
    steps=200,
    learning_rate=5e-3,
    warmup_steps=10,
    precision="float32",
    crop=JAW_SHAPE,
    whole_share=1.0,
    phantom_share=0.0,
    frozen_norm_share=0.3,
    ema_decay=0.9,
    seed=1,
)


def jaw(seed: int) -> Case:
    volume, truth = make_phantom(VolumeGeometry((24, 24, 24), SPACING), seed=seed, structures=MODEL.structures)
    hu, labels = (np.ascontiguousarray(array[JAW]) for array in (volume.hu, truth.labels))
    return Case(str(seed), CTVolume(hu, VolumeGeometry(JAW_SHAPE, SPACING)), labels, (True,) * 3, synthetic=True)


@pytest.fixture(scope="module")
def withheld() -> list[Case]:
    return one_structure_each([jaw(seed) for seed in range(CASES)])


@pytest.fixture(scope="module")
def unseen() -> list[Case]:
    return [jaw(seed) for seed in range(FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + UNSEEN)]


def one_structure_each(cases: list[Case]) -> list[Case]:
    """The first case keeps the first structure, the second the second, and so on."""
    return [
        replace(case, labels=np.where(case.labels == i % 3 + 1, case.labels, 0), annotated=tuple(np.arange(3) == i % 3))
        for i, case in enumerate(cases)
    ]


def scores_after_training(cases: list[Case], unseen: list[Case], missing: str) -> dict[str, float]:
    training = trained(cases, MODEL, replace(TRAIN, missing=missing), torch.device("cpu"))
    scores = validate(training.average, MODEL, unseen, "cpu")
    return {name: float(np.mean(values)) for name, values in scores.items()}


@pytest.mark.parametrize("missing", ["mask", "marginal"])
def test_structures_of_which_no_case_has_all_are_learnt(withheld: list[Case], unseen: list[Case], missing: str) -> None:
    assert not any(all(case.annotated) for case in withheld)
    scores = scores_after_training(withheld, unseen, missing)
    assert min(scores.values()) >= LEARNT, scores


def test_without_masks_they_are_not(withheld: list[Case], unseen: list[Case]) -> None:
    """What nobody contoured counts as background: the same data and steps teach not to draw."""
    blind = [replace(case, annotated=(True,) * 3) for case in withheld]
    scores = scores_after_training(blind, unseen, "mask")
    assert min(scores.values()) <= NOT_LEARNT, scores


def test_some_structures_are_withheld_never_all_and_never_none() -> None:
    case = jaw(0)
    chosen = with_structures_withheld([case] * 60, seed=1)
    assert {sum(c.annotated) for c in chosen} == {1, 2}
    assert np.mean([c.annotated for c in chosen]) == pytest.approx(0.5, abs=0.12)
    for other in chosen:
        kept = [i + 1 for i, known in enumerate(other.annotated) if known]
        assert set(np.unique(other.labels)) == {0, *kept}
        assert np.array_equal(other.labels > 0, np.isin(case.labels, kept))


def test_where_time_is_short_the_plan_shrinks_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is one that shows a second more at every look: a step takes a second."""
    monkeypatch.setattr(oar9_phantoms, "PLANNED_EVERY", 2)
    monkeypatch.setattr(oar9_phantoms, "time", SimpleNamespace(perf_counter=count().__next__))
    train = replace(TRAIN, steps=10_000, crop=(8, 8, 8), whole_share=0.0)
    training = trained([jaw(0)], MODEL, train, torch.device("cpu"), seconds=8)
    assert (training.step, training.train.steps) == (8, 8)
    training = trained([jaw(0)], MODEL, replace(train, steps=3), torch.device("cpu"), seconds=1000)
    assert (training.step, training.train.steps) == (3, 3)
    training = trained([jaw(0)], MODEL, train, torch.device("cpu"), seconds=1)  # over before there is a plan
    assert (training.step, training.train.steps) == (2, 10_000)


def test_planned_steps_by_hand() -> None:
    training = Training(MODEL, replace(TRAIN, steps=1000, frozen_norm_share=0.5), torch.device("cpu"))
    training.step = 100
    assert planned_steps(training, 1000, 6.0) == 600  # a sixth of the time is spent
    assert planned_steps(training, 1000, 60.0) == 1000  # never more than were asked for
    assert planned_steps(training, 1000, 1.5) == 1000  # would be frozen from step 75, which is past: the time ends it
    training.step = 500
    assert planned_steps(training, 1000, 1.9) == 1000  # is frozen already
