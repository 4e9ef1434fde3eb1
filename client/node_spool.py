"""The spool of a DICOM node: a folder a series, and the folder that it lies in is its state.

    received/    still grows; whatever was acknowledged lies here or further down (node_arrivals.py)
    ready/       complete: to be drawn
    segmented/   drawn: to be sent, with the SOPInstanceUIDs that it now keeps
    sent/        every destination has it; kept for a while
    parked/      waits for a person; its record says why
    trash/       to be deleted

A state changes by one rename, so that a node killed at any moment finds every series in one state, whole. A series
that grows or changes later is a new generation of its folder, KEY_2, KEY_3, ...

    KEY_1/ct/        the slices
    KEY_1/results/   what was drawn; not there before all of it is
    KEY_1/job.json   a JobRecord
"""

import fcntl
import hashlib
import json
import os
import pwd
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from anatomynet.client.headers import UID_TAIL_LENGTH
from anatomynet.client.node_log import log
from anatomynet.engine.config import config_from_table
from anatomynet.engine.errors import ModelError, NodeError
from anatomynet.engine.output import write_whole

RECEIVED, READY, SEGMENTED, SENT, PARKED, TRASH = "received", "ready", "segmented", "sent", "parked", "trash"
JOB_STATES = (READY, SEGMENTED, SENT, PARKED)
STATES = (RECEIVED, *JOB_STATES, TRASH)
RECORD_NAME = "job.json"
NODE_LOCK, CHANGE_LOCK = "node.lock", "change.lock"
LOCK_ATTEMPTS, LOCK_WAIT_S = 10, 0.05
PRIVATE_FOLDER = 0o700
OTHERS = 0o077
DIGEST_LENGTH = 16


@dataclass(frozen=True)
class JobRecord:
    """What a folder's files do not say of a series.

    Attributes:
        source: AE title that sent it.
        since: when it came into its state, ISO 8601, UTC.
        slices: files in ct/.
        notes: sentences for the ROIs' descriptions.
        starts: how often drawing was begun; more than a few, and it is what ends the node.
        failures: attempts in its state that failed for want of a server or destination.
        problem: why the last of them failed, or why it is parked.
        delivered: names of the destinations that have it.
    """

    source: str = ""
    since: str = ""
    slices: int = 0
    notes: tuple[str, ...] = ()
    starts: int = 0
    failures: int = 0
    problem: str = ""
    delivered: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One series in the spool, complete.

    Attributes:
        folder: its own; the name of the folder above is its state.
        record: what job.json says.
    """

    folder: Path
    record: JobRecord

    @property
    def state(self) -> str:
        """One of JOB_STATES."""
        return self.folder.parent.name

    @property
    def key(self) -> str:
        """Of its series."""
        return self.folder.name.rpartition("_")[0]

    @property
    def generation(self) -> int:
        """1, and one more each time that the series grew after it was complete."""
        return int(self.folder.name.rpartition("_")[2])

    @property
    def ct(self) -> Path:
        """Folder of the slices."""
        return self.folder / "ct"

    @property
    def results(self) -> Path:
        """Folder of what was drawn."""
        return self.folder / "results"


class Spool:
    """The folders of a node. Whoever holds `lock` in this process may look; whoever is `changing` may rename.

    Attributes:
        told: what lies in the way, and what of it was logged: once, since a node looks twice a second.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        self.told: dict[Path, str] = {}

    def prepare(self) -> None:
        """Makes the folders, readable by their owner alone.

        Raises:
            NodeError: a folder that cannot be made, or that others may read.
        """
        try:
            for folder in (self.folder, *(self.folder / state for state in STATES)):
                folder.mkdir(mode=PRIVATE_FOLDER, parents=folder is self.folder, exist_ok=True)
                if folder.stat().st_mode & OTHERS:
                    raise NodeError(f"{folder} is open to other users; patients' images lie here: chmod 700 {folder}")
        except OSError as error:
            raise NodeError(f"the spool {self.folder} cannot be made: {error.strerror or error}") from error

    def check_owner(self) -> None:
        """Refuses to write as another user than the spool's: its node could not read that.

        Raises:
            NodeError: this process is another user's.
        """
        owner = self.folder.stat().st_uid
        if os.geteuid() != owner:
            user = _user_name(owner)
            raise NodeError(f"the spool {self.folder} is {user}'s, whose node could not read it then: run it as {user}")

    @contextmanager
    def owned(self) -> Iterator[None]:
        """For as long as the block lasts this process is the spool's node, the only one.

        Raises:
            NodeError: another process is.
        """
        with (self.folder / NODE_LOCK).open("a+", encoding="ascii") as file:
            if not _locked_alone(file):
                raise NodeError(f"another node, pid {self.node_pid()}, works in the spool {self.folder}")
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def node_pid(self) -> str:
        """The process that is the spool's node; empty where none is."""
        try:
            with (self.folder / NODE_LOCK).open(encoding="ascii") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return file.read() or "unknown"
        except FileNotFoundError:
            pass
        return ""

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Keeps other threads from looking, and other processes from renaming."""
        with self.lock, (self.folder / CHANGE_LOCK).open("a", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def jobs(self, *states: str) -> list[Job]:
        """The series in these states, the one that has waited longest first; what is none of them is told."""
        found = []
        for state in states:
            for folder in sorted((self.folder / state).iterdir()):
                try:
                    found.append(Job(folder, read_record(folder)))
                except FileNotFoundError:  # renamed meanwhile
                    continue
                except NotADirectoryError:
                    self._tell(folder, f"a stray file in {folder.parent}: move it elsewhere")
                except OSError as error:
                    tail = key_tail(folder.name.rpartition("_")[0])
                    self._tell(folder, f"{tail} in {folder.parent} cannot be read: {error.strerror}; whose is it?")
        return sorted(found, key=lambda job: job.record.since)

    def generations(self, key: str) -> list[Job]:
        """Every job of a series, the oldest first; who is not `changing` may miss one that another process moves."""
        found = []
        for state in JOB_STATES:
            for folder in (self.folder / state).glob(f"{key}_*"):
                with suppress(FileNotFoundError):  # renamed meanwhile
                    found.append(Job(folder, read_record(folder)))
        return sorted(found, key=lambda job: job.generation)

    def save(self, job: Job, **changes: Any) -> Job:
        """The job with these fields of its record changed, on disk."""
        record = replace(job.record, **changes)
        write_record(job.folder, record)
        return Job(job.folder, record)

    def move(self, job: Job, state: str, **changes: Any) -> Job:
        """The job in another state, with these fields of its record changed."""
        with self.changing():
            return self.move_unlocked(job, state, **changes)

    def move_unlocked(self, job: Job, state: str, **changes: Any) -> Job:
        """The same, for who is `changing` already."""
        job = self.save(job, since=now_text(), **changes)
        target = self.folder / state / job.folder.name
        rename_durably(job.folder, target)
        return Job(target, job.record)

    def discard(self, folder: Path) -> None:
        """Takes a folder out of its state at once; deleting it may take longer. For who is `changing`."""
        rename_durably(folder, self.folder / TRASH / f"{folder.name}.{os.urandom(4).hex()}")

    def empty_trash(self) -> None:
        """Deletes what was discarded; what cannot be deleted is told."""
        for path in (self.folder / TRASH).iterdir():
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except OSError as error:
                self._tell(path, f"something in {path.parent} cannot be deleted: {error.strerror}")

    def _tell(self, path: Path, problem: str) -> None:
        """Logs what lies in the way, without its name, which may be a patient's."""
        if path not in self.told:
            self.told[path] = problem
            log("failure", reason=problem)


def series_key(series_instance_uid: str) -> str:
    """The name of a series' folders: the UID's last digits for a person, its digest to tell it from any other."""
    return f"series-{_short(series_instance_uid)}"


def instance_name(sop_instance_uid: str) -> str:
    """The name of a slice's file; it may stand in a message, which no whole UID may."""
    return f"CT-{_short(sop_instance_uid)}.dcm"


def _locked_alone(file: IO[str]) -> bool:
    """Whether a file is this process's alone now; who only looks whether it is another's keeps it for no time."""
    for _ in range(LOCK_ATTEMPTS):
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(LOCK_WAIT_S)
    return False


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # as in many a container
        return f"uid {uid}"


def _short(uid: str) -> str:
    return f"{uid[-UID_TAIL_LENGTH:]}-{hashlib.sha256(uid.encode()).hexdigest()[:DIGEST_LENGTH]}"


def key_tail(key: str) -> str:
    """The last digits of a series' UID, as every message has them."""
    return f"...{key.removeprefix('series-').rpartition('-')[0]}"


def now_text() -> str:
    """Now, in UTC, to the microsecond: jobs are sorted by it."""
    return datetime.now(UTC).isoformat()


def read_record(folder: Path) -> JobRecord:
    """What job.json says; of a damaged one, that it is.

    Raises:
        FileNotFoundError: no such file.
    """
    path = folder / RECORD_NAME
    text = path.read_bytes()
    try:
        values = json.loads(text)
        known = {each.name: values[each.name] for each in fields(JobRecord)}  # a newer version may write more
        record = config_from_table(JobRecord, known, RECORD_NAME)
        if datetime.fromisoformat(record.since).tzinfo is None:
            raise ValueError("no time zone")
    except (ValueError, KeyError, TypeError, ModelError):  # cut short, or edited by hand
        written = datetime.fromtimestamp(path.stat().st_mtime, UTC)  # its age still counts
        return JobRecord(since=written.isoformat(), problem=f"{RECORD_NAME} was damaged")
    return record


def write_record(folder: Path, record: JobRecord) -> None:
    """Writes job.json, whole or not at all, and has it on disk.

    Raises:
        OutputError: it cannot be written.
    """
    write_whole(folder / RECORD_NAME, json.dumps(asdict(record), indent=1).encode(), overwrite=True)
    sync_folder(folder)


def rename_durably(source: Path, target: Path) -> None:
    """Renames a folder, and has that on disk."""
    source.rename(target)
    sync_folder(target.parent)
    sync_folder(source.parent)


def sync_folder(folder: Path) -> None:
    """Has a folder's entries on disk: a file that was synced is lost with its name."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
