"""What is not the network is timed beside SimpleITK, and each goal stands in the table."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import common, reading_writing
from benchmarks.reading_writing import GOALS_S, READ, START, WRITE
from benchmarks.simple_itk import has_rt_utils

pytest.importorskip("SimpleITK", reason="a peer reads with it")


def test_each_way_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    arguments = ["--repeats", "1", "--shape", "24", "96", "96"]
    outcome = CliRunner().invoke(reading_writing.main, arguments)
    assert outcome.exit_code == 0, outcome.output
    written = json.loads((tmp_path / "reading_writing.json").read_text())
    found = [(row["what"], row["by"]) for row in written["rows"] if row["by"] != "rt-utils"]
    assert found == [(READ, "ours"), (READ, "SimpleITK"), (WRITE, "ours"), (START, "ours"), (START, "SimpleITK")]
    for row in written["rows"]:
        assert 0 < row["fastest"] <= row["median"]
        assert row["goal"] == (GOALS_S[row["what"]] if row["by"] == "ours" else None)
        assert row["by"] != "ours" or row["ratio"] == 1.0
    assert len(written["not_measured"]) == (0 if has_rt_utils() else 2)
    assert all(reason in outcome.output for reason in written["not_measured"].values())
