"""What ends a command from outside, Ctrl-C, SIGTERM and SIGHUP, and what it leaves behind then: nothing."""

import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryDirectory
from typing import Any

STOPS = (signal.SIGTERM,) if sys.platform == "win32" else (signal.SIGTERM, signal.SIGHUP)
ENDS = (signal.SIGINT, *STOPS)
USUAL = (signal.SIG_DFL, signal.default_int_handler)
STREAMS = (1, 2)


@contextmanager
def unwound_by_stops() -> Iterator[None]:
    """The first of Ctrl-C, SIGTERM and SIGHUP unwinds the stack; those that follow are not heard any more.

    Unwound: else what lies in temporary folders, a patient's CT, would stay there. Not heard, until the process has
    ended: a second one would break off the tidying, or the wait for the threads of the embedded engine, and without
    them it ends in a crash. What a program or `nohup` has chosen for them stays; in another thread than the main one
    nothing changes.
    """
    left = False

    def leave(number: int, _frame: object) -> None:
        nonlocal left
        left = True
        for each in before:
            signal.signal(each, _not_heard)
        if number not in STOPS:
            raise KeyboardInterrupt
        if number != signal.SIGTERM:
            _let_go_of_the_terminal()
        raise SystemExit(128 + number)

    before = _taken(leave, USUAL)
    try:
        yield
    finally:
        if not left:
            _give_back(before)


@contextmanager
def undisturbed() -> Iterator[None]:
    """What ends a command is heard when the block is done: one half way through would leave the other half."""
    heard: list[int] = []
    before = _taken(lambda number, _: heard.append(number), None)
    try:
        yield
    finally:
        _give_back(before)
        if heard:
            signal.raise_signal(heard[0])


@contextmanager
def temporary_folder(**where: Any) -> Iterator[str]:
    """A TemporaryDirectory, `where` its arguments, that is removed whole whatever comes meanwhile."""
    folder = TemporaryDirectory(**where)
    try:
        yield folder.name
    finally:
        with undisturbed():
            folder.cleanup()


def _taken(handler: Any, usual: tuple[Any, ...] | None) -> dict[int, Any]:
    """Gives the signals `handler` that have one of these, or any of their own; what they had."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    had = {number: signal.getsignal(number) for number in ENDS}
    wanted = [n for n, h in had.items() if (h in usual if usual else h not in (signal.SIG_IGN, None))]
    return {number: signal.signal(number, handler) for number in wanted}


def _give_back(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def _not_heard(_number: int, _frame: object) -> None:
    """In place of SIG_IGN: Python tells of a signal that waits while it becomes ignored, by a traceback."""


def _let_go_of_the_terminal() -> None:
    """It is closed: what is still told fails there, and the exit status would say so, not why the command ended."""
    for stream in STREAMS:
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
