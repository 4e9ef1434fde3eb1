"""Datasets as the bytes of explicit VR little endian (PS3.5 7.1.2): for sequences of hundreds of items.

pydicom makes an object of every element, checks it, and copies it once for every sequence around it. These are the
bytes that it would write, and it puts them into a file as they stand.
"""

import struct
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from pydicom.charset import convert_encodings, default_encoding
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

ITEM_TAG = struct.pack("<HH", 0xFFFE, 0xE000)
LENGTH_16, LENGTH_32 = struct.Struct("<H"), struct.Struct("<I")
LONGEST_16 = 0xFFFF
# VRs whose text is ASCII whatever the character set, and what makes its length even (PS3.5 6.2).
PADDING = {"CS": b" ", "DS": b" ", "IS": b" ", "UI": b"\0"}

Value = str | int | Sequence[str] | Sequence[int] | Sequence[bytes]


class _Kind(NamedTuple):
    """What all elements of one keyword have in common: `start` is tag and VR as they are written."""

    tag: int
    start: bytes
    vr: str


def encoded(**values: Value | None) -> bytes:
    """The dataset of these elements, in the order of their tags (PS3.5 7.1); None leaves one out.

    Args:
        values: by keyword: text or numbers, one or several, where the VR is CS, DS, IS or UI; where it is SQ, the
            items, each made by this function.

    Raises:
        ValueError: an unknown keyword, or one of another VR.
    """
    elements = [(_kind(keyword), value) for keyword, value in values.items() if value is not None]
    elements.sort()
    return b"".join([_sequence(kind, value) if kind.vr == "SQ" else _text(kind, value) for kind, value in elements])


def put_encoded_sequences(dataset: Dataset, **sequences: Sequence[bytes]) -> None:
    """Puts sequences, by keyword, into a dataset that is then written in explicit VR little endian.

    Args:
        dataset: its own elements are converted, so that pydicom may be told that none is to change its encoding or
            its character set; else it would parse these sequences and encode every item anew.
        sequences: their items, each made by `encoded`.
    """
    list(dataset)  # converts its elements
    charset = dataset.get("SpecificCharacterSet")
    codec = default_encoding if charset is None else convert_encodings(charset)
    dataset.set_original_encoding(is_implicit_vr=False, is_little_endian=True, character_encoding=codec)
    for keyword, items in sequences.items():
        tag, value = Tag(keyword), _joined(items)
        dataset[tag] = RawDataElement(tag, "SQ", len(value), value, 0, is_implicit_VR=False, is_little_endian=True)


@cache
def _kind(keyword: str) -> _Kind:
    tag = Tag(keyword)
    vr = dictionary_VR(tag)
    if vr != "SQ" and vr not in PADDING:
        raise ValueError(f"{keyword} is of VR {vr}; expected SQ or one of {', '.join(PADDING)}")
    return _Kind(int(tag), struct.pack("<HH2s", tag.group, tag.element, vr.encode()), vr)  # int: quicker to compare


def _text(kind: _Kind, value: Any) -> bytes:
    """An element of text; what is too long for the 16 bits of its length is a UN (PS3.5 6.2.2)."""
    text = str(value) if isinstance(value, (str, int)) else "\\".join(map(str, value))
    content = text.encode(default_encoding)
    if len(content) % 2:
        content += PADDING[kind.vr]
    if len(content) > LONGEST_16:
        return kind.start[:4] + b"UN\0\0" + LENGTH_32.pack(len(content)) + content
    return kind.start + LENGTH_16.pack(len(content)) + content


def _sequence(kind: _Kind, items: Any) -> bytes:
    content = _joined(items)
    return kind.start + b"\0\0" + LENGTH_32.pack(len(content)) + content


def _joined(items: Sequence[bytes]) -> bytes:
    """The value of a sequence: items of defined length (PS3.5 7.5.1)."""
    return b"".join([part for item in items for part in (ITEM_TAG, LENGTH_32.pack(len(item)), item)])
