"""A training log as TensorBoard reads it: loss and DSC over the steps, written after each epoch beside the CSV."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from anatomynet.engine.errors import OutputError

SUFFIX = ".tensorboard"  # of the folder beside the checkpoint: tensorboard --logdir runs


@contextmanager
def event_log(output: Path, *, first: int) -> Iterator[Callable[[dict[str, float]], None]]:
    """What writes a row of the log to an event file beside the checkpoint `output`, at once.

    Args:
        output: the checkpoint's file.
        first: the step that the run goes on from: what an interrupted run wrote beyond it does not count.

    Yields:
        A function of one row: step, loss, and DSC by name; what is NaN has no point. It does nothing, and one line
        says so, where tensorboardX is not installed.

    Raises:
        OutputError: the file could not be written.
    """
    try:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar
    except ImportError:
        click.echo("no event files for TensorBoard: they take tensorboardX, pip install 'anatomynet[train]'", err=True)
        yield lambda row: None
        return
    # Not SummaryWriter: its flush does not wait for the thread that writes, and a killed run lacks its last points.
    folder = output.with_suffix(SUFFIX)
    with _told_as_output_error(folder):
        folder.mkdir(exist_ok=True)
        # Named by the step too: the seconds in its names are too coarse to keep two files apart.
        writer = EventsWriter(str(folder / "events"), f".{first:09}")
        writer.write_event(Event(step=first + 1, session_log=SessionLog(status=SessionLog.START)))
        writer.flush()

    def write(row: dict[str, float]) -> None:
        with _told_as_output_error(folder):
            for name, value in row.items():
                if name != "step" and not math.isnan(value):
                    summary = scalar(name if name == "loss" else f"DSC/{name}", value)
                    writer.write_event(Event(wall_time=time.time(), step=int(row["step"]), summary=summary))
            writer.flush()

    try:
        yield write
    finally:
        with suppress(OSError):  # of what was told already
            writer.close()


@contextmanager
def _told_as_output_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{folder} could not be written: {error.strerror or error}") from error


def forget_events(output: Path) -> None:
    """Removes the event files of another run to the same checkpoint."""
    shutil.rmtree(output.with_suffix(SUFFIX), ignore_errors=True)
