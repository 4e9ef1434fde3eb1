"""Growth is measured on the real server, fitted, and drawn."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import common, growth
from benchmarks.growth import fit
from tests.triton_servers import has_server

pytest.importorskip("matplotlib", reason="the curves are drawn with it")


def points(y: list[float]) -> list[dict[str, float]]:
    return [{"x": x, "whole_s": value} for x, value in zip((1.0, 2.0, 3.0, 4.0, 5.0), y, strict=True)]


def test_a_line_is_told_from_a_parabola() -> None:
    line = fit(points([5.0, 8.0, 11.0, 14.0, 17.0]), "whole_s")
    assert line == pytest.approx({"a": 2.0, "b": 3.0, "r2": 1.0, "exponent": 1.0})
    parabola = fit(points([3.0, 6.0, 11.0, 18.0, 27.0]), "whole_s")
    assert parabola["exponent"] == 2.0
    assert parabola["r2"] < 0.98


@pytest.mark.skipif(not has_server(), reason="no tritonserver here: pip install 'anatomynet[serve]'")
def test_every_curve_is_written_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    sizes = ["--slices", "40,56", "--sides", "128", "--clients", "2"]
    outcome = CliRunner().invoke(growth.main, [*sizes, "--scale", "0.25", "--repeats", "1"])
    assert outcome.exit_code == 0, outcome.output
    written = json.loads((tmp_path / "growth.json").read_text())
    assert {axis: [point["x"] for point in curve] for axis, curve in written["curves"].items()} == {
        "slices": [40, 56],
        "pixels": [128**2],
        "clients": [2],
    }
    for point in (point for curve in written["curves"].values() for point in curve):
        assert all(value > 0 for value in point.values())
    assert {axis: set(fits) for axis, fits in written["fits"].items()} == {
        "slices": {"whole_s", "infer_s", "client_gb", "server_gb"},
        "pixels": {"whole_s", "infer_s", "client_gb", "server_gb"},
        "clients": {"infer_s", "server_gb"},
    }
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
