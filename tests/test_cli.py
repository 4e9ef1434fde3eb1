"""The commands: every bad input is one clear line and exit status 1, and nothing is left behind."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from anatomynet.client.cli import main
from anatomynet.client.ct_writer import write_ct_series
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.phantom import make_phantom
from tests.full_disk import largest_file
from tests.triton_servers import RunningServer, ServerStarter, free_ports

# The throat and jaw of a phantom at the spacing that was trained, and the same at another.
TRAINED = VolumeGeometry((64, 256, 256), (1.0, 1.0, 3.0))
OTHER = VolumeGeometry((48, 128, 128), (2.0, 2.0, 4.0))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "study"
    write_ct_series(folder, make_phantom(TRAINED)[0])
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result) -> str:
    """The one line of a command that could not do what it was asked."""
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_study_becomes_an_rtstruct(study: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("output.dcm", "picture.png", "report.json", "review.html")}
    options = [part for name, path in files.items() for part in (f"--{name.split('.')[0]}", path)]
    result = run("segment", study, *options)
    assert result.exit_code == 0, result.output
    assert "Bone_Mandible" in result.output
    assert sorted(tmp_path.iterdir()) == sorted(files.values())
    # Every finding is in the report and on the page.
    for finding in json.loads(files["report.json"].read_text())["findings"]:
        assert json.dumps(finding["text"], ensure_ascii=False) in files["review.html"].read_text()


def test_an_output_that_exists_is_kept_before_any_work(study: Path, tmp_path: Path) -> None:
    output = tmp_path / "rs.dcm"
    output.write_bytes(b"a physician's work")
    assert "exists and was kept" in refused(run("segment", study, "--output", output))
    assert output.read_bytes() == b"a physician's work"


def test_a_folder_without_ct_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no CT here")
    assert "CT" in refused(run("segment", tmp_path, "--output", tmp_path / "rs.dcm"))
    assert not (tmp_path / "rs.dcm").exists()


def test_two_series_are_listed(study: Path, tmp_path: Path) -> None:
    both = tmp_path / "study"
    shutil.copytree(study, both / "first")
    write_ct_series(both / "second", make_phantom(TRAINED)[0], seed=5)
    assert "--series" in refused(run("segment", both, "--output", tmp_path / "rs.dcm"))


def test_a_missing_slice_is_refused(study: Path, tmp_path: Path) -> None:
    gap = tmp_path / "study"
    shutil.copytree(study, gap)
    sorted(gap.iterdir())[30].unlink()
    refused(run("segment", gap, "--output", tmp_path / "rs.dcm"))
    assert not (tmp_path / "rs.dcm").exists()


def test_a_damaged_slice_is_named(study: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "study"
    shutil.copytree(study, damaged)
    victim = sorted(damaged.iterdir())[30]
    victim.write_bytes(victim.read_bytes()[:4000])
    assert victim.name in refused(run("segment", damaged, "--output", tmp_path / "rs.dcm"))


def test_a_spacing_that_was_not_trained_is_resampled_and_told(tmp_path: Path) -> None:
    write_ct_series(tmp_path / "study", make_phantom(OTHER)[0])
    result = run("segment", tmp_path / "study", "--output", tmp_path / "rs.dcm")
    assert result.exit_code == 0, result.output
    assert "resampled from 2 x 2 x 4 mm" in result.output


def test_a_full_disk_leaves_nothing(study: Path, tmp_path: Path) -> None:
    with largest_file(1024):
        result = run("segment", study, "--output", tmp_path / "rs.dcm")
    assert "nothing was left behind" in refused(result)
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_not_there_is_never_replaced_silently(study: Path, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    server = ["--url", f"localhost:{port}", "--wait", 0]
    line = refused(run("segment", study, "--output", tmp_path / "rs.dcm", *server))
    assert str(port) in line
    assert not list(tmp_path.iterdir())


def test_a_server_without_the_model_is_told(
    study: Path, tmp_path: Path, start_server: ServerStarter, random_repository: Path
) -> None:
    with start_server(random_repository, "--model-control-mode=explicit") as server:  # nothing is loaded
        line = refused(run("segment", study, "--output", tmp_path / "rs.dcm", "--url", server.url))
    assert "anatomynet" in line


def test_info_tells_what_a_server_serves(triton_server: RunningServer) -> None:
    result = run("info", "--url", triton_server.url)
    assert result.exit_code == 0, result.output
    assert "checkpoint sha256: " in result.output


def test_a_phantom_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "1.dcm").touch()
    assert "was kept" in refused(run("phantom", tmp_path / "study"))
