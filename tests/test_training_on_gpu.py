"""On a GPU a step is recorded, and is the same step."""

from dataclasses import replace

import pytest
import torch

from anatomynet.engine.augmentation import Sample
from anatomynet.engine.config import TrainConfig
from anatomynet.engine.training import Training
from tests.synthetic_head import MODEL

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SHAPE = (16, 24, 24)
STEPS = 8


def sample(seed: int) -> Sample:
    random = torch.Generator().manual_seed(seed)
    image = torch.randn((1, 1, *SHAPE), generator=random).clamp(-1, 1).cuda()
    return Sample(image, torch.randint(0, 4, SHAPE, generator=random).cuda(), (True, seed % 2 == 0, True))


def losses(train: TrainConfig) -> list[float]:
    training = Training(MODEL, train, torch.device("cuda"))
    return [float(training.learn(sample(step % 3))) for step in range(train.steps)]


def test_a_recorded_step_is_the_same_step() -> None:
    """Before and after the statistics freeze."""
    recorded = TrainConfig(steps=STEPS, crop=SHAPE, frozen_norm_share=0.5)
    plain = replace(recorded, crop=(8, 8, 8))  # no sample is of that size
    assert losses(recorded) == pytest.approx(losses(plain), rel=1e-3)
