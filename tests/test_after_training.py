"""The benchmark of what is done after the network: each way does what its name says."""

import numpy as np
import torch

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.data import Case
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.volume import CTVolume
from benchmarks.after_training import add_scores, drawings, each_structure, labels_of, largest_piece, row_of

SPACING = (4.0, 4.0, 3.0)
MODEL = ModelConfig("two", ("Parotid_R", "Parotid_L"), 4, (1.0, 1.0, 3.0), (1.0, 1.0, 3.0), (-1000.0, 1000.0))
SHAPE = (8, 9, 20)


class Painter(torch.nn.Module):
    """Draws bright voxels as the right parotid in the image's left half, as the left one in the other.

    Args:
        sees_left: whether it draws the left one at all.
    """

    def __init__(self, *, sees_left: bool = True) -> None:
        super().__init__()
        self.sees_left = sees_left

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(1, 3, *x.shape[2:])
        left = torch.arange(x.shape[4]) >= x.shape[4] // 2
        logits[:, 1] = torch.where((x[:, 0] > 0) & ~left, 1.0, -1.0)
        logits[:, 2] = torch.where((x[:, 0] > 0) & left & self.sees_left, 1.0, -1.0)
        return logits


def bright_case() -> Case:
    """Bright where a parotid is; beside the right one a voxel that is none."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:6, 2:6, 2:6], labels[2:6, 2:6, 14:18] = 1, 2
    hu = np.where(labels > 0, 500, -500).astype(np.int16)
    hu[7, 8, 0] = 500
    return Case("bright", CTVolume(hu, VolumeGeometry(SHAPE, SPACING)), labels, (True, True))


def test_every_way_draws_what_its_name_says() -> None:
    case = bright_case()
    drawn = drawings({"once": Painter(), "mirrored": Painter(sees_left=False)}, case, MODEL)
    stray = (7, 8, 0)
    assert drawn["as it comes"][stray] == 1
    # 1 against 0.6 is drawn still: a heavier background changes nothing here.
    for way in ("largest piece", "strays dropped", "and the background weighs more"):
        assert np.array_equal(drawn[way], case.labels), way
    for way in ("and mirror images averaged", "and both"):
        assert np.array_equal(drawn[way], np.where(case.labels == 1, 1, 0)), way


def test_a_heavier_background_takes_what_is_unsure() -> None:
    logits = torch.tensor([0.0, 0.5]).reshape(2, 1, 1, 1)
    assert labels_of(logits) == 1
    assert labels_of(logits, background=0.6) == 0


def test_one_piece_is_kept_of_each_structure() -> None:
    labels = np.zeros((3, 3, 9), np.uint8)
    labels[0, 0, :3], labels[2, 2, 0], labels[0, 0, 5:7], labels[2, 2, 8] = 1, 1, 2, 2
    kept = each_structure(labels, largest_piece)
    assert np.bincount(kept.ravel()).tolist() == [76, 3, 2]
    assert not largest_piece(np.zeros((2, 2, 2), bool)).any()


def test_what_is_not_annotated_does_not_count() -> None:
    case = bright_case()
    scores: dict[str, list[float]] = {}
    add_scores(scores, case.labels, Case("half", case.volume, case.labels, (True, False)), MODEL)
    assert scores == {"Parotid_R": [1.0]}
    assert row_of("way", {"Parotid_R": [0.5, 1.0], "Parotid_L": [0.25]}) == {
        "way": "way",
        "mean": 0.5,
        "structures": {"Parotid_R": 0.75, "Parotid_L": 0.25},
    }
