"""export/composition.py: what the TensorRT ensemble computes, held against the checkpoint."""

from pathlib import Path

import numpy as np
import pytest

from anatomynet.engine.errors import GeometryError
from anatomynet.export.composition import ComposedRuntime, plan_parts, write_part
from anatomynet.export.parity import check_parity, draw_reference
from tests.random_network import CALIBRATION_SHAPE, random_config, random_graph, random_network, smooth_hu


@pytest.mark.parametrize("stride", [1, 4])
def test_the_composition_draws_what_the_checkpoint_draws(stride: int) -> None:
    config = random_config(stride)
    shape = CALIBRATION_SHAPE if stride > 1 else (21, 67, 83)
    hu = smooth_hu(shape)
    runtime = ComposedRuntime(plan_parts(random_graph(), config), config)
    if stride > 1:
        rounded, report = check_parity(draw_reference(random_network(), config, hu), runtime, fp16=True)
        assert "the plan's graph" in report.subject
        assert rounded.largest_activation is not None
    labels, confidence = runtime.infer(hu)
    assert labels.shape == shape
    assert labels.dtype == np.uint8
    assert confidence.shape == (len(config.structures),)


def test_what_a_plan_cannot_take_is_refused() -> None:
    config = random_config()
    runtime = ComposedRuntime(plan_parts(random_graph(), config), config)
    with pytest.raises(GeometryError, match="at most"):
        runtime.infer(np.broadcast_to(np.int16(0), (2000, 512, 512)))


def test_every_part_is_valid_onnx(tmp_path: Path) -> None:
    parts = plan_parts(random_graph(), random_config())
    for name in ("prepare", "network", "finish"):
        assert write_part(getattr(parts, name), tmp_path / f"{name}.onnx").stat().st_size > 0
