"""A bad case is named and skipped, an odd one is named, and nothing is left out silently."""

import csv
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nrrd
import numpy as np
import pytest
from numpy.typing import NDArray

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.data import Case, read_case
from anatomynet.engine.errors import DataError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.survey import summary_lines, survey_archive, survey_cases, write_survey
from anatomynet.engine.volume_files import read_volume, write_nrrd
from tests.openkbp import OPENKBP, requires_openkbp

MODEL = ModelConfig("test", ("Parotid_L", "Parotid_R"), 4, (0.9, 0.9, 2.0), (1.2, 1.2, 3.0), (-250.0, 550.0))
GEOMETRY = VolumeGeometry((24, 48, 48), (4.0, 4.0, 3.0))
LEFT, RIGHT = np.s_[6:14, 20:28, 34:40], np.s_[6:14, 20:28, 8:14]  # 18 ml each
Box = tuple[slice, ...]


def mask_of(box: Box) -> NDArray[np.uint8]:
    mask = np.zeros(GEOMETRY.shape, np.uint8)
    mask[box] = 1
    return mask


def write_case(folder: Path, boxes: dict[str, Box], geometry: VolumeGeometry = GEOMETRY) -> None:
    (folder / "structures").mkdir(parents=True)
    hu = np.full(GEOMETRY.shape, -1000, np.int16)
    hu[:, 4:44, 4:44] = 40
    write_nrrd(folder / "img.nrrd", hu, geometry)
    for name, box in boxes.items():
        write_nrrd(folder / "structures" / f"{name}.nrrd", mask_of(box), geometry)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "train"
    write_case(folder / "a_good", {"Parotid_L": LEFT, "Parotid_R": RIGHT, "Thyroid": LEFT})
    write_case(folder / "b_one", {"Parotid_L": LEFT})
    return folder


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        ({"Parotid_L": RIGHT, "Parotid_R": LEFT}, "Parotid_L: lies to the patient's right of Parotid_R"),
        ({"Parotid_L": np.s_[6:14, 20:28, 44:48]}, "Parotid_L: 100% of it lies in air"),
        ({"Parotid_L": np.s_[2:22, 6:42, 24:42]}, "Parotid_L: impossibly large: 622 ml, expected"),
        ({"Parotid_L": np.s_[6:8, 20:24, 34:36]}, "Parotid_L: impossibly small: 0.768 ml, expected"),
        ({"Thyroid": LEFT}, "none of Parotid_L, Parotid_R in its structures/; found Thyroid"),
    ],
)
def test_what_no_patient_can_be_is_skipped(data: Path, boxes: dict[str, Box], reason: str) -> None:
    write_case(data / "c_bad", boxes)
    survey = survey_cases(data, MODEL)
    assert [case.name for case in survey.cases] == ["a_good", "b_one"]
    (skipped,) = survey.skipped
    assert skipped.name == "c_bad"
    assert reason in skipped.skipped
    with pytest.raises(DataError, match=r"1 of 3 cases in .* cannot be used, the first of them c_bad") as error:
        survey_cases(data, MODEL, strict=True)
    assert reason in str(error.value)


def test_a_damaged_file_and_a_foreign_spacing_are_skipped(data: Path) -> None:
    write_case(data / "c_foreign", {"Parotid_L": LEFT}, replace(GEOMETRY, spacing=(2.0, 2.0, 3.0)))
    write_case(data / "d_damaged", {"Parotid_L": LEFT})
    (data / "d_damaged" / "structures" / "Parotid_L.nrrd").write_bytes(b"NRRD0005\n")
    reasons = {report.name: report.skipped for report in survey_cases(data, MODEL).skipped}
    assert "2 x 2 mm in plane" in reasons["c_foreign"]
    assert "not a readable NRRD file" in reasons["d_damaged"]


def test_the_summary_counts_each_structure_and_names_what_was_skipped(data: Path) -> None:
    write_case(data / "c_bad", {"Parotid_L": RIGHT, "Parotid_R": LEFT})
    first, second = summary_lines(survey_cases(data, MODEL), MODEL)
    assert first == "train: 2 cases (Parotid_L 2, Parotid_R 1); 1 deserve a look"
    assert second.startswith("  skipped c_bad: Parotid_L: lies to the patient's right")


def test_every_case_has_its_line_in_the_report(data: Path, tmp_path: Path) -> None:
    write_case(data / "c_bad", {"Parotid_L": RIGHT, "Parotid_R": LEFT})
    write_survey(tmp_path / "cases.csv", [survey_cases(data, MODEL)])
    with (tmp_path / "cases.csv").open(newline="") as file:
        good, one, bad = csv.DictReader(file)
    assert (good["case"], good["structures"], good["not matched"]) == ("a_good", "Parotid_L; Parotid_R", "Thyroid")
    assert (good["skipped because"], good["remarks"]) == ("", "")
    assert "Parotid_R: not drawn, though Parotid_L is" in one["remarks"]
    assert "left and right are exchanged" in bad["skipped because"]


def test_nothing_to_learn_from_is_an_error(tmp_path: Path) -> None:
    write_case(tmp_path / "bad", {"Parotid_L": RIGHT, "Parotid_R": LEFT})
    with pytest.raises(DataError, match=r"1 of 1 cases in .* cannot be used"):
        survey_cases(tmp_path, MODEL)


@requires_openkbp
def test_real_patients_are_not_skipped(tmp_path: Path) -> None:
    model = replace(MODEL, structures=("BrainStem", "SpinalCord", "Parotid_R", "Parotid_L", "Larynx", "Mandible"))
    for name in sorted(path.name for path in (OPENKBP / "validation").iterdir())[::4]:
        (tmp_path / name).symlink_to(OPENKBP / "validation" / name)
    survey = survey_cases(tmp_path, model)
    assert survey.skipped == ()
    assert len(survey.cases) > 5


def test_a_ct_that_is_not_in_hounsfield_units_is_skipped(data: Path) -> None:
    """Stored values, of which water is 1000 or 1024: a network would see nothing but bone."""
    write_case(data / "c_raw", {"Parotid_L": LEFT})
    hu, geometry = read_volume(data / "c_raw" / "img.nrrd")
    (data / "c_raw" / "img.nrrd").unlink()
    write_nrrd(data / "c_raw" / "img.nrrd", hu + np.int16(1024), geometry)
    (skipped,) = survey_cases(data, MODEL).skipped
    assert "Parotid_L: 1064 HU in the median: expected soft tissue; is the CT in Hounsfield units?" in skipped.skipped


@pytest.mark.parametrize(
    "scaled",
    [
        pytest.param(lambda hu: np.clip((hu + 1000) / 2000, 0, 1), id="0 to 1"),
        pytest.param(lambda hu: np.clip((hu + 160.0) / 400 * 255, 0, 255).astype(np.uint8), id="windowed, 0 to 255"),
        pytest.param(np.zeros_like, id="nothing"),
    ],
)
def test_a_ct_that_was_scaled_or_holds_nothing_is_skipped(
    data: Path, scaled: Callable[[NDArray[np.int16]], NDArray[np.generic]]
) -> None:
    """As many a NIfTI set lies on disk: its soft tissue is a number that soft tissue may have."""
    write_case(data / "c_scaled", {"Parotid_L": LEFT})
    hu, geometry = read_volume(data / "c_scaled" / "img.nrrd")
    (data / "c_scaled" / "img.nrrd").unlink()
    write_nrrd(data / "c_scaled" / "img.nrrd", scaled(hu), geometry)
    (skipped,) = survey_cases(data, MODEL).skipped
    assert skipped.skipped == "no air in the CT, its least value is 0: is it in Hounsfield units?"


@pytest.mark.parametrize(
    ("name", "box", "reason"),
    [
        ("Submandibular_L", np.s_[4:20, 12:36, 26:40], "impossibly large: 258 ml, expected 0.5 to 80"),
        ("Chiasm", np.s_[6:14, 20:28, 20:28], "impossibly large: 24.6 ml, expected 0.03 to 8"),
        ("OpticNerve_L", LEFT, "impossibly large: 18.4 ml, expected 0.03 to 8"),
    ],
)
def test_organs_that_no_patient_here_has_have_impossible_sizes_too(
    data: Path, name: str, box: Box, reason: str
) -> None:
    write_case(data / "c_bad", {name: box})
    model = replace(MODEL, structures=("Parotid_L", "Chiasm", "OpticNerve_L", "Submandibular_L"))
    (skipped,) = survey_cases(data, model).skipped
    assert reason in skipped.skipped


def test_one_ct_under_two_names_is_told(data: Path) -> None:
    """It may have been drawn by two observers, or copied."""
    write_case(data / "c_shifted", {"Parotid_L": LEFT}, replace(GEOMETRY, origin=(0.0, 0.0, 3.0)))
    reports = {report.name: report.remarks for report in survey_cases(data, MODEL).reports}
    assert "its CT is that of a_good, too" in reports["b_one"]
    assert "its CT is that of a_good, too" in reports["c_shifted"]
    assert not reports["a_good"]


def test_a_patient_to_learn_from_and_to_validate_with_is_refused(data: Path) -> None:
    write_case(data.parent / "validation" / "x", {"Parotid_L": LEFT})
    with pytest.raises(DataError, match="train/a_good and validation/x are one CT: expected other patients"):
        survey_archive(data.parent, MODEL)


def test_an_archived_patient_to_learn_from_and_to_validate_with_is_refused(data: Path) -> None:
    """A plan and a replan: two CTs, whose names begin alike."""
    for k, (folder, name) in enumerate(
        (
            ("train", "case_0a1b2c3d_0000000001"),
            ("validation", "case_0a1b2c3d_0000000002"),
            ("validation", "case_4e5f6071_0000000003"),
        )
    ):
        write_case(data.parent / folder / name, {"Parotid_L": LEFT})
        path = data.parent / folder / name / "img.nrrd"
        hu, geometry = read_volume(path)
        path.unlink()
        write_nrrd(path, hu + np.int16(k + 1), geometry)
    with pytest.raises(DataError, match=r"_0000000001 and .*_0000000002 are of one patient .* keep all case_0a1b2c3d_"):
        survey_archive(data.parent, MODEL)
    shutil.rmtree(data.parent / "validation" / "case_0a1b2c3d_0000000002")
    taught, held_out = survey_archive(data.parent, MODEL)
    assert (len(taught.cases), len(held_out.cases)) == (3, 1)


def test_several_cases_are_read_at_once_and_told_in_the_order_of_their_names(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more of them than readers: each holds a CT at full resolution, and its masks."""
    write_case(data / "c_bad", {"Thyroid": LEFT})
    write_case(data / "d_late", {"Parotid_L": LEFT})
    expected = survey_cases(data, MODEL)
    lock, both = threading.Lock(), threading.Barrier(2, timeout=60)
    reading, most = 0, 0

    def read(folder: Path, structures: tuple[str, ...], *, alias_file: Path | None = None) -> Case:
        nonlocal reading, most
        with lock:
            reading += 1
            most = max(most, reading)
        both.wait()  # one reader alone would wait here for ever
        time.sleep(0.2 if folder.name == "a_good" else 0)  # the first is the last to be read
        try:
            return read_case(folder, structures, alias_file=alias_file)
        finally:
            with lock:
                reading -= 1

    monkeypatch.setattr("anatomynet.engine.survey.READERS", 2)
    monkeypatch.setattr("anatomynet.engine.survey.read_case", read)
    survey = survey_cases(data, MODEL)
    assert most == 2
    assert survey.reports == expected.reports
    assert [case.name for case in survey.cases] == ["a_good", "b_one", "d_late"]


def test_after_an_error_no_more_cases_are_read(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after Ctrl-C."""
    for number in range(20):
        write_case(data / f"c_{number:02}", {"Parotid_L": LEFT})
    asked = []

    def read(folder: Path, structures: tuple[str, ...], *, alias_file: Path | None = None) -> Case:
        asked.append(folder.name)
        return read_case(folder, structures, alias_file=alias_file)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("anatomynet.engine.survey.READERS", 1)
    monkeypatch.setattr("anatomynet.engine.survey.read_case", read)
    monkeypatch.setattr("anatomynet.engine.survey._report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        survey_cases(data, MODEL)
    assert len(asked) < 22


def test_all_that_is_learnt_from_a_case_is_in_its_digest(tmp_path: Path) -> None:
    """Its place in the scanner is not: nothing is learnt from that."""
    boxes: dict[str, Box] = {"Parotid_L": LEFT, "Parotid_R": RIGHT}
    write_case(tmp_path / "a", boxes)
    write_case(tmp_path / "moved", boxes, replace(GEOMETRY, origin=(0.0, 0.0, 3.0)))
    write_case(tmp_path / "contour", boxes | {"Parotid_L": np.s_[6:14, 20:28, 34:39]})
    write_case(tmp_path / "fewer", {"Parotid_L": LEFT})
    write_case(tmp_path / "spacing", boxes, replace(GEOMETRY, spacing=(4.0, 4.0, 2.9)))
    write_case(tmp_path / "ct", boxes)
    hu, header = nrrd.read(str(tmp_path / "ct" / "img.nrrd"))
    hu[0, 0, 0] += 1
    nrrd.write(str(tmp_path / "ct" / "img.nrrd"), hu, header)
    digests = survey_cases(tmp_path, MODEL).digests
    assert list(digests) == ["a", "contour", "ct", "fewer", "moved", "spacing"]
    assert digests["a"] == digests["moved"]
    assert len(set(digests.values())) == 5


def test_a_case_that_is_skipped_has_no_digest(data: Path) -> None:
    write_case(data / "c_bad", {"Parotid_L": RIGHT, "Parotid_R": LEFT})
    assert list(survey_cases(data, MODEL).digests) == ["a_good", "b_one"]


def test_a_name_that_is_no_text_is_written_all_the_same(data: Path, tmp_path: Path) -> None:
    """Of a folder that another system wrote."""
    (data / "b_one").rename(os.fsdecode(bytes(data) + b"/b_\xe9"))
    write_survey(tmp_path / "cases.csv", [survey_cases(data, MODEL)])
    assert rb"b_\udce9" in (tmp_path / "cases.csv").read_bytes()
