"""Peers run on a small study, each beside ours, and what is not installed is said."""

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import common, peers
from benchmarks.peers import EAGER, MIRRORED, MONAI, NNUNET, OURS, OURS_WHOLE, SIMPLE_ITK, STAGES, median_row

pytest.importorskip("monai", reason="a peer is MONAI's")
pytest.importorskip("SimpleITK", reason="a peer reads with it")


def test_every_peer_that_is_there_has_a_row(small_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(peers, "has_nnunet", lambda: False)
    arguments = ["--study", str(small_study), "--repeats", "1", "--warm-ups", "0", "--roi", "40", "32", "32"]
    outcome = CliRunner().invoke(peers.main, arguments)
    assert outcome.exit_code == 0, outcome.output
    written = json.loads((tmp_path / "peers.json").read_text())
    installed = importlib.util.find_spec("rt_utils") is not None
    assert list(written["rows"]) == [OURS, OURS_WHOLE, EAGER, MONAI, *([SIMPLE_ITK] if installed else [])]
    for row in written["rows"].values():
        assert set(row["seconds"]) == set(STAGES)
        assert 0 < sum(row["seconds"].values()) < row["wall"]
        assert row["peak_gb"] > 0.05
    assert written["rows"][OURS]["ratio_to_ours"] == 1.0
    assert written["monai"] == {"roi": [40, 32, 32], "windows_at_once": 4, "overlap": 0.25}
    assert {"date", "cpu", "cores", "versions"} <= set(written["machine"])
    assert written["not_measured"].keys() == {NNUNET, MIRRORED} | (set() if installed else {SIMPLE_ITK})
    assert "| not measured" in outcome.output
    assert "pip install -c constraints.txt nnunetv2" in outcome.output


def test_medians_and_the_largest_memory() -> None:
    runs = [
        {"seconds": dict.fromkeys(STAGES, seconds), "wall": 10 * seconds, "peak_gb": gb}
        for seconds, gb in ((1.0, 2.0), (5.0, 1.0), (2.0, 1.5))
    ]
    assert median_row(runs) == {"seconds": dict.fromkeys(STAGES, 2.0), "wall": 20.0, "peak_gb": 2.0}
