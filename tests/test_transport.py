"""A volume goes every way to a real server and back."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import common, transport
from benchmarks.transport import COPIES, VOLUMES, WAYS
from tests.triton_servers import has_server


@pytest.mark.skipif(not has_server(), reason="no tritonserver here: pip install 'anatomynet[serve]'")
def test_every_way_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    outcome = CliRunner().invoke(transport.main, ["--repeats", "1", "--scale", "0.25"])
    assert outcome.exit_code == 0, outcome.output
    written = json.loads((tmp_path / "transport.json").read_text())
    assert {name: set(ways) for name, ways in written["seconds"].items()} == {name: set(WAYS) for name in VOLUMES}
    assert all(seconds > 0 for ways in written["seconds"].values() for seconds in ways.values())
    assert written["shapes"]["whole study"] == [44, 128, 128]
    assert {name: set(copies) for name, copies in written["copies"].items()} == {name: set(COPIES) for name in VOLUMES}
    assert "times as long as HTTP" in outcome.output
