"""anatomynet-train that dies as by `kill -9`, at one moment exactly: nothing is flushed, closed or cleaned up.

The process that dies is forked from one that has imported what takes long, and has trained nothing: imports alone were
several times what such a run computes.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from anatomynet.engine import checkpoint, curves, train, training

PRELOADED = [__name__, "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg", "tensorboardX"]


def status_of_killed(moment: str, times: int, options: Sequence[str], *, said: Path, wait_s: float) -> int | None:
    """Trains in a process that dies when the moment comes for the `times`-th time.

    Returns:
        Its exit status, -SIGKILL where the moment came; None where it hangs. What it said lies in the file `said`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_train_and_die, args=(moment, times, list(options), said))
    process.start()
    process.join(wait_s)
    status = process.exitcode
    process.kill()
    return status


def dies_at(times: int, work: Callable[..., Any], *, done: bool = True) -> Callable[..., Any]:
    """`work`, of whose calls so many return, or all but the last one where it is not done any more."""
    calls = 0

    def work_or_die(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = work(*arguments, **options) if done or calls < times else None
        if calls == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return work_or_die


def _train_and_die(moment: str, times: int, options: list[str], said: Path) -> None:
    """Never returns where the moment comes."""
    with said.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)  # sums in one order
    command: Any = train
    learner: Any = training.Training
    if moment == "best written":
        command.save_checkpoint = dies_at(times, checkpoint.save_checkpoint)
    elif moment == "row and curves written":
        command.write_curves = dies_at(times, curves.write_curves)
    elif moment in ("step done", "step done, each one saved"):
        command.SAVED_EVERY_S = command.SAVED_EVERY_S if moment == "step done" else 0.0
        learner.learn = dies_at(times, learner.learn)
    elif moment in ("all but the state written", "state written"):
        learner.save = dies_at(times, learner.save, done=moment == "state written")
    train.main(options)
