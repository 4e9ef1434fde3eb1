"""anatomynet-train that dies as by `kill -9`, at one moment exactly: nothing is flushed, closed or cleaned up.

python -m tests.killed_training MOMENT TIMES OPTION...    the moment that comes for the TIMES-th time
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from anatomynet.engine import checkpoint, curves


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


def main() -> None:
    """Never returns where the moment comes."""
    torch.set_num_threads(1)  # sums in one order
    moment, times = sys.argv.pop(1), int(sys.argv.pop(1))
    if moment == "best written":
        checkpoint.save_checkpoint = dies_at(times, checkpoint.save_checkpoint)
    elif moment == "row and curves written":
        curves.write_curves = dies_at(times, curves.write_curves)
    from anatomynet.engine import train, training  # only now: they take them by name

    learner: Any = training.Training
    if moment == "step done":
        learner.learn = dies_at(times, learner.learn)
    elif moment in ("all but the state written", "state written"):
        learner.save = dies_at(times, learner.save, done=moment == "state written")
    train.main()


if __name__ == "__main__":
    main()
