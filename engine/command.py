"""What every command shares: an error the user can mend is one line on stderr and exit status 1.

Exit status 0 done, 1 an AnatomyNetError, 2 usage (click's own), 130 interrupted, 143 stopped, 129 its terminal closed.
"""

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import ParamSpec, TypeVar

import click

from anatomynet.engine.errors import AnatomyNetError
from anatomynet.engine.stops import unwound_by_stops

INTERRUPTED = 130  # 128 + SIGINT, as shells say it
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
