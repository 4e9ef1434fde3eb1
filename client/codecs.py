"""Compressed frame -> its pixels, by the one decoder of its family. Which one that is, and whether it is here."""

import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from anatomynet.client.headers import DAMAGED, PLAIN_UID
from anatomynet.engine.errors import StudyError
from anatomynet.engine.volume import HounsfieldArray

BYTES_PER_PIXEL = 2
# Beside its pixels: tables, comments, offsets.
LONGEST_STREAM_HEADER = 64 << 10
START_OF_CODESTREAM = b"\xff\x4f\xff\x51"
JP2_SIGNATURE = b"\0\0\0\x0cjP  \r\n\x87\n"
# Bits of a sample, rows, columns, components.
StreamSize = tuple[int, int, int, int]


@dataclass(frozen=True)
class Codec:
    """What decodes a family of transfer syntaxes.

    Attributes:
        plugin: pydicom's name of it.
        package: what installs it; empty where pydicom does it alone.
        apart: to be decoded in a process of its own: a damaged stream may end the one that decodes it, hold it for
            ever, or write where it should not.
    """

    plugin: str
    package: str = ""
    apart: bool = False


UNKNOWN = Codec("")

# By the beginning of a transfer syntax's name. The licences are permissive: pylibjpeg-libjpeg, the usual answer for
# lossless JPEG, is GPL. Two decode in a process apart (decoder_process.py), which costs its start and copies of each
# slice: gdcm answers some damages with abort() or a segmentation fault, and OpenJPEG 2.5.0 is known to loop for ever on
# others. The rest need not pay that: CharLS, which is fast, hands every error back, and thousands of damaged streams
# ended in none otherwise (tests/fuzz_reader.py); RLE is decoded by pydicom in Python. Never a second decoder after the
# first failed: gdcm reads JPEG 2000 and JPEG-LS too.
CODECS = {
    "JPEG Extended": UNKNOWN,  # 12 bits, lossy: gdcm's is built for 8
    "JPEG 2000": Codec("pylibjpeg", "pylibjpeg-openjpeg", apart=True),
    "High-Throughput JPEG 2000": Codec("pylibjpeg", "pylibjpeg-openjpeg", apart=True),
    "JPEG-LS": Codec("pyjpegls", "pyjpegls"),
    "JPEG": Codec("gdcm", "python-gdcm", apart=True),
    "RLE": Codec("pydicom"),
}


@dataclass(frozen=True)
class EncodedFrame:
    """Where a decoder finds a slice's pixels, which may be one frame of an enhanced CT, and what they should be.

    Attributes:
        path: of the file.
        transfer_syntax_uid: of the file.
        start: bytes from the file's start to its pixel data.
        index: of the frame, from 0.
        count: of the file's frames.
        rows, columns, bits_stored, signed: as the header has them; 16 bits are allocated.
    """

    path: str
    transfer_syntax_uid: str
    start: int
    index: int
    count: int
    rows: int
    columns: int
    bits_stored: int
    signed: bool

    @property
    def name(self) -> str:
        """The slice in a message."""
        name = Path(self.path).name
        return f"{name} frame {self.index + 1}" if self.count > 1 else name

    @property
    def apart(self) -> bool:
        """Whether it must be decoded in a process of its own."""
        return codec_of(self.transfer_syntax_uid).apart


def codec_of(transfer_syntax_uid: str) -> Codec:
    """The decoder of a transfer syntax, UNKNOWN where there is none."""
    name = UID(transfer_syntax_uid).name
    return next((codec for family, codec in CODECS.items() if name.startswith(family)), UNKNOWN)


def check_codecs(transfer_syntax_uids: Iterable[str]) -> None:
    """Refuse a compression that nothing installed here can read, with what would.

    Raises:
        StudyError: no decoder.
    """
    for text in set(transfer_syntax_uids):
        if not is_readable(text):
            name = UID(text).name if PLAIN_UID.fullmatch(text) else "nothing that is known"
            package = codec_of(text).package
            advice = f"pip install 'anatomynet[codecs]' ({package})" if package else "export the series uncompressed"
            raise StudyError(f"the slices are compressed as {name}, for which no decoder is installed: {advice}")


def is_readable(transfer_syntax_uid: str) -> bool:
    """Whether the one decoder of a transfer syntax is installed."""
    uid = UID(transfer_syntax_uid)
    try:
        decoder = get_decoder(uid)
        return codec_of(uid).plugin in decoder.available_plugins if uid.is_encapsulated else decoder.is_available
    except (NotImplementedError, ValueError):
        return False


def decode_frame(frame: EncodedFrame, out: HounsfieldArray) -> None:
    """Fill `out`, int16 (y, x), with a frame's stored words, in this process.

    Raises:
        StudyError: what cannot be read, or decodes to something else than its header says.
    """
    try:
        found = _decoded(frame)
    except (OSError, RuntimeError, *DAMAGED) as error:
        raise undecodable(frame) from error
    if found.shape != out.shape or found.itemsize != BYTES_PER_PIXEL:
        raise StudyError(f"{frame.name}: its pixels decode to {found.shape}, expected {out.shape} of 16 bits")
    out[...] = found.astype(found.dtype.newbyteorder("="), copy=False).view(np.int16)


def encoded_stream(frame: EncodedFrame) -> bytes:
    """A frame as it is encoded, of the size that its header says.

    Raises:
        StudyError: what cannot be read, or is of another size.
    """
    try:
        with Path(frame.path).open("rb") as file:
            file.seek(frame.start)
            stream = get_frame(file, frame.index, number_of_frames=frame.count)
        _check_stream(stream, frame)
    except (OSError, *DAMAGED) as error:
        raise undecodable(frame) from error
    return stream


def undecodable(frame: EncodedFrame, why: str = "") -> StudyError:
    """What to raise where a frame's pixels cannot be decoded, for a reason or without."""
    return StudyError(f"{frame.name} is damaged: its pixels cannot be decoded{why}; export the series again")


def decoded_stream(stream: bytes, frame: EncodedFrame) -> NDArray[np.generic]:
    """A stream's stored words, (y, x), by pydicom's plugin, in this process.

    Raises:
        RuntimeError, ValueError: it cannot be decoded.
    """
    whole = replace(frame, index=0, count=1)
    return _by_pydicom(BytesIO(encapsulate([stream])), whole, plugin=codec_of(frame.transfer_syntax_uid).plugin)


def _decoded(frame: EncodedFrame) -> NDArray[np.generic]:
    if UID(frame.transfer_syntax_uid).is_encapsulated:
        return decoded_stream(encoded_stream(frame), frame)
    with Path(frame.path).open("rb") as file:
        file.seek(frame.start)
        return _by_pydicom(file, frame)


def _by_pydicom(pixel_data: BinaryIO, frame: EncodedFrame, *, plugin: str = "") -> NDArray[np.generic]:
    options: dict[str, Any] = {
        "number_of_frames": frame.count,
        "rows": frame.rows,
        "columns": frame.columns,
        "samples_per_pixel": 1,
        "photometric_interpretation": "MONOCHROME2",
        "bits_allocated": 8 * BYTES_PER_PIXEL,
        "bits_stored": frame.bits_stored,
        "pixel_representation": int(frame.signed),
        "pixel_keyword": "PixelData",
    }
    decoder = get_decoder(UID(frame.transfer_syntax_uid))
    found: NDArray[np.generic] = decoder.as_array(pixel_data, index=frame.index, decoding_plugin=plugin, **options)[0]
    return found


def _check_stream(stream: bytes, frame: EncodedFrame) -> None:
    """Refuse what a decoder would fill the memory with, or write beyond its buffer: it goes by the stream's own size.

    Raises:
        ValueError: a stream that cannot hold this frame.
    """
    if len(stream) > 2 * BYTES_PER_PIXEL * frame.rows * frame.columns + LONGEST_STREAM_HEADER:
        raise ValueError("the stream is longer than its pixels")  # and RLE makes up to 64 bytes of each of its own
    plugin = codec_of(frame.transfer_syntax_uid).plugin
    if plugin == CODECS["RLE"].plugin:  # which says nothing of its size
        return
    size = j2k_size(stream) if plugin == CODECS["JPEG 2000"].plugin else jpeg_size(stream)
    if size is None or size[1:] != (frame.rows, frame.columns, 1):
        raise ValueError("the stream is of another size than its header says")
    if plugin == CODECS["JPEG"].plugin and not 8 < size[0] <= 16:
        raise ValueError("the stream's samples are of another size than its header says")


def jpeg_size(stream: bytes) -> StreamSize | None:
    """What a JPEG's or JPEG-LS's own frame header says (ISO 10918-1 B.2.2, ISO 14495-1 C.2.2), or None without one."""
    place = 2  # after the start of image
    while place + 10 <= len(stream) and stream[place] == 0xFF:
        marker = stream[place + 1]
        if marker == 0xFF:  # fills up
            place += 1
        # Of this range three are no frame headers; 0xF7 is JPEG-LS's.
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            bits, rows, columns, components = struct.unpack_from(">BHHB", stream, place + 4)
            return bits, rows, columns, components
        else:
            place += 2 + int.from_bytes(stream[place + 2 : place + 4], "big")
    return None


def j2k_size(stream: bytes) -> StreamSize | None:
    """What a JPEG 2000 codestream says in its SIZ segment (ISO 15444-1 A.5.1), or None without one."""
    place = _codestream_place(stream)
    if stream[place : place + 4] != START_OF_CODESTREAM or len(stream) < place + 43:
        return None
    # Width and height reach to the end of the grid, and the image begins at an offset in it.
    right, bottom, left, top = struct.unpack_from(">IIII", stream, place + 8)
    (components,) = struct.unpack_from(">H", stream, place + 40)
    bits = (stream[place + 42] & 0x7F) + 1
    return bits, bottom - top, right - left, components


def _codestream_place(stream: bytes) -> int:
    """Where a codestream begins: at once, as DICOM wants it, or in a JP2 file's box "jp2c" (ISO 15444-1 I.4)."""
    place = 0
    while stream.startswith(JP2_SIGNATURE) and place + 8 <= len(stream):
        length = int.from_bytes(stream[place : place + 4], "big")
        if stream[place + 4 : place + 8] == b"jp2c":
            return place + (16 if length == 1 else 8)
        if length < 8:  # the last box, or one of a length that no slice has
            break
        place += length
    return 0
