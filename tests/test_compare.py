"""`compare`: from two files of contours to the table, the JSON, the figure and the animation."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from anatomynet.client.cli import main
from anatomynet.client.compare import compare_files, mean_agreement
from anatomynet.client.contours import trace_contours
from anatomynet.client.overlay import (
    AGREEMENT,
    OVERLAY_COLOURS,
    PREDICTION,
    REFERENCE,
    label_map_of,
    overlay_labels,
)
from anatomynet.client.rtstruct import write_rtstruct
from anatomynet.client.study import CTSeries, read_ct_series
from anatomynet.engine.metrics import compare_label_maps
from anatomynet.engine.structures import structures_by_name
from anatomynet.engine.volume import LabelMap
from tests.dicom_studies import random_volume, words_of_patient, write_study

SHAPE = (10, 40, 44)
NAMES = ("BrainStem", "Parotid_L", "Larynx")

Labels = NDArray[np.uint8]


def reference_labels() -> Labels:
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:6, 4:14, 4:14], labels[2:8, 20:33, 6:15], labels[3:9, 18:30, 25:40] = 1, 2, 3
    return labels


def predicted_labels() -> Labels:
    """The brainstem a voxel to the left, the parotid as it is, no larynx."""
    labels = reference_labels()
    labels[labels == 3] = 0
    labels[labels == 1] = 0
    labels[1:6, 4:14, 5:15] = 1
    return labels


class Study:
    """A CT with a physician's structure set and the network's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ct = folder / "ct"
        write_study(self.ct, random_volume(SHAPE))
        self.series: CTSeries = read_ct_series(self.ct)
        self.reference = self.write("reference.dcm", reference_labels())
        self.prediction = self.write("prediction.dcm", predicted_labels())

    def write(self, name: str, labels: Labels) -> Path:
        label_map = LabelMap(labels, self.series.geometry, structures_by_name(NAMES))
        write_rtstruct(self.folder / name, self.series, trace_contours(label_map))
        return self.folder / name

    def compare(self, *options: str, **files: Path) -> Result:
        """The command, on its own files unless others are given."""
        reference, prediction = files.get("reference", self.reference), files.get("prediction", self.prediction)
        arguments = [self.ct, "--reference", reference, "--prediction", prediction, *options]
        return CliRunner().invoke(main, ["compare", *map(str, arguments)])


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path)


def rename(path: Path, names: dict[str, str]) -> None:
    dataset = pydicom.dcmread(path)
    for roi in dataset.StructureSetROISequence:
        roi.ROIName = names.get(roi.ROIName, roi.ROIName)
    dataset.save_as(path)


def empty(path: Path, name: str) -> None:
    """Leave an ROI its name and take its contours."""
    dataset = pydicom.dcmread(path)
    number = next(roi.ROINumber for roi in dataset.StructureSetROISequence if roi.ROIName == name)
    item = next(c for c in dataset.ROIContourSequence if c.ReferencedROINumber == number)
    del item.ContourSequence
    dataset.save_as(path)


def test_the_table_has_a_line_a_structure(study: Study) -> None:
    result = study.compare()
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["Brainstem", "Parotid_L", "mean", "Larynx"]
    assert lines[1].split()[1] == "0.900"  # 9 of 10 columns in common
    assert lines[2].split()[1:3] == ["1.000", "1.000"]
    assert lines[4].endswith("not compared: not in the prediction")


def test_files_agree_as_their_label_maps_do(study: Study) -> None:
    found = compare_files(study.prediction, study.reference, study.series)
    maps = [
        LabelMap(labels, study.series.geometry, structures_by_name(NAMES))
        for labels in (predicted_labels(), reference_labels())
    ]
    assert [pair.agreement for pair in found.pairs] == list(compare_label_maps(*maps))[:2]


def test_an_empty_roi_is_a_miss_and_counts(study: Study) -> None:
    prediction = study.write("whole.dcm", reference_labels())
    empty(prediction, "Larynx")
    result = study.compare("--json", str(study.folder / "c.json"), prediction=prediction)
    assert "missed: the prediction is empty" in result.output
    found = json.loads((study.folder / "c.json").read_text())
    assert found["missed"] == 1
    assert found["mean"]["dice"] == pytest.approx(2 / 3)


def test_names_are_matched_by_the_aliases(study: Study) -> None:
    rename(study.reference, {"Parotid_L": "LT PAROTID", "Brainstem": "Stammhirn", "Larynx": "PTV70"})
    assert "Parotid_L" in study.compare().output
    assert "Brainstem         not compared: not in the reference" in study.compare().output
    ours = study.folder / "ours.toml"
    ours.write_text('BrainStem = ["Stammhirn"]\n')
    assert "Brainstem            0.900" in study.compare("--aliases", str(ours)).output


def test_two_rois_of_one_structure_are_told_apart_or_refused(study: Study) -> None:
    rename(study.reference, {"Larynx": "parotid left"})
    assert "Parotid_L            1.000" in study.compare().output  # the exact name wins
    rename(study.reference, {"Parotid_L": "LT PAROTID"})
    output = study.compare().output
    assert (
        "Parotid_L         not compared: the reference has 2 ROIs of that name ('LT PAROTID', 'parotid left')" in output
    )


def set_kind(path: Path, roi: int, kind: str) -> None:
    dataset = pydicom.dcmread(path)
    for contour in dataset.ROIContourSequence[roi].ContourSequence:
        contour.ContourGeometricType = kind
    dataset.save_as(path)


def test_an_roi_that_cannot_be_drawn_is_a_line_of_its_own(study: Study) -> None:
    set_kind(study.reference, 1, "OPEN_PLANAR")
    assert "Parotid_L         not compared: in the reference, 6 of 6 contours are open" in study.compare().output


def one_line_of_error(result: Result) -> str:
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert not any(word in result.output for word in words_of_patient())
    return lines[0]


def test_what_cannot_be_compared_is_one_clear_line(study: Study) -> None:
    rename(study.reference, {"Parotid_L": "GTV", "Brainstem": "PTV", "Larynx": "CTV"})
    assert "no structure in common: the prediction has 'Brainstem', 'Parotid_L', the reference 'PTV', 'GTV', 'CTV'" in (
        one_line_of_error(study.compare())
    )
    dataset = pydicom.dcmread(study.prediction)
    for roi in dataset.StructureSetROISequence:
        roi.ReferencedFrameOfReferenceUID = "1.2.3.4711"
    dataset.save_as(study.prediction)
    assert "drawn in frame of reference" in one_line_of_error(study.compare())
    assert "cannot be read" in one_line_of_error(study.compare(prediction=study.folder / "none.dcm"))


def test_every_number_is_in_the_json_and_the_csv(study: Study) -> None:
    files = [study.folder / "c.json", study.folder / "c.csv"]
    assert study.compare("--json", str(files[0]), "--csv", str(files[1])).exit_code == 0
    found = json.loads(files[0].read_text())
    comparison = compare_files(study.prediction, study.reference, study.series)
    assert found["mean"] == mean_agreement(comparison)
    assert found["not_compared"] == {"Larynx": "not in the prediction"}
    with files[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["Brainstem", "Parotid_L"]
    for row, agreement in zip(rows, found["structures"], strict=True):
        assert {key: str(value) for key, value in agreement.items()} == row
    text = "".join(file.read_text() for file in files)
    assert not any(word in text for word in words_of_patient())


def test_results_are_kept_unless_they_may_be_overwritten(study: Study) -> None:
    old = study.folder / "c.json"
    old.write_text("old")
    assert "exists and was kept" in one_line_of_error(study.compare("--json", str(old)))
    assert old.read_text() == "old"
    assert study.compare("--json", str(old), "--overwrite").exit_code == 0


def test_the_overlay_by_hand(study: Study) -> None:
    comparison = compare_files(study.prediction, study.reference, study.series)
    labels = overlay_labels(comparison)
    expected = np.zeros(SHAPE, np.uint8)
    expected[1:6, 4:14, 5:14], expected[1:6, 4:14, 4], expected[1:6, 4:14, 14] = AGREEMENT, REFERENCE, PREDICTION
    expected[2:8, 20:33, 6:15] = AGREEMENT
    np.testing.assert_array_equal(labels, expected)
    drawn = predicted_labels()
    np.testing.assert_array_equal(label_map_of(comparison, "prediction"), drawn)


def test_the_figure_shows_green_red_and_yellow(study: Study) -> None:
    from PIL import Image

    path = study.folder / "figure.png"
    assert study.compare("--figure", str(path)).exit_code == 0
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    for colour in OVERLAY_COLOURS:
        assert (pixels == colour).all(axis=1).sum() > 100


def test_the_gif_runs_through_every_slice(study: Study) -> None:
    from PIL import Image

    path = study.folder / "film.gif"
    assert study.compare("--animation", str(path)).exit_code == 0
    with Image.open(path) as film:
        frames: list[Any] = []
        for k in range(film.n_frames):  # type: ignore[attr-defined]
            film.seek(k)
            frames.append(np.asarray(film.convert("RGB")).copy())
    assert len(frames) == SHAPE[0]
    middle = frames[0].shape[1] // 2
    blue = np.array(structures_by_name(("Parotid_L",))[0].colour)
    for half in (slice(None, middle), slice(middle, None)):
        assert (frames[4][:, half] == blue).all(axis=-1).sum() > 50
        assert (frames[9][:, half] == blue).all(axis=-1).sum() == 0


def test_a_film_without_ffmpeg_says_what_to_do(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    table = ["--json", str(study.folder / "c.json")]  # not written, since this is told before any work is done
    line = one_line_of_error(study.compare("--animation", str(study.folder / "film.mp4"), *table))
    assert "ffmpeg" in line
    assert ".gif" in line
    line = one_line_of_error(study.compare("--animation", str(study.folder / "film.avi"), *table))
    assert "ends in .gif or .mp4" in line
    assert not [path for path in study.folder.iterdir() if path.suffix in (".json", ".mp4", ".avi")]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_a_film_by_ffmpeg(study: Study) -> None:
    path = study.folder / "film.mp4"
    assert study.compare("--animation", str(path)).exit_code == 0
    assert path.read_bytes()[4:8] == b"ftyp"


def test_ffmpeg_reads_nothing_of_what_is_meant_for_others(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the names that `while read study; do anatomynet-client compare ...; done` has yet to read."""
    program, names = study.folder / "ffmpeg", study.folder / "names"
    program.write_text('#!/bin/sh\nfor film; do :; done\ncat > "$film"\n')  # "$film" is the last argument
    program.chmod(0o755)
    names.write_text("the other studies")
    monkeypatch.setattr(shutil, "which", lambda _: str(program))
    before = os.dup(0)
    try:
        with names.open() as file:
            os.dup2(file.fileno(), 0)
            assert study.compare("--animation", str(study.folder / "film.mp4")).exit_code == 0
            assert os.read(0, 100) == b"the other studies"
    finally:
        os.dup2(before, 0)
        os.close(before)


def test_it_needs_no_torch(study: Study) -> None:
    code = (
        "import sys; from anatomynet.client.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'openvino' not in sys.modules"
    )
    arguments = ["compare", study.ct, "--reference", study.reference, "--prediction", study.prediction]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True)
