"""benchmarks/gpu.py where no GPU is; and the padded network that it times, which must be the same network."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anatomynet.engine.folding import folded
from anatomynet.engine.padding import padded_network
from tests.random_network import random_network

ROOT = Path(__file__).resolve().parent.parent
ROUNDING = 1e-4  # of logits of about 10, in FP32


@pytest.mark.parametrize("multiple", [8, 16])
def test_padded_channels_change_nothing(multiple: int) -> None:
    x = torch.rand(1, 1, 8, 12, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    network = padded_network(random_network(), multiple)
    convolutions = [m for stage in (*network.encoder, *network.decoder) for m in stage.modules()]
    sides = {c for m in convolutions if isinstance(m, torch.nn.Conv3d) for c in m.weight.shape[:2]}
    assert all(side % multiple == 0 for side in sides)
    with torch.inference_mode():
        torch.testing.assert_close(network(x), folded(random_network())(x), atol=ROUNDING, rtol=ROUNDING)


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    run = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (1, "", 1)
    assert "no NVIDIA GPU here" in run.stderr
