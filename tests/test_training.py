"""A training's step, its two stages and its state; and the samples that it is given."""

from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anatomynet.engine.config import ModelConfig, TrainConfig, load_config
from anatomynet.engine.data import Case
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.phantom import make_phantom
from anatomynet.engine.preprocess import body_box
from anatomynet.engine.train import chosen_by_structure, patient_counts, phantom_case, samples
from anatomynet.engine.training import FINAL_RATE, Training, rate_at, rate_share
from anatomynet.engine.volume import CTVolume

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = ModelConfig("tiny", ("Chiasm", "OpticNerve_L"), 1, (1.0, 1.0, 2.0), (2.0, 2.0, 3.0), (-250.0, 550.0))
PLAN = TrainConfig(steps=9, crop=(8, 16, 16), whole_share=0.5, phantom_share=0.0)
REGIONS = replace(PLAN, whole_share=0.2, region_share=0.4, region_crop=(8, 16, 24))
TWO_STAGES = replace(PLAN, steps=8, optimiser="rmsprop-sgd", learning_rate=2e-3, second_rate=1e-3, whole_share=0.0)


def uniform_cases() -> list[Case]:
    """Three cases that their Hounsfield units tell apart: normalised, they are -0.5, 0 and 0.5."""
    geometry = VolumeGeometry((10, 64, 64), (1.5, 1.5, 2.5))
    labels = np.zeros(geometry.shape, np.uint8)
    labels[4, 32, 32] = 1
    return [
        Case(str(hu), CTVolume(np.full(geometry.shape, hu, np.int16), geometry), labels, (True, True))
        for hu in (-50, 150, 350)
    ]


def test_the_rate_rises_then_falls() -> None:
    config = TrainConfig(steps=100, warmup_steps=10)
    shares = [rate_share(step, config) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert shares[10] == 1.0
    assert all(a > b for a, b in pairwise(shares[10:]))
    assert rate_share(55, config) == pytest.approx((1 + FINAL_RATE) / 2)
    assert rate_share(100, config) == pytest.approx(FINAL_RATE)
    assert rate_share(10_000, config) == pytest.approx(FINAL_RATE)


def test_the_rate_may_do_without_warm_up() -> None:
    assert rate_share(0, TrainConfig(steps=1, warmup_steps=0)) == 1.0
    assert rate_share(1, TrainConfig(steps=1, warmup_steps=5)) == pytest.approx(0.4)


def test_the_papers_recipe_has_two_stages_of_constant_rate() -> None:
    assert [rate_at(step, TWO_STAGES) for step in range(8)] == [2e-3] * 6 + [1e-3] * 2
    training = Training(MODEL, TWO_STAGES, torch.device("cpu"))
    found = []
    for sample in samples(uniform_cases(), MODEL, TWO_STAGES, first=0):
        training.learn(sample)
        found.append((type(training.optimiser), training.optimiser.param_groups[0]["lr"]))
    assert found == [(torch.optim.RMSprop, 2e-3)] * 6 + [(torch.optim.SGD, 1e-3)] * 2
    assert training.optimiser.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("stop", [3, 6, 7])
def test_either_stage_goes_on_where_it_was_left(tmp_path: Path, stop: int) -> None:
    """In the first stage, between both and in the second one."""
    whole = Training(MODEL, TWO_STAGES, torch.device("cpu"))
    for sample in samples(uniform_cases(), MODEL, TWO_STAGES, first=0):
        whole.learn(sample)
        if whole.step == stop:
            whole.save(tmp_path / "state.safetensors")
    resumed = Training(MODEL, TWO_STAGES, torch.device("cpu"))
    resumed.restore(tmp_path / "state.safetensors")
    for sample in samples(uniform_cases(), MODEL, TWO_STAGES, first=stop):
        resumed.learn(sample)
    expected, found = whole.network.state_dict(), resumed.network.state_dict()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


@pytest.mark.parametrize("steps", [6, 12])
def test_a_run_resumed_with_another_number_of_steps_may_lie_in_its_other_stage(tmp_path: Path, steps: int) -> None:
    """Saved in the first stage of 8 steps it lies in the second of 6, saved in the second in the first of 12."""
    saved_after = 5 if steps == 6 else 7
    begun = Training(MODEL, TWO_STAGES, torch.device("cpu"))
    for sample in islice(samples(uniform_cases(), MODEL, TWO_STAGES, first=0), saved_after):
        begun.learn(sample)
    begun.save(tmp_path / "state.safetensors")
    plan = replace(TWO_STAGES, steps=steps)
    resumed = Training(MODEL, plan, torch.device("cpu"))
    resumed.restore(tmp_path / "state.safetensors")
    assert not resumed.optimiser.state_dict()["state"], "the other stage's memory is of no use to it"
    for sample in samples(uniform_cases(), MODEL, plan, first=saved_after):
        assert torch.isfinite(resumed.learn(sample))
    assert resumed.step == steps


def test_statistics_frozen_by_a_resumption_are_the_averaged_ones(tmp_path: Path) -> None:
    """A run of fewer steps freezes them earlier; what serves has averaged ones."""
    plan = replace(PLAN, steps=8, frozen_norm_share=0.25, whole_share=0.0)  # from step 6 on
    begun = Training(MODEL, plan, torch.device("cpu"))
    for sample in islice(samples(uniform_cases(), MODEL, plan, first=0), 5):
        begun.learn(sample)
    begun.save(tmp_path / "state.safetensors")
    resumed = Training(MODEL, replace(plan, steps=6), torch.device("cpu"))  # from step 4 on
    resumed.restore(tmp_path / "state.safetensors")
    found, averaged = resumed.network.state_dict(), begun.average.state_dict()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, averaged[name])] == []


def test_a_gpu_records_every_size_of_crop_before_and_after_the_statistics_freeze(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a GPU: what it would be asked to record, once each, and that its trials leave no trace."""
    asked = []

    def record(network: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
        asked.append((network, tuple(inputs[0].shape[2:])))
        for tensor in network.state_dict().values():
            tensor.zero_()
        return network

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    training = Training(MODEL, replace(REGIONS, steps=4, frozen_norm_share=0.5), torch.device("cpu"))
    training.device = torch.device("cuda")
    before = {name: tensor.clone() for name, tensor in training.network.state_dict().items()}
    sizes = (REGIONS.crop, REGIONS.region_crop, (10, 64, 64), REGIONS.region_crop, REGIONS.crop)
    for step, known in ((1, 0), (2, 2)):
        training.step = step
        crop, region, whole, region_again, crop_again = (training._forward(torch.zeros(1, 1, *size)) for size in sizes)
        assert (crop, region) == (crop_again, region_again)
        assert asked[known:] == [(crop, REGIONS.crop), (region, REGIONS.region_crop)]
        assert whole not in [network for network, _ in asked]
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.network.state_dict().items())


def test_a_gpu_records_no_size_that_no_share_of_the_steps_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole body box may happen to be of it."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *_: pytest.fail("recorded"))
    training = Training(MODEL, replace(REGIONS, region_share=0.0), torch.device("cpu"))
    training.device = torch.device("cuda")
    training._forward(torch.zeros(1, 1, *REGIONS.region_crop))


def test_every_pass_sees_every_case_once() -> None:
    middles = [float(s.image[0, 0, :, 6:10, 6:10].median()) for s in samples(uniform_cases(), MODEL, PLAN, first=0)]
    seen = [int(np.argmin(np.abs(np.array([-0.5, 0, 0.5]) - middle))) for middle in middles]
    assert [sorted(seen[i : i + 3]) for i in (0, 3, 6)] == [[0, 1, 2]] * 3
    assert len({tuple(seen[i : i + 3]) for i in (0, 3, 6)}) > 1  # shuffled anew


@pytest.mark.parametrize("plan", [PLAN, REGIONS], ids=["crops", "regions"])
def test_a_steps_sample_hangs_on_the_step_alone(plan: TrainConfig) -> None:
    from_the_start = list(samples(uniform_cases(), MODEL, plan, first=0))
    from_the_middle = list(samples(uniform_cases(), MODEL, plan, first=5))
    assert (len(from_the_start), len(from_the_middle)) == (9, 4)
    for one, other in zip(from_the_start[5:], from_the_middle, strict=True):
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.target, other.target)


def test_another_seed_gives_other_samples() -> None:
    one = next(samples(uniform_cases(), MODEL, PLAN, first=0))
    other = next(samples(uniform_cases(), MODEL, replace(PLAN, seed=1), first=0))
    assert one.image.shape != other.image.shape or not torch.equal(one.image, other.image)


def test_a_phantom_is_a_case_with_every_structure() -> None:
    model, _ = load_config("openkbp7")
    case = phantom_case(model, spacing=(4.0, 4.0, 3.0), seed=1)
    assert case.annotated == (True,) * len(model.structures)
    assert case.volume.geometry.spacing == (4.0, 4.0, 3.0)
    assert set(np.unique(case.labels)) == set(range(len(model.structures) + 1))


@pytest.mark.parametrize(("stride", "slices"), [(1, 2.5), (2, 1.25)])
def test_a_phantom_has_its_organs_whole_at_any_stride(stride: int, slices: float) -> None:
    structures = ("Mandible", "Parotid_L", "Larynx")
    model = replace(MODEL, structures=structures, in_plane_stride=stride)
    case = phantom_case(model, spacing=(float(stride), float(stride), slices), seed=1)
    truth = phantom_case(replace(model, in_plane_stride=4), spacing=(4.0, 4.0, 2.5), seed=1)
    found, expected = (
        np.bincount(one.labels.ravel(), minlength=4)[1:] * one.volume.geometry.voxel_ml for one in (case, truth)
    )
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("slices", [3.0, 1.5])
def test_phantoms_are_those_that_the_shipped_weights_learnt_from(slices: float) -> None:
    model, _ = load_config("openkbp7")
    case = phantom_case(model, spacing=(4.0, 4.0, slices), seed=1)
    volume, truth = make_phantom(
        VolumeGeometry((112, 128, 128), (4.0, 4.0, slices)), seed=1, structures=model.structures
    )
    start, stop = body_box(volume.hu, in_plane_stride=1)
    body = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    np.testing.assert_array_equal(case.volume.hu, volume.hu[body])
    np.testing.assert_array_equal(case.labels, truth.labels[body])


def test_phantoms_are_no_patients() -> None:
    patient, other, third = uniform_cases()
    phantom = replace(third, annotated=(True, True), synthetic=True)
    assert patient_counts([replace(patient, annotated=(True, False)), other, phantom]) == (2, 1)
    assert patient_counts([phantom]) == (0, 0)


def test_structures_that_few_cases_have_are_drawn_as_often_as_their_weight() -> None:
    common, rare = uniform_cases()[:2]
    cases = [*(replace(common, name=f"common {i}", annotated=(True, False)) for i in range(9)), rare]
    weighted = replace(PLAN, class_weights=(1.0, 1.0, 3.0))
    random = np.random.default_rng(0)
    drawn = [chosen_by_structure(cases, weighted, random) for _ in range(400)]
    labels = [label for _, label in drawn]
    assert labels.count(2) / len(labels) == pytest.approx(0.75, abs=0.06)
    assert all(case.annotated[label - 1] for case, label in drawn)
    nobody = [replace(case, annotated=(True, False)) for case in cases]
    assert {chosen_by_structure(nobody, weighted, random)[1] for _ in range(20)} == {1}
