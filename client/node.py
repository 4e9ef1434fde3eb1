"""`anatomynet-client listen`: a DICOM node. CT comes in by C-STORE, contours go out by C-STORE.

    caller -> node_receiver.py -> node_arrivals.py -> received/
              received/ -> ready/ -> segmented/ -> sent/, or parked/       here: one thread, one step at a time

Every step can be cut off anywhere and done again: a drawing is a folder renamed when all of it is on disk, and with it
its SOPInstanceUIDs, so that what is sent twice, because the node was killed before it could note that it had sent it,
is the same object to its destination.
"""

import os
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from anatomynet.client.clock import StageClock
from anatomynet.client.connection import ServerOptions, access_to, connected, describe_runtime
from anatomynet.client.node_arrivals import Arrivals, arriving_folders
from anatomynet.client.node_config import NodeConfig
from anatomynet.client.node_log import log, log_to_stderr
from anatomynet.client.node_spool import (
    JOB_STATES,
    PARKED,
    READY,
    SEGMENTED,
    SENT,
    Job,
    JobRecord,
    Spool,
    key_tail,
    read_record,
    sync_folder,
)
from anatomynet.client.outputs import output_paths
from anatomynet.client.pipeline import SegmentOptions, draw_series, task_for, write_drawing
from anatomynet.client.structure_table import load_structure_table
from anatomynet.client.study import read_ct_series
from anatomynet.engine.errors import AnatomyNetError, NodeError, OutputError, ServerError

POLL_S = 0.5
LONGEST_RETRY_S = 3600.0
EXPIRY_INTERVAL_S = 600.0
# A study whose drawing was begun so often and never ended is what ends the node, as for want of memory.
MOST_STARTS = 5
PRIVATE_UMASK = 0o077


class Node:
    """What a node does with what it has received: `step` after `step`.

    Args:
        config: its settings.
        spool: prepared, and owned by this process.
        arrivals: what still grows.
    """

    def __init__(self, config: NodeConfig, spool: Spool, arrivals: Arrivals) -> None:
        self._config = config
        self._spool = spool
        self._arrivals = arrivals
        self._due: dict[str, float] = {}  # folder name -> monotonic time before which it is left alone
        self._next_expiry = 0.0

    def step(self) -> bool:
        """Does the next thing, and whether there was any.

        Raises:
            OutputError, OSError: the spool cannot be written; trying again later may do.
        """
        self._spool.empty_trash()
        if self._complete():
            return True
        for job in self._spool.jobs(SEGMENTED, READY):
            # A series that grows again is left alone: its contours would be of half of it.
            if job.key not in self._arrivals and self._due.get(job.folder.name, 0.0) <= time.monotonic():
                self._advance(job)
                return True
        if time.monotonic() >= self._next_expiry:
            self._next_expiry = time.monotonic() + EXPIRY_INTERVAL_S
            self._expire()
        return False

    def _complete(self) -> bool:
        """Makes a job of the next series that is settled, and whether there was one."""
        quiet = {
            "quiet_seconds": self._config.quiet_seconds,
            "after_release": self._config.quiet_seconds_after_release,
        }
        for key in self._arrivals.settled(**quiet):
            if self._due.get(key, 0.0) > time.monotonic():
                continue
            try:
                job = self._arrivals.complete(key, **quiet)
            except (OutputError, OSError) as error:  # what keeps one series need not keep the others
                self._due[key] = time.monotonic() + self._config.retry_seconds
                log("failure", series=key_tail(key), reason=error)
                continue
            self._due.pop(key, None)
            if job is None:
                continue
            self._log(job, "complete" if job.state == READY else "parked", reason=job.record.problem or None)
            return True
        return False

    def _advance(self, job: Job) -> None:
        """One step with one job; what fails is put off or parked."""
        from anatomynet.client.node_delivery import DeliveryError

        try:
            if job.state == READY:
                self._draw(job)
            else:
                self._send(job)
        except (AnatomyNetError, OSError) as error:
            passes = isinstance(error, ServerError | OSError) or isinstance(error.__cause__, OSError)
            if isinstance(error, DeliveryError):
                passes = error.transient
            (self._put_off if passes else self._park)(Job(job.folder, read_record(job.folder)), error)

    def _draw(self, job: Job) -> None:
        """Draws on a series that is complete.

        Raises:
            AnatomyNetError: it is not safe to contour, nothing was drawn, the server is away, a full disk.
        """
        if not job.results.is_dir():
            if job.record.starts >= MOST_STARTS:
                raise NodeError(f"drawing it was begun {job.record.starts} times and ended the node each time")
            job = self._spool.save(job, starts=job.record.starts + 1)
            clock = StageClock()
            runtime = write_results(job, self._config, clock)
            self._log(job, "drawn", runtime=runtime, seconds=sum(clock.seconds.values()))
        self._spool.move(job, SEGMENTED, starts=0, failures=0, problem="")

    def _send(self, job: Job) -> None:
        """Sends what was drawn to every destination that has not got it.

        Raises:
            DeliveryError: one of them did not take it; the others have it.
        """
        from anatomynet.client.node_delivery import DeliveryError, deliver

        files = sorted(job.results.glob("*.dcm"))
        failure = None
        for destination in self._config.destinations:
            if not files or destination.name in job.record.delivered:
                continue
            try:
                deliver(files, destination, ae_title=self._config.ae_title, timeout_s=self._config.timeout_seconds)
            except DeliveryError as error:
                failure = error
                continue
            job = self._spool.save(job, delivered=(*job.record.delivered, destination.name))
            self._log(job, "sent", destination=destination.name)
        if failure:
            raise failure
        self._spool.move(job, SENT, failures=0, problem="")
        self._log(job, "done")

    def _put_off(self, job: Job, error: Exception) -> None:
        """Tries again later, or parks what was tried often enough."""
        failures = job.record.failures + 1
        wait = min(self._config.retry_seconds * 2 ** min(failures - 1, 20), LONGEST_RETRY_S)
        self._due[job.folder.name] = time.monotonic() + wait
        if failures >= self._config.attempts:
            self._park(job, error, failures=failures)
            return
        self._log(job, "waiting", attempt=failures, seconds=wait, reason=error)
        self._spool.save(job, failures=failures, starts=0, problem=one_line(error))

    def _park(self, job: Job, error: Exception, *, failures: int = 0) -> None:
        """Leaves a job to a person."""
        problem = one_line(error) + (f" (after {failures} attempts)" if failures else "")
        self._spool.move(job, PARKED, problem=problem)
        self._due.pop(job.folder.name, None)
        self._log(job, "parked", reason=problem)

    def _expire(self) -> None:
        """Deletes what has been kept long enough."""
        for state, days in ((SENT, self._config.keep_days), (PARKED, self._config.keep_parked_days)):
            for job in self._spool.jobs(state) if days else ():
                if datetime.now(UTC) - datetime.fromisoformat(job.record.since) > timedelta(days=days):
                    with self._spool.changing():
                        self._spool.discard(job.folder)
                    self._log(job, "deleted", after_days=days)

    def _log(self, job: Job, event: str, **values: object) -> None:
        log(event, series=key_tail(job.key), generation=job.generation, slices=job.record.slices, **values)


def write_results(job: Job, config: NodeConfig, clock: StageClock) -> str:
    """Draws on a job's slices and writes job.results, whole or not at all.

    Returns:
        Model, checkpoint and where it ran, in one line.

    Raises:
        StudyError, GeometryError: slices that are not safe to contour.
        ServerError, ModelError: nothing that computes the model, or it fails.
        OutputError: nothing was drawn, or a full disk.
    """
    part = job.folder / "results.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    options = replace(_options(config), report=part / "report.json")
    outputs = output_paths(config.output_types, part / "contours", output=None, overwrite=False)
    with clock.stage("read"):
        series = read_ct_series(job.ct)
    with connected(options.server) as runtime:
        task = task_for(options, runtime, load_structure_table(options.structure_table))
        drawing = draw_series(series, task, clock=clock)
        label_map = replace(drawing.label_map, notes=(*drawing.label_map.notes, *job.record.notes))
        write_drawing(replace(drawing, label_map=label_map), outputs, task, clock=clock)
        sync_folder(part)
        part.rename(job.results)
        sync_folder(job.folder)
        return describe_runtime(runtime)


def run_node(config: NodeConfig) -> None:
    """Listens, draws and sends until SIGTERM or SIGINT; then ends what it is at.

    Raises:
        NodeError: pynetdicom is missing, another node works in the spool, the port is taken.
        ModelError, OutputError, ServerError: settings that no study could be drawn with.
    """
    try:
        from anatomynet.client.node_receiver import listening
    except ImportError as error:
        raise NodeError("listen needs pynetdicom: pip install 'anatomynet[node]'") from error
    os.umask(PRIVATE_UMASK)
    warnings.simplefilter("ignore")  # pydicom's quote values: a patient's name among them
    log_to_stderr()
    spool = Spool(config.spool)
    spool.prepare()
    # No Event: its `set` waits for a lock that the very wait which the signal interrupts may hold.
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    with spool.owned():
        check_settings(config)
        arrivals = Arrivals(spool, most_instances=config.most_instances)
        node = Node(config, spool, arrivals)
        with listening(config, arrivals) as (_, port):
            log("listening", ae_title=config.ae_title, port=port, spool=spool.folder)
            while not signals:
                if not _stepped(node):
                    time.sleep(POLL_S)
    log("stopped")


def check_settings(config: NodeConfig) -> None:
    """Finds out at the start what would fail for every study; a server that is away may come back.

    Raises:
        ModelError, OutputError: a structure, table or package that is not there, no engine.
        ServerError: an address that is none, or files that cannot open a server.
    """
    options = _options(config)
    access_to(options.server)
    output_paths(config.output_types, config.spool / "contours", output=None, overwrite=False)
    table = load_structure_table(options.structure_table)
    try:
        with connected(options.server) as runtime:
            task_for(options, runtime, table)
            log("ready", runtime=describe_runtime(runtime))
    except ServerError as error:
        log("waiting", reason=error)


def status_lines(spool: Spool) -> Iterator[str]:
    """What is in a spool, a line a series, whether or not its node runs.

    Raises:
        NodeError: no spool there.
    """
    check_spool(spool)
    pid = spool.node_pid()
    free = shutil.disk_usage(spool.folder).free / 1e9
    yield f"{f'running, pid {pid}' if pid else 'not running'}; spool {spool.folder}, {free:.1f} GB free"
    for key, record, slices, unreleased in arriving_folders(spool):
        yield _status_line("received", key, replace(record, slices=slices), "not released yet" if unreleased else "")
    for state in JOB_STATES:
        for job in spool.jobs(state):
            sent_to = f"sent to {', '.join(job.record.delivered)}" if job.record.delivered else ""
            detail = "; ".join(filter(None, (sent_to, job.record.problem)))
            yield _status_line(state, job.key, job.record, detail)
    yield from (f"failure: {problem}" for problem in spool.told.values())


def retry_parked(spool: Spool, tail: str = "") -> list[str]:
    """Puts back what is parked, the series whose UIDs end so, with all its attempts before it again.

    Returns:
        A line a series.

    Raises:
        NodeError: no spool there, or another user's; no such series.
    """
    check_spool(spool)
    spool.check_owner()
    os.umask(PRIVATE_UMASK)
    lines = []
    with spool.changing():
        for job in spool.jobs(PARKED):
            if key_tail(job.key).endswith(tail):
                state = SEGMENTED if job.results.is_dir() else READY
                job = spool.move_unlocked(job, state, starts=0, failures=0, problem="")
                lines.append(_status_line(state, job.key, job.record, "put back"))
    if tail and not lines:
        raise NodeError(f"nothing that ends in {tail} is parked in {spool.folder}; see --status")
    return lines


def check_spool(spool: Spool) -> None:
    """Refuses a folder that is no spool.

    Raises:
        NodeError: it is none, or another user's.
    """
    try:
        is_spool = (spool.folder / PARKED).is_dir()
    except PermissionError as error:
        raise NodeError(f"{spool.folder} is not this user's to read: run it as the node's user") from error
    if not is_spool:
        raise NodeError(f"no spool at {spool.folder}: expected one that `anatomynet-client listen` made")


def one_line(error: Exception) -> str:
    """An error's message, without line breaks."""
    return " ".join(str(error).split())


def _stepped(node: Node) -> bool:
    """One step; a spool that cannot be written is told, and tried again."""
    try:
        return node.step()
    except (OutputError, OSError) as error:
        log("failure", reason=error)
        return False


def _options(config: NodeConfig) -> SegmentOptions:
    return SegmentOptions(
        server=ServerOptions(
            urls=config.urls,
            tls_ca=config.tls_ca,
            tls_cert=config.tls_cert,
            tls_key=config.tls_key,
            api_key_file=config.api_key_file,
        ),
        structures=config.structures,
        structure_table=config.structure_table,
        output_types=config.output_types,
    )


def _status_line(state: str, key: str, record: JobRecord, detail: str) -> str:
    about = f"{record.slices:5} slices from {record.source}, {record.since[:19]}Z"
    return f"{state:<10}{key_tail(key):<13}{about}{f': {detail}' if detail else ''}"
