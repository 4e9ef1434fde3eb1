"""A decoder that may end its process, or never end, gets one of its own: bounded in time and memory, it dies alone.

A child (decoder_child.py) lives for a series, not for a slice. It gets streams alone, not their files, and nothing
that it sends is taken for more than numbers: a damaged stream may have made it anyone's.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from io import BufferedReader
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import IO, cast

import numpy as np

from anatomynet.client import decoder_child
from anatomynet.client.codecs import EncodedFrame, codec_of, encoded_stream, undecodable
from anatomynet.client.decoder_child import DECODED, REFUSED
from anatomynet.engine.errors import StudyError
from anatomynet.engine.volume import HounsfieldArray

CHILD = Path(decoder_child.__file__)


class DecoderProcesses:
    """Children that decode, as many as threads ask at the same time; started when they are needed.

    A context manager: they end with the block.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._started: list[subprocess.Popen[bytes]] = []
        self._idle: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "DecoderProcesses":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._started:
            child.kill()
            child.communicate()

    def decode(self, frame: EncodedFrame, out: HounsfieldArray) -> None:
        """Fill `out`, int16 (y, x) and contiguous, with a frame's stored words; from any thread.

        Raises:
            StudyError: the child cannot decode it, or died of it.
        """
        stream = encoded_stream(frame)
        child = self._take()
        status = _asked(child, frame, stream, out)
        if not status:
            raise undecodable(frame, f" ({_how_it_ended(child)})")
        with self._lock:
            self._idle.append(child)
        if status == REFUSED:
            raise undecodable(frame)

    def _take(self) -> "subprocess.Popen[bytes]":
        with self._lock:
            if not self._idle:
                self._idle.append(_start_child())
                self._started.append(self._idle[-1])
            return self._idle.pop()


def _start_child() -> "subprocess.Popen[bytes]":
    # -P: no module is taken from the working directory, which may be a folder that came by post.
    # -S: all paths are in PYTHONPATH, and what hooks into Python's start takes longer than the child.
    command = [sys.executable, "-P", "-S", str(CHILD)]
    # One thread: numpy's many on a large machine are address space that the child may not have.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    try:
        with _stops_are_for_the_parent():
            return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, env=environment)
    except OSError as error:
        raise StudyError(f"no decoder could be started: {error.strerror or error}") from error


@contextmanager
def _stops_are_for_the_parent() -> Iterator[None]:
    """What starts inside lives on: a terminal's Ctrl-C and a service's stop are sent to every process.

    A child that obeyed them would look like a damaged slice; it ends with its standard input.
    """
    if sys.platform == "win32":
        yield
        return
    # A child has the mask of who starts it, from its first moment.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _asked(child: "subprocess.Popen[bytes]", frame: EncodedFrame, stream: bytes, out: HounsfieldArray) -> bytes:
    """DECODED, and `out` is filled; REFUSED; nothing where the child is gone."""
    question, answer = cast(IO[bytes], child.stdin), cast(BufferedReader, child.stdout)
    wanted = {
        **asdict(replace(frame, path="", start=0, index=0, count=1)),
        "plugin": codec_of(frame.transfer_syntax_uid).plugin,
        "stream_bytes": len(stream),
    }
    try:
        question.write(json.dumps(wanted).encode() + b"\n" + stream)
        question.flush()
    except BrokenPipeError:
        return b""
    status = answer.read(1)
    if status == DECODED and answer.readinto(out.view(np.uint8).data) != out.nbytes:
        return b""
    return status if status in (DECODED, REFUSED) else b""


def _how_it_ended(child: "subprocess.Popen[bytes]") -> str:
    child.kill()  # it may be there still, having said what it should not; what has ended keeps its status
    status = child.wait()
    if status >= 0:
        return f"the decoder left with {status}"
    name = signal.Signals(-status).name
    return "the decoder took too long" if name == "SIGALRM" else f"the decoder died of {name}"
