"""What happened to each of many studies, as the user sees it: progress, the table at the end, and its CSV."""

import csv
import io
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from anatomynet.client.cohort import StudyOutcome
from anatomynet.engine.errors import OutputError
from anatomynet.engine.output import refuse_existing, write_whole

COLUMNS = ("study", "series", "status", "seconds", "look_at", "output", "error")
HEADER = ",".join(COLUMNS)


class Progress:
    """How far a run is, and how long it will take by what it did so far.

    Args:
        count: studies in all.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._studies: set[Path] = set()
        self._worked: set[Path] = set()
        self._start = time.monotonic()

    def line(self, outcome: StudyOutcome) -> str:
        """One line on an outcome: "12 of 100, about 40 s left: p012 drawn"."""
        self._studies.add(outcome.study)
        if outcome.status == "done before":
            if not self._worked:  # what was skipped says nothing of what is left
                self._start = time.monotonic()
        else:
            self._worked.add(outcome.study)
        left = ""
        if self._worked and len(self._studies) < self._count:
            a_study = (time.monotonic() - self._start) / len(self._worked)
            left = f", about {_in_words(a_study * (self._count - len(self._studies)))} left"
        return f"{len(self._studies)} of {self._count}{left}: {_name(outcome)} {outcome.status}"


def table_lines(outcomes: Sequence[StudyOutcome]) -> list[str]:
    """A line an outcome, and a last one that counts them."""
    lines = []
    for outcome in outcomes:
        look = f"; {outcome.findings} to look at" if outcome.findings else ""
        what = outcome.error or ", ".join(map(str, outcome.outputs)) + look
        lines.append(f"{outcome.status:<11} {outcome.seconds:7.2f} s  {_name(outcome)}: {what}")
    count = Counter(outcome.status for outcome in outcomes)
    lines.append(", ".join(f"{number} {status}" for status, number in sorted(count.items())))
    return lines


def check_csv(path: Path, *, overwrite: bool) -> None:
    """Asked before any work is done: an older table of this kind may be replaced, any other file is kept.

    Raises:
        OutputError: a file that is no such table, or its folder is not there.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            older = file.readline().rstrip("\r\n") == HEADER
    except FileNotFoundError:
        older = False
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    refuse_existing(path, overwrite=overwrite or older)


def write_csv(path: Path, outcomes: Sequence[StudyOutcome]) -> None:
    """Writes a line an outcome, UTF-8; replaces the file.

    Raises:
        OutputError: it cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for o in outcomes:
        files = " ".join(map(str, o.outputs))
        writer.writerow([o.study, o.series, o.status, f"{o.seconds:.3f}", o.findings, files, o.error])
    write_whole(path, text.getvalue().encode("utf-8", errors="replace"), overwrite=True)


def _name(outcome: StudyOutcome) -> str:
    return f"{outcome.study} ...{outcome.series}" if outcome.series else str(outcome.study)


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
