"""Compressed slices bring the same Hounsfield units; who compressed them is pydicom's plugins and dcmtk."""

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID, JPEG2000Lossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from anatomynet.client.codecs import JP2_SIGNATURE
from anatomynet.client.study import read_ct_series, volume_from_series
from anatomynet.engine.volume import HounsfieldArray
from tests.dicom_studies import edit, random_volume, write_study

SHAPE = (3, 72, 80)  # JPEG 2000 halves a slice five times
SEGMENT = "import sys; from anatomynet.client.cli import main; main(['segment', sys.argv[1]])"
# Bytes from a JPEG's start whose damage ends gdcm's process: in the JFIF segment by SIGABRT, in its table of Huffman
# codes too, in its precision by SIGSEGV.
DEADLY_PLACES = {"JFIF": (11, 0xFE), "Huffman table": (33, 0x83), "precision": (24, 0x50)}
# The error of a study, and the process' peak memory in MB.
PEAK = """
import re, sys
from pathlib import Path
from anatomynet.client.study import read_ct_series, volume_from_series
from anatomynet.engine.errors import StudyError
try:
    volume_from_series(read_ct_series(Path(sys.argv[1])))
except StudyError as error:
    print(error)
print(int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10)
"""
WITHOUT_CODECS = """
import sys
sys.modules.update(dict.fromkeys(["gdcm", "pylibjpeg", "openjpeg", "jpeg_ls", "PIL"]))
from anatomynet.client.cli import main
main(["segment", sys.argv[1]])
"""


def compress(path: Path, syntax: UID) -> None:
    if syntax == JPEGLosslessSV1:
        if shutil.which("dcmcjpeg") is None:
            pytest.skip("dcmcjpeg is not installed: apt install dcmtk")
        subprocess.run(["dcmcjpeg", "+e1", "+un", path, path], check=True, capture_output=True)
    else:
        dataset = pydicom.dcmread(path)
        dataset.compress(syntax, generate_instance_uid=False)
        dataset.save_as(path)
    assert pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID == syntax


@pytest.mark.parametrize("signed", [1, 0], ids=["signed", "unsigned"])
@pytest.mark.parametrize(
    "syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless, JPEGLosslessSV1], ids=lambda uid: uid.name
)
def test_every_codec_brings_the_same_volume(tmp_path: Path, syntax: UID, signed: int) -> None:
    if not get_decoder(syntax).is_available:
        pytest.skip(f"no decoder for {syntax.name}: pip install 'anatomynet[codecs]'")
    paths = write_study(
        tmp_path, random_volume(SHAPE), PixelRepresentation=signed, RescaleIntercept=0 if signed else -32768
    )
    expected: HounsfieldArray = volume_from_series(read_ct_series(tmp_path)).hu
    for path in paths:
        compress(path, syntax)
    np.testing.assert_array_equal(volume_from_series(read_ct_series(tmp_path)).hu, expected)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1], ids=lambda uid: uid.name)
def test_without_the_extra_one_line_names_it(tmp_path: Path, syntax: UID) -> None:
    if not get_decoder(syntax).is_available:
        pytest.skip(f"nothing for {syntax.name} to hide: pip install 'anatomynet[codecs]'")
    for path in write_study(tmp_path / "study", random_volume(SHAPE)):
        compress(path, syntax)
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_CODECS, tmp_path / "study"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: the slices are compressed as {syntax.name}, for which no decoder")
    assert "pip install 'anatomynet[codecs]'" in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1], ids=lambda uid: uid.name)
def test_a_stream_of_another_size_than_its_header_says_is_refused(tmp_path: Path, syntax: UID) -> None:
    """In a process of its own: gdcm's answer to it is to abort. RLE streams know no size."""
    if not get_decoder(syntax).is_available:
        pytest.skip(f"no decoder for {syntax.name}: pip install 'anatomynet[codecs]'")
    for path in write_study(tmp_path / "study", random_volume(SHAPE)):
        compress(path, syntax)
        dataset = pydicom.dcmread(path)
        dataset.Rows = 40
        dataset.save_as(path)
    assert "CT0001.dcm" in refused(tmp_path / "study")


def larger(stream: bytearray, syntax: UID) -> None:
    """A few kilobytes say that they are gigabytes."""
    if syntax == JPEG2000Lossless:
        siz = stream.index(b"\xff\x4f\xff\x51")
        struct.pack_into(">IIIIII", stream, siz + 8, 20_000, 20_000, 0, 0, 20_000, 20_000)
    elif syntax == RLELossless:
        start = stream.rindex(b"\xe0\x7f\x10\x00OB")
        pixels = pydicom.encaps.encapsulate([struct.pack("<16I", 2, 64, 66, *[0] * 13) + b"\x81\0" * 8_000_000])
        stream[start + 12 :] = pixels + b"\xfe\xff\xdd\xe0\0\0\0\0"
    else:
        struct.pack_into(">HH", stream, stream.index(b"\xff\xf7") + 5, 30_000, 30_000)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless], ids=lambda uid: uid.name)
def test_a_stream_that_would_fill_the_memory_is_refused(tmp_path: Path, syntax: UID) -> None:
    if not get_decoder(syntax).is_available:
        pytest.skip(f"no decoder for {syntax.name}: pip install 'anatomynet[codecs]'")
    paths = write_study(tmp_path / "study", random_volume(SHAPE))
    for path in paths:
        compress(path, syntax)
    data = bytearray(paths[1].read_bytes())
    larger(data, syntax)
    paths[1].write_bytes(data)
    run = subprocess.run([sys.executable, "-c", PEAK, tmp_path / "study"], capture_output=True, text=True, check=True)
    error, megabytes = run.stdout.splitlines()
    assert error.startswith("slice 2 of 3, CT0002.dcm is damaged: its pixels cannot be decoded")
    assert int(megabytes) < 300


def of_many_layers(path: Path, count: int) -> None:
    """Makes of a JPEG 2000 slice a kilobyte that costs OpenJPEG time and memory for each of its layers.

    Precincts of 2 x 2 samples, of which each layer has a packet (ISO 15444-1 A.6.1); all packets are empty.
    """
    dataset = pydicom.dcmread(path)
    stream = pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=1)
    cod, tile = stream.index(b"\xff\x52"), stream.index(b"\xff\x90")
    length, _, order, _, transform, levels = struct.unpack_from(">HBBHBB", stream, cod + 2)
    rest = stream[cod + 10 : cod + 2 + length]
    style = struct.pack(">HBBHBB", length + levels + 1, 0b111, order, count, transform, levels)
    header = stream[:cod] + b"\xff\x52" + style + rest + b"\0" + b"\x11" * levels
    tile_part = struct.pack(">HHHIBB", 0xFF90, 10, 0, 0, 0, 1) + b"\xff\x93" + bytes(64)
    dataset.PixelData = pydicom.encaps.encapsulate([header + stream[cod + 2 + length : tile] + tile_part])
    dataset.save_as(path)


def test_a_jpeg_2000_of_too_many_layers_is_refused(tmp_path: Path) -> None:
    """In 10 seconds and its own gigabyte at the latest."""
    paths = write_study(tmp_path / "study", random_volume(SHAPE))
    for path in paths:
        compress(path, JPEG2000Lossless)
    of_many_layers(paths[1], 65535)
    run = subprocess.run([sys.executable, "-c", PEAK, tmp_path / "study"], capture_output=True, text=True, check=True)
    error, megabytes = run.stdout.splitlines()
    assert error.startswith("slice 2 of 3, CT0002.dcm is damaged: its pixels cannot be decoded")
    assert int(megabytes) < 300


@pytest.mark.parametrize("boxed", [False, True], ids=["codestream", "JP2 file"])
def test_a_jpeg_2000_may_lie_in_a_jp2_file(tmp_path: Path, boxed: bool) -> None:
    """DICOM wants the codestream alone; some archives keep the file."""
    openjpeg = pytest.importorskip("openjpeg.utils", reason="pip install 'anatomynet[codecs]'")
    volume = random_volume(SHAPE)
    for path, plane in zip(write_study(tmp_path / "study", volume), volume.hu, strict=True):
        dataset = pydicom.dcmread(path)
        stream = openjpeg.encode_array(plane, codec_format=int(boxed))
        assert stream.startswith(JP2_SIGNATURE) == boxed
        dataset.PixelData = pydicom.encaps.encapsulate([stream])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
        dataset.save_as(path, implicit_vr=False, little_endian=True)
    np.testing.assert_array_equal(volume_from_series(read_ct_series(tmp_path / "study")).hu, volume.hu)


@pytest.mark.parametrize("place", DEADLY_PLACES)
def test_a_stream_that_ends_its_decoder_is_one_line_that_says_where(tmp_path: Path, place: str) -> None:
    paths = write_study(tmp_path / "study", random_volume(SHAPE))
    for path in paths:
        compress(path, JPEGLosslessSV1)
    data = bytearray(paths[1].read_bytes())
    offset, value = DEADLY_PLACES[place]
    data[data.index(b"\xff\xd8\xff\xe0") + offset] = value
    paths[1].write_bytes(data)
    assert refused(tmp_path / "study").startswith("error: slice 2 of 3, CT0002.dcm is damaged: its pixels cannot be")


def test_lossy_jpeg_of_12_bits_is_told_as_what_it_is(tmp_path: Path) -> None:
    """dcmtk writes it, gdcm does not read it: no slice is damaged."""
    if shutil.which("dcmcjpeg") is None:
        pytest.skip("dcmcjpeg is not installed: apt install dcmtk")
    for path in write_study(tmp_path / "study", random_volume(SHAPE)):
        edit(path, BitsStored=12, HighBit=11, PixelRepresentation=0)
        subprocess.run(["dcmcjpeg", "+ee", "+un", path, path], check=True, capture_output=True)
    line = refused(tmp_path / "study")
    assert "compressed as JPEG Extended (Process 2 and 4), for which no decoder is installed: export" in line


@pytest.mark.parametrize("selection", range(1, 8))
def test_lossless_jpeg_of_every_prediction(tmp_path: Path, selection: int) -> None:
    if shutil.which("dcmcjpeg") is None or not get_decoder(JPEGLossless).is_available:
        pytest.skip("needs dcmcjpeg (apt install dcmtk) and anatomynet[codecs]")
    volume = random_volume(SHAPE)
    for path in write_study(tmp_path, volume):
        subprocess.run(["dcmcjpeg", "+el", "+sv", str(selection), "+un", path, path], check=True, capture_output=True)
        assert pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID == JPEGLossless
    np.testing.assert_array_equal(volume_from_series(read_ct_series(tmp_path)).hu, volume.hu)


def refused(study: Path) -> str:
    """The one line of `segment`, in a process of its own: what it is shown might end it."""
    run = subprocess.run([sys.executable, "-c", SEGMENT, study], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    return run.stderr
