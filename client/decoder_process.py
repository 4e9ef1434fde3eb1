"""A decoder that may end its process gets one of its own: bounded in time and memory, it dies alone.

A child lives for a series, not for a slice: it is asked by a line of JSON, and answers by one byte and the pixels.
Nothing that it sends is taken for more than numbers: a damaged stream may have made it anyone's.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import BufferedReader
from threading import Lock
from types import TracebackType
from typing import IO, cast

import numpy as np

from anatomynet.client.codecs import EncodedFrame, decode_frame, undecodable
from anatomynet.engine.errors import AnatomyNetError, StudyError
from anatomynet.engine.volume import HounsfieldArray

# For one slice, which takes a hundredth of a second.
LONGEST_DECODE_S = 10
# Of addresses: Python with numpy takes 0.3 GB of them.
MOST_CHILD_BYTES = 2 << 30
DECODED, REFUSED = b"+", b"-"


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
        child = self._take()
        status = _asked(child, frame, out)
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
    command = [sys.executable, "-P", "-m", __name__]
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


def _asked(child: "subprocess.Popen[bytes]", frame: EncodedFrame, out: HounsfieldArray) -> bytes:
    """DECODED, and `out` is filled; REFUSED; nothing where the child is gone."""
    question, answer = cast(IO[bytes], child.stdin), cast(BufferedReader, child.stdout)
    try:
        question.write(json.dumps(asdict(frame)).encode() + b"\n")
        question.flush()
    except BrokenPipeError:
        return b""
    status = answer.read(1)
    if status == DECODED and answer.readinto(out.view(np.uint8).data) != out.nbytes:
        return b""
    return status if status in (DECODED, REFUSED) else b""


def _how_it_ended(child: "subprocess.Popen[bytes]") -> str:
    status = child.wait()
    if status >= 0:
        return f"the decoder left with {status}"
    name = signal.Signals(-status).name
    return f"the decoder was stopped after {LONGEST_DECODE_S} s" if name == "SIGALRM" else f"the decoder died of {name}"


def main() -> None:
    """The child: decodes what its standard input names until that ends."""
    _limit_itself()
    for line in sys.stdin.buffer:
        frame = EncodedFrame(**json.loads(line))
        out = np.empty((frame.rows, frame.columns), np.int16)
        try:
            with _bounded_in_time():
                decode_frame(frame, out)
        except AnatomyNetError:
            answer = REFUSED
        else:
            answer = DECODED + out.tobytes()
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.flush()


@contextmanager
def _bounded_in_time() -> Iterator[None]:
    """The process ends where the block takes too long, in the middle of a decoder's code too."""
    if sys.platform == "win32":
        yield
        return
    signal.alarm(LONGEST_DECODE_S)
    try:
        yield
    finally:
        signal.alarm(0)


def _limit_itself() -> None:
    if sys.platform == "win32":
        return
    import resource

    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a parent may have chosen to ignore it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # else a patient's slice lies in a core file
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = MOST_CHILD_BYTES if most == resource.RLIM_INFINITY else min(MOST_CHILD_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))


if __name__ == "__main__":
    main()
