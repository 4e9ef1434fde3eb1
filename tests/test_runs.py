"""Runs: what SciPy and NumPy find in a mask voxel by voxel is found in its runs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from scipy import ndimage

from anatomynet.engine import runs as runs_module
from anatomynet.engine.runs import Runs, Touch, pieces_of, runs_of

Mask = NDArray[np.bool_]
small_masks = arrays(np.bool_, array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=9), elements=st.booleans())
STRUCTURES: dict[Touch, NDArray[np.bool_]] = {
    "faces": ndimage.generate_binary_structure(3, 1),
    "corners": ndimage.generate_binary_structure(3, 3),
}


def numbered(runs: Runs, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """An array of the mask's shape: each run's number in its voxels, 0 outside."""
    whole = np.zeros(runs.shape, np.int64)
    for number in np.unique(numbers):
        whole.reshape(-1)[runs.voxels(numbers == number)] = number
    return whole


@given(small_masks)
@settings(max_examples=200, deadline=None)
def test_runs_are_the_mask(mask: Mask) -> None:
    runs = runs_of(mask)
    np.testing.assert_array_equal(numbered(runs, np.ones(len(runs.start), np.int64)), mask)
    assert (np.diff(runs.start) > runs.length[:-1] - 1).all()
    assert [tuple(place) for place in runs.places.T] == list(
        zip(*np.unravel_index(runs.start, mask.shape), strict=True)
    )


def test_rows_that_touch_at_their_ends_are_two() -> None:
    mask = np.zeros((1, 2, 4), np.bool_)
    mask[0, 0, 2:] = mask[0, 1, :2] = True
    runs = runs_of(mask)
    assert (runs.start.tolist(), runs.length.tolist()) == ([2, 4], [2, 2])


@pytest.mark.parametrize("touch", ["faces", "corners"])
@given(mask=small_masks)
@settings(max_examples=200, deadline=None)
def test_pieces_are_scipys(touch: Touch, mask: Mask) -> None:
    runs = runs_of(mask)
    expected, _ = ndimage.label(mask, STRUCTURES[touch])
    np.testing.assert_array_equal(numbered(runs, pieces_of(runs, touch=touch) + 1), expected)


@pytest.mark.parametrize("touch", ["faces", "corners"])
def test_a_winding_piece_is_one(touch: Touch) -> None:
    """Arms that begin apart and meet at their ends, again and again, the last of them along z."""
    mask = np.zeros((9, 9, 9), np.bool_)
    mask[::4, :, ::2] = True
    mask[::4, -1], mask[:, -1, -1] = True, True
    assert set(pieces_of(runs_of(mask), touch=touch)) == {0}
    mask[1::4, -1, -1] = False
    assert set(pieces_of(runs_of(mask), touch=touch)) == {0, 1, 2}


@pytest.mark.parametrize("touch", ["faces", "corners"])
@pytest.mark.parametrize("height", [1, 5])
def test_many_pieces_that_one_joins_take_few_rounds(monkeypatch: pytest.MonkeyPatch, touch: Touch, height: int) -> None:
    """A thousand posts that a plate joins, as a grid in a couch: not a thousand passes over all runs."""
    rounds: list[int] = []
    ends_of = runs_module._ends_of

    def counted(into: NDArray[np.int64]) -> NDArray[np.int64]:
        rounds.append(len(into))
        return ends_of(into)

    monkeypatch.setattr(runs_module, "_ends_of", counted)
    mask = np.zeros((height + 1, 64, 64), np.bool_)
    mask[:height, ::2, ::2] = mask[height] = True
    assert set(pieces_of(runs_of(mask), touch=touch)) == {0}
    assert len(rounds) < 20


@given(small_masks.filter(np.any))
@settings(max_examples=200, deadline=None)
def test_centre_and_box_are_those_of_the_voxels(mask: Mask) -> None:
    runs = runs_of(mask)
    assert runs.centre().tolist() == np.argwhere(mask).mean(axis=0).tolist()
    assert runs.box(np.ones(len(runs.start), np.bool_)) == ndimage.find_objects(mask.astype(np.uint8))[0]
