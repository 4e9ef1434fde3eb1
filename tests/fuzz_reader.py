"""Damaged studies by the thousand: the reader ends each in a result or one line of an AnatomyNetError.

    python -m tests.fuzz_reader --count 10000 [--first 0]

Input n is the same wherever it runs. The first that ends otherwise (another error, a second line, a word of the
patient, a hang, too much memory) is printed as JSON with its number; a crash of a decoder shows as a signal.
"""

import json
import random
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
import numpy as np
import pydicom
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.fileset import FileSet
from pydicom.pixels.decoders.base import get_decoder
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from anatomynet.client.contours import trace_contours
from anatomynet.client.headers import DAMAGED
from anatomynet.client.rtstruct import write_rtstruct
from anatomynet.client.study import read_ct_series, volume_from_series
from anatomynet.client.study_files import opened_study
from anatomynet.engine.errors import AnatomyNetError
from anatomynet.engine.structures import STRUCTURES
from anatomynet.engine.volume import LabelMap
from tests.dicom_studies import random_volume, words_of_patient, write_study
from tests.enhanced_studies import Frames, write_enhanced
from tests.test_codecs import compress

Files = dict[str, bytes]
Damage = Callable[[random.Random, bytes], bytes]

SHAPE = (3, 32, 40)
LONGEST_SECONDS = 20
MOST_BYTES = 4 << 30
VRS = [b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"FD", b"FL", b"IS", b"LO", b"LT", b"OB", b"OW", b"PN", b"SH", b"SL"]
VRS += [b"SQ", b"SS", b"ST", b"TM", b"UC", b"UI", b"UL", b"UN", b"US", b"UT", b"ZZ", b"\0\0"]
LENGTHS = [0, 1, 7, 0xFFFE, 0xFFFF, 0x10000, 0x7FFFFFFE, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]
DECIMALS = ["", " ", "nan", "inf", "-inf", "1e999", "1e308", "-1e-320", "0", "-1", "abc", "1,5", "1\\2", "\\", "0x10"]
DECIMALS += [
    "1\\2\\3",
    "1\\0\\0\\0\\1\\0",
    "nan\\0\\0",
    "1e30\\1e30\\1e30",
    "9" * 400,
    "\u0664",
    "1_000",
    "\n1",
    "1e-9",
]
TEXTS = ["", " ", "\0", "\\", "\n", "1.2.3", "." * 70, "x" * 5000, "1.2.3\\1.2.4", "LOCALIZER", "MIP", "HU\\HU", "RGB"]
WORDS: list[int | list[int]] = [0, 1, 2, 7, 8, 12, 15, 16, 17, 32, 255, 4096, 32767, 32768, 65535, [1, 2], [16, 16, 16]]
EDITED = ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"]
EDITED += ["GantryDetectorTilt", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"]
EDITED += ["SamplesPerPixel", "NumberOfFrames", "PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleType"]
EDITED += ["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"]
EDITED += ["ImageType", "PhotometricInterpretation", "SpecificCharacterSet", "AcquisitionNumber", "PatientID"]


# ---- what is damaged ----


def flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_in_header(rng: random.Random, data: bytes) -> bytes:
    size = min(len(data), 2200)
    return flip(rng, data[:size]) + data[size:]


def flip_in_tail(rng: random.Random, data: bytes) -> bytes:
    start = max(0, len(data) - rng.choice([16, 600, 4000]))
    return data[:start] + flip(rng, data[start:])


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def drop(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice([1, 2, 8, 100]) :]


def insert(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(rng.choice([1, 2, 8, 100])) + data[start:]


def fill(rng: random.Random, data: bytes) -> bytes:
    start, size = rng.randrange(len(data)), rng.choice([2, 4, 16, 300])
    return data[:start] + rng.choice([b"\0", b"\xff", b"A"]) * size + data[start + size :]


def swap(rng: random.Random, data: bytes) -> bytes:
    """Two 4-byte words change places: tags among them."""
    a, b = sorted(rng.randrange(0, max(2, min(len(data), 2200) - 4), 2) for _ in range(2))
    return data[:a] + data[b : b + 4] + data[a + 4 : b] + data[a : a + 4] + data[b + 4 :] if b - a >= 4 else data


def other_vr(rng: random.Random, data: bytes) -> bytes:
    places = [m.start() for m in re.finditer(rb"[A-Z]{2}(?=[\0-\xff]\0)", data[:4000])]
    return data if not places else _put(data, rng.choice(places), rng.choice(VRS))


def other_length(rng: random.Random, data: bytes) -> bytes:
    places = [m.start() + 2 for m in re.finditer(rb"[A-Z]{2}(?=[\0-\xff]\0)", data[:4000])]
    size = rng.choice([2, 4])
    place = rng.choice(places) + rng.choice([0, 0, 2]) if places else rng.randrange(len(data))
    return _put(data, place, rng.choice(LENGTHS).to_bytes(8, "little")[:size])


def item_marks(rng: random.Random, data: bytes) -> bytes:
    mark = rng.choice([b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0"])
    return _put(data, rng.randrange(len(data)), mark + rng.choice(LENGTHS).to_bytes(4, "little"))


def deep_nest(rng: random.Random, data: bytes) -> bytes:
    """Sequences in sequences, deeper than anyone may follow."""
    level = b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    place = data.find(b"\x08\x00\x16\x00UI")
    return data[:place] + level * rng.choice([3, 200, 5000]) + data[max(0, place) :]


def edit_element(rng: random.Random, data: bytes) -> bytes:
    """One element, of the file or of a functional group, gets a value that it must not have."""
    try:
        dataset = pydicom.dcmread(BytesIO(data), force=True)
        keyword = rng.choice(EDITED)
        holders = [item for item in (dataset, *_items_with(dataset, keyword)) if keyword in item or item is dataset]
        holder = rng.choice(holders)
        if rng.random() < 0.1:
            holder.pop(keyword, None)
        else:
            vr = dictionary_VR(Tag(keyword)).split(" ")[0]
            value = _odd_value(rng, vr)
            holder[Tag(keyword)] = DataElement(Tag(keyword), vr, value, already_converted=isinstance(value, str))
        buffer = BytesIO()
        dataset.save_as(buffer)
    except (OSError, OverflowError, *DAMAGED):  # pydicom cannot read or write it
        return flip_in_header(rng, data)
    return buffer.getvalue()


def _items_with(dataset: Dataset, keyword: str) -> list[Dataset]:
    found = []
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for groups in dataset.get(name, []):
            found += [item for element in groups if element.VR == "SQ" for item in element.value if keyword in item]
    return found


def _odd_value(rng: random.Random, vr: str) -> str | int | list[int]:
    if vr == "US":
        return rng.choice(WORDS)
    if vr in ("DS", "IS"):
        return rng.choice([*DECIMALS, "1000000", "2", "-5"])
    return rng.choice(TEXTS)


def _put(data: bytes, place: int, value: bytes) -> bytes:
    return data[:place] + value + data[place + len(value) :]


DAMAGES: list[Damage] = [flip, flip_in_header, flip_in_tail, truncate, drop, insert, fill, swap, other_vr]
DAMAGES += [other_length, item_marks, deep_nest, edit_element, edit_element, edit_element]


# ---- studies ----


def whole_studies(folder: Path) -> dict[str, Files]:
    """Name -> files of a study, one of every kind of slice that can be made here."""
    warnings.simplefilter("ignore")
    studies = {"explicit": _classic(folder / "explicit", ExplicitVRLittleEndian)}
    for syntax in (ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian):
        studies[syntax.name] = _classic(folder / syntax.name, syntax)
    codecs = [RLELossless, JPEGLSLossless, JPEG2000Lossless]
    codecs += [JPEGLosslessSV1] if shutil.which("dcmcjpeg") else []
    for syntax in (uid for uid in codecs if get_decoder(uid).is_available):
        studies[syntax.name] = _classic(folder / syntax.name, syntax)
        studies[f"enhanced {syntax.name}"] = _enhanced(folder / f"enhanced {syntax.name}", syntax)
    studies["enhanced"] = _enhanced(folder / "enhanced", ExplicitVRLittleEndian)
    studies["DICOMDIR"] = _with_dicomdir(folder / "media", studies["explicit"])
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in studies["explicit"].items():
            archive.writestr(f"DICOM/{name}", data)
    studies["zip"] = {"study.zip": buffer.getvalue()}
    return studies


def _classic(folder: Path, syntax: UID) -> Files:
    for path in write_study(folder, random_volume(SHAPE)):
        if syntax.is_compressed and syntax != DeflatedExplicitVRLittleEndian:
            compress(path, syntax)
        elif syntax != ExplicitVRLittleEndian:
            _save_as(path, syntax)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _enhanced(folder: Path, syntax: UID) -> Files:
    path = write_enhanced(folder / "ct.dcm", random_volume(SHAPE), Frames((2, 0, 1)))
    if syntax.is_compressed:
        compress(path, syntax)
    return {path.name: path.read_bytes()}


def _save_as(path: Path, syntax: UID) -> None:
    dataset = pydicom.dcmread(path)
    if not syntax.is_little_endian:
        dataset.PixelData = dataset.pixel_array.astype(">i2").tobytes()
    fresh = Dataset(dict(dataset.items()))
    fresh.file_meta = dataset.file_meta
    fresh.file_meta.TransferSyntaxUID = syntax
    list(fresh.iterall())  # converts what is still in the old encoding
    fresh.save_as(path, enforce_file_format=True)


def _with_dicomdir(folder: Path, files: Files) -> Files:
    fileset = FileSet()
    for data in files.values():
        fileset.add(pydicom.dcmread(BytesIO(data)))
    fileset.write(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the trial ----


def damaged(number: int, studies: dict[str, Files]) -> tuple[str, Files]:
    """Input `number`: what it is, and its files."""
    rng = random.Random(number)
    kind = rng.choice(list(studies))
    files = dict(studies[kind])
    name = rng.choice(list(files))
    damage = rng.choice(DAMAGES)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        files[name] = damage(rng, files[name]) if files[name] else b""
    if kind == "zip" and rng.random() < 0.3:  # a sound zip with a damaged slice
        sound = dict(studies["explicit"])
        inner = rng.choice(list(sound))
        sound[inner] = damage(rng, sound[inner])
        buffer = BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for entry, data in sound.items():
                archive.writestr(entry, data)
        files = {"study.zip": buffer.getvalue()}
    return f"{kind}, {damage.__name__} of {name}", files


def outcome(folder: Path, files: Files) -> str:
    """Read and draw a study: "result", or the name of its error.

    Raises:
        AssertionError: a message of several lines, or one that names the patient.
    """
    for name, data in files.items():
        path = folder / "study" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    study = folder / "study"
    if "study.zip" in files or "DICOMDIR" in files:
        study = study / ("study.zip" if "study.zip" in files else "DICOMDIR")
    try:
        with opened_study(study) as opened:
            series = read_ct_series(opened)
            volume = volume_from_series(series)
            labels = np.zeros(volume.geometry.shape, np.uint8)
            labels[..., : labels.shape[2] // 2] = 1
            write_rtstruct(
                folder / "rs.dcm",
                series,
                trace_contours(LabelMap(labels, series.geometry, (STRUCTURES["BrainStem"],))),
            )
    except AnatomyNetError as error:
        message = str(error)
        if "\n" in message or not message.isprintable() or len(message) > 1000:
            raise AssertionError(f"no line of text: {message!r}") from error
        if any(word in message for word in words_of_patient()):
            raise AssertionError(f"names the patient: {message!r}") from error
        return type(error).__name__
    return "result"


def stop_a_hang(_: int, __: FrameType | None) -> NoReturn:
    """Raises what no handler of the reader catches."""
    raise KeyboardInterrupt


@click.command()
@click.option("--count", default=10_000, show_default=True)
@click.option("--first", default=0, show_default=True)
@click.option("--keep-going", is_flag=True, help="Print every failure instead of the first.")
def main(count: int, first: int, *, keep_going: bool) -> None:
    """Read COUNT damaged studies; exit status 1 at the first that ends otherwise than it may."""
    status = Path("/proc/self/status").read_text()
    base = int(re.search(r"VmSize:\s*(\d+)", status)[1]) << 10  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_AS, (base + MOST_BYTES, base + MOST_BYTES))
    signal.signal(signal.SIGALRM, stop_a_hang)
    counts: Counter[str] = Counter()
    failures, slowest, start = 0, (0.0, -1), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        studies = whole_studies(Path(temporary) / "whole")
        for number in range(first, first + count):
            what, files = damaged(number, studies)
            folder = Path(temporary, str(number))
            began = time.monotonic()
            signal.alarm(LONGEST_SECONDS)
            try:
                counts[outcome(folder, files)] += 1
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
                signal.alarm(0)
                failures += 1
                frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
                click.echo(json.dumps({"input": number, "what": what, "error": repr(error)[:300], "at": frames[-6:]}))
                if not keep_going:
                    break
            finally:
                signal.alarm(0)
            slowest = max(slowest, (time.monotonic() - began, number))
            shutil.rmtree(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    summary = {"inputs": count, "failures": failures, "outcomes": dict(counts), "seconds": time.monotonic() - start}
    click.echo(json.dumps({**summary, "slowest": slowest, "peak_gb": peak}))
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
