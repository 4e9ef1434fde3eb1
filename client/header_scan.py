"""First bytes of a plain DICOM file -> the wanted elements of its header, in one pass.

pydicom reads any file; this reads those without a peculiarity, to the same result and many times faster. What it does
not know to the last byte it leaves to pydicom: nothing is refused here.
"""

import re
from functools import lru_cache
from struct import Struct, pack
from struct import error as StructError
from typing import BinaryIO, cast

from pydicom.charset import python_encoding
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement, empty_value_for_VR
from pydicom.uid import AllTransferSyntaxes, ImplicitVRLittleEndian
from pydicom.valuerep import EXPLICIT_VR_LENGTH_16, EXPLICIT_VR_LENGTH_32

from anatomynet.client.header_elements import (
    LONGEST_HEADER_VALUE,
    META_START,
    PREAMBLE_LENGTH,
    TAGS,
    UNDEFINED_LENGTH,
    FileElements,
)

# No value within so many is long enough for pydicom to leave it on disk.
HEAD_BYTES = LONGEST_HEADER_VALUE
EXPLICIT = Struct("<4s2sH").unpack_from
IMPLICIT = Struct("<4sL").unpack_from
LENGTH = Struct("<L").unpack_from
SHORT_VRS = {vr.encode(): vr.value for vr in EXPLICIT_VR_LENGTH_16}
LONG_VRS = {vr.encode(): vr.value for vr in EXPLICIT_VR_LENGTH_32}
EMPTY_VALUES = {
    vr: cast(bytes | None, empty_value_for_VR(vr, raw=True)) for vr in (None, *SHORT_VRS.values(), *LONG_VRS.values())
}
SYNTAXES = {uid for uid in AllTransferSyntaxes if uid.is_little_endian and not uid.is_deflated}
# Tags as they stand in a little-endian file.
WANTED = {pack("<HH", tag.group, tag.element): (keyword, tag) for keyword, tag in TAGS.items()}
CHARACTER_SET = b"\x08\x00\x05\x00"
PIXEL_DATA = b"\xe0\x7f\x10\x00"
MEDIA_CLASS, TRANSFER_SYNTAX = b"\x02\x00\x02\x00", b"\x02\x00\x10\x00"
COMMAND_GROUP, META_GROUP, ITEM_GROUP = b"\x00\x00", b"\x02\x00", b"\xfe\xff"
ITEM, SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
ITEM_END = b"\xfe\xff\x0d\xe0\x00\x00\x00\x00"
# Values of the file's own header that pydicom converts without a second thought, by VR.
META_VALUES = {
    "UI": re.compile(rb"[0-9.]{1,64}\0?"),
    "UL": re.compile(rb".{4}", re.DOTALL),
    "OB": re.compile(rb".+", re.DOTALL),
    "SH": re.compile(rb"[ -\[\]-~]+"),
    "AE": re.compile(rb"[ -\[\]-~]+"),
}
UPPER_CASE = re.compile(rb"[A-Z]{2}")
DEEPEST_SEQUENCE = 8

Element = tuple[bytes, str | None, int, int]


class UnusualError(Exception):
    """A file that is pydicom's to read."""


def scan_header(file: BinaryIO, head: bytes, size: int) -> FileElements | None:
    """The wanted elements of an open file, but for its pixels' value; None where it is pydicom's to read.

    Args:
        file: of which the position is lost.
        head: its first HEAD_BYTES.
        size: bytes of the file.
    """
    if head[PREAMBLE_LENGTH:META_START] != b"DICM":
        return None
    try:
        media_class_uid, syntax, at = _scan_file_meta(head)
        implicit = syntax == ImplicitVRLittleEndian
        if syntax not in SYNTAXES or head[at : at + 2] == COMMAND_GROUP:
            return None
        if implicit and UPPER_CASE.match(head, at + 4):
            return None  # it is explicit all the same
        elements, pixels = _scan_elements(head, at, implicit=implicit)
        end = (
            _end_of_fragments(file, pixels) if pixels.length == UNDEFINED_LENGTH else pixels.value_tell + pixels.length
        )
    except (UnusualError, StructError):
        return None
    # Elements may follow the pixels where there is room for one.
    return FileElements(elements, media_class_uid, syntax) if size - end < 8 else None


def _scan_file_meta(head: bytes) -> tuple[str, str, int]:
    """MediaStorageSOPClassUID, TransferSyntaxUID and where the file's own header ends."""
    uids: dict[bytes, str] = {}
    at = META_START
    while head[at : at + 2] == META_GROUP:
        tag, vr, length, start = _element_at(head, at, implicit=False)
        at = start + length
        if vr not in META_VALUES or at > len(head) or not META_VALUES[vr].fullmatch(head, start, at):
            raise UnusualError
        if tag in (MEDIA_CLASS, TRANSFER_SYNTAX):
            if vr != "UI":
                raise UnusualError
            uids[tag] = head[start:at].rstrip(b"\0").decode()
    return uids.get(MEDIA_CLASS, ""), uids.get(TRANSFER_SYNTAX, ""), at


def _scan_elements(head: bytes, at: int, *, implicit: bool) -> tuple[dict[str, RawDataElement], RawDataElement]:
    """The wanted elements up to the pixels, and these; where a value ends beyond what was read, nothing follows it."""
    found: dict[str, RawDataElement] = {}
    while True:
        tag, vr, length, start = _element_at(head, at, implicit=implicit)
        at = start + length
        if tag in WANTED:
            keyword, known = WANTED[tag]
            if tag == PIXEL_DATA:
                found[keyword] = RawDataElement(known, vr, length, None, start, implicit, True)
                return found, found[keyword]
            if tag == CHARACTER_SET and not _is_character_set(vr, head[start:at]):
                raise UnusualError
            value = head[start:at] or EMPTY_VALUES[vr]
            found[keyword] = RawDataElement(known, vr, length, value, start, implicit, True)
        elif tag[:2] == ITEM_GROUP:
            raise UnusualError
        elif length == UNDEFINED_LENGTH:
            at = _end_of_sequence(head, start, tag, vr)


def _element_at(head: bytes, at: int, *, implicit: bool) -> Element:
    """Tag, VR, length and where the value begins."""
    if implicit:
        tag, length = IMPLICIT(head, at)
        return tag, None, length, at + 8
    tag, vr, length = EXPLICIT(head, at)
    if vr in SHORT_VRS:
        return tag, SHORT_VRS[vr], length, at + 8
    if vr not in LONG_VRS:
        raise UnusualError
    return tag, LONG_VRS[vr], LENGTH(head, at + 8)[0], at + 12


@lru_cache(maxsize=16)
def _is_character_set(vr: str | None, value: bytes) -> bool:
    """Whether pydicom has an encoding for each: it must know them before it reads on."""
    names = value.decode("latin-1").rstrip(" \0").split("\\")
    return vr in (None, "CS") and all(name in python_encoding for name in names)


def _end_of_sequence(head: bytes, at: int, tag: bytes, vr: str | None, depth: int = 1) -> int:
    """Where the element after a sequence of undefined length begins."""
    if depth > DEEPEST_SEQUENCE or not _is_sequence(head, at, tag, vr):
        raise UnusualError
    while True:
        mark, length = IMPLICIT(head, at)
        at += 8
        if mark == SEQUENCE_END:
            return at
        if mark != ITEM:
            raise UnusualError
        at = _end_of_item(head, at, length, implicit=vr is None, depth=depth)


def _is_sequence(head: bytes, at: int, tag: bytes, vr: str | None) -> bool:
    """Whether what has no defined length is a sequence; UN is one (PS3.5 6.2.2)."""
    if vr is not None:
        return vr in ("SQ", "UN")
    group, element = Struct("<HH").unpack(tag)
    try:
        return dictionary_VR((group, element)) == "SQ"
    except KeyError:
        return head[at : at + 4] == ITEM


def _end_of_item(head: bytes, at: int, length: int, *, implicit: bool, depth: int) -> int:
    """Where a sequence's next item begins; those of an explicit file may be implicit (PS3.5 6.2.2)."""
    end = None if length == UNDEFINED_LENGTH else at + length
    implicit = implicit or not UPPER_CASE.match(head, at + 4)
    while at != end:  # past it, only the end of what was read ends this
        if end is None and head[at : at + 8] == ITEM_END:
            return at + 8
        tag, vr, size, start = _element_at(head, at, implicit=implicit)
        if tag == CHARACTER_SET or tag[:2] == ITEM_GROUP:
            raise UnusualError
        at = _end_of_sequence(head, start, tag, vr, depth + 1) if size == UNDEFINED_LENGTH else start + size
    return at


def _end_of_fragments(file: BinaryIO, pixels: RawDataElement) -> int:
    """Where encapsulated pixels end (PS3.5 A.4)."""
    if pixels.VR not in ("OB", "OW", None):
        raise UnusualError
    at = pixels.value_tell
    while True:
        file.seek(at)
        mark, length = IMPLICIT(file.read(8))
        at += 8
        if mark == SEQUENCE_END:
            return at
        if mark != ITEM:
            raise UnusualError
        at += length
