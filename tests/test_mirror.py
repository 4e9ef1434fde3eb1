"""What is drawn twice is drawn the same on either side."""

import pytest
import torch

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import ModelError
from anatomynet.engine.network import AnatomyNet
from anatomynet.engine.structures import mirrored_labels
from benchmarks.mirror import MirroredNetwork

MODEL = ModelConfig(
    "test", ("Parotid_R", "BrainStem", "Parotid_L"), 1, (1.0, 1.0, 2.0), (2.0, 2.0, 3.0), (-250.0, 550.0)
)
TOLERANCE = 1e-5


@pytest.fixture
def network() -> AnatomyNet:
    torch.manual_seed(0)
    return AnatomyNet(MODEL.classes).eval()


@pytest.fixture
def image() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(1, 1, 8, 12, 16) * 2 - 1


def test_a_mirrored_patient_gets_mirrored_contours(network: AnatomyNet, image: torch.Tensor) -> None:
    twice = MirroredNetwork(network, MODEL)
    with torch.inference_mode():
        drawn = twice(image).softmax(dim=1)
        mirrored = twice(image.flip(-1)).softmax(dim=1).flip(-1)[:, list(mirrored_labels(MODEL.structures))]
        alone = network(image).softmax(dim=1)
    assert (drawn - mirrored).abs().max() < TOLERANCE
    assert (drawn - alone).abs().max() > 100 * TOLERANCE  # one look alone is not symmetric


def test_the_mean_of_both_by_hand(network: AnatomyNet, image: torch.Tensor) -> None:
    with torch.inference_mode():
        seen, flipped = (network(x).softmax(dim=1) for x in (image, image.flip(-1)))
        drawn = MirroredNetwork(network, MODEL)(image).softmax(dim=1)
    expected = (seen[0, 1, 2, 3, 4] + flipped[0, 3, 2, 3, 11]) / 2  # the right parotid, and there the left one
    assert drawn[0, 1, 2, 3, 4] == pytest.approx(expected.item(), abs=TOLERANCE)


def test_half_a_pair_cannot_be_mirrored(network: AnatomyNet) -> None:
    half = ModelConfig("half", ("Parotid_R",), 1, (1.0, 1.0, 2.0), (2.0, 2.0, 3.0), (-250.0, 550.0))
    with pytest.raises(ModelError, match="half cannot be mirrored: expected both sides of Parotid_R"):
        MirroredNetwork(network, half)
