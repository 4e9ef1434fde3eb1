"""What a DICOM node is sent, from its first slice until the series is complete: received/ in the spool.

A slice is on disk, its file and every folder above it synced, before `receive` returns, so before it is acknowledged.
Complete is a series to which nothing was added for a while. While an association that brought some of it has not been
released, a file `unreleased` lies beside it: should the association break, or the node be killed, and nobody send the
rest, the series is parked, since half of a head could pass for a whole one.
"""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import pydicom

from anatomynet.client.headers import DAMAGED
from anatomynet.client.node_spool import (
    PARKED,
    READY,
    RECEIVED,
    RECORD_NAME,
    SEGMENTED,
    SENT,
    Job,
    JobRecord,
    Spool,
    instance_name,
    now_text,
    read_record,
    rename_durably,
    series_key,
    sync_folder,
    write_record,
)
from anatomynet.engine.errors import NodeError
from anatomynet.engine.output import write_whole

UNRELEASED = "unreleased"
BROKEN = "the association that brought it broke"
# What `receive` did.
STARTED, STORED, KNOWN, REPLACED = "started", "stored", "known", "replaced"


@dataclass(frozen=True)
class Instance:
    """One DICOM instance as it was received.

    Attributes:
        series_instance_uid, sop_instance_uid: its own.
        data: a whole DICOM file.
    """

    series_instance_uid: str
    sop_instance_uid: str
    data: bytes


@dataclass
class _Arriving:
    """One series that still grows.

    Attributes:
        names: of its files.
        changed: when something was last added, by the monotonic clock.
        senders: associations that brought some of it, and are open.
        broken: the last association that brought some of it was not released.
    """

    names: set[str]
    changed: float
    senders: set[object] = field(default_factory=set)
    broken: bool = False

    def is_settled(self, *, quiet_seconds: float, after_release: float) -> bool:
        """Whether nothing was added for long enough."""
        quiet = quiet_seconds if self.senders or self.broken else after_release
        return time.monotonic() - self.changed >= quiet


class Arrivals:
    """The series that still grow; any thread may call.

    Args:
        spool: prepared.
        most_instances: of one series.
    """

    def __init__(self, spool: Spool, *, most_instances: int) -> None:
        self._spool = spool
        self._most_instances = most_instances
        self._arriving: dict[str, _Arriving] = {}
        for folder in (spool.folder / RECEIVED).iterdir():
            for part in folder.glob("**/.*.part"):  # never acknowledged
                part.unlink()
            names = {path.name for path in (folder / "ct").glob("*.dcm")}
            if names and (folder / RECORD_NAME).is_file():
                broken = (folder / UNRELEASED).exists()
                self._arriving[folder.name] = _Arriving(names, time.monotonic(), broken=broken)
            else:
                spool.discard(folder)

    def __contains__(self, key: str) -> bool:
        return key in self._arriving

    def receive(self, instance: Instance, *, source: str, sender: object) -> str:
        """Puts an instance on disk, where it is not there already.

        Args:
            instance: one CT image.
            source: AE title that sent it.
            sender: the association, or whatever stands for it.

        Returns:
            STARTED or STORED, for a series' first and for another; KNOWN where the series has the very same; REPLACED
            where it had another of this UID.

        Raises:
            NodeError: more instances than a series may have.
            OutputError, OSError: it could not be written; nothing is left behind.
        """
        key, name = series_key(instance.series_instance_uid), instance_name(instance.sop_instance_uid)
        with self._spool.lock:
            arriving = self._arriving.get(key)
            there = self._path_of(key, name)
            known = there is not None and _holds(there, instance.data)
            if known and arriving is None:
                return KNOWN
            if arriving and name not in arriving.names and len(arriving.names) >= self._most_instances:
                raise NodeError(f"a series of more than {self._most_instances} instances: raise most_instances?")
            folder = self._spool.folder / RECEIVED / key
            self._open_folder(folder, source, marked=arriving is not None and bool(arriving.senders))
            if not known:
                write_whole(folder / "ct" / name, instance.data, overwrite=True)
                sync_folder(folder / "ct")
            was_there = arriving is not None
            arriving = self._arriving.setdefault(key, _Arriving(set(), 0.0))
            arriving.names.add(name)
            arriving.senders.add(sender)
            arriving.changed = time.monotonic()
            return KNOWN if known else REPLACED if there else STORED if was_there else STARTED

    def release(self, sender: object) -> None:
        """An association has ended as it should."""
        with self._spool.lock:
            for key, arriving in self._arriving.items():
                if sender in arriving.senders:
                    arriving.senders.discard(sender)
                    arriving.changed = time.monotonic()
                    if not arriving.senders:
                        arriving.broken = False
                        (self._spool.folder / RECEIVED / key / UNRELEASED).unlink(missing_ok=True)

    def lose(self, sender: object) -> None:
        """An association has broken: only one that adds to a series from now on can make it whole again."""
        with self._spool.lock:
            for arriving in self._arriving.values():
                if sender in arriving.senders:
                    arriving.senders.clear()
                    arriving.broken = True

    def settled(self, *, quiet_seconds: float, after_release: float) -> list[str]:
        """Keys of the series to which nothing was added for long enough."""
        with self._spool.lock:
            return [
                key
                for key, arriving in self._arriving.items()
                if arriving.is_settled(quiet_seconds=quiet_seconds, after_release=after_release)
            ]

    def complete(self, key: str, *, quiet_seconds: float, after_release: float) -> Job | None:
        """Makes a job of a series: READY with all that was ever received of it, or PARKED where its end was lost.

        Jobs of fewer of its slices are discarded where nobody has got their contours, else their contours are named
        in the notes.

        Returns:
            None where something was added since it was settled: it grows on.
        """
        with self._spool.changing():
            arriving = self._arriving[key]
            if not arriving.is_settled(quiet_seconds=quiet_seconds, after_release=after_release):
                return None
            folder = self._spool.folder / RECEIVED / key
            earlier = self._spool.generations(key)
            if earlier:
                _link_missing(earlier[-1].ct, folder / "ct")
            broken = arriving.broken and not arriving.senders
            state, record = _completed(folder, earlier, broken=broken)
            write_record(folder, record)
            for job in earlier:
                if job.record.delivered and job.state != SENT:
                    self._spool.move_unlocked(job, SENT, problem="superseded before every destination had it")
                elif job.state != SENT:
                    self._spool.discard(job.folder)
            generation = earlier[-1].generation + 1 if earlier else 1
            target = self._spool.folder / state / f"{key}_{generation}"
            rename_durably(folder, target)
            (target / UNRELEASED).unlink(missing_ok=True)
            del self._arriving[key]
            return Job(target, record)

    def free_bytes(self) -> int:
        """Of the spool's disk."""
        return shutil.disk_usage(self._spool.folder).free

    def _path_of(self, key: str, name: str) -> Path | None:
        """Where an instance of this UID lies, if it is there; what is parked does not count: sending again retries."""
        folders = [self._spool.folder / RECEIVED / key]
        folders += [j.folder for j in self._spool.generations(key)[-1:] if j.state in (READY, SEGMENTED, SENT)]
        return next((f / "ct" / name for f in folders if (f / "ct" / name).is_file()), None)

    def _open_folder(self, folder: Path, source: str, *, marked: bool) -> None:
        """Makes a series' folder, and marks it as not released."""
        if not (folder / "ct").is_dir():
            (folder / "ct").mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
        if not (folder / RECORD_NAME).is_file():
            write_record(folder, JobRecord(source=source, since=now_text()))
        if not marked:
            (folder / UNRELEASED).touch()
            sync_folder(folder)


def arriving_folders(spool: Spool) -> Iterator[tuple[str, JobRecord, int, bool]]:
    """Key, record, slices, and whether it is not released, of every series that still grows; for who only looks."""
    for folder in sorted((spool.folder / RECEIVED).iterdir()):
        try:
            record, slices = read_record(folder), len(list((folder / "ct").glob("*.dcm")))
        except (FileNotFoundError, NotADirectoryError):  # begun, or renamed, just now; or a stray file
            continue
        yield folder.name, record, slices, (folder / UNRELEASED).exists()


def _completed(folder: Path, earlier: list[Job], *, broken: bool) -> tuple[str, JobRecord]:
    """State and record of a series that is complete."""
    slices = len(list((folder / "ct").glob("*.dcm")))
    drawn = [job for job in earlier if job.state == SENT or job.record.delivered]
    notes = []
    if drawn:
        notes.append(
            f"drawn on {slices} slices; contours on {drawn[-1].record.slices} were sent before the series grew or "
            "changed: discard those"
        )
    problem = ""
    if broken:
        notes.append(f"{BROKEN}: slices may be missing at its ends")
        problem = f"{BROKEN} after {slices} slices; send the series again, or --retry to draw on what is there"
    record = replace(read_record(folder), slices=slices, notes=tuple(notes), problem=problem, since=now_text())
    return (PARKED if broken else READY), record


def _link_missing(source: Path, target: Path) -> None:
    """Gives a folder the files of another that it has not."""
    for path in source.glob("*.dcm"):
        if not (target / path.name).exists():
            (target / path.name).hardlink_to(path)
    sync_folder(target)


def _holds(path: Path, data: bytes) -> bool:
    """Whether a file holds this very instance, whatever its encoding."""
    if path.read_bytes() == data:
        return True
    try:
        return bool(pydicom.dcmread(path) == pydicom.dcmread(BytesIO(data)))
    except DAMAGED:
        return False
