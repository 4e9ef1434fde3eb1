"""Compressed slices bring the same Hounsfield units; who compressed them is pydicom's plugins and dcmtk."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from anatomynet.client.study import read_ct_series, volume_from_series
from anatomynet.engine.volume import HounsfieldArray
from tests.dicom_studies import random_volume, write_study

SHAPE = (3, 72, 80)  # JPEG 2000 halves a slice five times
SEGMENT = "import sys; from anatomynet.client.cli import main; main(['segment', sys.argv[1]])"
# Bytes from a JPEG's start whose damage ends gdcm's process: in the JFIF segment by SIGABRT, in its table of Huffman
# codes too, in its precision by SIGSEGV.
DEADLY_PLACES = {"JFIF": (11, 0xFE), "Huffman table": (33, 0x83), "precision": (24, 0x50)}
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


def refused(study: Path) -> str:
    """The one line of `segment`, in a process of its own: what it is shown might end it."""
    run = subprocess.run([sys.executable, "-c", SEGMENT, study], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    return run.stderr
