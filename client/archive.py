"""CT series with RTSTRUCTs -> cases to train on, in the PDDCA layout: `anatomynet-client archive`.

A command of its own, so that training knows nothing of DICOM and dependencies keep running one way: contours become
masks once, what was matched can be looked at before a night of training, and the cases carry no patient's data: a case
is named after a word drawn for its patient and a hash of its SeriesInstanceUID.
"""

import csv
import hashlib
import io
import secrets
import shutil
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anatomynet.client.pairing import SeriesWithRtstruct, find_pairs
from anatomynet.client.structure_set import Roi, StructureSet, read_structure_set
from anatomynet.client.study import read_ct_files, volume_from_series
from anatomynet.client.study_files import OpenedStudies
from anatomynet.engine.aliases import Aliases, load_aliases, structure_from_roi_name
from anatomynet.engine.errors import GeometryError, OutputError, StudyError
from anatomynet.engine.findings import judge_contours
from anatomynet.engine.output import write_whole
from anatomynet.engine.preprocess import canonical_from_array
from anatomynet.engine.stops import undisturbed
from anatomynet.engine.structure_region import StructureRegion
from anatomynet.engine.structures import STRUCTURES
from anatomynet.engine.volume import CTVolume
from anatomynet.engine.volume_files import write_nrrd

PATIENT_DIGITS, SERIES_DIGITS = 8, 10  # of a case's name; training's survey knows them
# Of an ROI's slices: more is no slip, but an ROI drawn on every second slice, which a planning system interpolates.
MOST_LEFT_OUT = 0.25
REPORT_NAME = "archive.csv"
COLUMNS = ("case", "study", "rtstruct", "matched", "not matched", "remarks")


@dataclass(frozen=True)
class ArchivedStudy:
    """What became of one CT series, or of what else lay below the source.

    Attributes:
        study: the way below the source to it, for the report alone.
        case: the name of the case; "" where none was written.
        rtstruct: the way below the source to the one that was taken; "" where none was.
        matched: structure -> the ROI it was drawn as.
        unmatched: ROIs that are none of our structures.
        remarks: what was left out or deserves a look; why no case was written.
    """

    study: str
    case: str = ""
    rtstruct: str = ""
    matched: Mapping[str, str] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def archive_studies(
    source: Path, folder: Path, *, alias_file: Path | None = None
) -> Generator[ArchivedStudy, None, None]:
    """Turns every CT series below `source` that has its RTSTRUCT into a case in `folder`, and writes the report last.

    What cannot be used is named and passed over. The report is written at an interruption, too. It is the department's
    own: it names studies by their folders, which are often called as the patients are, and must not leave with the
    cases.

    Args:
        source: a study, or a folder of them, see `find_pairs`.
        folder: of the cases; new or empty, but for the report of a try that nothing came of.
        alias_file: a department's ROI names, see `load_aliases`.

    Raises:
        StudyError: no case came of it.
        OutputError: the folder holds something, or cannot be written.
        ModelError: an alias file that cannot be used.
    """
    archive = _Archive(folder, load_aliases(alias_file))
    _prepare(folder)
    done: list[ArchivedStudy] = []
    try:
        with OpenedStudies(2) as opened:  # the CT's and the RTSTRUCT's
            for found in find_pairs(source, left_out=[folder]):
                if isinstance(found, SeriesWithRtstruct):
                    done.append(archive.add(found, opened))
                else:
                    done.append(ArchivedStudy(found.where, remarks=(found.problem,)))
                yield done[-1]
    finally:
        _write_report(folder / REPORT_NAME, done)
    if not any(study.case for study in done):
        raise StudyError(
            f"no case came of {source}, for the reasons in {folder / REPORT_NAME}: expected CT series and the "
            "RTSTRUCTs that were drawn on them"
        )


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = not all(_is_report(path) for path in folder.iterdir())
    except OSError as error:
        raise OutputError(f"{folder} cannot be a folder for cases: {error.strerror or error}") from error
    if held:
        raise OutputError(f"{folder} holds files and was kept: give a new folder")


def _is_report(path: Path) -> bool:
    """Whether it is a report of ours, which says of nothing but what lies beside it, and not another's table."""
    if path.name != REPORT_NAME or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline().rstrip() == ",".join(COLUMNS).encode()


class _Archive:
    """A folder of cases, of which those of one patient begin alike, so that they stay together when it is split."""

    def __init__(self, folder: Path, aliases: Aliases) -> None:
        self._folder, self._aliases = folder, aliases
        # Drawn by chance, anew in each run. A hash of PatientID, which is a number of a few digits, is found again by
        # hashing all such numbers; to count patients would give two runs' first ones one name.
        self._words: dict[str, str] = {}

    def add(self, pair: SeriesWithRtstruct, opened: OpenedStudies) -> ArchivedStudy:
        """Writes the case of a pair; what cannot be used becomes a remark."""
        try:
            return self._add(pair, opened)
        except (StudyError, GeometryError) as error:
            return ArchivedStudy(pair.where, rtstruct=pair.rtstruct_where, remarks=(str(error),))

    def _add(self, pair: SeriesWithRtstruct, opened: OpenedStudies) -> ArchivedStudy:
        ct, rtstruct = opened.folder_of(pair.series.study), opened.folder_of(pair.rtstruct.study)
        series = read_ct_files(ct / file for file in pair.series.files)
        structures = read_structure_set(rtstruct / pair.rtstruct.file, series)
        rois, remarks = _matched_rois(structures, self._aliases)
        matched = {name: roi.name for name, roi in rois.items()}
        unmatched = tuple(n for n in structures.roi_names if structure_from_roi_name(n, self._aliases) is None)
        found = ArchivedStudy(pair.where, "", pair.rtstruct_where, matched, unmatched, remarks)
        if not rois:
            return replace(found, remarks=(*remarks, "none of its ROIs can be learnt from"))
        volume = volume_from_series(series)
        case = self._name(pair.series.patient or series.study_instance_uid, series.series_instance_uid)
        phantom = series.header.get("QualityControlSubject") == "YES"
        _write_case(self._folder / case, volume, rois, phantom=phantom)
        nameless = () if pair.series.patient else ("no PatientID: other cases of the patient will begin otherwise",)
        told = ("a phantom, which counts as no patient",) if phantom else ()
        return replace(found, case=case, remarks=(*remarks, *nameless, *told, *_judgement(volume, rois)))

    def _name(self, patient: str, series_instance_uid: str) -> str:
        """Of the folder of a case; tells nothing of whose it is."""
        word = self._words.setdefault(patient, secrets.token_hex(PATIENT_DIGITS // 2))
        return f"case_{word}_{hashlib.sha256(series_instance_uid.encode()).hexdigest()[:SERIES_DIGITS]}"


def _judgement(volume: CTVolume, rois: Mapping[str, Roi]) -> tuple[str, ...]:
    """What training's survey will say.

    A case that it will skip is written all the same: it skips by what a model draws, and a chiasm that cannot be right
    does not spoil the case for one that draws none.
    """
    regions = [
        StructureRegion(STRUCTURES[name].tg263_name, STRUCTURES[name].colour, roi.start, roi.box, STRUCTURES[name])
        for name, roi in rois.items()
    ]
    wrong, odd = judge_contours(volume, regions)
    return (*(f"training will skip it: {line}" for line in wrong), *odd)


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


def _write_case(case: Path, volume: CTVolume, rois: Mapping[str, Roi], *, phantom: bool) -> None:
    """The CT and its masks on canonical axes, whole or not at all."""
    beside = case.with_name(f".{case.name}.part")
    geometry = volume.geometry.canonical()

    def turned(array: NDArray[np.generic]) -> NDArray[np.generic]:
        return np.ascontiguousarray(canonical_from_array(array, volume.geometry))

    try:
        (beside / "structures").mkdir(parents=True)
        write_nrrd(beside / "img.nrrd", turned(volume.hu), geometry, phantom=phantom)
        for name, roi in rois.items():
            mask = roi.mask(volume.geometry).astype(np.uint8)
            write_nrrd(beside / "structures" / f"{name}.nrrd", turned(mask), geometry)
        beside.replace(case)
    except OSError as error:
        raise OutputError(f"{case} could not be written: {error.strerror or error}") from error
    finally:
        with undisturbed():
            shutil.rmtree(beside, ignore_errors=True)


def _write_report(path: Path, studies: list[ArchivedStudy]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for study in studies:
        matched = "; ".join(name if name == roi else f"{name} ({roi})" for name, roi in study.matched.items())
        lists = (matched, "; ".join(study.unmatched), "; ".join(study.remarks))
        writer.writerow((study.case, study.study, study.rtstruct, *lists))
    # A folder's name may be no text, where another system wrote it.
    write_whole(path, text.getvalue().encode(errors="backslashreplace"), overwrite=True)
