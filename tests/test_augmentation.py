"""Augmentation keeps image, labels and sides together, in plane and in the volume."""

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from anatomynet.engine import augmentation
from anatomynet.engine.augmentation import Augmentation, Sample
from anatomynet.engine.config import ModelConfig, TrainConfig
from anatomynet.engine.data import Case
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.volume import CTVolume
from tests.synthetic_head import LEFT, MODEL, RIGHT, STEM, head

# Of what is bright and what is labelled so, after interpolation of one and not of the other, and other greys: of the
# worst sample, and of the median.
LEAST_DICE, USUAL_DICE = 0.85, 0.95
SEEDS = range(40)
KINDS = ("in-plane", "volumetric")


def draw(case: Case, seed: int, model: ModelConfig = MODEL, **settings_: Any) -> Sample:
    drawn = Augmentation(model, TrainConfig(**({"crop": (16, 40, 40)} | settings_)))
    return drawn.draw(case, random=np.random.default_rng(seed))


def flipped(sample: Sample) -> bool:
    """Whether the bright parotid is called the right one."""
    bright = sample.image[0, 0] > 0.5
    return bool((sample.target[bright] == RIGHT).sum() > (sample.target[bright] == LEFT).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_is_the_same_sample(kind: str) -> None:
    first, again, other = (
        draw(head(), 1, augmentation=kind),
        draw(head(), 1, augmentation=kind),
        draw(head(), 2, augmentation=kind),
    )
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.target, again.target)
    assert not torch.equal(first.image, other.image)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole_share", [0.0, 1.0])
def test_image_and_labels_stay_together(kind: str, whole_share: float) -> None:
    overlaps = []
    for seed in SEEDS:
        sample = draw(head(), seed, whole_share=whole_share, augmentation=kind)
        # Half way between tissue (-0.625) and the darker parotid (0.25); contrast and brightness move it little.
        bright, labelled = sample.image[0, 0] > -0.2, sample.target > 0
        if labelled.sum() > 200:
            overlaps.append(float(2 * (bright & labelled).sum() / (bright.sum() + labelled.sum())))
    assert len(overlaps) > len(SEEDS) / 2
    assert min(overlaps) >= LEAST_DICE
    assert np.median(overlaps) >= USUAL_DICE


@pytest.mark.parametrize("whole_share", [0.0, 1.0])
def test_every_slice_moves_alike(monkeypatch: pytest.MonkeyPatch, whole_share: float) -> None:
    """Affine and elastic are in plane: what does not change along z still does not."""
    monkeypatch.setattr(augmentation, "LARGEST_NOISE", 0.0)
    monkeypatch.setattr(augmentation, "ELASTIC_SHARE", 1.0)
    case = head()
    hu, labels = (np.repeat(array[12:13], len(array), axis=0) for array in (case.volume.hu, case.labels))
    column = replace(case, volume=CTVolume(hu, case.volume.geometry), labels=labels)
    shown, seeds = 0, SEEDS[::4]
    for seed in seeds:
        sample = draw(column, seed, whole_share=whole_share)
        for volume in (sample.image[0, 0], sample.target):
            assert torch.equal(volume, volume[:1].expand_as(volume))
        shown += bool(sample.target.any() and np.unique(sample.image.numpy()).size > 100)
    assert shown > len(seeds) / 2


def bend(seed: int) -> float:
    """Of the straight lines in one sample, in voxels: how far its image is from any affine one of a HU that rises."""
    geometry = VolumeGeometry((8, 96, 96), (1.5, 1.5, 2.5))
    hu = np.broadcast_to(np.arange(96, dtype=np.int16) * 8 - 234, geometry.shape)  # 150, the window's middle, amid
    labels = np.zeros(geometry.shape, np.uint8)
    labels[4, 48, 48] = STEM
    image = draw(Case("ramp", CTVolume(hu.copy(), geometry), labels, (True,) * 3), seed, whole_share=0.0).image[0, 0, 0]
    y, x = np.indices(image.shape)
    plane = np.stack((y.ravel(), x.ravel(), np.ones(y.size)), axis=1)
    values = image.numpy().ravel().astype(np.float64)
    slopes, *_ = np.linalg.lstsq(plane, values, rcond=None)
    return float(np.std(values - plane @ slopes) / np.hypot(*slopes[:2]))


def test_elastic_moves_voxels_as_no_affine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LARGEST_NOISE": 0.0, "FOREGROUND_SHARE": 1.0, "ELASTIC_SHARE": 0.0}.items():
        monkeypatch.setattr(augmentation, name, value)
    assert max(bend(seed) for seed in SEEDS) < 0.01
    monkeypatch.setattr(augmentation, "ELASTIC_SHARE", 1.0)
    bends = [bend(seed) for seed in SEEDS]
    assert 0.5 < min(bends) < max(bends) < 1.5  # each node by 1.2 voxels, 3 % of the crop's side


@pytest.mark.parametrize("kind", KINDS)
def test_a_flip_exchanges_left_and_right(kind: str) -> None:
    flips = []
    for seed in SEEDS:
        sample = draw(head(), seed, whole_share=1.0, augmentation=kind)
        x = torch.arange(48.0).expand_as(sample.target)
        # Whatever happened, the left parotid lies where x grows.
        assert x[sample.target == LEFT].mean() > x[sample.target == RIGHT].mean() + 10
        flips.append(flipped(sample))
        assert sample.annotated == (False, True, True)
    assert 0.25 < np.mean(flips) < 0.75


@pytest.mark.parametrize("kind", KINDS)
def test_a_flip_exchanges_what_is_annotated(kind: str) -> None:
    case = head()
    one_sided = Case("one", case.volume, np.where(case.labels == LEFT, case.labels, 0), (True, True, False))
    outcomes = set()
    for seed in SEEDS:
        sample = draw(one_sided, seed, whole_share=1.0, augmentation=kind)
        labels = tuple(np.unique(sample.target.numpy()).tolist())
        outcomes.add((labels, sample.annotated))
    assert outcomes == {((0, LEFT), (True, True, False)), ((0, RIGHT), (True, False, True))}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_one_side_never_takes_the_other_for_it(kind: str) -> None:
    # In a mirrored image the left parotid looks like a right one, which this model must not draw.
    model = ModelConfig("left", ("Parotid_L",), 1, (1.0, 1.0, 2.0), (2.0, 2.0, 3.0), (-250.0, 550.0))
    case = head()
    left_only = Case("left", case.volume, (case.labels == LEFT).astype(np.uint8), (True,))
    outcomes = set()
    for seed in SEEDS:
        sample = draw(left_only, seed, model, whole_share=1.0, augmentation=kind)
        outcomes.add((tuple(np.unique(sample.target.numpy()).tolist()), sample.annotated))
    assert outcomes == {((0, 1), (True,)), ((0,), (False,))}


@pytest.mark.parametrize("kind", KINDS)
def test_most_crops_show_a_structure(kind: str) -> None:
    case = head()
    labels = np.zeros_like(case.labels)
    labels[20, 40, 40] = STEM
    far = Case("far", case.volume, labels, (True, False, False))
    seen = [bool(draw(far, seed, crop=(8, 16, 16), whole_share=0.0, augmentation=kind).target.any()) for seed in SEEDS]
    assert np.mean(seen) > 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_a_crop_as_the_region_finders_shows_all_structures(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Whichever is asked for; a crop around a structure, the mean of them or the body's middle would lose one."""
    fixed = {"SCALES": (1.0, 1.0), "SLICE_SCALES": (1.0, 1.0), "ASPECT": 0.0, "ELASTIC_SHARE": 0.0}
    for name, value in {**fixed, "LARGEST_ROTATION": 0.0, "LARGEST_PITCH": 0.0, "LARGEST_ROLL": 0.0}.items():
        monkeypatch.setattr(augmentation, name, value)
    geometry = VolumeGeometry((32, 80, 64), (1.5, 1.5, 2.5))
    labels = np.zeros(geometry.shape, np.uint8)
    labels[12:30, 8:24, 8:24] = LEFT
    labels[12:16, 40:44, 20:24] = STEM
    case = Case("apart", CTVolume(np.zeros_like(labels, np.int16), geometry), labels, (True, False, True))
    drawn = Augmentation(
        MODEL, TrainConfig(whole_share=0.0, region_share=1.0, region_crop=(24, 44, 24), augmentation=kind)
    )
    shown = [drawn.draw(case, STEM, random=np.random.default_rng(seed)).target for seed in SEEDS]
    assert {tuple(target.shape) for target in shown} == {(24, 44, 24)}
    stems = [int((target == STEM).sum()) for target in shown]
    assert min(stems) > 0
    # The contours' box is 36 of 44 voxels long, and lies 2.6 from where it should (one standard deviation).
    assert np.mean([stem == 64 for stem in stems]) > 0.8
    assert len({tuple(np.argwhere(target.numpy() > 0).min(axis=0)) for target in shown}) > 5


def test_a_step_without_such_a_crop_is_as_if_there_were_none() -> None:
    """So that a share more or less changes no other step."""
    regions = 0
    for seed in SEEDS:
        sample, before = (
            draw(head(), seed, whole_share=0.2, region_share=share, region_crop=(8, 24, 24)) for share in (0.5, 0.0)
        )
        if sample.target.shape == (8, 24, 24):
            assert before.target.shape == (16, 40, 40)
            regions += 1
        else:
            assert torch.equal(sample.image, before.image)
            assert torch.equal(sample.target, before.target)
    assert 0.3 < regions / len(SEEDS) < 0.7


def test_a_recipe_without_such_crops_draws_no_number_for_them() -> None:
    """Its samples are what they were before there were any: the first number decides, the next three are the place."""
    case = replace(head(), labels=np.zeros((24, 48, 48), np.uint8))
    drawn = Augmentation(MODEL, TrainConfig(crop=(16, 40, 40), whole_share=0.0))
    centre, size = drawn._place(drawn._hold(case), None, np.random.default_rng(1))
    assert centre == pytest.approx(np.random.default_rng(1).random(4)[1:] * (24, 48, 48))
    assert size == (16, 40, 40)


sides = st.tuples(st.integers(8, 20), st.integers(8, 40), st.integers(8, 40))


@settings(deadline=None, max_examples=40)
@given(
    shape=sides,
    crop=sides,
    seen=st.sampled_from(("whole", "region", "crop")),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
def test_samples_are_finite_and_of_the_announced_shape(
    shape: tuple[int, int, int], crop: tuple[int, int, int], seen: str, kind: str, seed: int
) -> None:
    random = np.random.default_rng(seed)
    hu = random.integers(-1024, 3000, shape).astype(np.int16)
    labels = random.integers(0, 4, shape).astype(np.uint8) * bool(seed % 3)  # every third case is empty
    case = Case("any", CTVolume(hu, VolumeGeometry(shape, (1.5, 1.5, 2.5))), labels, (True, True, True))
    shares: dict[str, Any] = {"whole_share": float(seen == "whole"), "region_share": float(seen == "region")}
    size = {"region_crop" if seen == "region" else "crop": crop}
    sample = draw(case, seed, augmentation=kind, **shares | size)
    # In plane, slices are not made up.
    expected = shape if seen == "whole" else (crop[0] if kind == "volumetric" else min(crop[0], shape[0]), *crop[1:])
    assert sample.image.shape == (1, 1, *expected)
    assert sample.target.shape == expected
    assert (sample.image.dtype, sample.target.dtype) == (torch.float32, torch.int64)
    assert torch.isfinite(sample.image).all()
    assert sample.image.abs().max() <= 1
    assert 0 <= sample.target.min() <= sample.target.max() <= 3


@pytest.mark.parametrize("kind", KINDS)
def test_outside_the_volume_is_air(kind: str) -> None:
    case = Case(
        "full",
        CTVolume(np.full((16, 32, 32), 150, np.int16), VolumeGeometry((16, 32, 32), (1.5, 1.5, 2.5))),
        np.ones((16, 32, 32), np.uint8),
        (True, True, True),
    )
    for seed in SEEDS:
        sample = draw(case, seed, whole_share=1.0, augmentation=kind)
        # Soft tissue is 0 here, and all of it is labelled; where the turned volume ends, -1 begins.
        outside = sample.target == 0
        if outside.sum() > 50:
            assert sample.image[0, 0][outside].median() < -0.5
            return
    pytest.fail("no sample looked over the edge")


BALL_MM = 9.0


def extents(seed: int) -> NDArray[np.float64]:
    """Standard deviations (z, y, x), mm, of a ball that a sample shows whole."""
    geometry = VolumeGeometry((24, 40, 40), (1.5, 1.5, 2.5))
    places = np.indices(geometry.shape) * np.array((2.5, 1.5, 1.5))[:, None, None, None]
    middle = np.array((30.0, 30.0, 30.0))[:, None, None, None]
    labels = (((places - middle) ** 2).sum(axis=0) <= BALL_MM**2).astype(np.uint8)
    hu = np.where(labels, 100, -100).astype(np.int16)
    sample = draw(Case("ball", CTVolume(hu, geometry), labels, (True,) * 3), seed, augmentation="volumetric")
    found = np.argwhere(sample.target.numpy()) * (2.5, 1.5, 1.5)
    return np.asarray(found.std(axis=0))


@pytest.mark.parametrize("longer", [1.0, 1.25])
def test_turns_are_of_millimetres_and_only_slices_stretch(monkeypatch: pytest.MonkeyPatch, longer: float) -> None:
    """Voxels are longer than wide: a ball that is tilted by voxels would become an egg."""
    fixed = {"SCALES": (1.0, 1.0), "SLICE_SCALES": (longer, longer), "ASPECT": 0.0, "ELASTIC_SHARE": 0.0}
    for name, value in {**fixed, "FOREGROUND_SHARE": 1.0}.items():
        monkeypatch.setattr(augmentation, name, value)
    for seed in SEEDS[::4]:
        z, y, x = extents(seed)
        assert y == pytest.approx(BALL_MM / np.sqrt(5), rel=0.06)
        assert x == pytest.approx(BALL_MM / np.sqrt(5), rel=0.06)
        assert z == pytest.approx(longer * BALL_MM / np.sqrt(5), rel=0.08)


def test_what_is_held_of_a_case_goes_with_it() -> None:
    drawn = Augmentation(MODEL, TrainConfig(crop=(16, 40, 40)))
    case = head()
    drawn.draw(case, random=np.random.default_rng(0))
    assert len(drawn._held) == 1
    del case
    gc.collect()
    assert len(drawn._held) == 0
