"""Two checkouts are timed by turns, each by its own code."""

from pathlib import Path

import click
import pytest

from benchmarks.by_turns import HERE, by_turns, commit_of
from benchmarks.stages import STAGES


def test_each_checkout_has_its_medians(small_study: Path) -> None:
    rows = by_turns({"earlier": HERE, "now": HERE}, small_study, [], repeats=1)
    for row in rows.values():
        assert set(row) == {*STAGES, "wall"}
        assert 0 < sum(row[stage] for stage in STAGES) < row["wall"]


def test_the_other_checkouts_code_runs(small_study: Path, tmp_path: Path) -> None:
    package = tmp_path / "src" / "anatomynet" / "client"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "cli.py").write_text("def main():\n    return 'the code of the other checkout'\n")
    with pytest.raises(click.ClickException, match="the code of the other checkout"):
        by_turns({"earlier": tmp_path}, small_study, [], repeats=1)
    assert commit_of(tmp_path) == ""
