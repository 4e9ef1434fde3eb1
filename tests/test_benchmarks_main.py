"""One command runs the benchmarks, shows their tables, and ends with what was not measured."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import __main__ as benchmarks
from benchmarks.__main__ import SCRIPTS, Script, main

QUARTER_OF_AN_HOUR_S = 900


def test_it_promises_a_quarter_of_an_hour() -> None:
    assert "stages" in SCRIPTS
    assert sum(script.seconds for script in SCRIPTS.values()) < QUARTER_OF_AN_HOUR_S


def test_readme_lists_every_script() -> None:
    folder = Path(benchmarks.__file__).parent
    scripts = {path.stem for path in folder.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    readme = (folder / "README.md").read_text()
    assert {name for name in scripts if f"`{name}`" not in readme} == {"__main__"}


def test_tables_results_and_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("SimpleITK", reason="a peer reads with it")
    small = Script(1, ("--repeats", "1", "--shape", "24", "96", "96"))
    monkeypatch.setitem(SCRIPTS, "reading_writing", small)
    monkeypatch.setitem(SCRIPTS, "engines", Script(1, ("--repeats", "none"), takes_study=True))
    arguments = ["--only", "reading_writing,engines", "--study", str(tmp_path), "--results", str(tmp_path / "results")]
    outcome = CliRunner().invoke(main, arguments)
    assert outcome.exit_code == 1
    assert "## reading_writing" in outcome.output
    assert "| start of the command line" in outcome.output
    assert "not measured: engines: failed with status 2: Error: Invalid value for '--repeats'" in outcome.output
    written = json.loads((tmp_path / "results" / "reading_writing.json").read_text())
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["reading_writing.json"]
    for what, reason in written["not_measured"].items():
        assert f"not measured: reading_writing: {what}: {reason}" in outcome.output


def test_an_unknown_one_is_refused() -> None:
    outcome = CliRunner().invoke(benchmarks.main, ["--only", "peers,peer"])
    assert outcome.exit_code == 2
    assert "no benchmark peer: expected some of stages," in outcome.output
