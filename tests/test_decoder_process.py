"""Decoders in processes of their own: they end alone, in time, within their memory, and with who started them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import HTJ2KLossless, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from anatomynet.client import decoder_child, decoder_process
from anatomynet.client.codecs import EncodedFrame, codec_of
from anatomynet.client.decoder_process import CHILD, DecoderProcesses
from anatomynet.client.study import read_ct_series, volume_from_series
from anatomynet.engine.errors import StudyError
from anatomynet.engine.volume import HounsfieldArray
from tests.dicom_studies import random_volume, write_study
from tests.test_codecs import SHAPE, compress, of_many_layers

ORPHAN = """
import sys, time
from pathlib import Path
import numpy as np
from anatomynet.client.decoder_process import DecoderProcesses
from anatomynet.client.study import read_ct_series
series = read_ct_series(Path(sys.argv[1]))
DecoderProcesses().decode(series.slices[0].pixels.frame, np.empty((series.rows, series.columns), np.int16))
print(Path("/proc/self/task", Path("/proc/self").resolve().name, "children").read_text(), flush=True)
time.sleep(60)
"""
ENDLESS = """
from anatomynet.client import decoder_child
decoder_child.decoded = lambda stream, wanted: sum(iter(int, 1))
decoder_child.main()
"""
# Of which an import on a busy machine takes none.
IN_TWO_SECONDS = """
import openjpeg
from anatomynet.client import codecs, decoder_child
decoder_child.LONGEST_DECODE_S = 2
decoder_child.main()
"""
# More than a pipe holds: it waits until all of it is read.
BABBLING = """
import sys
sys.stdin.buffer.readline()
sys.stdout.buffer.write(bytes(1 << 20))
"""
STARTS_IN_S = 30

pytest.importorskip("gdcm", reason="no decoder for lossless JPEG: pip install 'anatomynet[codecs]'")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    for path in write_study(folder, random_volume(SHAPE)):
        compress(path, JPEGLosslessSV1)
    return folder


@pytest.fixture(scope="module")
def frames(study: Path) -> list[EncodedFrame]:
    return [s.pixels.frame for s in read_ct_series(study).slices if s.pixels.frame]


@pytest.fixture
def decoders() -> Iterator[DecoderProcesses]:
    with DecoderProcesses() as decoders:
        yield decoders


def decoded(decoders: DecoderProcesses, frame: EncodedFrame) -> HounsfieldArray:
    out = np.empty((frame.rows, frame.columns), np.int16)
    decoders.decode(frame, out)
    return out


def children() -> list[int]:
    """Processes that this one started and that run a decoder."""
    pids = [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    return [pid for pid in pids if CHILD.name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize(
    ("syntax", "apart"),
    [
        (JPEGLosslessSV1, True),
        (JPEG2000Lossless, True),
        (HTJ2KLossless, True),
        (JPEGLSLossless, False),
        (RLELossless, False),
    ],
    ids=["JPEG", "JPEG 2000", "HTJ2K", "JPEG-LS", "RLE"],
)
def test_only_what_may_crash_or_hang_is_decoded_apart(syntax: str, apart: bool) -> None:
    assert codec_of(syntax).apart == apart


def test_a_jpeg_2000_that_takes_too_long_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six seconds of OpenJPEG's, where two are given."""
    study, child = tmp_path / "study", tmp_path / "child.py"
    for path in write_study(study, random_volume(SHAPE)):
        compress(path, JPEG2000Lossless)
    of_many_layers(study / "CT0002.dcm", 30_000)
    child.write_text(IN_TWO_SECONDS)
    monkeypatch.setattr(decoder_process, "CHILD", child)
    with pytest.raises(StudyError) as error:
        volume_from_series(read_ct_series(study))
    assert str(error.value) == (
        "slice 2 of 3, CT0002.dcm is damaged: its pixels cannot be decoded (the decoder took too long); "
        "export the series again"
    )


def test_one_child_decodes_a_series_and_goes_with_it(frames: list[EncodedFrame]) -> None:
    with DecoderProcesses() as decoders:
        assert not children()  # none before it is needed
        hu = np.stack([decoded(decoders, frame) for frame in frames])
        (child,) = children()
    assert not Path(f"/proc/{child}").exists()
    np.testing.assert_array_equal(hu, random_volume(SHAPE).hu)


@pytest.mark.parametrize(
    ("death", "words"), [(signal.SIGSEGV, "died of SIGSEGV"), (signal.SIGALRM, "took too long")], ids=["crash", "alarm"]
)
def test_one_that_died_is_replaced(
    decoders: DecoderProcesses, frames: list[EncodedFrame], death: signal.Signals, words: str
) -> None:
    expected = decoded(decoders, frames[0])
    (child,) = children()
    os.kill(child, death)
    with pytest.raises(StudyError, match=rf"CT0001.dcm is damaged: .* \(the decoder {words}\)"):
        decoded(decoders, frames[0])
    np.testing.assert_array_equal(decoded(decoders, frames[0]), expected)


def test_a_refused_frame_costs_no_child(decoders: DecoderProcesses, frames: list[EncodedFrame]) -> None:
    decoded(decoders, frames[0])
    before = children()
    with pytest.raises(StudyError, match="its pixels cannot be decoded; export"):
        decoded(decoders, replace(frames[1], rows=40))
    decoded(decoders, frames[1])
    assert children() == before


def test_one_that_hangs_is_stopped_in_time(frames: list[EncodedFrame]) -> None:
    """No JPEG is known that gdcm never ends with; an endless sum runs in C as it would."""
    question = {**asdict(frames[0]), "stream_bytes": 4}
    start = time.monotonic()
    child = subprocess.run(
        [sys.executable, "-c", ENDLESS], input=json.dumps(question).encode() + b"\n1234", check=False
    )
    assert child.returncode == -signal.SIGALRM
    assert 0 <= time.monotonic() - start - decoder_child.LONGEST_DECODE_S < STARTS_IN_S


def test_one_that_says_what_it_should_not_is_ended(
    decoders: DecoderProcesses, frames: list[EncodedFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child.py"
    child.write_text(BABBLING)
    monkeypatch.setattr(decoder_process, "CHILD", child)
    with pytest.raises(StudyError, match=r"CT0001.dcm is damaged: .* \(the decoder died of SIGKILL\)"):
        decoded(decoders, frames[0])


def test_memory_is_bounded_and_no_core_is_left(decoders: DecoderProcesses, frames: list[EncodedFrame]) -> None:
    decoded(decoders, frames[0])
    limits = Path(f"/proc/{children()[0]}/limits").read_text().splitlines()
    limit = {line[:26].strip(): line[26:].split()[0] for line in limits[1:]}
    assert limit["Max address space"] == str(decoder_child.MOST_BYTES)
    assert limit["Max core file size"] == "0"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_that_is_sent_to_all_is_left_to_the_parent(
    decoders: DecoderProcesses, frames: list[EncodedFrame], stop: signal.Signals
) -> None:
    expected = decoded(decoders, frames[0])
    os.kill(children()[0], stop)
    np.testing.assert_array_equal(decoded(decoders, frames[0]), expected)
    assert not {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_it_ends_with_a_parent_that_is_killed(study: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN, study], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = Path("/proc", parent.stdout.readline().strip())
        assert CHILD.name.encode() in (child / "cmdline").read_bytes()
        parent.kill()
    deadline = time.monotonic() + STARTS_IN_S
    while not ended(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended(child)


def ended(process: Path) -> bool:
    """Gone, or waiting for whoever started it to ask how it ended."""
    try:
        return (process / "stat").read_text().split()[2] == "Z"
    except OSError:
        return True
