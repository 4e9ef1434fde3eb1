"""On a GPU a step is recorded, and is the same step."""

from dataclasses import replace

import pytest
import torch

from anatomynet.engine.augmentation import Sample
from anatomynet.engine.config import TrainConfig
from anatomynet.engine.training import Training
from tests.synthetic_head import MODEL

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SHAPE, REGION_SHAPE = (16, 24, 24), (24, 16, 16)
STEPS = 8


def sample(seed: int, shape: tuple[int, int, int]) -> Sample:
    random = torch.Generator().manual_seed(seed)
    image = torch.randn((1, 1, *shape), generator=random).clamp(-1, 1).cuda()
    return Sample(image, torch.randint(0, 4, shape, generator=random).cuda(), (True, seed % 2 == 0, True))


def learnt(train: TrainConfig) -> tuple[list[float], int]:
    """The losses of steps that see both sizes by turns, and how many recordings were made."""
    training = Training(MODEL, train, torch.device("cuda"))
    losses = [float(training.learn(sample(i % 3, (SHAPE, REGION_SHAPE)[i % 2]))) for i in range(train.steps)]
    return losses, len(training._recorded)


def test_a_recorded_step_is_the_same_step() -> None:
    """Of either size, before and after the statistics freeze."""
    recorded = TrainConfig(steps=STEPS, crop=SHAPE, region_crop=REGION_SHAPE, region_share=0.5, frozen_norm_share=0.5)
    plain = replace(recorded, crop=(8, 8, 8), region_crop=(8, 8, 8))  # no sample is of that size
    (losses, recordings), (expected, none) = learnt(recorded), learnt(plain)
    assert (recordings, none) == (4, 0)
    assert losses == pytest.approx(expected, rel=1e-3)
