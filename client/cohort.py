"""Many studies over one connection: one is read while another is drawn on and a third is written.

Three studies at most are in memory, however many there are: each goes through the same steps as alone, and waits
before each for the one ahead of it. A study that cannot be drawn is an outcome like any other.
"""

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from anatomynet.client.clock import StageClock
from anatomynet.client.connection import connected
from anatomynet.client.headers import UID_TAIL_LENGTH
from anatomynet.client.outputs import output_paths
from anatomynet.client.pipeline import DEFAULTS, Drawing, SegmentOptions, Task, draw_series, task_for, write_drawing
from anatomynet.client.quiet import quiet_libraries
from anatomynet.client.records import files_of, findings_in, is_done, record_of, write_recorded
from anatomynet.client.structure_table import load_structure_table
from anatomynet.client.study import CTSeries, list_ct_series, read_ct_series
from anatomynet.client.study_files import named_path, opened_study
from anatomynet.client.study_search import FoundStudy, find_studies
from anatomynet.engine.errors import AnatomyNetError, OutputError, ServerError, StudyError
from anatomynet.engine.runtime import Runtime

IN_FLIGHT = 3  # one read, one drawn on, one written
# So many in a row, and the server is gone: the studies that are left would each wait for its time-out.
SERVER_FAILURES = 3

Status = Literal["drawn", "done before", "failed"]


@dataclass(frozen=True)
class StudyOutcome:
    """What happened to one study, or to one series of it where each was asked for.

    Attributes:
        study: where it lies.
        series: the last digits of its UID, where each series was asked for; else empty.
        status: "drawn"; "done before", its outputs were there, of the same slices by the same model; or "failed".
        seconds: that were spent on it, without waiting for others.
        outputs: its files.
        findings: how many things deserve a look.
        error: why it failed, in one line.
    """

    study: Path
    series: str
    status: Status
    seconds: float
    outputs: tuple[Path, ...] = ()
    findings: int = 0
    error: str = ""


def segment_studies(
    studies: Sequence[str | PathLike[str]],
    options: SegmentOptions = DEFAULTS,
    *,
    output_folder: str | PathLike[str] | None = None,
    all_series: bool = False,
    runtime: Runtime | None = None,
) -> Iterator[StudyOutcome]:
    """Draw the organs at risk on many studies, and write them; what was done before is not done again.

    While it runs, warnings are off in the whole process: pydicom's quote what a header holds.

    Args:
        studies: studies, and folders of studies (see `anatomynet.client.study_search`).
        options: of all of them; with `overwrite` all are drawn anew.
        output_folder: of the outputs, made where it is not there; None is beside each study.
        all_series: every CT series of each study that is a stack of slices, instead of the only one.
        runtime: computes the network instead of `options.server`, and stays open.

    Yields:
        The outcomes, in the order of the studies.

    Raises:
        StudyError: no study, or one series of many studies, or of all series, is asked for.
        ServerError, ModelError: nothing that computes the model; a structure that it does not know.
        OutputError: one file is asked for where there are many studies; two studies would be written to one file; the
            folder cannot be made.
    """
    folder = Path(output_folder) if output_folder is not None else None
    found = find_studies([Path(study) for study in studies], left_out=[folder] if folder else [])
    return segment_found(found, options, output_folder=folder, all_series=all_series, runtime=runtime)


def segment_found(
    found: Sequence[FoundStudy],
    options: SegmentOptions,
    *,
    output_folder: Path | None = None,
    all_series: bool = False,
    runtime: Runtime | None = None,
) -> Generator[StudyOutcome, None, None]:
    """See `segment_studies`, of which this is all but the search; what is asked is checked at once."""
    _check_options(found, options, all_series=all_series)
    table = load_structure_table(options.structure_table)
    names = _output_names(found, options, output_folder)

    def outcomes() -> Generator[StudyOutcome, None, None]:
        with ExitStack() as stack:
            # Between what each thread has quiet for itself, too.
            stack.enter_context(quiet_libraries())
            task = task_for(options, runtime or stack.enter_context(connected(options.server)), table)
            run = _Run(task, all_series)
            pool = stack.enter_context(ThreadPoolExecutor(IN_FLIGHT))
            stack.callback(run.stopping.set)
            for of_study in pool.map(run.segment, found, names):
                yield from of_study

    return outcomes()


def _check_options(found: Sequence[FoundStudy], options: SegmentOptions, *, all_series: bool) -> None:
    if not found:
        raise StudyError("no study was named; expected a folder or a zip file, or several")
    if options.series and all_series:
        raise StudyError("--series chooses one series, --all-series takes every one: give one of them")
    if options.series and len(found) > 1:
        raise StudyError(f"--series chooses within one study, and there are {len(found)}; give one, or leave it out")
    if options.output and len(found) == 1:
        raise OutputError(
            "--output names one file; --all-series and --csv are of several: give --output-folder, or only --output"
        )
    if options.output:
        listed = ", ".join(study.path.name for study in found[:3]) + (", ..." if len(found) > 3 else "")
        raise OutputError(
            f"--output names one file, and there are {len(found)} studies ({listed}); give --output-folder to draw "
            "each, or choose one with --series"
        )
    for name in ("report", "picture", "review"):
        if getattr(options, name):
            raise OutputError(f"--{name} names one file, and there may be many studies; leave it out")
    options.validate()


def _output_names(found: Sequence[FoundStudy], options: SegmentOptions, folder: Path | None) -> list[Path]:
    """What each study's outputs are called after, endings apart; no two alike.

    Raises:
        OutputError: two are alike; an output type that is unknown or needs what is not installed; no such folder.
    """
    if folder:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder} could not be made: {error.strerror or error}") from error
    owners: dict[Path, Path] = {}
    named = []
    for study in found:
        name = folder / study.name if folder else named_path(study.path)
        first = next(iter(_outputs(name, options).values()))
        other = owners.setdefault(first, study.path)
        if other != study.path:
            raise OutputError(f"{other} and {study.path} would both be written to {first}; draw them one by one")
        named.append(name)
    return named


def _outputs(name: Path, options: SegmentOptions) -> dict[str, Path]:
    return output_paths(options.output_types, name, output=None, overwrite=True)


@dataclass(eq=False)
class _Run:
    """What the studies that are under way share."""

    task: Task
    all_series: bool
    turns: dict[str, Any] = field(default_factory=dict)
    stopping: threading.Event = field(default_factory=threading.Event)
    server_failures: int = 0

    def segment(self, study: FoundStudy, name: Path) -> list[StudyOutcome]:
        """Every outcome of one study; its outputs are called after `name`."""
        clock = _TurnTakingClock(self.turns, self.stopping)
        try:
            with ExitStack() as stack:
                with clock.stage("read"):
                    folder = stack.enter_context(opened_study(study.path))
                    every = list_ct_series(folder) if self.all_series else ()
                if not self.all_series:
                    return [self._segment_series(study, folder, name, uid=self.task.options.series, clock=clock)]
                return [
                    self._segment_series(
                        study, folder, name.with_name(f"{name.name.removesuffix('.zip')}.{tail}"), uid=uid, tail=tail
                    )
                    for uid, tail in zip(every, _distinct_tails(every), strict=True)
                ]
        except AnatomyNetError as error:  # before there was a series
            return [_failure(study, "", clock, error)]

    def _segment_series(
        self,
        study: FoundStudy,
        folder: Path,
        name: Path,
        *,
        uid: str | None = None,
        tail: str = "",
        clock: StageClock | None = None,
    ) -> StudyOutcome:
        clock = clock or _TurnTakingClock(self.turns, self.stopping)
        outputs = _outputs(name, self.task.options)
        try:
            if self.server_failures >= SERVER_FAILURES:
                raise ServerError(f"not tried: the server failed {SERVER_FAILURES} times in a row")
            with clock.stage("read"):
                series = read_ct_series(folder, series_instance_uid=uid)
            drawing = self._drawn(series, outputs, clock)
        except AnatomyNetError as error:
            self.server_failures += isinstance(error, ServerError)
            return _failure(study, tail, clock, error)
        files = tuple(outputs.values())
        if drawing is None:
            return _outcome(study, tail, "done before", clock, outputs=files, findings=findings_in(files_of(outputs)))
        return _outcome(study, tail, "drawn", clock, outputs=files, findings=len(drawing.findings))

    def _drawn(self, series: CTSeries, outputs: Mapping[str, Path], clock: StageClock) -> Drawing | None:
        """What was drawn and written; None where this was done before, or by another run meanwhile."""
        task, overwrite = self.task, self.task.options.overwrite
        if not overwrite and is_done(files_of(outputs), record_of(series, task, task.runtime.model)):
            return None
        drawing = draw_series(series, task, clock=clock)
        self.server_failures = 0
        record = record_of(series, task, drawing.model)
        written = write_recorded(
            outputs,
            record,
            lambda staged: write_drawing(drawing, staged, task, clock=clock),
            findings=len(drawing.findings),
            overwrite=overwrite,
        )
        return drawing if written else None


class _TurnTakingClock(StageClock):
    """A clock of one study among several: each stage has one of them in it at a time, and waiting is not counted."""

    def __init__(self, turns: dict[str, Any], stopping: threading.Event) -> None:
        super().__init__()
        self._turns, self._stopping = turns, stopping

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Waits for its turn.

        Raises:
            _StoppedError: nobody wants the result any more.
        """
        with self._turns.setdefault(name, threading.RLock()):
            if self._stopping.is_set():
                raise _StoppedError
            with super().stage(name):
                yield


class _StoppedError(Exception):
    """The run was given up; ends a thread that works for it."""


def _outcome(
    study: FoundStudy,
    tail: str,
    status: Status,
    clock: StageClock,
    *,
    outputs: tuple[Path, ...] = (),
    findings: int = 0,
    error: str = "",
) -> StudyOutcome:
    return StudyOutcome(study.path, tail, status, sum(clock.seconds.values()), outputs, findings, error)


def _failure(study: FoundStudy, tail: str, clock: StageClock, error: AnatomyNetError) -> StudyOutcome:
    return _outcome(study, tail, "failed", clock, error=" ".join(str(error).split()))


def _distinct_tails(uids: Sequence[str]) -> list[str]:
    """The last digits of each, as many as tell them apart, fit for a file's name."""
    length = UID_TAIL_LENGTH
    while len({uid[-length:] for uid in uids}) < len(uids):
        length += 4
    return [uid[-length:].replace(".", "_").replace("/", "_") for uid in uids]
