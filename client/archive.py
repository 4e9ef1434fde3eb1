"""DICOM studies with RTSTRUCTs -> cases to train on, in the PDDCA layout: `anatomynet-client archive`.

A command of its own, so that training knows nothing of DICOM and dependencies keep running one way: contours become
masks once, what was matched can be looked at before a night of training, and the cases carry no patient's data: a case
is named after a hash of its SeriesInstanceUID.
"""

import csv
import hashlib
import io
import shutil
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import RTStructureSetStorage

from anatomynet.client.headers import DAMAGED
from anatomynet.client.structure_set import Roi, StructureSet, read_structure_set
from anatomynet.client.study import CTSeries, list_ct_series, read_ct_series, volume_from_series
from anatomynet.client.study_files import opened_study
from anatomynet.client.study_search import find_studies
from anatomynet.engine.aliases import Aliases, load_aliases, structure_from_roi_name
from anatomynet.engine.errors import GeometryError, OutputError, StudyError
from anatomynet.engine.output import write_whole
from anatomynet.engine.preprocess import canonical_from_array
from anatomynet.engine.volume_files import write_nrrd

NAME_DIGITS = 10  # of the hash that names a case
# Of an ROI's slices: more is no slip, but an ROI drawn on every second slice, which a planning system interpolates.
MOST_LEFT_OUT = 0.25
REPORT_NAME = "archive.csv"
COLUMNS = ("case", "study", "matched", "not matched", "remarks")


@dataclass(frozen=True)
class ArchivedStudy:
    """What became of one study.

    Attributes:
        study: its folder's name or way below the source, for the report alone.
        case: the name of the case; "" where none was written.
        matched: structure -> the ROI it was drawn as.
        unmatched: ROIs that are none of our structures.
        remarks: what was left out, and why; why no case was written.
    """

    study: str
    case: str
    matched: dict[str, str]
    unmatched: tuple[str, ...]
    remarks: tuple[str, ...]


def archive_studies(
    source: Path, folder: Path, *, alias_file: Path | None = None
) -> Generator[ArchivedStudy, None, None]:
    """Turns every study below `source` into a case in `folder`, and writes the report when all are done.

    A study that cannot be used is named and passed over. The report is written at an interruption, too.

    Args:
        source: a study, or a folder of them, as `find_studies` tells them apart.
        folder: of the cases; new or empty.
        alias_file: a department's ROI names, see `load_aliases`.

    Raises:
        StudyError: none could be used.
        OutputError: the folder holds something, or cannot be written.
        ModelError: an alias file that cannot be used.
    """
    aliases = load_aliases(alias_file)
    _prepare(folder)
    done: list[ArchivedStudy] = []
    try:
        for study in find_studies([source], left_out=[folder]):
            try:
                with opened_study(study.path) as opened:
                    archived = _archive_study(opened, study.name, folder, aliases)
            except (StudyError, GeometryError) as error:
                archived = ArchivedStudy(study.name, "", {}, (), (str(error),))
            done.append(archived)
            yield archived
    finally:
        _write_report(folder / REPORT_NAME, done)
    if not any(study.case for study in done):
        many = f"{len(done)} stud{'y' if len(done) == 1 else 'ies'}"
        raise StudyError(
            f"no case came of {many} in {source}: expected folders, each with a CT series and its RTSTRUCT"
        )


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = any(folder.iterdir())
    except OSError as error:
        raise OutputError(f"{folder} cannot be a folder for cases: {error.strerror or error}") from error
    if held:
        raise OutputError(f"{folder} holds files and was kept: give a new folder")


def _archive_study(study: Path, name: str, folder: Path, aliases: Aliases) -> ArchivedStudy:
    rtstruct, chosen = _find_contoured(study)
    series = read_ct_series(study, series_instance_uid=chosen)
    structures = read_structure_set(rtstruct, series)
    rois, remarks = _matched_rois(structures, aliases)
    unmatched = tuple(name for name in structures.roi_names if structure_from_roi_name(name, aliases) is None)
    if not rois:
        return ArchivedStudy(name, "", {}, unmatched, (*remarks, "none of its ROIs can be learnt from"))
    case = case_name(series)
    if (folder / case).exists():
        raise StudyError(f"its CT series is that of another study: {case} is there already")
    _write_case(folder / case, series, rois)
    return ArchivedStudy(name, case, {name: roi.name for name, roi in rois.items()}, unmatched, remarks)


def case_name(series: CTSeries) -> str:
    """Of the folder that a series becomes; tells nothing of whose it is."""
    return f"case_{hashlib.sha256(series.series_instance_uid.encode()).hexdigest()[:NAME_DIGITS]}"


def _find_contoured(study: Path) -> tuple[Path, str]:
    """The one structure set of a study, and the CT series that it was drawn on, as `list_ct_series` names it.

    Raises:
        StudyError: no CT series; none of them with an RTSTRUCT, or several RTSTRUCTs.
    """
    names = list_ct_series(study)
    files = sorted(path for path in study.rglob("*") if path.is_file())
    drawn = []
    for path in files:
        if (referred := _referred_series(path)) is not None:
            on = [name for name in names if name.partition("/")[0] in referred]
            # One that refers to none is the only series', not any one's of several.
            drawn += [(path, name) for name in (names if not referred and len(names) == 1 else on)]
    if len(drawn) != 1:
        of = "its CT series" if len(names) == 1 else f"its {len(names)} CT series"
        raise StudyError(f"{len(drawn)} RTSTRUCTs of {of}; expected one: leave only the one to learn from")
    return drawn[0]


def _referred_series(path: Path) -> set[str] | None:
    """The series that an RTSTRUCT refers to (PS3.3 C.8.8.5); None of any other file."""
    tags = ["SOPClassUID", "ReferencedFrameOfReferenceSequence"]
    try:
        header = pydicom.dcmread(path, specific_tags=tags, stop_before_pixels=True)
        if header.get("SOPClassUID") != RTStructureSetStorage:
            return None
        return {
            str(item.SeriesInstanceUID)
            for frame in header.get("ReferencedFrameOfReferenceSequence") or ()
            for part in frame.get("RTReferencedStudySequence") or ()
            for item in part.get("RTReferencedSeriesSequence") or ()
        }
    except (OSError, *DAMAGED):
        return None


def _matched_rois(structures: StructureSet, aliases: Aliases) -> tuple[dict[str, Roi], tuple[str, ...]]:
    """Structure -> the one ROI that is it, and what was left out."""
    found: dict[str, list[Roi]] = {}
    remarks = []
    for roi in structures.rois:
        structure = structure_from_roi_name(roi.name, aliases)
        if structure is None:
            continue
        problem, remark = _looked_at(roi)
        if problem or remark:
            remarks.append(f"{roi.name}: {problem or remark}")
        if not problem:
            found.setdefault(structure.name, []).append(roi)
    for name, rois in found.items():
        if len(rois) > 1:
            remarks.append(f"{' and '.join(roi.name for roi in rois)} are both {name}: neither was taken")
    return {name: rois[0] for name, rois in found.items() if len(rois) == 1}, tuple(remarks)


def _looked_at(roi: Roi) -> tuple[str, str]:
    """Why an ROI of ours cannot be learnt from, and what else deserves a look; "" each where nothing does."""
    if roi.problem or not roi.box.any():
        return roi.problem or "empty, so not annotated", ""
    # The slices' axis is the first, however the series lies in the patient.
    drawn = np.flatnonzero(roi.box.any(axis=(1, 2)))
    length = int(drawn[-1] - drawn[0]) + 1
    told = f"drawn on {len(drawn)} of the {length} slices from its first to its last"
    if len(drawn) < length * (1 - MOST_LEFT_OUT):
        return f"{told}: interpolate it, and export it again", ""
    return "", told if len(drawn) < length else ""


def _write_case(case: Path, series: CTSeries, rois: dict[str, Roi]) -> None:
    """The CT and its masks on canonical axes, whole or not at all."""
    beside = case.with_name(f".{case.name}.part")
    volume = volume_from_series(series)
    geometry = volume.geometry.canonical()

    def turned(array: NDArray[np.generic]) -> NDArray[np.generic]:
        return np.ascontiguousarray(canonical_from_array(array, volume.geometry))

    try:
        (beside / "structures").mkdir(parents=True)
        write_nrrd(beside / "img.nrrd", turned(volume.hu), geometry)
        for name, roi in rois.items():
            mask = roi.mask(volume.geometry).astype(np.uint8)
            write_nrrd(beside / "structures" / f"{name}.nrrd", turned(mask), geometry)
        beside.replace(case)
    except OSError as error:
        raise OutputError(f"{case} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_report(path: Path, studies: list[ArchivedStudy]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for study in studies:
        matched = "; ".join(name if name == roi else f"{name} ({roi})" for name, roi in study.matched.items())
        writer.writerow((study.case, study.study, matched, "; ".join(study.unmatched), "; ".join(study.remarks)))
    # A folder's name may be no text, where another system wrote it.
    write_whole(path, text.getvalue().encode(errors="backslashreplace"))
