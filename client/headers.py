"""Folder -> headers of the CT slices in it: the first half of reading a study.

Here it is decided what is DICOM, what is a CT slice and what is damaged; whether slices fit together is not.
"""

import math
import os
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from anatomynet.engine.errors import GeometryError, StudyError

# Copied into an RTSTRUCT as they stand (PS3.3 C.7.1.1, C.7.2.1, C.7.4.1), never logged.
PATIENT_AND_STUDY_KEYWORDS = (
    "SpecificCharacterSet",
    "TimezoneOffsetFromUTC",
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
    "StudyDescription",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
)
IMAGE_KEYWORDS = (
    "ImageType",
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "SeriesInstanceUID",
    "AcquisitionNumber",
    "GantryDetectorTilt",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "PixelSpacing",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "PixelData",
)
HEADER_KEYWORDS = [*PATIENT_AND_STUDY_KEYWORDS, *IMAGE_KEYWORDS]
# A header has no longer value than this but the pixels, which stay on disk until they are asked for.
LONGEST_HEADER_VALUE = 65536
# What pydicom raises, depending on where a file is damaged.
DAMAGED = (
    InvalidDicomError,
    EOFError,
    struct.error,
    zlib.error,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    NotImplementedError,
    RecursionError,
)


@dataclass(frozen=True, eq=False)
class CTHeader:
    """One CT file's header, before it is known whether its series is the wanted one."""

    path: Path
    dataset: Dataset
    size: int

    def value(self, keyword: str) -> Any:
        """The element's value; None where absent or empty. Raises StudyError where it cannot be read."""
        try:
            value = self.dataset.get(keyword)
        except DAMAGED as error:
            raise StudyError(f"{self.path.name}: {keyword} cannot be read; export the series again") from error
        return None if value is None or value == "" else value

    def text(self, keyword: str) -> str:
        """The element as text. Raises StudyError where it is missing."""
        value = self.value(keyword)
        if value is None:
            raise StudyError(
                f"{self.path.name}: {keyword} is missing; a CT slice must have it: export the series again"
            )
        return str(value)

    def numbers(self, keyword: str, count: int) -> tuple[float, ...]:
        """The element as finite numbers. Raises StudyError where it is missing or something else."""
        text = self.value(keyword)
        try:
            values = tuple(float(v) for v in (text if isinstance(text, Sequence) else [text]))
        except DAMAGED:
            values = ()
        if len(values) != count or not all(map(math.isfinite, values)):
            found = (
                "it is missing"
                if text is None
                else f"found {len(values)} numbers"
                if values
                else "found something else"
            )
            raise StudyError(
                f"{self.path.name}: expected {count} finite numbers as {keyword}, {found}; export the series again"
            )
        return values

    def number(self, keyword: str) -> float:
        """The element as one finite number. Raises StudyError where it is missing or something else."""
        return self.numbers(keyword, 1)[0]

    @property
    def transfer_syntax_uid(self) -> UID:
        """How the file is encoded; a file without a preamble does not say."""
        uid = getattr(self.dataset, "file_meta", Dataset()).get("TransferSyntaxUID")
        if uid is None:
            return ImplicitVRLittleEndian if self.dataset.original_encoding[0] else ExplicitVRLittleEndian
        return UID(str(uid))

    @cached_property
    def image_type(self) -> frozenset[str]:
        """The words of ImageType."""
        values = self.value("ImageType") or ()
        text = " ".join([values] if isinstance(values, str) else map(str, values))
        return frozenset(text.upper().replace("_", " ").split())

    @property
    def placed(self) -> bool:
        """Whether it says where it lies."""
        return self.value("ImageOrientationPatient") is not None and self.value("ImagePositionPatient") is not None

    @cached_property
    def normal(self) -> NDArray[np.float64]:
        """Unit normal of the slice, LPS: row direction x column direction."""
        cosines = np.array(self.numbers("ImageOrientationPatient", 6))
        normal: NDArray[np.float64] = np.cross(cosines[:3], cosines[3:])
        length = np.linalg.norm(normal)
        if abs(length - 1) > 1e-3:
            raise GeometryError(
                f"{self.path.name}: ImageOrientationPatient is not two unit vectors at right angles; "
                "export the series again"
            )
        return normal / length

    @cached_property
    def position(self) -> NDArray[np.float64]:
        """LPS mm of the first voxel's centre."""
        return np.array(self.numbers("ImagePositionPatient", 3))


def read_headers(study_dir: Path) -> tuple[list[CTHeader], Counter[str]]:
    """The CT slices under a folder, and a count of everything else."""
    if not study_dir.is_dir():
        what = "is a file" if study_dir.exists() else "does not exist"
        raise StudyError(f"{study_dir} {what}; expected a folder with one CT series")
    headers: list[CTHeader] = []
    others: Counter[str] = Counter()
    for path in _files_under(study_dir):
        # pydicom's warnings quote values: a patient's name among them.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = _read_dataset(path)
        if dataset is None:
            others["other files"] += 1
        elif _sop_class(dataset) == CTImageStorage:
            headers.append(CTHeader(path, dataset, path.stat().st_size))
        else:
            others[_sop_class(dataset).name] += 1
    return headers, others


def _files_under(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise StudyError(f"a folder in the study cannot be read: {error.strerror}; check its permissions") from error

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders.sort()
        for name in sorted(names):
            path = Path(root, name)
            # A Mac leaves a "._IMG1.dcm" beside IMG1.dcm on foreign disks.
            if not name.startswith(".") and path.is_file():
                yield path


def _read_dataset(path: Path) -> Dataset | None:
    """What a header says; None for a file that is not DICOM."""
    try:
        with path.open("rb") as file:
            head = file.read(132)
            has_preamble = head[128:] == b"DICM"
            if not has_preamble and not _starts_without_preamble(head):
                if path.suffix.lower() == ".dcm":
                    raise StudyError(f"{path.name} is damaged: it holds no DICOM; export the series again")
                return None
            file.seek(0)
            dataset = pydicom.dcmread(
                file, defer_size=LONGEST_HEADER_VALUE, specific_tags=HEADER_KEYWORDS, force=not has_preamble
            )
    except OSError as error:
        raise StudyError(f"{path.name} cannot be read: {error.strerror or error}") from error
    except DAMAGED as error:
        if not has_preamble:
            return None
        raise StudyError(f"{path.name} is damaged: its header cannot be read; export the series again") from error
    if not _sop_class(dataset):
        if not has_preamble:
            return None
        raise StudyError(f"{path.name} is damaged: its header ends early; export the series again")
    return dataset


def _starts_without_preamble(head: bytes) -> bool:
    """Whether a file begins with an identifying group's element, as old exports without the 128-byte preamble do."""
    return len(head) == 132 and head[:2] in (b"\x08\x00", b"\x02\x00") and head[3] == 0


def _sop_class(dataset: Dataset) -> UID:
    uid = dataset.get("SOPClassUID") or getattr(dataset, "file_meta", Dataset()).get("MediaStorageSOPClassUID") or ""
    return UID(str(uid))


def patient_and_study(dataset: Dataset) -> Dataset:
    """The attributes to copy, their bytes as they stand: decoding could warn with a patient's name."""
    header = Dataset()
    for keyword in PATIENT_AND_STUDY_KEYWORDS:
        if keyword in dataset:
            header[keyword] = dataset.get_item(keyword, keep_deferred=True)
    return header
