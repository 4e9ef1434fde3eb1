"""The child of decoder_process.py: a stream in, its pixels out. It imports no more than that stream needs.

For each frame a line of JSON and the stream on standard input; on standard output one byte, and the pixels after it.
"""

import json
import signal
import sys
from collections.abc import Mapping
from typing import Any

# For one slice, which takes hundredths of a second.
LONGEST_DECODE_S = 10
# Of addresses: Python takes 0.1 GB of them with gdcm, 0.2 with pydicom.
MOST_BYTES = 1 << 30
DECODED, REFUSED = b"+", b"-"


def main() -> None:
    """Decodes what comes until no more does."""
    _limit_itself()
    for line in sys.stdin.buffer:
        wanted = json.loads(line)
        stream = sys.stdin.buffer.read(wanted["stream_bytes"])
        if sys.platform != "win32":
            signal.alarm(LONGEST_DECODE_S)  # ends the process, in the middle of a decoder's code too
        pixels = decoded(stream, wanted)
        if sys.platform != "win32":
            signal.alarm(0)
        whole = len(pixels) == 2 * wanted["rows"] * wanted["columns"]
        sys.stdout.buffer.write(DECODED + pixels if whole else REFUSED)
        sys.stdout.buffer.flush()


def decoded(stream: bytes, wanted: Mapping[str, Any]) -> bytes:
    """The 16-bit words of a frame, in this machine's order; empty where its decoder refuses it."""
    return (_by_gdcm if wanted["plugin"] == "gdcm" else _by_pydicom)(stream, wanted)


def _by_pydicom(stream: bytes, wanted: Mapping[str, Any]) -> bytes:
    from anatomynet.client.codecs import EncodedFrame, decoded_stream

    of_frame = {name: value for name, value in wanted.items() if name not in ("plugin", "stream_bytes")}
    try:
        found = decoded_stream(stream, EncodedFrame(**of_frame))
    except (RuntimeError, ValueError, MemoryError):
        return b""
    return found.astype(found.dtype.newbyteorder("="), copy=False).tobytes()


def _by_gdcm(stream: bytes, wanted: Mapping[str, Any]) -> bytes:
    import gdcm  # type: ignore[import-untyped]  # an extra's: the parent has none to start a child for without it

    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(stream)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    pixel_data = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    pixel_data.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((wanted["columns"], wanted["rows"], 1))
    image.SetDataElement(pixel_data)
    grey = gdcm.PhotometricInterpretation.GetPIType("MONOCHROME2")
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(grey))
    syntax = gdcm.TransferSyntax.GetTSType(wanted["transfer_syntax_uid"])
    image.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    bits = wanted["bits_stored"]
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, bits, bits - 1, int(wanted["signed"])))
    try:
        # Its bindings take the buffer for text; what is none of UTF-8 they have escaped.
        return bytes(image.GetBuffer().encode("utf-8", "surrogateescape"))
    except (RuntimeError, ValueError):
        return b""


def _limit_itself() -> None:
    if sys.platform == "win32":
        return
    import resource

    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a parent may have chosen to ignore it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # else a patient's slice lies in a core file
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = MOST_BYTES if most == resource.RLIM_INFINITY else min(MOST_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))


if __name__ == "__main__":
    main()
