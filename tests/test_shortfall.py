"""The look into a poor agreement: what of it lies in the first and last slice, and in size."""

from typing import Any

import numpy as np
import pytest

from benchmarks.shortfall import agreement, summary_of, table


def test_slices_that_the_physician_left_out_are_forgiven() -> None:
    truth, drawn = np.zeros((2, 6, 4, 4), bool)
    truth[2:4, :2] = True  # 16 voxels
    drawn[1:5, :2] = True  # 32, the same 16 among them
    assert agreement(drawn, truth) == {
        "dice": round(2 * 16 / 48, 4),
        "dice_in_its_slices": 1.0,
        "volume_ratio": 2.0,
        "slices": [2, 3],
        "slices_drawn": [1, 4],
    }


def test_what_was_missed_has_no_slices() -> None:
    truth = np.ones((2, 2, 2), bool)
    missed = agreement(~truth, truth)
    assert (missed["dice"], missed["dice_in_its_slices"], missed["slices_drawn"]) == (0.0, 0.0, None)


def row(case: str, dice: float, *, refused: bool = False) -> dict[str, Any]:
    told = {"split": "validation", "structure": "Larynx", "case": case, "refused": refused}
    return told | {"dice": dice, "dice_in_its_slices": dice + 0.1, "volume_ratio": 1 + dice}


def test_refused_cases_are_left_out_and_the_worst_named() -> None:
    rows = [row("a", 0.8), row("b", 0.1, refused=True), row("c", 0.6), row("d", 0.7)]
    summary = summary_of(rows, "validation", "Larynx")
    assert summary["dice"] == pytest.approx(0.55)
    assert summary["dice_without_refused"] == pytest.approx(0.7)
    assert summary["dice_in_its_slices"] == pytest.approx(0.65)
    assert summary["worst"] == ["b", "c", "d"]
    header, line, nothing = table([summary, summary_of(rows, "train", "Larynx")])
    assert "in its slices" in header
    assert line.split()[:6] == ["validation", "Larynx", "4", "0.550", "0.700", "0.650"]
    assert nothing.split() == ["train", "Larynx", "0"]
