"""Results on disk: whole or not at all, and never over an older one unasked."""

import os
from pathlib import Path

from anatomynet.engine.errors import OutputError


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Asked before any work is done.

    Raises:
        OutputError: the file exists and may not be overwritten, or its folder does not.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists and was kept: give --overwrite to replace it, or another --output")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: its folder does not exist; make it, or give another --output")


def write_whole(path: Path, data: bytes, *, overwrite: bool = False) -> None:
    """Writes a file beside `path`, then renames it.

    Raises:
        OutputError: the file exists and may not be overwritten, or it could not be written; nothing is left behind.
    """
    refuse_existing(path, overwrite=overwrite)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror or error}; nothing was left behind") from error
    finally:
        beside.unlink(missing_ok=True)


def prepare_folder(folder: Path, *, overwrite: bool) -> None:
    """Makes an empty folder; what an older result left in it goes only when it may be overwritten.

    Raises:
        OutputError: the folder holds something and may not be overwritten, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = sorted(folder.iterdir())
        if old and not overwrite:
            raise OutputError(f"{folder} holds {len(old)} files and was kept: give --overwrite, or another folder")
        if any(path.is_dir() or path.suffix != ".dcm" for path in old):
            raise OutputError(f"{folder} holds more than .dcm files and was kept: give another folder")
        for path in old:
            path.unlink()
    except OSError as error:
        raise OutputError(f"{folder} could not be prepared: {error.strerror or error}") from error
