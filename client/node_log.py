"""The log of a DICOM node: an event a line, on stderr, nothing private. UIDs by their last digits alone.

2026-11-24T09:14:05Z drawn series=...20181122 slices=178 seconds=5.6
"""

import json
import logging
import re
import sys
import threading
import time
from pathlib import Path

PLAIN = re.compile(r"[\w.:,+/@-]+")
LOGGER = logging.getLogger("anatomynet.node")


def log(event: str, **fields: object) -> None:
    """One line: when, what, and key=value of each field; None is left out."""
    LOGGER.info(" ".join([event, *(f"{name}={_quoted(value)}" for name, value in fields.items() if value is not None)]))


def log_to_stderr() -> None:
    """Sends the log to stderr, and what goes wrong inside pynetdicom too, without the values of its messages."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)sZ %(message)s", "%Y-%m-%dT%H:%M:%S"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    network = logging.getLogger("pynetdicom")
    network.addHandler(_Failures(logging.ERROR))
    network.propagate = False
    sys.excepthook = lambda _type, error, _trace: log_failure(error)
    threading.excepthook = lambda failed: log_failure(failed.exc_value)


class _Formatter(logging.Formatter):
    converter = staticmethod(time.gmtime)  # UTC


class _Failures(logging.Handler):
    """An exception in one of pynetdicom's threads: of which type, and where; its text may quote a header."""

    def emit(self, record: logging.LogRecord) -> None:
        log_failure(record.exc_info[1] if record.exc_info else None)


def log_failure(error: BaseException | None) -> None:
    """One line of an exception that nobody expected: its type, and where it was raised; its text may name a patient."""
    if error is None:
        return
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else "unknown"
    log("failure", error=type(error).__name__, at=place)


def _quoted(value: object) -> str:
    text = f"{value:.2f}" if isinstance(value, float) else " ".join(str(value).split())
    return text if PLAIN.fullmatch(text) else json.dumps(text)
