"""Folder -> headers of the CT slices in it: the first half of reading a study.

Here it is decided what is DICOM, what is a CT slice and what is damaged; whether slices fit together is not.
"""

import math
import os
import re
import stat
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement, convert_raw_data_element
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
    MediaStorageDirectoryStorage,
)

from anatomynet.client.header_elements import (
    LONGEST_HEADER_VALUE,
    META_START,
    PATIENT_AND_STUDY_KEYWORDS,
    PREAMBLE_LENGTH,
    TAGS,
    FileElements,
)
from anatomynet.client.header_scan import HEAD_BYTES, scan_header
from anatomynet.client.study_files import mode_of
from anatomynet.engine.errors import GeometryError, StudyError

FRAME_CLASSES = frozenset({EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage})
CT_CLASSES = FRAME_CLASSES | {CTImageStorage}
# Of a file that is deflated as a whole; a slice of 4096 x 4096 is half of it. Deflate makes at most 1032 bytes of one.
LARGEST_INFLATED_BYTES = 64 << 20
DEFLATE_RATIO = 1032
INFLATED_CHUNK = 1 << 20
UID_TAIL_LENGTH = 8
UNREADABLE_HEADER = "its header cannot be read"
# A UID that may stand in a message: in a damaged file anything may stand in its place.
PLAIN_UID = re.compile(r"[0-9.]{1,64}")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
# What pydicom raises, depending on where a file is damaged.
DAMAGED = (
    InvalidDicomError,
    BytesLengthException,
    EOFError,
    struct.error,
    zlib.error,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    NotImplementedError,
    RecursionError,
    MemoryError,  # a length that no file has
)


@dataclass(frozen=True, eq=False)
class CTHeader:
    """One CT file's header, before it is known whether its series is the wanted one.

    Values are taken from the file's bytes: pydicom's own would take three times as long, and warn with what they hold.

    Attributes:
        path: of its file.
        file: the file's elements, the pixels left on disk.
        size: bytes of the file.
        frame: which of an enhanced CT's frames, from 1; 0 where the file is one slice.
        of_frame: keyword -> value of what that frame alone says; it goes before the file's.
        part: of a series cut into several enhanced files: their common UID, this one's number, how many there are.
    """

    path: Path
    file: FileElements
    size: int
    frame: int = 0
    of_frame: Mapping[str, bytes] = field(default_factory=dict)
    part: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The slice in a message."""
        return f"{self.path.name} frame {self.frame}" if self.frame else self.path.name

    @property
    def frame_count(self) -> int:
        """Of its file; 1 where the file is one slice."""
        return int(self.text("NumberOfFrames")) if self.frame else 1

    @property
    def stack(self) -> str:
        """Which of an enhanced CT's stacks it belongs to; empty where it does not say."""
        return self.text("StackID") if self.frame else ""

    def text(self, keyword: str) -> str:
        """The element as text, its values separated by backslashes; empty where it is absent."""
        value = self._bytes(keyword)
        return value.decode("latin-1").strip(" \0")

    def required_text(self, keyword: str) -> str:
        """The element as text.

        Raises:
            StudyError: it is absent or empty.
        """
        return self.text(keyword) or self._refuse(f"{keyword} is missing; a CT slice must have it")

    def numbers(self, keyword: str, count: int) -> tuple[float, ...]:
        """The element, decimal text, as so many finite numbers.

        Raises:
            StudyError: it is absent or something else.
        """
        text = self.required_text(keyword)
        try:
            values = tuple(float(part) for part in text.split("\\")) if "_" not in text else ()  # Python takes 1_0
        except ValueError:
            values = ()
        if len(values) != count or not all(map(math.isfinite, values)):
            self._refuse(f"{keyword} is not {count} finite number{'s' if count > 1 else ''}")
        return values

    def number(self, keyword: str) -> float:
        """The element, decimal text, as one finite number.

        Raises:
            StudyError: it is absent or something else.
        """
        return self.numbers(keyword, 1)[0]

    def word(self, keyword: str) -> int:
        """The element, 16 bits, as an unsigned number.

        Raises:
            StudyError: it is absent or something else.
        """
        value = self._bytes(keyword)
        if len(value) != 2:
            self._refuse(
                f"{keyword} is missing; a CT slice must have it" if not value else f"{keyword} is not one number"
            )
        return int.from_bytes(value, "little" if self.file.little_endian else "big")

    @cached_property
    def sop_class_uids(self) -> tuple[str, str]:
        """What the file is, as the image says and as the file's own header says; they may differ, or be empty."""
        return self.text("SOPClassUID"), self.file.media_class_uid

    @property
    def is_ct(self) -> bool:
        """Whether it is a CT image, or an enhanced one."""
        return not CT_CLASSES.isdisjoint(self.sop_class_uids)

    @property
    def enhanced(self) -> bool:
        """Whether its file holds frames, each a slice."""
        return not FRAME_CLASSES.isdisjoint(self.sop_class_uids)

    @property
    def has_pixels(self) -> bool:
        """Whether it gets as far as its pixels."""
        return "PixelData" in self.file.by_keyword

    @property
    def transfer_syntax_uid(self) -> str:
        """How the file is encoded."""
        return self.file.transfer_syntax_uid

    @property
    def image_type(self) -> frozenset[str]:
        """The words of ImageType."""
        return frozenset(re.findall(r"\w+", self.text("ImageType").upper().replace("_", " ")))

    def has(self, keyword: str) -> bool:
        """Whether the element is there and not empty."""
        return bool(self._bytes(keyword))

    @property
    def placed(self) -> bool:
        """Whether it says where it lies."""
        return self.has("ImageOrientationPatient") and self.has("ImagePositionPatient")

    def _bytes(self, keyword: str) -> bytes:
        if keyword in self.of_frame:
            return self.of_frame[keyword]
        element = self.file.by_keyword.get(keyword)
        return element.value or b"" if isinstance(element, RawDataElement) else b""

    def _refuse(self, problem: str) -> NoReturn:
        raise StudyError(f"{self.name}: {problem}: export the series again")

    @cached_property
    def normal(self) -> NDArray[np.float64]:
        """Unit normal of the slice, LPS: row direction x column direction."""
        normal = _unit_normal(self.numbers("ImageOrientationPatient", 6))
        if normal is None:
            raise GeometryError(
                f"{self.name}: ImageOrientationPatient is not two unit vectors at right angles; export the series again"
            )
        return normal

    @cached_property
    def position(self) -> NDArray[np.float64]:
        """LPS mm of the first voxel's centre."""
        return np.array(self.numbers("ImagePositionPatient", 3))


@lru_cache(maxsize=16)
def _unit_normal(cosines: tuple[float, ...]) -> NDArray[np.float64] | None:
    """Row direction x column direction, read-only; None where they are no unit vectors at right angles."""
    with np.errstate(all="ignore"):
        normal: NDArray[np.float64] = np.cross(cosines[:3], cosines[3:])
        length = np.linalg.norm(normal)
    if not abs(length - 1) <= 1e-3:  # where they are too long it is no number
        return None
    normal /= length
    normal.setflags(write=False)  # slices of one orientation share it
    return normal


def read_headers(files: Iterable[Path]) -> tuple[list[CTHeader], Counter[str]]:
    """The CT files among files, and a count of everything else by its kind.

    Raises:
        StudyError: a file that cannot be read, or is damaged.
    """
    headers: list[CTHeader] = []
    others: Counter[str] = Counter()
    for path in files:
        header = read_header(path)
        if header is not None and header.is_ct:
            headers.append(header)
        else:
            others[kind_of(header)] += 1
    return headers, others


def kind_of(header: CTHeader | None) -> str:
    """What a file is, for a message; None is of no DICOM file."""
    if header is None:
        return "other file"
    uid = header.sop_class_uids[0]
    return UID(uid).name if PLAIN_UID.fullmatch(uid) else "unreadable class"


def files_under(study_dir: Path) -> Iterator[Path]:
    """The files in a folder and in those below, hidden ones apart, in the order of their names.

    Raises:
        StudyError: no folder, or one that cannot be read.
    """
    mode = mode_of(study_dir)
    if not stat.S_ISDIR(mode):
        what = "is a file" if mode else "does not exist"
        raise StudyError(f"{study_dir} {what}; expected a folder, or a zip file, with one CT series")

    def refuse(error: OSError) -> NoReturn:
        raise StudyError(f"a folder in the study cannot be read: {error.strerror}; check its permissions") from error

    for root, folders, names in os.walk(study_dir, onerror=refuse):
        # What is hidden is not the scanner's: a Mac leaves a "._IMG1.dcm" beside IMG1.dcm on foreign disks.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(root, name) for name in sorted(names) if not name.startswith(".")]
        try:
            files = [path for path in paths if path.is_file()]
        except OSError as error:  # a folder that may be listed, and not entered
            refuse(error)
        yield from files


def read_header(path: Path) -> CTHeader | None:
    """What a DICOM file says of itself; None for a file of another kind.

    Raises:
        StudyError: a file that cannot be read, or is damaged.
    """
    damage = UNREADABLE_HEADER
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(HEAD_BYTES)
            has_preamble = head[PREAMBLE_LENGTH:META_START] == b"DICM"
            found = scan_header(file, head, size)
            if found is None and (has_preamble or _starts_without_preamble(head)):
                if _inflates_well(file, size):
                    found = _read_elements(file)
                else:
                    damage = f"it does not inflate to at most {LARGEST_INFLATED_BYTES >> 20} MiB"
    except OSError as error:
        raise StudyError(f"{path.name} cannot be read: {error.strerror or error}") from error
    if found:
        header = CTHeader(path, found, size)
        damage = _damage_in(header)
        if not damage:
            return header
    if has_preamble or _must_be_dicom(path, size):
        raise StudyError(
            f"{path.name} is damaged: {damage if size else 'it is empty'}; "
            "export the series again, or delete it if it is no slice"
        )
    return None


def _damage_in(header: CTHeader) -> str:
    """What shows that a file was cut or changed; empty where nothing does."""
    # Only a DICOMDIR has its class in the file's own header alone; another file without one was cut.
    if not header.has("SOPClassUID") and MediaStorageDirectoryStorage not in header.sop_class_uids:
        return UNREADABLE_HEADER
    if header.is_ct:
        if not header.has_pixels:
            return "it ends before its pixels"
        if len({*header.sop_class_uids} - {""}) > 1:
            return "it says both that it is a CT and that it is not"
    return ""


def _inflates_well(file: BinaryIO, size: int) -> bool:
    """Whether an open file is safe to parse: where it is deflated, pydicom inflates it whole."""
    if size * DEFLATE_RATIO <= LARGEST_INFLATED_BYTES:
        return True
    file.seek(0)
    inflater, left = zlib.decompressobj(-zlib.MAX_WBITS), LARGEST_INFLATED_BYTES
    try:
        read_preamble(file, force=True)
        if _read_file_meta_info(file).get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return True
        while left >= 0 and (packed := inflater.unconsumed_tail or file.read(INFLATED_CHUNK)):
            left -= len(inflater.decompress(packed, INFLATED_CHUNK))
    except DAMAGED:
        return False
    return left >= 0


def _read_elements(file: BinaryIO) -> FileElements | None:
    """The wanted elements of an open file, as pydicom reads them; None where it is damaged."""
    file.seek(0)
    try:
        dataset = pydicom.dcmread(file, defer_size=LONGEST_HEADER_VALUE, specific_tags=list(TAGS.values()), force=True)
        list(dataset.file_meta)  # converts its values: what is damaged there shows here
    except DAMAGED:
        return None
    found = {keyword: dataset.get_item(tag, keep_deferred=True) for keyword, tag in TAGS.items() if tag in dataset}
    implicit, little_endian = dataset.original_encoding
    # A file without a preamble need not say how it is encoded.
    syntax = (
        dataset.file_meta.get("TransferSyntaxUID") or (implicit and ImplicitVRLittleEndian) or ExplicitVRLittleEndian
    )
    media_class = dataset.file_meta.get("MediaStorageSOPClassUID") or ""
    return FileElements(found, str(media_class), str(syntax), bool(little_endian))


def _starts_without_preamble(head: bytes) -> bool:
    """Whether a file begins with an element of group 2 or 8, as exports without the 128-byte preamble do."""
    return len(head) >= META_START and head[:2] in (b"\x08\x00", b"\x02\x00") and head[3] == 0


def _must_be_dicom(path: Path, size: int) -> bool:
    """Whether a file that holds no DICOM must have been a slice: at the end of a stack it would be missed silently."""
    suffix = path.suffix.lower()
    return suffix in DICOM_SUFFIXES or (size == 0 and (not suffix or suffix[1:].isdigit()))


def uid_tail(uid: str) -> str:
    """The last digits of a UID: enough to tell it from its neighbours in a message."""
    return f"...{uid[-UID_TAIL_LENGTH:]}"


def patient_and_study(header: CTHeader) -> Dataset:
    """The attributes that an RTSTRUCT copies, as the file has them.

    Raises:
        StudyError: one whose type is not that attribute's.
    """
    copied = Dataset()
    for keyword in PATIENT_AND_STUDY_KEYWORDS:
        element = header.file.by_keyword.get(keyword)
        if element is None:
            continue
        if element.VR not in (None, "UN", dictionary_VR(TAGS[keyword])):
            raise StudyError(f"{header.name} is damaged: {keyword} is of a wrong type; export the series again")
        if keyword == "SpecificCharacterSet" and isinstance(element, RawDataElement):
            element = convert_raw_data_element(element)  # as pydicom's reader does
        copied[keyword] = element
    return copied
