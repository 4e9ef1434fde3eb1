"""Every engine computes the same logits, and stands in the table with its speed or a reason."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from anatomynet.client.ct_writer import write_ct_series
from anatomynet.engine.network import AnatomyNet
from benchmarks import common, engines
from benchmarks.engines import ENGINES, GPU_ENGINES, NO_GPU, OPENVINO, flop_of
from benchmarks.growth import stretched
from benchmarks.served import phantom_hu

LARGEST_DIFFERENCE = 1e-3  # of logits of tens


def test_every_engine_that_is_there_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(engines, "MATRIX", 256)
    study = tmp_path / "study"
    write_ct_series(study, stretched(phantom_hu((24, 96, 96)), (24, 96, 96)))
    outcome = CliRunner().invoke(engines.main, ["--study", str(study), "--repeats", "1"])
    assert outcome.exit_code == 0, outcome.output
    written = json.loads((tmp_path / "engines.json").read_text())
    with_gpu = torch.cuda.is_available()
    assert [*written["rows"], *written["not_measured"]] == list(ENGINES)
    assert set(written["rows"]) >= set(ENGINES) - set(GPU_ENGINES)
    for name, row in written["rows"].items():
        assert row["largest_difference"] < LARGEST_DIFFERENCE or name in GPU_ENGINES
        assert row["gflops"] == pytest.approx(written["gflop"] / row["seconds"])
    assert written["rows"][OPENVINO]["times_openvino"] == 1.0
    assert with_gpu or set(written["not_measured"].values()) == {NO_GPU}


def test_work_is_the_papers() -> None:
    """218 kFLOP a voxel with ten classes."""
    x = torch.zeros(1, 1, 32, 64, 64)
    assert flop_of(AnatomyNet(10), x) / x.numel() == pytest.approx(218e3, rel=0.01)
