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

MOMENTS = ("step done", "best written", "row and curves written", "all but the state written", "state written")


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
    moment, times = MOMENTS.index(sys.argv.pop(1)), int(sys.argv.pop(1))
    if moment == 1:
        checkpoint.save_checkpoint = dies_at(times, checkpoint.save_checkpoint)
    elif moment == 2:
        curves.write_curves = dies_at(times, curves.write_curves)
    from anatomynet.engine import train  # only now: it takes them by name

    if moment == 0:
        train.Training.learn = dies_at(times, train.Training.learn)  # type: ignore[method-assign]
    elif moment >= 3:
        train.Training.save = dies_at(times, train.Training.save, done=moment == 4)  # type: ignore[method-assign]
    train.main()


if __name__ == "__main__":
    main()
