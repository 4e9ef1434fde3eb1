"""What every command shares: an error the user can mend is one line on stderr and exit status 1.

Exit status 0 done, 1 an AnatomyNetError, 2 usage (click's own), 130 interrupted, 143 stopped, 129 its terminal closed.
"""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import ParamSpec, TypeVar

import click

from anatomynet.engine.errors import AnatomyNetError

INTERRUPTED = 130  # 128 + SIGINT, as shells say it
STOPS = (signal.SIGTERM,) if sys.platform == "win32" else (signal.SIGTERM, signal.SIGHUP)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def reports_errors(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorates a command's function, under `@click.command`."""

    @wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            with unwound_by_stops():
                return command(*args, **kwargs)
        except AnatomyNetError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise SystemExit(1) from error
        except KeyboardInterrupt as interruption:
            click.echo("interrupted", err=True)
            raise SystemExit(INTERRUPTED) from interruption
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            # Who writes a result tells of it there: what is left is `> log.txt`, and what is kept for a moment.
            place = "where the output goes, or for temporary files"
            click.echo(f"error: {error.strerror} {place}: make room, and run it again", err=True)
            _drop_what_cannot_be_written()
            raise SystemExit(1) from error

    return run


def _drop_what_cannot_be_written() -> None:
    """Else Python tries once more as it ends, says so, and makes the exit status 120."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def unwound_by_stops() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the stack: else what lies in temporary folders, a patient's CT, would stay there.

    What a program or `nohup` has chosen for them stays; in another thread than the main one nothing changes.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    stops = [number for number in STOPS if main_thread and signal.getsignal(number) == signal.SIG_DFL]

    def leave(number: int, _frame: object) -> None:
        for stop in stops:  # a second one, as closed terminals send it, would break off the tidying
            signal.signal(stop, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for stop in stops:
        signal.signal(stop, leave)
    try:
        yield
    finally:
        for stop in stops:
            signal.signal(stop, signal.SIG_DFL)
