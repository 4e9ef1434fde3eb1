"""Two checkouts are timed by turns, each by its own code."""

from pathlib import Path

import click
import pytest

from anatomynet.client.ct_writer import write_ct_series
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.phantom import make_phantom
from benchmarks.by_turns import HERE, by_turns, commit_of
from benchmarks.stages import STAGES


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom on a coarse grid that is told as a fine one, so that nothing is resampled: 40 x 104 x 104."""
    folder = tmp_path_factory.mktemp("by_turns") / "study"
    volume, _ = make_phantom(VolumeGeometry((40, 104, 104), (4.8, 4.8, 8.9)))
    write_ct_series(folder, type(volume)(volume.hu, VolumeGeometry((40, 104, 104), (1.0, 1.0, 2.5))))
    return folder


def test_each_checkout_has_its_medians(study: Path) -> None:
    rows = by_turns({"earlier": HERE, "now": HERE}, study, [], repeats=1)
    for row in rows.values():
        assert set(row) == {*STAGES, "wall"}
        assert 0 < sum(row[stage] for stage in STAGES) < row["wall"]


def test_the_other_checkouts_code_runs(study: Path, tmp_path: Path) -> None:
    package = tmp_path / "src" / "anatomynet" / "client"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "cli.py").write_text("def main():\n    return 'the code of the other checkout'\n")
    with pytest.raises(click.ClickException, match="the code of the other checkout"):
        by_turns({"earlier": tmp_path}, study, [], repeats=1)
    assert commit_of(tmp_path) == ""
