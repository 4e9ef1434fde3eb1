"""A department's studies become cases that training reads: masks as plastimatch draws them, all else named."""

import csv
import sys
from pathlib import Path
from zlib import crc32

import numpy as np
import pydicom
import pytest
from click.testing import CliRunner

from anatomynet.client.archive import archive_studies
from anatomynet.client.cli import main
from anatomynet.client.structure_set import read_structure_set
from anatomynet.client.study import CTSeries, read_ct_series, volume_from_series
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.data import find_cases, read_case
from anatomynet.engine.errors import OutputError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.metrics import dice
from anatomynet.engine.survey import patient_of, survey_cases
from anatomynet.engine.volume import CTVolume
from anatomynet.engine.volume_files import read_volume
from tests.dicom_studies import (
    DIRECTIONS,
    edit,
    masks_by_plastimatch,
    on_grid,
    random_volume,
    words_of_patient,
    write_study,
)
from tests.test_structure_set import LARGE_DSC, LARGE_VOXELS, circle, item, write_rois

SHAPE = (10, 48, 52)
MODEL = ModelConfig("test", ("Parotid_L", "Parotid_R"), 1, (1.5, 1.5, 2.0), (2.5, 2.5, 3.0), (-250.0, 550.0))
NAMES = ("Parotid_L", "Larynx")


def own_uids(folder: Path) -> dict[str, str]:
    number = crc32(str(folder).encode())
    return {"StudyInstanceUID": f"1.2.3.{number}", "SeriesInstanceUID": f"1.2.4.{number}"}


def write_contoured_study(folder: Path, position: str = "HFS", **changes: str) -> CTSeries:
    """A study with an RTSTRUCT: a parotid and a larynx under a department's names, a target, and an empty ROI."""
    write_study(folder, random_volume(SHAPE, DIRECTIONS[position]), **{**own_uids(folder), **changes})
    series = read_ct_series(folder)
    rois = {
        "LT PAROTID": [item(circle(series, k, (24.0, 26.0), 8 + k / 2, waves=0.15)) for k in range(2, 9)],
        "Kehlkopf": [item(circle(series, k, (36.0, 40.0), 7 - abs(k - 5) / 2)) for k in range(1, 9)],
        "PTV70": [item(circle(series, k, (30.0, 20.0), 9)) for k in range(2, 6)],
        "Cord": [],
    }
    write_rois(folder / "RS.dcm", series, rois)
    return series


@pytest.mark.parametrize("position", ["HFS", "FFP", "HFP"])
def test_masks_are_those_that_plastimatch_draws(tmp_path: Path, position: str) -> None:
    series = write_contoured_study(tmp_path / "in" / "study", position)
    (archived,) = archive_studies(tmp_path / "in", tmp_path / "out")
    theirs = masks_by_plastimatch(tmp_path / "in" / "study" / "RS.dcm", tmp_path / "in" / "study", tmp_path / "masks")
    case = tmp_path / "out" / archived.case
    for name, roi in archived.matched.items():
        mask, geometry = read_volume(case / "structures" / f"{name}.nrrd")
        drawn, grid = theirs[roi]
        assert mask.sum() > LARGE_VOXELS
        assert dice(mask > 0, on_grid(drawn, grid, geometry)) >= LARGE_DSC
    volume = volume_from_series(series)
    hu, geometry = read_volume(case / "img.nrrd")
    np.testing.assert_array_equal(on_grid(volume.hu, volume.geometry, geometry), hu)


def test_training_reads_what_was_archived_and_the_report_names_the_rest(tmp_path: Path) -> None:
    write_contoured_study(tmp_path / "in" / "Meier")
    (archived,) = archive_studies(tmp_path / "in", tmp_path / "out")
    assert archived.matched == {"Parotid_L": "LT PAROTID", "Larynx": "Kehlkopf"}
    assert archived.unmatched == ("PTV70",)
    assert archived.remarks[0] == "Cord: empty, so not annotated"
    (folder,) = find_cases(tmp_path / "out")
    case = read_case(folder, (*NAMES, "SpinalCord"))
    assert case.annotated == (True, True, False)
    for name, label in zip(NAMES, (1, 2), strict=True):
        roi = next(
            r
            for r in read_structure_set(tmp_path / "in" / "Meier" / "RS.dcm", read_ct_series(tmp_path / "in")).rois
            if r.name == archived.matched[name]
        )
        assert (case.labels == label).sum() == roi.box.sum()
    with (tmp_path / "out" / "archive.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["matched"] == "Parotid_L (LT PAROTID); Larynx (Kehlkopf)"
    assert (row["case"], row["not matched"]) == (folder.name, "PTV70")
    assert (row["study"], row["rtstruct"]) == ("in", "Meier/RS.dcm")
    written = b"".join(path.read_bytes() for path in folder.rglob("*.nrrd")) + folder.name.encode()
    assert not any(word.encode() in written for word in words_of_patient())


def test_studies_that_cannot_be_used_are_named_and_passed_over(tmp_path: Path) -> None:
    for name in ("a_good", "b_bare", "c_other", "d_cut"):
        write_contoured_study(tmp_path / "in" / name)
    (tmp_path / "in" / "b_bare" / "RS.dcm").unlink()
    dataset = pydicom.dcmread(tmp_path / "in" / "c_other" / "RS.dcm")
    for roi in dataset.StructureSetROISequence:
        roi.ROIName = f"PTV{roi.ROINumber}"
    dataset.save_as(tmp_path / "in" / "c_other" / "RS.dcm")
    (tmp_path / "in" / "d_cut" / "CT0005.dcm").unlink()
    studies = list(archive_studies(tmp_path / "in", tmp_path / "out"))
    assert [study.study for study in studies] == ["a_good", "b_bare", "c_other", "d_cut"]
    assert [bool(study.case) for study in studies] == [True, False, False, False]
    for study, complaint in zip(
        studies[1:], ("no RTSTRUCT was drawn on it", "none of its ROIs", "missing slices"), strict=True
    ):
        assert complaint in study.remarks[-1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["archive.csv", studies[0].case]


def test_two_rois_of_one_structure_are_neither_taken(tmp_path: Path) -> None:
    series = write_contoured_study(tmp_path / "study")
    contours = [item(circle(series, k, (24.0, 26.0), 8)) for k in range(2, 9)]
    write_rois(tmp_path / "study" / "RS.dcm", series, dict.fromkeys(("Parotid_L", "LT PAROTID", "Larynx"), contours))
    (archived,) = archive_studies(tmp_path / "study", tmp_path / "out")
    assert archived.matched == {"Larynx": "Larynx"}
    assert archived.remarks[0] == "Parotid_L and LT PAROTID are both Parotid_L: neither was taken"


def test_cases_of_one_patient_begin_alike_and_training_keeps_them_on_one_side(tmp_path: Path) -> None:
    for name, patient in (("a_plan", "4711"), ("b_replan", "4711"), ("c_other", "4712")):
        write_contoured_study(tmp_path / "in" / name, PatientID=patient)
    cases = [study.case for study in archive_studies(tmp_path / "in", tmp_path / "out")]
    plan, replan, other = map(patient_of, cases)
    assert plan == replan != other
    again = [study.case for study in archive_studies(tmp_path / "in", tmp_path / "again")]
    assert not {plan, other} & {*map(patient_of, again)}  # what was drawn by chance tells nothing of PatientID
    assert [case[-10:] for case in cases] == [case[-10:] for case in again]


def test_without_patient_id_a_study_is_a_patient_and_that_is_told(tmp_path: Path) -> None:
    for name in "ab":
        write_contoured_study(tmp_path / "in" / name, PatientID="")
    first, second = archive_studies(tmp_path / "in", tmp_path / "out")
    assert patient_of(first.case) != patient_of(second.case)
    assert "no PatientID: other cases of the patient will begin otherwise" in first.remarks


def write_head(folder: Path, rois: dict[str, tuple[float, float]]) -> None:
    """Soft tissue in air, with an ROI of 24 mm around each of some centres (x, y), mm from the first voxel."""
    geometry = VolumeGeometry((20, 80, 80), (2.0, 2.0, 2.5))
    hu = np.full(geometry.shape, -1000, np.int16)
    hu[:, 5:75, 5:75] = 40
    write_study(folder, CTVolume(hu, geometry), **own_uids(folder))
    series = read_ct_series(folder)
    drawn = {name: [item(circle(series, k, at, 12.0)) for k in range(2, 18)] for name, at in rois.items()}
    write_rois(folder / "RS.dcm", series, drawn)


def test_what_deserves_a_look_is_told_and_what_training_will_skip(tmp_path: Path) -> None:
    right, left = (40.0, 80.0), (120.0, 80.0)  # the patient's left is where x is large
    write_head(tmp_path / "in" / "a_good", {"Parotid_L": left, "Parotid_R": right})
    write_head(tmp_path / "in" / "b_odd", {"Parotid_L": left})
    write_head(tmp_path / "in" / "c_bad", {"Parotid_L": right, "Parotid_R": left})
    good, odd, bad = archive_studies(tmp_path / "in", tmp_path / "out")
    assert good.remarks == ()
    assert odd.remarks == ("Parotid_R: not drawn, though Parotid_L is",)
    (skipped,) = survey_cases(tmp_path / "out", MODEL).skipped
    assert skipped.name == bad.case
    assert bad.remarks == (f"training will skip it: {skipped.skipped}",)


@pytest.mark.parametrize(("said", "synthetic"), [({"QualityControlSubject": "YES"}, True), ({}, False)])
def test_a_phantom_stays_one(tmp_path: Path, said: dict[str, str], *, synthetic: bool) -> None:
    """Else its structures would count as taught by a patient."""
    write_contoured_study(tmp_path / "in" / "study", **said)
    (study,) = archive_studies(tmp_path / "in", tmp_path / "out")
    assert read_case(tmp_path / "out" / study.case, MODEL.structures).synthetic == synthetic
    assert ("a phantom, which counts as no patient" in study.remarks) == synthetic


def test_without_pynrrd_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_contoured_study(tmp_path / "in" / "study")
    monkeypatch.setitem(sys.modules, "nrrd", None)
    result = CliRunner().invoke(main, ["archive", str(tmp_path / "in"), str(tmp_path / "out")])
    assert (result.exit_code, result.stderr) == (1, "error: NRRD needs pynrrd: pip install 'anatomynet[formats]'\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["archive.csv"]


def test_a_folder_that_holds_something_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="holds files and was kept"):
        list(archive_studies(tmp_path, tmp_path / "out"))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    write_contoured_study(tmp_path / "in" / "study")
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="cannot be a folder for cases"):
            list(archive_studies(tmp_path / "in", folder))


def test_nothing_archived_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in" / "empty").mkdir(parents=True)
    result = CliRunner().invoke(main, ["archive", str(tmp_path / "in"), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "skipped in: no CT slices" in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: no case came of ")
    assert "no CT slices" in (tmp_path / "out" / "archive.csv").read_text()
    write_contoured_study(tmp_path / "in" / "now")
    again = CliRunner().invoke(main, ["archive", str(tmp_path / "in"), str(tmp_path / "out")])
    assert again.exit_code == 0, again.output
    assert ",now/RS.dcm," in (tmp_path / "out" / "archive.csv").read_text()


def test_a_table_of_that_name_that_is_none_of_ours_is_kept(tmp_path: Path) -> None:
    write_contoured_study(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "archive.csv").write_text("patient,dose\n")
    with pytest.raises(OutputError, match="holds files and was kept"):
        next(archive_studies(tmp_path / "in", tmp_path / "out"))


def test_the_report_tells_what_was_done_before_an_interruption(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_contoured_study(tmp_path / "in" / name)
    studies = archive_studies(tmp_path / "in", tmp_path / "out")
    archived = next(studies)
    studies.close()
    with (tmp_path / "out" / "archive.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["case"] == archived.case


def test_an_roi_drawn_on_every_second_slice_is_not_taken_and_a_slice_left_out_is_told(tmp_path: Path) -> None:
    """Planning systems draw what lies between; the file has none of it."""
    series = write_contoured_study(tmp_path / "study")
    contours = {k: item(circle(series, k, (24.0, 26.0), 8)) for k in range(1, 10)}
    rois = {"Larynx": [contours[k] for k in (1, 3, 5, 7, 9)], "Cord": [contours[k] for k in contours if k != 5]}
    write_rois(tmp_path / "study" / "RS.dcm", series, rois)
    (archived,) = archive_studies(tmp_path / "study", tmp_path / "out")
    assert archived.matched == {"SpinalCord": "Cord"}
    assert archived.remarks[:2] == (
        "Larynx: drawn on 5 of the 9 slices from its first to its last: interpolate it, and export it again",
        "Cord: drawn on 8 of the 9 slices from its first to its last",
    )


def test_the_command_sums_up(tmp_path: Path) -> None:
    write_contoured_study(tmp_path / "in" / "good")
    write_contoured_study(tmp_path / "in" / "bad")
    for path in (tmp_path / "in" / "bad").glob("*.dcm"):
        if path.name != "RS.dcm":
            edit(path, RescaleSlope=None)
    result = CliRunner().invoke(main, ["archive", str(tmp_path / "in"), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert any(line.startswith("skipped bad: ") for line in lines)
    assert "  Parotid_L             1 case" in lines
    assert "not matched: PTV70 (1)" in lines
    assert not any(word in result.output for word in words_of_patient())
