"""Stored pixels -> Hounsfield units, one slice at a time, straight into the volume."""

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from anatomynet.client.headers import DAMAGED, PLAIN_UID, TAGS, CTHeader
from anatomynet.engine.errors import StudyError
from anatomynet.engine.volume import HounsfieldArray

# Pixels that carry no measurement become air.
AIR_HU = -1000
INT16_RANGE = (-32768, 32767)
# A value that may stand in a message (PS3.5 6.2, CS): in a damaged file anything may stand in its place.
CODE_STRING = re.compile(r"[A-Z0-9 _]{1,16}")
# Family of transfer syntaxes -> pydicom's name of the one decoder for it, and what installs that. The licences are
# permissive: pylibjpeg-libjpeg, the usual answer for lossless JPEG, is GPL. Never a second decoder after the first
# failed: gdcm ends the process on a stream of another size than its header says.
CODECS = {
    "JPEG 2000": ("pylibjpeg", "pylibjpeg-openjpeg"),
    "High-Throughput JPEG 2000": ("pylibjpeg", "pylibjpeg-openjpeg"),
    "JPEG-LS": ("pyjpegls", "pyjpegls"),
    "JPEG": ("gdcm", "python-gdcm"),
    "RLE": ("pydicom", ""),
}


@dataclass(frozen=True)
class EncodedFrame:
    """Where a decoder finds a slice's pixels, which may be one frame of an enhanced CT.

    Attributes:
        start: bytes from the file's start to its pixel data.
        index: of the frame, from 0.
        count: of the file's frames.
    """

    start: int
    index: int
    count: int


@dataclass(frozen=True)
class StoredPixels:
    """How one slice's values lie in its file, and how they become HU (PS3.3 C.7.6.3, C.8.2.1).

    Attributes:
        offset: bytes from the file's start to raw little-endian pixels; None where a decoder must read them.
        transfer_syntax_uid: of the file.
        signed: two's complement.
        bits_stored: of the 16 allocated; the others carry nothing.
        slope, intercept: HU = slope x stored + intercept.
        padding: lowest and highest of the 16-bit words that mean "no measurement"; None where there are none.
        frame: where a decoder must read it; None where the whole file is deflated.
    """

    offset: int | None
    transfer_syntax_uid: str
    signed: bool
    bits_stored: int
    slope: float
    intercept: float
    padding: tuple[int, int] | None
    frame: EncodedFrame | None = None


def stored_pixels(header: CTHeader) -> StoredPixels:
    """How a slice's values are stored.

    Raises:
        StudyError: something that a CT slice cannot be, a missing tag, a file that ends before its pixels do.
    """
    _check_image(header)
    signed = header.word("PixelRepresentation") == 1
    return StoredPixels(
        offset=_raw_pixel_offset(header),
        frame=_encoded_frame(header),
        transfer_syntax_uid=header.transfer_syntax_uid,
        signed=signed,
        bits_stored=header.word("BitsStored"),
        slope=header.number("RescaleSlope"),
        intercept=header.number("RescaleIntercept"),
        padding=_padding(header, signed=signed),
    )


def _check_image(header: CTHeader) -> None:
    """Refuse what is no CT slice in Hounsfield units (PS3.3 C.8.2.1.1)."""
    unit = header.text("RescaleType").upper() or "HU"
    found_and_expected = [
        ("PhotometricInterpretation", header.required_text("PhotometricInterpretation"), ("MONOCHROME2",)),
        ("SamplesPerPixel", header.word("SamplesPerPixel"), (1,)),
        ("NumberOfFrames", "1" if header.frame else header.text("NumberOfFrames") or "1", ("1",)),
        ("BitsAllocated", header.word("BitsAllocated"), (16,)),
        ("BitsStored", header.word("BitsStored"), range(16, 7, -1)),
        ("HighBit", header.word("HighBit"), (header.word("BitsStored") - 1,)),
        ("PixelRepresentation", header.word("PixelRepresentation"), (0, 1)),
        ("RescaleType", unit, ("HU", "US")),  # US is "unspecified", which old scanners write
    ]
    for keyword, found, expected in found_and_expected:
        if found not in expected:
            shown = found if CODE_STRING.fullmatch(str(found)) else "unreadable"
            raise StudyError(
                f"{header.name}: {keyword} is {shown}, expected {expected[0]}; it is no CT slice in Hounsfield units"
            )
    if header.number("RescaleSlope") <= 0:
        raise StudyError(f"{header.name}: RescaleSlope is not above zero; export the series again")


def _raw_pixel_offset(header: CTHeader) -> int | None:
    element: Any = header.dataset.get_item(TAGS["PixelData"], keep_deferred=True)
    if header.transfer_syntax_uid not in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        return None
    size = 2 * header.word("Rows") * header.word("Columns")
    expected = size * header.frame_count
    present = max(0, min(element.length, header.size - element.value_tell))
    if present < expected:
        raise StudyError(
            f"{header.path.name} is damaged: expected {expected} bytes of pixels, found {present}; "
            "export the series again"
        )
    return int(element.value_tell) + size * max(0, header.frame - 1)


def _encoded_frame(header: CTHeader) -> EncodedFrame | None:
    if header.transfer_syntax_uid == DeflatedExplicitVRLittleEndian:
        if header.frame:
            raise StudyError(f"{header.path.name} is an enhanced CT deflated as a whole; export it uncompressed")
        return None
    element: Any = header.dataset.get_item(TAGS["PixelData"], keep_deferred=True)
    return EncodedFrame(int(element.value_tell), max(0, header.frame - 1), header.frame_count)


def _padding(header: CTHeader, *, signed: bool) -> tuple[int, int] | None:
    """Lowest and highest stored value that means "no measurement" (PS3.3 C.7.5.1.1.2)."""
    if not header.has("PixelPaddingValue"):
        return None
    words = [header.word("PixelPaddingValue")]
    if header.has("PixelPaddingRangeLimit"):
        words.append(header.word("PixelPaddingRangeLimit"))
    values = [word - 0x10000 if signed and word >= 0x8000 else word for word in words]
    return min(values), max(values)


def read_hu(path: Path, pixels: StoredPixels, out: HounsfieldArray) -> None:
    """Fill `out`, int16 (y, x) and contiguous, with Hounsfield units; padding becomes air.

    Raises:
        StudyError: pixels that cannot be read or decoded.
    """
    if pixels.offset is None:
        out[...] = _decoded_pixels(path, pixels, out.shape).view(np.int16)
    else:
        _read_raw_pixels(path, pixels.offset, out)
    _convert_to_hu(out, pixels)


def _read_raw_pixels(path: Path, offset: int, out: HounsfieldArray) -> None:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            count = file.readinto(out.view(np.uint8).data)
    except OSError as error:
        raise StudyError(f"{path.name} cannot be read: {error.strerror or error}") from error
    if count != out.nbytes:
        raise StudyError(f"{path.name} is damaged: expected {out.nbytes} bytes of pixels, found {count}")


def _decoded_pixels(path: Path, pixels: StoredPixels, shape: tuple[int, ...]) -> NDArray[np.generic]:
    try:
        found: NDArray[np.generic] = (
            _decoded_frame(path, pixels, pixels.frame, shape) if pixels.frame else pydicom.dcmread(path).pixel_array
        )
    except (OSError, RuntimeError, *DAMAGED) as error:
        raise StudyError(f"{path.name} is damaged: its pixels cannot be decoded; export the series again") from error
    if found.shape != shape or found.itemsize != 2:
        raise StudyError(f"{path.name}: its pixels decode to {found.shape}, expected {shape} of 16 bits")
    return found.astype(found.dtype.newbyteorder("="), copy=False)


def _decoded_frame(
    path: Path, pixels: StoredPixels, frame: EncodedFrame, shape: tuple[int, ...]
) -> NDArray[np.generic]:
    options: dict[str, Any] = {
        "number_of_frames": frame.count,
        "rows": shape[0],
        "columns": shape[1],
        "samples_per_pixel": 1,
        "photometric_interpretation": "MONOCHROME2",
        "bits_allocated": 16,
        "bits_stored": pixels.bits_stored,
        "pixel_representation": int(pixels.signed),
        "pixel_keyword": "PixelData",
    }
    uid = UID(pixels.transfer_syntax_uid)
    with path.open("rb") as file:
        if uid.is_encapsulated:
            options["decoding_plugin"] = plugin = _codec(uid)[0]
            file.seek(frame.start)
            if plugin == "gdcm" and jpeg_size(get_frame(file, frame.index, number_of_frames=frame.count)) != shape:
                raise ValueError("the JPEG stream is of another size than its header says")
        file.seek(frame.start)
        found: NDArray[np.generic] = get_decoder(uid).as_array(file, index=frame.index, **options)[0]
    return found


def jpeg_size(stream: bytes) -> tuple[int, int] | None:
    """Rows and columns of a JPEG, as its own frame header has them (ISO 10918-1 B.2.2); None without one."""
    place = 2  # after the start of image
    while place + 9 <= len(stream) and stream[place] == 0xFF:
        marker = stream[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # those are no frame headers
            rows, columns = struct.unpack_from(">HH", stream, place + 5)
            return rows, columns
        place += 2 + int.from_bytes(stream[place + 2 : place + 4], "big")
    return None


def _convert_to_hu(words: HounsfieldArray, pixels: StoredPixels) -> None:
    """Turn stored 16-bit words into HU in place."""
    stored: NDArray[Any] = words if pixels.signed else words.view(np.uint16)
    padding = None
    if pixels.padding is not None:
        low, high = pixels.padding
        padding = (stored >= low) & (stored <= high)
    unused = 16 - pixels.bits_stored
    if unused:  # bits above may hold anything; the sign is the highest stored bit
        stored <<= unused
        stored >>= unused
    if pixels.slope == 1 and pixels.intercept.is_integer() and _fits(stored, int(pixels.intercept)):
        words += np.array(int(pixels.intercept)).astype(np.int16)  # wraps around to the right value
    else:
        words[...] = np.clip(np.rint(stored * np.float64(pixels.slope) + pixels.intercept), *INT16_RANGE)
    if padding is not None:
        words[padding] = AIR_HU


def _fits(stored: NDArray[Any], intercept: int) -> bool:
    return bool(INT16_RANGE[0] <= int(stored.min()) + intercept and int(stored.max()) + intercept <= INT16_RANGE[1])


def check_codecs(stored: Iterable[StoredPixels]) -> None:
    """Refuse a compression that nothing installed here can read, with what would.

    Raises:
        StudyError: no decoder.
    """
    for uid in {pixels.transfer_syntax_uid for pixels in stored if pixels.offset is None}:
        plugin, package = _codec(UID(uid))
        try:
            decoder = get_decoder(UID(uid))
            available = plugin in decoder.available_plugins if UID(uid).is_encapsulated else decoder.is_available
        except (NotImplementedError, ValueError):
            available = False
        if not available:
            name = UID(uid).name if PLAIN_UID.fullmatch(uid) else "nothing that is known"
            advice = f"pip install 'anatomynet[codecs]' ({package})" if package else "export the series uncompressed"
            raise StudyError(f"the slices are compressed as {name}, for which no decoder is installed: {advice}")


def _codec(uid: UID) -> tuple[str, str]:
    """The decoder of a transfer syntax and what installs it; empty where there is none."""
    return next((codec for family, codec in CODECS.items() if uid.name.startswith(family)), ("", ""))
