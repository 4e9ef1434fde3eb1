"""A folder of cases -> those that can be learnt from, and a report of what was found, is odd, is left out.

Between data.py, which reads one case, and train.py. A bad case is named and skipped, never trained on silently.
"""

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.data import Case, at_network_resolution, find_cases, read_case
from anatomynet.engine.errors import DataError, GeometryError
from anatomynet.engine.findings import judge_contours
from anatomynet.engine.machine import available_cores
from anatomynet.engine.output import write_whole
from anatomynet.engine.structure_region import StructureRegion, regions_from_label_map
from anatomynet.engine.structures import structures_by_name
from anatomynet.engine.volume import LabelMap

ARCHIVED_CASE = re.compile(r"(case_[0-9a-f]{8})_[0-9a-f]{10}")  # the patient's part, and the CT series'
READERS = min(8, available_cores())  # threads; each takes a quarter of a GB while it reads 178 x 512 x 512 voxels
COLUMNS = ("folder", "case", "skipped because", "structures", "not matched", "remarks")


@dataclass(frozen=True)
class CaseReport:
    """What became of one case.

    Attributes:
        name: of the case.
        skipped: why nothing is learnt from it; "" where it is.
        structures: those annotated.
        unmatched: names of masks that are none of the model's structures.
        remarks: what deserves a look, one line each.
    """

    name: str
    skipped: str = ""
    structures: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Survey:
    """A folder of cases, at the network's resolution.

    Attributes:
        folder: its name.
        cases: those to learn from.
        reports: of every case, in the order of their names.
        digests: of each case to learn from, by its name: another one where anything is other that is learnt from it.
    """

    folder: str
    cases: list[Case]
    reports: tuple[CaseReport, ...]
    digests: dict[str, str]

    @property
    def skipped(self) -> tuple[CaseReport, ...]:
        """Reports of the cases that nothing is learnt from."""
        return tuple(report for report in self.reports if report.skipped)


def survey_archive(
    archive: Path, model: ModelConfig, *, alias_file: Path | None = None, strict: bool = False
) -> tuple[Survey, Survey]:
    """Reads every case of an archive's `train` and `validation`; arguments as of `survey_cases`.

    Returns:
        What is learnt from, and what it is validated with.

    Raises:
        DataError: see `survey_cases`; one CT or one patient in both.
        ModelError: an alias file that cannot be used.
    """
    taught, held_out = (
        survey_cases(archive / name, model, alias_file=alias_file, strict=strict) for name in ("train", "validation")
    )
    _check_apart(taught, held_out)
    return taught, held_out


def survey_cases(folder: Path, model: ModelConfig, *, alias_file: Path | None = None, strict: bool = False) -> Survey:
    """Reads every case of a folder, with a progress bar.

    Args:
        folder: of case folders.
        model: whose structures and resolution are wanted.
        alias_file: a department's names for the structures.
        strict: a case that cannot be used is an error.

    Raises:
        DataError: no case there, none that can be used, or, if strict, one that cannot.
        ModelError: an alias file that cannot be used.
    """
    cases, reports, first_of, digests = [], [], dict[str, str](), dict[str, str]()
    for read, ct in _read_cases(folder, model, alias_file):
        if isinstance(read, CaseReport):
            reports.append(read)
            continue
        reports.append(_report(read, model, same_as=first_of.setdefault(ct, read.name)))
        if not reports[-1].skipped:
            cases.append(read)
            digests[read.name] = _digest_with_contours(read, ct)
    survey = Survey(folder.name, cases, tuple(reports), digests)
    if survey.skipped and (strict or not cases):
        first = survey.skipped[0]
        how_many = f"{len(survey.skipped)} of {len(reports)} cases in {folder} cannot be used"
        raise DataError(f"{how_many}, the first of them {first.name}: {first.skipped}")
    return survey


def _read_cases(folder: Path, model: ModelConfig, alias_file: Path | None) -> Iterator[tuple[Case | CaseReport, str]]:
    """Every case with its CT's digest, or why it could not be read, by name; as many are in work as there are threads.

    Most of the time goes into inflating and counting, during which Python lets other threads run.
    """
    folders = find_cases(folder)
    pool = ThreadPoolExecutor(READERS)
    try:
        read = pool.map(partial(_read, model=model, alias_file=alias_file), folders)
        yield from tqdm(read, desc=f"reading {folder.name}", unit="case", total=len(folders))
    finally:
        pool.shutdown(cancel_futures=True)


def _read(path: Path, model: ModelConfig, alias_file: Path | None) -> tuple[Case | CaseReport, str]:
    try:
        case = at_network_resolution(read_case(path, model.structures, alias_file=alias_file), model)
    except (DataError, GeometryError) as error:
        return CaseReport(path.name, skipped=str(error)), ""
    return case, _digest(case)


def summary_lines(survey: Survey, model: ModelConfig) -> list[str]:
    """How many cases of each structure, how many are odd, and every one that was skipped."""
    counts = [sum(case.annotated[i] for case in survey.cases) for i in range(len(model.structures))]
    odd = sum(bool(report.remarks) for report in survey.reports if not report.skipped)
    of_each = ", ".join(f"{name} {count}" for name, count in zip(model.structures, counts, strict=True))
    lines = [f"{survey.folder}: {len(survey.cases)} cases ({of_each}); {odd} deserve a look"]
    lines += [f"  skipped {report.name}: {report.skipped}" for report in survey.skipped]
    return lines


def write_survey(path: Path, surveys: Iterable[Survey]) -> None:
    """Writes a CSV, a line a case.

    Raises:
        OutputError: it could not be written.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for survey in surveys:
        for report in survey.reports:
            lists = ("; ".join(values) for values in (report.structures, report.unmatched, report.remarks))
            writer.writerow((survey.folder, report.name, report.skipped, *lists))
    # A folder's name may be no text, where another system wrote it.
    write_whole(path, text.getvalue().encode(errors="backslashreplace"), overwrite=True)


def patient_of(case: str) -> str:
    """How the cases of one patient begin, where `anatomynet-client archive` named them; "" where something else did."""
    match = ARCHIVED_CASE.fullmatch(case)
    return match[1] if match else ""


def _check_apart(taught: Survey, held_out: Survey) -> None:
    """What is learnt from and validated with must be other patients: else validation measures memory."""
    digests = {_digest(case): case.name for case in reversed(taught.cases)}
    patients = {patient_of(case.name): case.name for case in reversed(taught.cases)}
    for case in held_out.cases:
        if (patient := patient_of(case.name)) and patient in patients:
            raise DataError(
                f"{taught.folder}/{patients[patient]} and {held_out.folder}/{case.name} are of one patient by their "
                f"names: expected other patients to validate with; keep all {patient}_* on one side, or rename what is "
                "another's"
            )
        if (name := digests.get(_digest(case))) is not None:
            raise DataError(
                f"{taught.folder}/{name} and {held_out.folder}/{case.name} are one CT: expected other patients to "
                "validate with; remove it from one of them"
            )


def _digest(case: Case) -> str:
    """Of the CT's voxels alone: a copy may lie elsewhere."""
    return hashlib.sha256(np.ascontiguousarray(case.volume.hu).data).hexdigest()


def _digest_with_contours(case: Case, ct: str) -> str:
    """Of all that is learnt from a case whose CT has that digest."""
    digest = hashlib.sha256(repr((ct, case.labels.shape, case.volume.geometry.spacing, case.annotated)).encode())
    digest.update(np.ascontiguousarray(case.labels).data)
    return digest.hexdigest()


def _report(case: Case, model: ModelConfig, *, same_as: str) -> CaseReport:
    """Of a case; `same_as` is the first that has its CT, itself perhaps."""
    regions = _regions(case, model)
    wrong, odd = judge_contours(case.volume, regions)
    structures = tuple(name for name, known in zip(model.structures, case.annotated, strict=True) if known)
    again = [f"its CT is that of {same_as}, too"] if same_as != case.name else []
    return CaseReport(case.name, "; ".join(wrong), structures, case.unmatched, (*case.remarks, *again, *odd))


def _regions(case: Case, model: ModelConfig) -> Sequence[StructureRegion]:
    """Of the structures that are annotated."""
    label_map = LabelMap(case.labels, case.volume.geometry, structures_by_name(model.structures))
    return [region for region, known in zip(regions_from_label_map(label_map), case.annotated, strict=True) if known]
