"""bfloat16 is computed where it is fast and wanted, and nowhere else."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from anatomynet.engine import precision
from anatomynet.engine.precision import computes_bfloat16, in_bfloat16


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_bfloat16_takes_a_processor_for_it(monkeypatch: pytest.MonkeyPatch, fast: bool, wanted: bool) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device_type: fast)
    image, kernel = torch.ones(1, 1, 4, 4, 4), torch.ones(1, 1, 3, 3, 3)
    with in_bfloat16("cpu", wanted=wanted):
        assert F.conv3d(image, kernel).dtype == (torch.bfloat16 if fast and wanted else torch.float32)


def test_a_gpu_does_and_a_processor_is_asked() -> None:
    mkldnn: Any = torch.ops.mkldnn
    assert computes_bfloat16("cuda")
    assert computes_bfloat16("cpu") == mkldnn._is_mkldnn_bf16_supported()
