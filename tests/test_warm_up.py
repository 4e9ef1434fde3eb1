"""export/warm_up.py, by a runtime that notes what it is given."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from anatomynet.engine.config import load_config
from anatomynet.engine.errors import ModelError
from anatomynet.engine.limits import SizeLimit, size_limit
from anatomynet.engine.volume import HounsfieldArray, LabelArray
from anatomynet.export.triton_models import COMMON_SHAPES
from anatomynet.export.warm_up import warm_up

LARGEST_FIRST = [(178, 512, 512), (178, 320, 320), (144, 224, 192)]


class NotingRuntime:
    """Draws nothing; refuses CTs of more voxels than its memory holds."""

    description = "a GPU of the tests"

    def __init__(self, largest: int = 2**62) -> None:
        self.model, _ = load_config("openkbp7")
        self.largest = largest
        self.drawn: list[tuple[int, ...]] = []

    def infer(self, hu: HounsfieldArray) -> tuple[LabelArray, NDArray[np.float32]]:
        assert hu.dtype == np.int16
        self.drawn.append(hu.shape)
        if hu.size > self.largest:
            raise ModelError(f"too little memory for {hu.shape}")
        return np.zeros(1, np.uint8), np.zeros(1, np.float32)


def test_every_common_size_is_drawn_the_largest_first() -> None:
    runtime = NotingRuntime()
    assert warm_up(runtime, size_limit(runtime.model)) == []
    assert runtime.drawn == LARGEST_FIRST
    assert sorted(COMMON_SHAPES) == sorted(LARGEST_FIRST)


@pytest.mark.parametrize("fit", [0, 1, 2])
def test_what_does_not_fit_is_told_and_the_others_are_drawn(fit: int) -> None:
    largest = [0, *map(math.prod, reversed(LARGEST_FIRST))][fit]
    runtime = NotingRuntime(largest)
    told = warm_up(runtime, size_limit(runtime.model))
    assert told == [f"too little memory for {shape}" for shape in LARGEST_FIRST[: 3 - fit]]
    assert runtime.drawn == LARGEST_FIRST


def test_what_the_model_refuses_is_not_tried() -> None:
    runtime = NotingRuntime()
    (told,) = warm_up(runtime, SizeLimit(math.prod(LARGEST_FIRST[1])))
    assert told.startswith("CT of (178, 512, 512) voxels (z, y, x): expected at most")
    assert runtime.drawn == LARGEST_FIRST[1:]
