"""What a run left on disk: beside each output, hidden, a record of what it was made of, by which a later run knows it.

    OUT/head.rtstruct.dcm
    OUT/.anatomynet/head.rtstruct.dcm.json    the file's hash, and hashes of the slices, the model and what was asked

A name alone says nothing: an output is done when its bytes are those that were written, of these slices, by this model.
A record is renamed into place just before its output, so that a killed run never leaves an output without a record.
Runs that write to one folder take turns at that, and each looks again before: another may have been faster.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from anatomynet import __version__
from anatomynet.client.nifti import label_table_path
from anatomynet.client.pipeline import Task
from anatomynet.client.study import CTSeries
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import OutputError
from anatomynet.engine.output import alone_in, write_whole
from anatomynet.engine.stops import temporary_folder

RECORDS = ".anatomynet"
UNFINISHED = ".part"
LOOK_AT = "look_at"  # as the column of the table
ABANDONED_S = 24 * 3600  # no run takes so long over one study
# What a user asks that changes nothing in the files; what is to be drawn, and its names, count as they were understood.
NOT_IN_FILES = {
    "server",
    "series",
    "output",
    "output_types",
    "report",
    "picture",
    "review",
    "overwrite",
    "structures",
    "structure_table",
}
Record = Mapping[str, str]


def files_of(outputs: Mapping[str, Path]) -> list[Path]:
    """Every file that is written for outputs: type -> file."""
    return [*outputs.values(), *([label_table_path(outputs["nifti"])] if "nifti" in outputs else [])]


def record_of(series: CTSeries, task: Task, model: ModelConfig) -> Record:
    """What outputs are made of: the slices, the model that draws, and what was asked of it; nothing private."""
    asked = {name: value for name, value in vars(task.options).items() if name not in NOT_IN_FILES}
    asked |= {s.name: vars(task.table[s.name]) for s in task.wanted}
    slices = sorted((s.sop_instance_uid, s.frame) for s in series.slices)
    return {
        "slices_sha256": _hash_of_json([series.series_instance_uid, slices]),
        "checkpoint_sha256": model.checkpoint_sha256,
        "asked_sha256": _hash_of_json(asked),
    }


def is_done(files: Sequence[Path], record: Record) -> bool:
    """Whether all these files are there as a run wrote them, of what `record` says.

    Raises:
        OutputError: one is there that this record does not account for; it is kept.
    """
    written = [_is_written(file, record) for file in files]  # each is asked: one may be a stranger's
    return all(written)


def write_recorded(
    outputs: Mapping[str, Path],
    record: Record,
    write: Callable[[Mapping[str, Path]], object],
    *,
    findings: int,
    overwrite: bool,
) -> bool:
    """Writes outputs and their records somewhere hidden, then gives them their names.

    Args:
        outputs: type -> file.
        record: see `record_of`.
        write: writes the files it is given, of the same types and names.
        findings: how many things deserve a look in them; kept in the record, see `findings_in`.
        overwrite: files that are there may be replaced.

    Returns:
        Whether these are the outputs; else another run has written the same meanwhile, and they were kept.

    Raises:
        OutputError: one has appeared meanwhile that `record` does not account for; the folder cannot be written to,
            and what `write` raises. What was there is kept, with its record.
    """
    first = next(iter(outputs.values()))
    folder = first.parent / RECORDS
    try:
        folder.mkdir(exist_ok=True)
        _remove_abandoned(folder)
        with temporary_folder(dir=folder, prefix=f"{first.name}.", suffix=UNFINISHED) as unfinished:
            staged = {kind: Path(unfinished, path.name) for kind, path in outputs.items()}
            write(staged)
            Path(unfinished, RECORDS).mkdir()
            for file in files_of(staged):
                known = {**record, LOOK_AT: findings, "sha256": _hash_of(file), "anatomynet_version": __version__}
                write_whole(_record_path(file), json.dumps(known).encode())
            with alone_in(folder):
                if not overwrite and is_done(files_of(outputs), record):
                    return False
                for file in files_of(staged):
                    _record_path(file).replace(folder / _record_path(file).name)
                    file.replace(first.parent / file.name)
    except OSError as error:
        raise OutputError(
            f"{first} could not be written: {error.strerror or error}; nothing was left behind"
        ) from error
    return True


def findings_in(files: Sequence[Path]) -> int:
    """How many things deserved a look when these files, which are done, were written; 0 where no record says it."""
    told = _read_record(_record_path(files[0])).get(LOOK_AT, "")
    return int(told) if told.isdecimal() else 0


def _is_written(file: Path, record: Record) -> bool:
    if not file.exists():
        return False
    known = _read_record(_record_path(file))
    mend = "give --overwrite to replace it, or another --output-folder"
    if known.get("sha256") != _hash_of(file):
        what = "it was changed since it was drawn" if known else "nothing says that it was drawn from this study"
        raise OutputError(f"{file} exists and was kept: {what}; {mend}")
    for key, what in (
        ("slices_sha256", "of other slices than this study's"),
        ("checkpoint_sha256", f"by another model, checkpoint {known.get('checkpoint_sha256', '')[:12]}"),
        ("asked_sha256", "with other options"),
    ):
        if known.get(key) != record[key]:
            raise OutputError(f"{file} exists and was kept: it was drawn {what}; {mend}")
    return True


def _read_record(path: Path) -> dict[str, str]:
    """A record; empty where there is none that can be read."""
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return {key: str(value) for key, value in known.items()} if isinstance(known, dict) else {}


def _record_path(file: Path) -> Path:
    return file.parent / RECORDS / f"{file.name}.json"


def _remove_abandoned(folder: Path) -> None:
    """What killed runs left unfinished."""
    for path in folder.glob(f"*{UNFINISHED}"):
        with suppress(FileNotFoundError):  # another study's, which was finished meanwhile
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)


def _hash_of(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise OutputError(f"{file} exists and cannot be read: {error.strerror or error}") from error


def _hash_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
