"""The one-pass scan of a header gives what pydicom gives, on files that are whole and on any that are damaged."""

import os
import random
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from anatomynet.client import headers
from anatomynet.client.header_scan import HEAD_BYTES, scan_header
from anatomynet.client.headers import patient_and_study, read_header
from anatomynet.client.quiet import quiet_libraries
from anatomynet.engine.errors import StudyError
from tests import fuzz_reader
from tests.dicom_studies import random_volume, write_study
from tests.enhanced_studies import Frames, write_enhanced
from tests.test_codecs import compress

INPUTS = int(os.environ.get("ANATOMYNET_FUZZ", "600"))
# Of the places that a file is cut or changed at; odd, as elements begin at even ones.
STEP = 1 if "ANATOMYNET_FUZZ" in os.environ else 5
SHAPE = (2, 4, 6)
COMPRESSIBLE_SHAPE = (2, 32, 40)
PIXELS = b"\xe0\x7f\x10\x00"
PLAIN = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
# What an element that is no sequence, or a sequence's parts, look like in a file.
WORD = b"\x21\0\x10\x10US\2\0\7\0"
IMPLICIT_WORD = b"\x21\0\x10\x10\2\0\0\0\7\0"
SEQUENCE, UNKNOWN, BYTES = (b"\x21\0\x11\x10" + vr + b"\0\0\xff\xff\xff\xff" for vr in (b"SQ", b"UN", b"OB"))
ITEM, OPEN_ITEM, ITEM_OF_10 = (b"\xfe\xff\0\xe0" + length for length in (bytes(4), b"\xff" * 4, b"\x0a\0\0\0"))
ITEM_END, SEQUENCE_END = b"\xfe\xff\x0d\xe0\0\0\0\0", b"\xfe\xff\xdd\xe0\0\0\0\0"
CHARACTER_SET = b"\x08\0\5\0CS\x0a\0"
# Name -> what stands before the pixels, and whether it is scanned.
PECULIAR: dict[str, tuple[bytes, bool]] = {
    "empty sequence": (SEQUENCE + SEQUENCE_END, True),
    "items of both kinds": (SEQUENCE + ITEM + ITEM_OF_10 + WORD + OPEN_ITEM + WORD * 2 + ITEM_END + SEQUENCE_END, True),
    "implicit items": (
        UNKNOWN + ITEM_OF_10 + IMPLICIT_WORD + OPEN_ITEM + IMPLICIT_WORD + ITEM_END + SEQUENCE_END,
        True,
    ),
    "a sequence in a sequence": ((SEQUENCE + OPEN_ITEM) * 2 + (ITEM_END + SEQUENCE_END) * 2, True),
    "sequences too deep": ((SEQUENCE + OPEN_ITEM) * 100 + (ITEM_END + SEQUENCE_END) * 100, False),
    "a long private value": (b"\x21\0\x12\x10OB\0\0\0\x80\0\0" + bytes(0x8000), True),
    "a value longer than what is read at once": (b"\x21\0\x12\x10OB\0\0\0\0\1\0" + bytes(0x10000), False),
    "fragments that are no pixels": (BYTES + ITEM + SEQUENCE_END, False),
    "an item that is longer than its elements": (SEQUENCE + ITEM_OF_10 + WORD[:8] + SEQUENCE_END, False),
    "an item that is shorter than its elements": (SEQUENCE + b"\xfe\xff\0\xe0\x09\0\0\0" + WORD + SEQUENCE_END, False),
    "a character set of its own": (
        SEQUENCE + OPEN_ITEM + CHARACTER_SET + b"ISO_IR 100" + ITEM_END + SEQUENCE_END,
        False,
    ),
    "no item": (SEQUENCE + WORD + SEQUENCE_END, False),
    "an unknown VR": (b"\x21\0\x13\x10ZZ\2\0\0\0", False),
    "no VR": (b"\x21\0\x13\x10\2\0\0\0\0\0", False),
    "the end of an item": (ITEM_END, False),
    "the end of an item with a VR": (b"\xfe\xff\x0d\xe0US\0\0", False),
    "the end of an item that is a sequence": (b"\xfe\xff\x0d\xe0" + SEQUENCE[4:] + SEQUENCE_END, False),
    "an element twice": (b"\x28\0\x10\0US\2\0\7\0" * 2, True),
    "another character set": (CHARACTER_SET + b"ISO_IR 100", True),
    "character sets": (CHARACTER_SET[:-2] + b"\x18\0\\ISO 2022 IR 87\\GB18030 ", True),
    "an unknown character set": (CHARACTER_SET + b"ISO_IR 999", False),
    "a character set that is a number": (b"\x08\0\5\0US\x03\0abc", False),
    "pixels twice": (b"\xe0\x7f\x10\0OW\0\0\2\0\0\0\0\0", False),
}
FIRST = b"\x08\0\5\0"
CLASS = b"\2\0\2\0UI\x1a\0" + CTImageStorage.encode() + b"\0"
# Name -> of which file which bytes are other bytes: it says something else than it is. None of them is scanned.
MISTAKEN = {
    "implicit that is explicit": (
        "Explicit VR Little Endian",
        b"\x14\x001.2.840.10008.1.2.1\0",
        b"\x12\x001.2.840.10008.1.2\0",
    ),
    "implicit that looks explicit": ("Implicit VR Little Endian", FIRST, b"\x08\0\1\0AA\0\0" + bytes(0x4141) + FIRST),
    "a command": ("Explicit VR Little Endian", FIRST, b"\0\0\0\0UL\4\0\0\0\0\0" + FIRST),
    "a class that is a word": ("Explicit VR Little Endian", CLASS, CLASS.replace(b"UI", b"SH")[:-1] + b" "),
    "fragments of unknown VR": ("RLE Lossless", PIXELS + b"OB", PIXELS + b"UN"),
}
PYDICOMS = (ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)


@pytest.fixture
def outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], list[object]]:
    """What a file's bytes end in with the scan, and in pydicom alone: a refusal's text, None, or all elements."""
    path = tmp_path / "IMG1.dcm"

    def read_twice(data: bytes) -> list[object]:
        path.write_bytes(data)
        found = [_outcome(path)]
        with monkeypatch.context() as patch:
            patch.setattr(headers, "scan_header", lambda *_: None)
            found.append(_outcome(path))
        return found

    return read_twice


def _outcome(path: Path) -> object:
    with quiet_libraries():
        try:
            header = read_header(path)
            copied = header and patient_and_study(header)
        except StudyError as error:
            return str(error)
    if header is None:
        return None
    # Two that only pydicom reads: the value of small pixels, and the character set, which it converts.
    elements = {**header.file.by_keyword, "SpecificCharacterSet": None}
    if isinstance(pixels := elements.get("PixelData"), RawDataElement):
        elements["PixelData"] = pixels._replace(value=None)
    return header.size, elements, header.file[1:], copied and dict(copied.items())


def understood(data: bytes) -> bool:
    return scan_header(BytesIO(data), data[:HEAD_BYTES], len(data)) is not None


def slice_of(folder: Path, syntax: UID = ExplicitVRLittleEndian, **changes: object) -> bytes:
    """A slice with everything that scanners write before its pixels: sequences, private elements, empty values."""
    path = write_study(folder, random_volume(SHAPE))[0]
    dataset = pydicom.dcmread(path)
    dataset.DeidentificationMethodCodeSequence = [_code("113100"), _code("113105")]
    dataset.StudyDescription = "Kopf"
    dataset.ReferencedImageSequence = [_code("1"), Dataset()]
    dataset.RequestAttributesSequence = _undefined([_code("2"), Dataset()])
    for keyword, value in changes.items():
        setattr(dataset, keyword, value)
    block = dataset.private_block(0x0019, "AnatomyNet", create=True)
    block.add_new(1, "OB", b"\x01\x02" * 40)
    block.add_new(2, "SQ", _undefined([_code("3")]))
    fresh = Dataset(dict(dataset.items()))
    fresh.file_meta = dataset.file_meta
    fresh.file_meta.TransferSyntaxUID = syntax
    list(fresh.iterall())  # converts what is still in the old encoding
    buffer = BytesIO()
    fresh.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _code(value: str) -> Dataset:
    code = Dataset()
    code.CodeValue = value
    code.CodingSchemeDesignator = "DCM"
    inner = Dataset()
    inner.CodeMeaning = "nested"
    code.EquivalentCodeSequence = _undefined([inner])
    return code


def _undefined(items: list[Dataset]) -> Sequence:
    sequence = Sequence(items)
    sequence.is_undefined_length = True
    for item in items:
        item.is_undefined_length_sequence_item = True
    return sequence


def before_pixels(data: bytes, element: bytes) -> bytes:
    place = data.index(PIXELS)
    return data[:place] + element + data[place:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Name -> a file of every kind that can be made here."""
    folder = tmp_path_factory.mktemp("whole")
    files = {syntax.name: slice_of(folder / syntax.name, syntax) for syntax in (*PLAIN, *PYDICOMS)}
    for syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless):
        if get_decoder(syntax).is_available:
            paths = write_study(folder / syntax.name, random_volume(COMPRESSIBLE_SHAPE))
            compress(paths[0], syntax)
            files[syntax.name] = paths[0].read_bytes()
    enhanced = write_enhanced(folder / "enhanced.dcm", random_volume(SHAPE), Frames((1, 0)))
    files["enhanced"] = enhanced.read_bytes()
    plain = files[ExplicitVRLittleEndian.name]
    files["no preamble"] = plain[132:]
    files["trailing padding"] = plain + b"\xfc\xff\xfc\xffOB\0\0\4\0\0\0\0\0\0\0"
    return files


def test_every_kind_of_file_is_read_alike(whole: dict[str, bytes], outcomes: Callable[[bytes], list[object]]) -> None:
    for name, data in whole.items():
        ours, pydicoms = outcomes(data)
        assert ours == pydicoms, name
        assert isinstance(ours, tuple), name


def test_what_is_usual_is_scanned_and_the_rest_is_pydicoms(whole: dict[str, bytes]) -> None:
    scanned = {name for name, data in whole.items() if understood(data)}
    assert set(whole) - scanned == {syntax.name for syntax in PYDICOMS} | {"no preamble", "trailing padding"}


@pytest.mark.parametrize("name", PECULIAR)
def test_peculiar_elements(name: str, whole: dict[str, bytes], outcomes: Callable[[bytes], list[object]]) -> None:
    element, is_scanned = PECULIAR[name]
    data = before_pixels(whole[ExplicitVRLittleEndian.name], element)
    ours, pydicoms = outcomes(data)
    assert ours == pydicoms
    assert understood(data) == is_scanned


@pytest.mark.parametrize("name", MISTAKEN)
def test_mistaken_files(name: str, whole: dict[str, bytes], outcomes: Callable[[bytes], list[object]]) -> None:
    kind, old, new = MISTAKEN[name]
    assert old in whole[kind]
    data = whole[kind].replace(old, new, 1)
    ours, pydicoms = outcomes(data)
    assert ours == pydicoms
    assert not understood(data)


@pytest.mark.parametrize("syntax", PLAIN, ids=lambda uid: uid.name)
def test_a_file_cut_anywhere(syntax: UID, whole: dict[str, bytes], outcomes: Callable[[bytes], list[object]]) -> None:
    data = whole[syntax.name]
    refused = 0
    for length in range(0, len(data), STEP):
        ours, pydicoms = outcomes(data[:length])
        assert ours == pydicoms, length
        refused += isinstance(ours, str)
    assert refused > len(data) // STEP // 2


@pytest.mark.parametrize("syntax", PLAIN, ids=lambda uid: uid.name)
def test_any_byte_changed(syntax: UID, whole: dict[str, bytes], outcomes: Callable[[bytes], list[object]]) -> None:
    data = whole[syntax.name]
    rng = random.Random(7)
    for place in range(128, data.index(PIXELS) + 16, STEP):
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        ours, pydicoms = outcomes(bytes(changed))
        assert ours == pydicoms, (place, changed[place])


def test_any_damage(whole: dict[str, bytes], outcomes: Callable[[bytes], list[object]]) -> None:
    scanned = refused = 0
    for number in range(INPUTS):
        rng = random.Random(number)
        name = rng.choice(list(whole))
        data = whole[name]
        for _ in range(rng.choice([1, 1, 2])):
            with quiet_libraries():
                data = rng.choice(fuzz_reader.DAMAGES)(rng, data) if data else data
        ours, pydicoms = outcomes(data)
        assert ours == pydicoms, (number, name)
        scanned += understood(data)
        refused += isinstance(ours, str)
    assert scanned > INPUTS / 10
    assert refused > INPUTS / 10
