"""What an RTSTRUCT and a SEG of one CT have in common: its patient and study, and what is said of a structure."""

from collections.abc import Sequence

from pydicom.dataset import Dataset

from anatomynet.client.study import CTSeries
from anatomynet.engine.findings import Finding
from anatomynet.engine.structures import Structure

LONGEST_DESCRIPTION = 1024  # characters of an ST value (PS3.5 6.2)
# Attributes that must be there, empty where the CT has none (PS3.3 C.7.1.1, C.7.2.1, C.7.4.1).
TYPE_2_KEYWORDS = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
    "PositionReferenceIndicator",
)


def copy_patient_and_study(series: CTSeries, dataset: Dataset) -> None:
    """Puts what a CT says of patient and study into an object of the same study, byte for byte."""
    dataset.update(series.header)
    for keyword in TYPE_2_KEYWORDS:
        if keyword not in series.header:
            setattr(dataset, keyword, "")


def remarks_on(
    structure: Structure, findings: Sequence[Finding], notes: Sequence[str], *, drawn: Sequence[Structure]
) -> str:
    """What is to be said of one structure, as a description that DICOM holds; "" where nothing is.

    Whoever gets the file alone would not miss a structure that was not found: every one that was `drawn` names it.
    """
    names = {each.tg263_name for each in drawn}
    own = [finding.text for finding in findings if finding.name in (None, structure.tg263_name)]
    missing = [f"{finding.name}: {finding.text}" for finding in findings if finding.name not in {None, *names}]
    return "; ".join((*own, *missing, *notes))[:LONGEST_DESCRIPTION]
