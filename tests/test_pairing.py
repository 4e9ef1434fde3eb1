"""Whatever folders a department exports, a CT series gets the RTSTRUCT that was drawn on it, and nothing is lost."""

import shutil
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pydicom
import pytest

from anatomynet.client.archive import ArchivedStudy, archive_studies
from anatomynet.client.header_scan import scan_header
from anatomynet.client.headers import CTHeader, read_header
from anatomynet.client.pairing import SeriesWithRtstruct, find_pairs
from anatomynet.client.study_contents import contents_below
from tests.dicom_studies import edit
from tests.test_archive import write_contoured_study
from tests.test_frames import two_stacks


def write_patient(ct: Path, rtstruct: Path, **changes: str) -> None:
    """A CT of a folder and its RTSTRUCT; the folder's files are named after it."""
    write_contoured_study(ct, **changes)
    rtstruct.parent.mkdir(parents=True, exist_ok=True)
    (ct / "RS.dcm").rename(rtstruct)


def move_files(folder: Path, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        path.rename(into / f"{folder.name}_{path.name}")
    folder.rmdir()


def archived_below(source: Path) -> list[ArchivedStudy]:
    """What became of a source: pairs become cases, each of its own, and no advice is of an option that is not there."""
    found = list(archive_studies(source, source.parent / "cases"))
    assert not any("--" in remark for archived in found for remark in archived.remarks)
    cases = [archived.case for archived in found if archived.case]
    assert len({*cases}) == len(cases)
    return found


def paired(source: Path) -> dict[str, str]:
    """Series -> its RTSTRUCT, where every one became a case."""
    found = archived_below(source)
    assert all(archived.case for archived in found), found
    return {archived.study: archived.rtstruct for archived in found}


def problems(source: Path) -> dict[str, str]:
    """What came to nothing, and why."""
    return {one.where: one.problem for one in find_pairs(source) if not isinstance(one, SeriesWithRtstruct)}


def set_references(rtstruct: Path, *uids: str) -> None:
    dataset = pydicom.dcmread(rtstruct)
    study = dataset.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
    series = study.RTReferencedSeriesSequence[0]
    study.RTReferencedSeriesSequence = []
    for uid in uids:
        other = pydicom.Dataset()
        other.update(series)
        other.SeriesInstanceUID = uid
        study.RTReferencedSeriesSequence.append(other)
    dataset.save_as(rtstruct)


def uid_of(path: Path, keyword: str = "SeriesInstanceUID") -> str:
    """Of a file, or of a folder's first."""
    path = path if path.is_file() else min(path.glob("*CT*.dcm"))
    return str(pydicom.dcmread(path, stop_before_pixels=True)[keyword].value)


def test_cts_and_rtstructs_in_trees_of_their_own(tmp_path: Path) -> None:
    for name in ("P1", "P2"):
        write_patient(tmp_path / "in" / "CT" / name, tmp_path / "in" / "RS" / f"{name}.dcm", PatientID=name)
    assert paired(tmp_path / "in") == {"CT/P1": "RS/P1.dcm", "CT/P2": "RS/P2.dcm"}


def test_rtstructs_beside_the_folders_of_patients(tmp_path: Path) -> None:
    for name in ("P1", "P2"):
        write_patient(tmp_path / "in" / name, tmp_path / "in" / f"{name}.dcm", PatientID=name)
    assert paired(tmp_path / "in") == {"P1": "P1.dcm", "P2": "P2.dcm"}


def test_a_flat_folder_of_several_patients(tmp_path: Path) -> None:
    for name in ("P1", "P2"):
        write_contoured_study(tmp_path / name, PatientID=name)
        move_files(tmp_path / name, tmp_path / "in")
    found = paired(tmp_path / "in")
    assert sorted(found.values()) == ["P1_RS.dcm", "P2_RS.dcm"]
    tails = {name: uid_of(tmp_path / "in" / f"{name}_CT0001.dcm")[-8:] for name in ("P1", "P2")}
    assert found == {f"in (...{tail})": f"{name}_RS.dcm" for name, tail in tails.items()}


@pytest.mark.parametrize("study", ["1.2.3.1", ""])
def test_plan_and_replan_of_one_patient(tmp_path: Path, study: str) -> None:
    """In one study, and in two."""
    for name in ("plan", "replan"):
        own = {"StudyInstanceUID": study} if study else {}
        write_patient(tmp_path / "in" / "P1" / name, tmp_path / "in" / "P1" / "RS" / f"{name}.dcm", **own)
    assert paired(tmp_path / "in") == {"P1/plan": "P1/RS/plan.dcm", "P1/replan": "P1/RS/replan.dcm"}


def test_folders_of_sites_of_patients(tmp_path: Path) -> None:
    for site, name in (("A", "P1"), ("A", "P2"), ("B", "P3")):
        folder = tmp_path / "in" / site / name
        write_patient(folder / "CT", folder / "RS" / "RS.dcm", PatientID=name)
    assert paired(tmp_path / "in") == {
        "A/P1": "A/P1/RS/RS.dcm",
        "A/P2": "A/P2/RS/RS.dcm",
        "B": "B/P3/RS/RS.dcm",
    }


def test_zipped_studies(tmp_path: Path) -> None:
    """One with its RTSTRUCT inside, one whose RTSTRUCT is zipped too, and one whose RTSTRUCT is not."""
    write_contoured_study(tmp_path / "a")
    write_patient(tmp_path / "b", tmp_path / "b_rs" / "RS.dcm")
    write_patient(tmp_path / "c", tmp_path / "in" / "c.dcm")
    for name in ("a", "b", "b_rs", "c"):
        shutil.make_archive(str(tmp_path / "in" / "zips" / name), "zip", tmp_path / name)
    assert paired(tmp_path / "in") == {
        "zips/a.zip": "zips/a.zip/RS.dcm",
        "zips/b.zip": "zips/b_rs.zip/RS.dcm",
        "zips/c.zip": "c.dcm",
    }


def test_one_zip_file_of_several_patients(tmp_path: Path) -> None:
    for name in ("P1", "P2"):
        write_contoured_study(tmp_path / "all" / name, PatientID=name)
    source = Path(shutil.make_archive(str(tmp_path / "all"), "zip", tmp_path / "all"))
    assert paired(source) == {"P1": "P1/RS.dcm", "P2": "P2/RS.dcm"}


def test_a_loose_study_beside_folders_of_patients(tmp_path: Path) -> None:
    for name in ("P1", "P2"):
        write_contoured_study(tmp_path / "in" / name, PatientID=name)
    write_contoured_study(tmp_path / "loose")
    move_files(tmp_path / "loose", tmp_path / "in")
    assert paired(tmp_path / "in") == {"in": "loose_RS.dcm", "P1": "P1/RS.dcm", "P2": "P2/RS.dcm"}


def test_a_zip_file_within_a_study_is_named(tmp_path: Path) -> None:
    write_contoured_study(tmp_path / "in")
    write_contoured_study(tmp_path / "other")
    shutil.make_archive(str(tmp_path / "in" / "more" / "other"), "zip", tmp_path / "other")
    first, second = archived_below(tmp_path / "in")
    assert first.case
    assert (second.study, second.remarks) == (
        "more/other.zip",
        ("it lies in a study and was not looked into: unpack it",),
    )


def test_series_without_an_rtstruct_and_with_several_are_named(tmp_path: Path) -> None:
    """A planning CT lies beside scans of another day, of a breath, of a cone beam."""
    for name in ("CT", "CBCT", "twice"):
        write_contoured_study(tmp_path / "in" / name, StudyInstanceUID="1.2.3.1")
    (tmp_path / "in" / "CBCT" / "RS.dcm").unlink()
    shutil.copy(tmp_path / "in" / "twice" / "RS.dcm", tmp_path / "in" / "again.dcm")
    (tmp_path / "in" / "notes.txt").write_text("no DICOM")
    assert [archived.study for archived in archived_below(tmp_path / "in") if archived.case] == ["CT"]
    assert problems(tmp_path / "in") == {
        "CBCT": "no RTSTRUCT was drawn on it: export that too, or leave the series out",
        "twice": "2 RTSTRUCTs were drawn on it: keep only the one to learn from, of again.dcm and twice/RS.dcm",
    }


def test_an_rtstruct_that_was_drawn_on_no_ct_here_is_named(tmp_path: Path) -> None:
    for name in ("P1", "P2"):
        write_patient(tmp_path / "in" / "CT" / name, tmp_path / "in" / "RS" / f"{name}.dcm", PatientID=name)
    shutil.rmtree(tmp_path / "in" / "CT" / "P2")
    (kept,) = (one for one in find_pairs(tmp_path / "in") if isinstance(one, SeriesWithRtstruct))
    assert kept.rtstruct_where == "RS/P1.dcm"
    assert problems(tmp_path / "in") == {
        "RS/P2.dcm": "it was drawn on no CT series here: export its CT too, or leave it out"
    }


def test_an_rtstruct_that_refers_to_none_belongs_to_the_only_series_of_its_study(tmp_path: Path) -> None:
    for name in ("P1", "P2"):
        folder = tmp_path / "in" / name
        write_patient(folder / "CT", folder / "RS" / "RS.dcm", PatientID=name)
        edit(folder / "RS" / "RS.dcm", ReferencedFrameOfReferenceSequence=None)
    scout = tmp_path / "in" / "P1" / "scout"
    write_contoured_study(
        scout, StudyInstanceUID=uid_of(tmp_path / "in" / "P1" / "CT", "StudyInstanceUID"), PatientID="P1"
    )
    for path in sorted(scout.iterdir())[1:]:
        path.unlink()
    assert paired(tmp_path / "in") == {"P1": "P1/RS/RS.dcm", "P2": "P2/RS/RS.dcm"}


def test_an_rtstruct_that_refers_to_none_is_not_given_to_one_of_several(tmp_path: Path) -> None:
    for name in ("CT", "CBCT"):
        write_contoured_study(tmp_path / "in" / name, StudyInstanceUID="1.2.3.1")
    (tmp_path / "in" / "CBCT" / "RS.dcm").unlink()
    edit(tmp_path / "in" / "CT" / "RS.dcm", ReferencedFrameOfReferenceSequence=None)
    found = problems(tmp_path / "in")
    assert found.keys() == {"CT", "CBCT", "CT/RS.dcm"}
    assert found["CT/RS.dcm"].startswith("it refers to no CT series, and its study holds 2: put it into a folder with")


def test_an_rtstruct_that_refers_to_two_series_is_given_to_neither(tmp_path: Path) -> None:
    for name in ("CT", "late"):
        write_contoured_study(tmp_path / "in" / name, StudyInstanceUID="1.2.3.1")
    (tmp_path / "in" / "late" / "RS.dcm").unlink()
    set_references(tmp_path / "in" / "CT" / "RS.dcm", *(uid_of(tmp_path / "in" / name) for name in ("CT", "late")))
    told = "CT/RS.dcm refers to 2 CT series here: keep only the one that it was drawn on"
    assert problems(tmp_path / "in") == {"CT": told, "late": told}
    shutil.rmtree(tmp_path / "in" / "late")
    assert problems(tmp_path / "in") == {}


def test_a_series_in_two_studies_is_named_whether_halved_or_copied(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_contoured_study(tmp_path / "in" / name, PatientID=name, SeriesInstanceUID="1.2.4.1")
    told = "its slices lie in a and b: bring them into one of these, or delete the copies"
    assert problems(tmp_path / "in") == {"a": told, "b": told}


def test_several_stacks_of_one_series_are_named(tmp_path: Path) -> None:
    two_stacks(tmp_path / "in")
    write_contoured_study(tmp_path / "other")
    (tmp_path / "other" / "RS.dcm").rename(tmp_path / "in" / "RS.dcm")
    (image,) = (path for path in (tmp_path / "in").iterdir() if path.name != "RS.dcm")
    set_references(tmp_path / "in" / "RS.dcm", uid_of(image))
    (told,) = problems(tmp_path / "in").values()
    assert told == "it holds 2 stacks of slices: export the one that was drawn on as a series of its own"


def test_an_rtstruct_of_a_reformat_makes_no_case(tmp_path: Path) -> None:
    write_contoured_study(tmp_path / "in")
    for path in (tmp_path / "in").glob("CT*.dcm"):
        edit(path, ImageType=["DERIVED", "SECONDARY", "AXIAL", "MPR"])
    (told,) = problems(tmp_path / "in").values()
    assert told == "it is no stack of slices, but a localizer or a reformat: export the CT that it was made from"


def test_what_lies_beside_studies_is_named_too(tmp_path: Path) -> None:
    for name in ("P1", "P2"):
        write_contoured_study(tmp_path / "in" / name, PatientID=name)
    write_patient(tmp_path / "gone", tmp_path / "in" / "lost.dcm")
    edit(tmp_path / "in" / "lost.dcm", ReferencedFrameOfReferenceSequence=None)
    (tmp_path / "in" / "cut.dcm").write_bytes(b"cut")
    found = problems(tmp_path / "in")
    assert found.keys() == {"in", "lost.dcm"}
    assert found["in"].startswith("cut.dcm is damaged")
    assert "its study holds 0" in found["lost.dcm"]


def test_cases_within_the_source_are_no_studies(tmp_path: Path) -> None:
    for name in ("P1", "P2"):
        write_contoured_study(tmp_path / "in" / name, PatientID=name)
    found = list(archive_studies(tmp_path / "in", tmp_path / "in" / "cases"))
    assert [archived.study for archived in found] == ["P1", "P2"]


def test_a_file_that_cannot_be_read_is_named_and_gives_its_study_no_case(tmp_path: Path) -> None:
    """It may be a slice; an RTSTRUCT beside it belongs to a CT elsewhere all the same."""
    for name in ("P1", "P2"):
        write_patient(tmp_path / "in" / "CT" / name, tmp_path / "in" / "RS" / f"{name}.dcm", PatientID=name)
    (tmp_path / "in" / "CT" / "P1" / "CT0099.dcm").write_bytes(b"cut")
    (tmp_path / "in" / "RS" / "P0.dcm").write_bytes(b"cut")
    (kept,) = (one for one in find_pairs(tmp_path / "in") if isinstance(one, SeriesWithRtstruct))
    assert kept.where == "CT/P2"
    found = problems(tmp_path / "in")
    assert found.keys() == {"CT/P1", "RS"}
    assert found["CT/P1"].startswith("CT0099.dcm is damaged")
    assert found["RS"].startswith("P0.dcm is damaged")


def test_an_rtstruct_whose_references_are_damaged_is_named(tmp_path: Path) -> None:
    write_contoured_study(tmp_path / "in")
    dataset = pydicom.dcmread(tmp_path / "in" / "RS.dcm")
    del (
        dataset.ReferencedFrameOfReferenceSequence[0]
        .RTReferencedStudySequence[0]
        .RTReferencedSeriesSequence[0]["SeriesInstanceUID"]
    )
    dataset.save_as(tmp_path / "in" / "RS.dcm")
    assert problems(tmp_path / "in") == {"in": "RS.dcm is damaged: what it refers to cannot be read; export it again"}


def test_a_study_without_ct_is_named(tmp_path: Path) -> None:
    write_contoured_study(tmp_path / "in" / "P1")
    (tmp_path / "in" / "P2").mkdir()
    (tmp_path / "in" / "P2" / "notes.txt").write_text("no DICOM")
    write_contoured_study(tmp_path / "in" / "P3")
    assert problems(tmp_path / "in") == {"P2": "no CT slices in it: found 1 x other file; expected CT images"}


@pytest.mark.parametrize("flat", [True, False])
def test_a_ct_header_is_read_at_most_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flat: bool) -> None:
    """And once more that of one file of each folder, by which studies are found."""
    for name in ("P1", "P2", "P3"):
        write_contoured_study(tmp_path / "in" / name, PatientID=name)
        if flat:
            move_files(tmp_path / "in" / name, tmp_path / "in")
    count = Counter[str]()

    def counting(file: Any, head: bytes, size: int) -> Any:
        count[file.name] += 1
        return scan_header(file, head, size)

    monkeypatch.setattr("anatomynet.client.headers.scan_header", counting)
    assert len(paired(tmp_path / "in")) == 3
    of_ct = Counter(n for name, n in count.items() if "CT" in Path(name).name)
    assert of_ct == {2: 30 - (1 if flat else 3), 3: 1 if flat else 3}


def test_headers_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("P1", "P2"):
        write_contoured_study(tmp_path / name, PatientID=name)
        move_files(tmp_path / name, tmp_path / "in")
    alive, most = weakref.WeakSet[CTHeader](), 0

    def reading(path: Path) -> CTHeader | None:
        nonlocal most
        most = max(most, len(alive))
        header = read_header(path)
        if header is not None:
            alive.add(header)
        return header

    monkeypatch.setattr("anatomynet.client.study_contents.read_header", reading)
    (contents,) = contents_below(tmp_path / "in")
    assert [len(series.files) for series in contents.series] == [10, 10]
    assert 1 <= most <= 3
