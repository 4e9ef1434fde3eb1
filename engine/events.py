"""A training log as TensorBoard reads it: loss and DSC over the steps, written after each epoch beside the CSV."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

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
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        click.echo("no event files for TensorBoard: they take tensorboardX, pip install 'anatomynet[train]'", err=True)
        yield lambda row: None
        return
    folder, beyond = str(output.with_suffix(SUFFIX)), first + 1 if first else None
    # Named by the step too: the seconds in its names are too coarse to keep two files apart.
    with SummaryWriter(folder, purge_step=beyond, filename_suffix=f".{first:09}") as writer:

        def write(row: dict[str, float]) -> None:
            for name, value in row.items():
                if name != "step" and not math.isnan(value):
                    writer.add_scalar(name if name == "loss" else f"DSC/{name}", value, int(row["step"]))
            writer.flush()

        yield write


def forget_events(output: Path) -> None:
    """Removes the event files of another run to the same checkpoint."""
    shutil.rmtree(output.with_suffix(SUFFIX), ignore_errors=True)
