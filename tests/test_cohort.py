"""Many studies in one run, with the embedded engine: what is good is drawn, what is bad is named, memory stays flat."""

import csv
import json
import shutil
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from pydicom import dcmread

from anatomynet.client import SegmentOptions, segment_studies
from anatomynet.client.cli import main
from anatomynet.client.cohort import IN_FLIGHT
from anatomynet.client.cohort_table import HEADER
from anatomynet.client.ct_writer import write_ct_series
from anatomynet.client.records import RECORDS, is_done
from anatomynet.client.structure_set import read_structure_set
from anatomynet.client.study import CTSeries, read_ct_series, volume_from_series
from anatomynet.client.study_search import find_studies
from anatomynet.engine.errors import ModelError, OutputError, ServerError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.runtime import OpenVinoRuntime, Runtime
from anatomynet.engine.volume import CTVolume, HounsfieldArray
from tests.dicom_studies import edit

pytest.importorskip("openvino")
SHAPE = (8, 48, 48)
STUDIES, BAD = 100, 5
SIZE_OF_A_STUDY = VolumeGeometry(SHAPE, (1.0, 1.0, 2.5))


def write_tiny(folder: Path, *, seed: int = 0) -> Path:
    """A study on which the random network draws something."""
    from tests.random_network import smooth_hu

    write_ct_series(folder, CTVolume(smooth_hu(SHAPE), SIZE_OF_A_STUDY), seed=seed)
    return folder


def break_studies(folder: Path) -> dict[str, str]:
    """Five of the studies, each spoilt in its own way: name -> a word of the error."""
    slices = {name: sorted((folder / name).iterdir()) for name in ("p003", "p020", "p041", "p066", "p099")}
    slices["p003"][3].unlink()
    slices["p020"][2].write_bytes(slices["p020"][2].read_bytes()[:900])
    shutil.rmtree(folder / "p041")
    (folder / "p041").mkdir()
    for path in slices["p066"]:
        edit(path, GantryDetectorTilt=15)
    edit(slices["p099"][0], PixelSpacing=[3.0, 3.0])
    return {"p003": "missing", "p020": "damaged", "p041": "no CT", "p066": "tilt", "p099": "PixelSpacing"}


@pytest.fixture(scope="module")
def runtime(random_onnx_files: tuple[Path, Path]) -> Runtime:
    return OpenVinoRuntime(random_onnx_files[0])


@pytest.fixture
def embedded(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's own choice is the random network: the shipped one draws nothing on noise."""
    monkeypatch.setattr("anatomynet.client.connection.choose_runtime", lambda server: runtime)


class Changing:
    """A runtime during whose every call something happens first."""

    def __init__(self, runtime: Runtime, meanwhile: Callable[["Changing"], object]) -> None:
        self._runtime, self._meanwhile = runtime, meanwhile
        self.model, self.description = runtime.model, runtime.description
        self.calls = 0

    def infer(self, hu: HounsfieldArray) -> Any:
        self.calls += 1
        self._meanwhile(self)
        return self._runtime.infer(hu)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["segment", *map(str, arguments)])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def two(folder: Path) -> Sequence[Path]:
    return [write_tiny(folder / name, seed=seed) for seed, name in enumerate(("first", "second"))]


@pytest.mark.usefixtures("embedded")
def test_a_hundred_studies_with_five_bad_ones(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    volumes: list[weakref.ref[CTVolume]] = []

    def read(series: CTSeries) -> CTVolume:
        volume = volume_from_series(series)
        volumes.append(weakref.ref(volume))
        return volume

    monkeypatch.setattr("anatomynet.client.pipeline.volume_from_series", read)
    template = write_tiny(tmp_path / "template")
    studies, results = tmp_path / "studies", tmp_path / "results"
    for number in range(STUDIES):
        shutil.copytree(template, studies / f"p{number:03d}")
        for path in (studies / f"p{number:03d}").iterdir() if number < 2 else ():
            edit(path, StudyInstanceUID=f"1.2.{number + 1}")  # two studies below make it a folder of studies
    words = break_studies(studies)
    outcomes, most = [], 0
    for outcome in segment_studies([studies], output_folder=results, runtime=runtime):
        outcomes.append(outcome)
        most = max(most, sum(volume() is not None for volume in volumes))
    failures = {o.study.name: o.error for o in outcomes if o.status == "failed"}
    assert set(failures) == set(words), failures
    assert Counter(o.status for o in outcomes) == {"drawn": STUDIES - BAD, "failed": BAD}
    assert len(list(results.glob("*.rtstruct.dcm"))) == STUDIES - BAD
    assert len(volumes) >= STUDIES - BAD
    assert most <= IN_FLIGHT
    again = run(studies, "--output-folder", results)
    assert again.exit_code == 1, again.output
    rows = rows_of(results / "anatomynet-segment.csv")
    assert Counter(row["status"] for row in rows) == {"done before": STUDIES - BAD, "failed": BAD}
    for row in rows:
        word = words.get(Path(row["study"]).name)
        assert (word in row["error"]) if word else not row["error"], row
    assert again.stderr.splitlines()[-1] == f"error: {BAD} of {STUDIES} could not be drawn; the table says why"


@pytest.mark.usefixtures("embedded")
def test_what_is_done_is_known_by_what_it_was_made_of(tmp_path: Path) -> None:
    first, second = two(tmp_path)
    results = tmp_path / "results"
    drawn = run(first, second, "--output-folder", results)
    assert drawn.exit_code == 0, drawn.output
    looked_at = [row["look_at"] for row in rows_of(results / "anatomynet-segment.csv")]
    assert "0" not in looked_at
    other = run(first, second, "--output-folder", results, "--tolerance-mm", "0.7")
    assert "with other options" in other.stdout
    (results / "second.rtstruct.dcm").unlink()
    (results / "first.rtstruct.dcm").write_bytes(b"a physician's work")
    changed = run(first, second, "--output-folder", results)
    assert "changed since it was drawn" in changed.stdout
    assert (results / "second.rtstruct.dcm").exists()
    again = run(first, second, "--output-folder", results)
    assert "done before" in again.stdout
    assert [row["look_at"] for row in rows_of(results / "anatomynet-segment.csv")] == ["0", looked_at[1]]
    assert (results / "first.rtstruct.dcm").read_bytes() == b"a physician's work"
    shutil.rmtree(first)
    write_tiny(first, seed=7)
    run(first, "--output-folder", results, "--overwrite")
    shutil.rmtree(first)
    write_tiny(first, seed=8)
    assert "of other slices" in run(first, "--output-folder", results).stdout


@pytest.mark.usefixtures("embedded")
def test_every_series_of_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = tmp_path / "study"
    for path in two(study):
        for file in path.iterdir():
            edit(file, StudyInstanceUID="1.2.3", PatientID="one")
    result = run(study, "--all-series")
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("study.*.rtstruct.dcm"))) == 2
    for path in tmp_path.glob("study.*.rtstruct.dcm"):
        path.unlink()
    for here, named in ((study, "."), (study / "first", "..")):
        monkeypatch.chdir(here)
        result = run(named, "--all-series", "--overwrite")
        assert result.exit_code == 0, result.output
        assert len(list(tmp_path.glob("study.*.rtstruct.dcm"))) == 2
        assert not list(study.rglob("*.rtstruct.dcm"))


@pytest.mark.usefixtures("embedded")
def test_one_series_of_a_study_into_a_folder(tmp_path: Path) -> None:
    study, results = tmp_path / "study", tmp_path / "results"
    for path in two(study):
        for file in path.iterdir():
            edit(file, StudyInstanceUID="1.2.3", PatientID="one")
    uid = str(dcmread(next((study / "second").iterdir())).SeriesInstanceUID)
    result = run(study, "--series", uid, "--output-folder", results)
    assert result.exit_code == 0, result.output
    drawn = read_ct_series(study, series_instance_uid=uid)
    read_structure_set(results / "study.rtstruct.dcm", drawn)  # refuses another series' frame of reference
    both = run(study, "--series", uid, "--all-series", "--output-folder", results)
    assert "--series chooses one series, --all-series takes every one: give one of them" in both.stderr


def test_one_file_beside_a_table_is_refused(tmp_path: Path) -> None:
    study, _ = two(tmp_path / "both")
    with pytest.raises(OutputError, match=r"--output names one file; .*: give --output-folder"):
        segment_studies([study], SegmentOptions(output=tmp_path / "rs.dcm"))


def test_two_patients_never_become_one_study(tmp_path: Path) -> None:
    two(tmp_path / "both")
    assert [study.name for study in find_studies([tmp_path / "both"])] == ["first", "second"]
    one = tmp_path / "one"
    for path in two(one):
        for file in path.iterdir():
            edit(file, StudyInstanceUID="1.2.3", PatientID="one")
    assert [study.path for study in find_studies([one])] == [one]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    named = [tmp_path / "a" / "CT", tmp_path / "b" / "CT", tmp_path / "a" / "CT"]
    assert [study.name for study in find_studies(named)] == ["a_CT", "b_CT"]


def test_a_zip_file_is_a_study_however_deep_it_lies(tmp_path: Path) -> None:
    write_tiny(tmp_path / "study")
    packed = shutil.make_archive(str(tmp_path / "in" / "site" / "patient" / "export"), "zip", tmp_path / "study")
    assert [study.path for study in find_studies([tmp_path / "in"])] == [Path(packed)]


@pytest.mark.usefixtures("embedded")
def test_unknown_structures_are_refused_before_anything_is_read(tmp_path: Path, runtime: Runtime) -> None:
    result = run(tmp_path / "not there", "--structures", "Spleen")
    assert "unknown structure 'Spleen'" in result.stderr
    with pytest.raises(ModelError, match="Spleen"):
        next(segment_studies([tmp_path / "no"], SegmentOptions(structures=("Spleen",)), runtime=runtime))


def test_one_file_for_many_studies_is_refused(tmp_path: Path) -> None:
    studies = two(tmp_path / "both")
    with pytest.raises(OutputError, match="--output-folder"):
        segment_studies(studies, SegmentOptions(output=tmp_path / "rs.dcm"))


def test_a_table_that_is_none_of_ours_is_kept(tmp_path: Path) -> None:
    studies = two(tmp_path / "both")
    table = tmp_path / "table.csv"
    table.write_text("patient,dose\n")
    assert "exists and was kept" in run(*studies, "--csv", table).stderr
    assert table.read_text() != HEADER


def test_a_file_that_appears_while_a_study_is_drawn_is_kept(tmp_path: Path, runtime: Runtime) -> None:
    study, file = write_tiny(tmp_path / "study"), tmp_path / "study.rtstruct.dcm"
    (outcome,) = segment_studies([study], runtime=Changing(runtime, lambda _: file.write_bytes(b"a physician's")))
    assert outcome.status == "failed"
    assert "exists and was kept: nothing says that it was drawn from this study" in outcome.error
    assert file.read_bytes() == b"a physician's"
    assert not list((tmp_path / RECORDS).iterdir())


def test_what_another_run_draws_at_the_same_time_is_done_before(tmp_path: Path, runtime: Runtime) -> None:
    study, drawn = write_tiny(tmp_path / "study"), list[bytes]()

    def draw_too(_: Changing) -> None:
        (outcome,) = segment_studies([study], runtime=runtime)
        assert outcome.status == "drawn"
        drawn.append(outcome.outputs[0].read_bytes())

    (outcome,) = segment_studies([study], runtime=Changing(runtime, draw_too))
    assert outcome.status == "done before"
    assert [outcome.outputs[0].read_bytes()] == drawn


def test_a_record_and_its_file_name_the_model_that_drew(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server has loaded another one, which the second study finds while the third has been read."""
    another, third_read = replace(runtime.model, checkpoint_sha256="0ddba11" * 9 + "0"), threading.Event()
    asked: list[Any] = []

    def is_done_noted(*arguments: Any) -> bool:
        asked.append(arguments)
        if len(asked) == 3:
            third_read.set()
        return is_done(*arguments)

    def find_another(changing: Changing) -> None:
        if changing.calls == 2:
            assert third_read.wait(60)
            changing.model = another
            raise ServerError("the server has changed meanwhile")

    monkeypatch.setattr("anatomynet.client.cohort.is_done", is_done_noted)
    studies = [write_tiny(tmp_path / f"p{number}", seed=number) for number in range(4)]
    outcomes = list(segment_studies(studies, runtime=Changing(runtime, find_another)))
    assert Counter(outcome.status for outcome in outcomes) == {"drawn": 3, "failed": 1}
    recorded = []
    for file in (file for outcome in outcomes for file in outcome.outputs):
        record = json.loads((tmp_path / RECORDS / f"{file.name}.json").read_bytes())
        recorded.append(record["checkpoint_sha256"])
        assert f"checkpoint {recorded[-1][:12]}" in dcmread(file).StructureSetDescription
    assert Counter(recorded) == {runtime.model.checkpoint_sha256: 1, another.checkpoint_sha256: 2}


def test_a_drawing_that_may_be_of_two_models_is_none(tmp_path: Path, runtime: Runtime) -> None:
    """Another thread of the program has found that the server's model has changed."""

    def found(changing: Changing) -> None:
        changing.model = replace(runtime.model, checkpoint_sha256="0ddba11" * 9 + "0")

    (outcome,) = segment_studies([write_tiny(tmp_path / "study")], runtime=Changing(runtime, found))
    assert outcome.error == "the server's model has changed meanwhile: segment the study again"
    assert not list(tmp_path.glob("*.dcm"))
