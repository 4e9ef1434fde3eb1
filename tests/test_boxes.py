"""engine/boxes.py: the box of each label, as SciPy finds it."""

import numpy as np
import pytest
from scipy.ndimage import find_objects

from anatomynet.engine.boxes import boxes_of, slices_of


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5])
@pytest.mark.parametrize("turn", [(0, 1, 2), (2, 0, 1)])
def test_boxes_are_scipys(share: float, turn: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    labels = np.zeros((20, 30, 40), np.uint8)
    inner = labels[3:, 5:27, :33]
    inner[rng.random(inner.shape) < share] = 5
    inner[rng.random(inner.shape) < share] = 2
    turned = labels.transpose(turn)
    assert boxes_of(turned, 7) == (find_objects(turned, max_label=7) or [None] * 7)


def test_a_label_beyond_the_last_has_no_box() -> None:
    labels = np.zeros((4, 6, 8), np.uint8)
    labels[1, 2, 3], labels[2, 3, 4] = 1, 3
    assert boxes_of(labels, 2) == [(slice(1, 2), slice(2, 3), slice(3, 4)), None]


def test_slices_cut_a_box_out() -> None:
    assert slices_of((1, 2, 3), np.array([2, 4, 6])) == (slice(1, 2), slice(2, 4), slice(3, 6))
