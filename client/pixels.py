"""Stored pixels -> Hounsfield units, one slice at a time, straight into the volume."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from anatomynet.client.headers import DAMAGED, CTHeader
from anatomynet.engine.errors import StudyError
from anatomynet.engine.volume import HounsfieldArray

# Pixels that carry no measurement become air.
AIR_HU = -1000
# Where the licence is permissive: pylibjpeg-libjpeg, the usual answer for lossless JPEG, is GPL.
CODECS = {
    "JPEG 2000": "pylibjpeg pylibjpeg-openjpeg",
    "JPEG-LS": "pyjpegls",
    "JPEG": "python-gdcm",
}


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
    """

    offset: int | None
    transfer_syntax_uid: str
    signed: bool
    bits_stored: int
    slope: float
    intercept: float
    padding: tuple[int, int] | None


def stored_pixels(header: CTHeader) -> StoredPixels:
    """How the values are stored. Raises StudyError for what a CT slice cannot be."""
    for keyword, expected in (
        ("SamplesPerPixel", "1"),
        ("PhotometricInterpretation", "MONOCHROME2"),
        ("BitsAllocated", "16"),
    ):
        if header.text(keyword) != expected:
            raise StudyError(
                f"{header.path.name}: {keyword} is {header.text(keyword)}; expected {expected} in a CT slice"
            )
    if header.value("NumberOfFrames") not in (None, 1):
        raise StudyError(f"{header.path.name} has several frames; expected one file a slice")
    unit = str(header.value("RescaleType") or "HU").strip().upper()
    if unit not in ("HU", "US"):
        raise StudyError(f"{header.path.name}: values are {unit}, not Hounsfield units; expected a CT reconstruction")
    slope = header.number("RescaleSlope")
    if slope == 0:
        raise StudyError(f"{header.path.name}: RescaleSlope is 0; export the series again")
    return StoredPixels(
        offset=_raw_pixel_offset(header),
        transfer_syntax_uid=header.transfer_syntax_uid,
        signed=header.number("PixelRepresentation") == 1,
        bits_stored=int(header.number("BitsStored")),
        slope=slope,
        intercept=header.number("RescaleIntercept"),
        padding=_padding_words(header),
    )


def _raw_pixel_offset(header: CTHeader) -> int | None:
    dataset = header.dataset
    if "PixelData" not in dataset:
        raise StudyError(f"{header.path.name} is damaged: it ends before its pixels; export the series again")
    if header.transfer_syntax_uid not in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        return None
    element: Any = dataset.get_item("PixelData", keep_deferred=True)
    expected = int(header.number("Rows") * header.number("Columns")) * 2
    present = min(element.length, header.size - element.value_tell)
    if present < expected:
        raise StudyError(
            f"{header.path.name} is damaged: expected {expected} bytes of pixels, found {max(present, 0)}; "
            "export the series again"
        )
    return int(element.value_tell)


def _padding_words(header: CTHeader) -> tuple[int, int] | None:
    """Lowest and highest stored value that means "no measurement" (PS3.3 C.7.5.1.1.2), as signed or unsigned words."""
    value = header.value("PixelPaddingValue")
    if value is None:
        return None
    limit = header.value("PixelPaddingRangeLimit")
    signed = header.number("PixelRepresentation") == 1
    # Some writers give a negative padding as its unsigned word.
    words = [int(v) & 0xFFFF for v in (value, value if limit is None else limit)]
    low, high = sorted(w - 0x10000 if signed and w >= 0x8000 else w for w in words)
    return low, high


def read_hu(path: Path, pixels: StoredPixels, out: HounsfieldArray) -> None:
    """Fill `out`, int16 (y, x) and contiguous, with Hounsfield units; padding becomes air.

    Raises:
        StudyError: pixels that cannot be read or decoded.
    """
    if pixels.offset is None:
        out[...] = _decoded_pixels(path, out.shape).view(np.int16)
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


def _decoded_pixels(path: Path, shape: tuple[int, ...]) -> NDArray[np.generic]:
    try:
        pixels: NDArray[np.generic] = pydicom.dcmread(path).pixel_array
    except (OSError, RuntimeError, *DAMAGED) as error:
        raise StudyError(f"{path.name} is damaged: its pixels cannot be decoded; export the series again") from error
    if pixels.shape != shape or pixels.itemsize != 2:
        raise StudyError(f"{path.name}: its pixels decode to {pixels.shape}, expected {shape} of 16 bits")
    return pixels


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
    largest = max(abs(pixels.intercept), 1) + (1 << (pixels.bits_stored - pixels.signed))
    if pixels.slope == 1 and pixels.intercept.is_integer() and largest <= 32768:
        words += np.int16(pixels.intercept)
    else:
        hu = stored * np.float64(pixels.slope) + pixels.intercept
        words[...] = np.clip(np.rint(hu), -32768, 32767)
    if padding is not None:
        words[padding] = AIR_HU


def check_codecs(stored: Iterable[StoredPixels]) -> None:
    """Refuse a compression that nothing installed here can read, with what would.

    Raises:
        StudyError: no decoder.
    """
    for uid in {pixels.transfer_syntax_uid for pixels in stored if pixels.offset is None}:
        try:
            available = get_decoder(UID(uid)).is_available
        except NotImplementedError:
            available = False
        if not available:
            name = UID(uid).name
            package = next((p for family, p in CODECS.items() if name.startswith(family)), None)
            advice = f"pip install {package}" if package else "export the series uncompressed"
            raise StudyError(f"the slices are compressed as {name}, for which no decoder is installed: {advice}")
