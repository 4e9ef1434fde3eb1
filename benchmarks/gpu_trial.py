"""What every part of benchmarks.gpu shares: what is measured on and into what, a part that may fail, a median."""

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import click
import torch
from torch import Tensor

from anatomynet.engine.volume import HounsfieldArray
from benchmarks.common import write_result

WARM_UPS = 2
SECONDS_A_ROW = 3.0  # then no more runs are timed
PART_LIMIT_S = 90.0

Row = dict[str, Any]


class OutOfTimeError(BaseException):
    """A part took longer than it may; no Exception, since a compiler that is interrupted would go on with another."""


@dataclass(frozen=True)
class Trial:
    """What all parts share.

    Attributes:
        checkpoint: of the network that is timed.
        device: "cuda" or "cpu".
        hu: the CT, int16 (z, y, x).
        repeats: timed runs each.
        clients: how many at once.
        folder: for files.
        stop: the time, of time.monotonic, after which no part begins that may be left out.
        result: what was found.
        reference: the labels of the first form, once it was measured.
    """

    checkpoint: Path
    device: str
    hu: HounsfieldArray
    repeats: int
    clients: tuple[int, ...]
    folder: Path
    stop: float
    result: dict[str, Any] = field(default_factory=dict)
    reference: list[Tensor] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether anything that is timed counts."""
        return self.device == "cuda"

    @property
    def file(self) -> str:
        """Its name among the results."""
        return "gpu" if self.on_gpu else "gpu_trial"

    def write(self) -> None:
        """What there is so far."""
        write_result(self.file, self.result)


def guarded(trial: Trial, name: str, measure: Callable[[], object], *, limit_s: float = PART_LIMIT_S) -> None:
    """Runs one part; what ends it early is one line of the result, and no other part is lost with it."""
    start = time.perf_counter()
    try:
        with time_limit(limit_s):
            measure()
    except (Exception, OutOfTimeError) as error:  # noqa: BLE001  whatever it is, the others are to be measured
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]
        trial.result.setdefault("not_measured", {})[name] = reason
        click.echo(f"{name} not measured: {reason}", err=True)
    trial.result.setdefault("part_seconds", {})[name] = time.perf_counter() - start
    trial.write()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTimeError inside the block once it took so long."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError(f"not done after {seconds:.0f} s")

    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, give_up)
    around, _ = signal.getitimer(signal.ITIMER_REAL)  # of a block around this one
    signal.setitimer(signal.ITIMER_REAL, max(min(seconds, around or seconds), 0.001))
    try:
        yield
    finally:
        left = max(around - (time.monotonic() - start), 0.001) if around else 0
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)


def median_seconds(run: Callable[[], object], trial: Trial) -> float:
    """Of so many runs as the trial has, or as there is time for; on a GPU each is waited for."""
    seconds: list[float] = []
    for _ in range(WARM_UPS):
        run()
    begun = time.perf_counter()
    while len(seconds) < trial.repeats and (not seconds or time.perf_counter() - begun < SECONDS_A_ROW):
        if trial.on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if trial.on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
