"""Stored pixels -> Hounsfield units, one slice at a time, straight into the volume."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from anatomynet.client.codecs import EncodedFrame, decode_frame
from anatomynet.client.decoder_process import DecoderProcesses
from anatomynet.client.header_elements import UNDEFINED_LENGTH
from anatomynet.client.headers import DAMAGED, CTHeader
from anatomynet.engine.errors import StudyError
from anatomynet.engine.volume import HounsfieldArray

# Pixels that carry no measurement become air.
AIR_HU = -1000
INT16_RANGE = (-32768, 32767)
# A value that may stand in a message (PS3.5 6.2, CS): in a damaged file anything may stand in its place.
CODE_STRING = re.compile(r"[A-Z0-9 _]{1,16}")


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


def _pixel_element(header: CTHeader) -> RawDataElement:
    element = header.file.by_keyword["PixelData"]
    if not isinstance(element, RawDataElement):
        raise StudyError(f"{header.path.name} is damaged: its pixels are a sequence; export the series again")
    return element


def _raw_pixel_offset(header: CTHeader) -> int | None:
    element = _pixel_element(header)
    if header.transfer_syntax_uid not in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        return None
    if element.length == UNDEFINED_LENGTH:  # else items' headers would be read as voxels, and all lie 8 to the side
        raise StudyError(
            f"{header.path.name} is damaged: its pixels lie in fragments, which the transfer syntax "
            f"{header.transfer_syntax_uid} does not have; export the series again"
        )
    size = 2 * header.word("Rows") * header.word("Columns")
    expected = size * header.frame_count
    present = max(0, min(element.length, header.size - element.value_tell))
    if present < expected:
        raise StudyError(
            f"{header.path.name} is damaged: expected {expected} bytes of pixels, found {present}; "
            "export the series again"
        )
    return element.value_tell + size * max(0, header.frame - 1)


def _encoded_frame(header: CTHeader) -> EncodedFrame | None:
    if header.transfer_syntax_uid == DeflatedExplicitVRLittleEndian:
        if header.frame:
            raise StudyError(f"{header.path.name} is an enhanced CT deflated as a whole; export it uncompressed")
        return None
    return EncodedFrame(
        path=str(header.path),
        transfer_syntax_uid=header.transfer_syntax_uid,
        start=_pixel_element(header).value_tell,
        index=max(0, header.frame - 1),
        count=header.frame_count,
        rows=header.word("Rows"),
        columns=header.word("Columns"),
        bits_stored=header.word("BitsStored"),
        signed=header.word("PixelRepresentation") == 1,
    )


def _padding(header: CTHeader, *, signed: bool) -> tuple[int, int] | None:
    """Lowest and highest stored value that means "no measurement" (PS3.3 C.7.5.1.1.2)."""
    if not header.has("PixelPaddingValue"):
        return None
    words = [header.word("PixelPaddingValue")]
    if header.has("PixelPaddingRangeLimit"):
        words.append(header.word("PixelPaddingRangeLimit"))
    values = [word - 0x10000 if signed and word >= 0x8000 else word for word in words]
    return min(values), max(values)


def read_hu(path: Path, pixels: StoredPixels, out: HounsfieldArray, decoders: DecoderProcesses) -> None:
    """Fill `out`, int16 (y, x) and contiguous, with Hounsfield units; padding becomes air.

    Raises:
        StudyError: pixels that cannot be read or decoded.
    """
    if pixels.offset is not None:
        _read_raw_pixels(path, pixels.offset, out)
    elif pixels.frame is None:
        _read_deflated_pixels(path, out)
    elif pixels.frame.apart:
        decoders.decode(pixels.frame, out)
    else:
        decode_frame(pixels.frame, out)
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


def _read_deflated_pixels(path: Path, out: HounsfieldArray) -> None:
    try:
        found = pydicom.dcmread(path).pixel_array
    except (OSError, RuntimeError, *DAMAGED) as error:
        raise StudyError(f"{path.name} is damaged: its pixels cannot be decoded; export the series again") from error
    if found.shape != out.shape or found.itemsize != out.itemsize:
        raise StudyError(f"{path.name}: its pixels decode to {found.shape}, expected {out.shape} of 16 bits")
    out[...] = found.view(np.int16)


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
    if pixels.slope == 1 and pixels.intercept.is_integer() and _fits(stored, pixels):
        words += np.array(int(pixels.intercept)).astype(np.int16)  # wraps around to the right value
    else:
        words[...] = np.clip(np.rint(stored * np.float64(pixels.slope) + pixels.intercept), *INT16_RANGE)
    if padding is not None:
        words[padding] = AIR_HU


def _fits(stored: NDArray[Any], pixels: StoredPixels) -> bool:
    """Whether every value plus the intercept is an int16: by what the bits can hold, else by what they do hold."""
    lowest = -1 << pixels.bits_stored - 1 if pixels.signed else 0
    intercept = int(pixels.intercept)
    return _is_int16(lowest + intercept, lowest + (1 << pixels.bits_stored) - 1 + intercept) or _is_int16(
        int(stored.min()) + intercept, int(stored.max()) + intercept
    )


def _is_int16(lowest: int, highest: int) -> bool:
    return INT16_RANGE[0] <= lowest and highest <= INT16_RANGE[1]
