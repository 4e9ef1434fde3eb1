"""Results on disk: whole or not at all, and never over an older one unasked."""

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from anatomynet.engine.errors import OutputError

if sys.platform != "win32":
    import fcntl


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Asked before any work is done.

    Raises:
        OutputError: the file exists and may not be overwritten, its folder does not or may not be entered, or no file
            can have such a name.
    """
    try:
        there, has_folder = path.exists(), path.parent.is_dir()
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; give another --output") from error
    if there and not overwrite:
        raise OutputError(f"{path} exists and was kept: give --overwrite to replace it, or another --output")
    if not has_folder:
        raise OutputError(f"{path}: its folder does not exist; make it, or give another --output")


def write_whole(path: Path, data: bytes, *, overwrite: bool = False) -> None:
    """Writes a file beside `path`, then renames it.

    Beside it has no name before it is whole, where the file system can do so: a process that is killed leaves nothing.

    Raises:
        OutputError: the file exists and may not be overwritten, or it could not be written; nothing is left behind.
    """
    refuse_existing(path, overwrite=overwrite)
    # Not by the process's number: threads share it, and in containers on one disk each may be process 1.
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        nameless = _nameless_file(path.parent)
        with beside.open("wb") if nameless is None else os.fdopen(nameless, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if nameless is not None:
                # Only with a folder's descriptor does Python ask linkat to follow the link.
                os.link(f"/proc/self/fd/{nameless}", beside, src_dir_fd=nameless)
        beside.replace(path)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror or error}; nothing was left behind") from error
    finally:
        beside.unlink(missing_ok=True)


def _nameless_file(folder: Path) -> int | None:
    """Descriptor of a new file in a folder, gone when it is closed; None where there is no such thing."""
    if not hasattr(os, "O_TMPFILE") or not Path("/proc/self/fd").is_dir():
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except OSError:  # a file system that has none; what else is wrong, a named file will tell
        return None


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Another thread or process waits here until the block is left; where a file system has no locks, nobody does.

    Raises:
        OSError: no such folder, or one that may not be read.
    """
    if sys.platform == "win32":  # which has no such locks
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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
