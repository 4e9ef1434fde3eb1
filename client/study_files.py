"""What a user calls a study -> a folder to read: a folder, a DICOMDIR in one, or a zip file as archives export it.

A zip file comes from elsewhere: what would write outside its folder, or fill the disk, is refused before a byte is
unpacked.
"""

import lzma
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path, PurePosixPath

from anatomynet.engine.errors import StudyError
from anatomynet.engine.stops import temporary_folder

LARGEST_FILE_COUNT = 20_000
LARGEST_UNPACKED_BYTES = 4 << 30  # twenty CT series of 400 slices
# CT packs two to five times; deflate's own limit is about 1000. A small file may be as empty as it likes.
LARGEST_RATIO, ALWAYS_ALLOWED_BYTES = 100, 64 << 20
CHUNK_BYTES = 1 << 20
# What zipfile raises, depending on where a file is damaged; a name may say that it is UTF-8, and not be.
DAMAGED_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    ValueError,
    EOFError,
    NotImplementedError,
)


def mode_of(path: Path) -> int:
    """The st_mode of what a user names: what kind of thing it is; 0 where nothing is there.

    Raises:
        StudyError: it may not be looked at, or no file can have such a name.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror or error}") from error


def named_path(path: Path) -> Path:
    """A study's path, by which its outputs are called: of "." and ".." the folder's own."""
    return path if path.name.strip(".") else path.resolve()


@contextmanager
def opened_study(study: Path) -> Iterator[Path]:
    """The folder of a study's files; what was unpacked is deleted when it closes.

    Args:
        study: a folder, a DICOMDIR (what lies in its folder is read, whatever it lists), or a zip file.

    Raises:
        StudyError: a zip file that is damaged, encrypted or too large, or that would write outside its folder; a place
            that may not be looked at.
    """
    is_file = stat.S_ISREG(mode_of(study))
    if is_file and zipfile.is_zipfile(study):
        with temporary_folder(prefix="anatomynet-") as folder:
            _unpack(study, Path(folder))
            yield Path(folder)
    elif is_file and study.name.upper() == "DICOMDIR":
        yield study.parent
    else:
        yield study


class OpenedStudies(AbstractContextManager["OpenedStudies"]):
    """The studies that were asked for last, opened: of one zip file many series may be read, one after another."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._opened: dict[Path, tuple[ExitStack, Path]] = {}  # the last one last

    def folder_of(self, study: Path) -> Path:
        """The folder of its files, which stays until so many others were asked for.

        Raises:
            StudyError: as `opened_study`.
        """
        if study in self._opened:
            self._opened[study] = self._opened.pop(study)
        else:
            with ExitStack() as stack:
                folder = stack.enter_context(opened_study(study))
                self._opened[study] = (stack.pop_all(), folder)
            self._close_all_but(self._count)
        return self._opened[study][1]

    def _close_all_but(self, count: int) -> None:
        for study in list(self._opened)[: len(self._opened) - count]:
            self._opened.pop(study)[0].close()

    def __exit__(self, *_: object) -> None:
        self._close_all_but(0)


def _unpack(path: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            _check_entries(entries, path, free_bytes=shutil.disk_usage(folder).free)
            for entry in entries:
                target = folder / entry.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as packed, target.open("xb") as file:
                    shutil.copyfileobj(packed, file, CHUNK_BYTES)
    except FileExistsError as error:
        raise StudyError(f"{path.name} holds two files of one name; export the study again") from error
    except DAMAGED_ZIP as error:
        raise StudyError(f"{path.name} is damaged, or packed in a way that is not known here; pack it again") from error
    except OSError as error:
        raise StudyError(f"{path.name} could not be unpacked: {error.strerror or error}") from error


def _check_entries(entries: list[zipfile.ZipInfo], path: Path, *, free_bytes: int) -> None:
    """Refuse by the table of contents; zipfile unpacks no more of a file than it declares."""
    if any(_leaves_its_folder(entry) for entry in entries):
        raise StudyError(f"{path.name} would write outside its folder; expected plain relative paths: pack it again")
    if any(entry.flag_bits & 1 for entry in entries):
        raise StudyError(f"{path.name} is encrypted; unpack it and give the folder")
    size = sum(entry.file_size for entry in entries)
    limit = min(LARGEST_UNPACKED_BYTES, free_bytes)
    if len(entries) > LARGEST_FILE_COUNT or size > limit:
        raise StudyError(
            f"{path.name} unpacks to {len(entries)} files of {size >> 20} MiB; expected at most {LARGEST_FILE_COUNT} "
            f"of {limit >> 20} MiB: unpack it and give the folder of one study"
        )
    if size > max(ALWAYS_ALLOWED_BYTES, LARGEST_RATIO * path.stat().st_size):
        raise StudyError(
            f"{path.name} unpacks to more than {LARGEST_RATIO} times its size, which no CT does; "
            "if you trust it, unpack it and give the folder"
        )


def _leaves_its_folder(entry: zipfile.ZipInfo) -> bool:
    name = entry.filename
    parts = PurePosixPath(name).parts
    link = stat.S_ISLNK(entry.external_attr >> 16)
    return link or name.startswith("/") or ".." in parts or "\\" in name or ":" in name or not parts
