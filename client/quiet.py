"""What the DICOM libraries tell of their own accord, by warnings and logs, names values: a patient's among them."""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

LIBRARIES = ("pydicom", "highdicom")
SILENT = logging.CRITICAL + 1

_lock = threading.Lock()
_levels: list[int] = []
_filters = ExitStack()
_inside = 0


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Neither warns nor logs what a file holds, for as long as the block lasts; several threads may be inside."""
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1:
            # All threads have the same filters: once for all of them, since who leaves puts back what there was.
            _filters.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            _levels[:] = [logging.getLogger(name).level for name in LIBRARIES]
            for name in LIBRARIES:
                logging.getLogger(name).setLevel(SILENT)


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if not _inside:  # the last one puts back what a program may have chosen
            _filters.close()
            for name, level in zip(LIBRARIES, _levels, strict=True):
                logging.getLogger(name).setLevel(level)
