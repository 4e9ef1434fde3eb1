"""Folders -> studies: which of what a user names is one study, and which is a folder of them.

The files decide, not the folders' names or depth:

    a folder in which CT files lie is one study, with all that lies below it;
    so is a folder below which, however deep, every CT is of one patient and one StudyInstanceUID, and no zip file lies;
    any other folder is a folder of studies: each folder and each zip file of DICOM in it is looked at in the same way.

One CT file of each folder is asked for its patient and study. So two patients never become one study; what holds no
CT beside studies becomes one that is refused by its name, and nothing is passed over in silence.
"""

import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from anatomynet.client.header_elements import META_START, PREAMBLE_LENGTH
from anatomynet.client.headers import read_header
from anatomynet.client.quiet import quiet_libraries
from anatomynet.client.study_files import DAMAGED_ZIP, named_path
from anatomynet.engine.errors import StudyError

# Patient and study of one CT file, or a zip file's path.
Identity = tuple[str, str]


@dataclass(frozen=True)
class FoundStudy:
    """One study.

    Attributes:
        path: a folder, a DICOMDIR, a zip file, or what is none of these and will be refused when it is read.
        name: for its outputs: its own, or its way below the folder that was named, "_" for "/"; where that is another
            study's too, with the folders above it.
    """

    path: Path
    name: str


@dataclass(frozen=True)
class _Folder:
    """What a folder holds; `own` is of a CT file that lies in it."""

    path: Path
    own: Identity | None = None
    zips: tuple[Path, ...] = ()
    below: tuple["_Folder", ...] = ()

    @property
    def identities(self) -> set[Identity]:
        own = {self.own} if self.own else set[Identity]()
        return own.union((("", str(path)) for path in self.zips), *(folder.identities for folder in self.below))

    @property
    def has_zips(self) -> bool:
        """Whether it holds a zip file, however deep: each is a study of its own."""
        return bool(self.zips) or any(folder.has_zips for folder in self.below)


def find_studies(named: Iterable[Path], *, left_out: Sequence[Path] = ()) -> list[FoundStudy]:
    """The studies that a user names, in that order and by name within a folder; each once.

    Args:
        named: studies, and folders of studies.
        left_out: folders below them that hold results, and no studies.
    """
    skipped = frozenset(map(_real, left_out))
    found: dict[Path, tuple[Path, int]] = {}
    for given in named:
        for path in _studies_in(given, skipped):
            found.setdefault(_real(path), (path, max(1, len(path.relative_to(given).parts))))
    names = _distinct_names(list(found.values()))
    return [FoundStudy(path, name) for (path, _), name in zip(found.values(), names, strict=True)]


def _real(path: Path) -> Path:
    """As Path.resolve, which before Python 3.13 raises RuntimeError of links in a loop."""
    return Path(os.path.realpath(path))


def _distinct_names(paths: Sequence[tuple[Path, int]]) -> list[str]:
    """Of each path so many of its last parts, and more where others have the same, as far as there are any."""
    parts = [named_path(path).absolute().parts[1:] for path, _ in paths]
    lengths = [length for _, length in paths]
    while True:
        names = ["_".join(of[-length:]).removesuffix(".zip") for of, length in zip(parts, lengths, strict=True)]
        count = Counter(names)
        longer = [k for k, name in enumerate(names) if count[name] > 1 and lengths[k] < len(parts[k])]
        if not longer:
            return names
        for k in longer:
            lengths[k] += 1


def _studies_in(given: Path, skipped: frozenset[Path]) -> Iterator[Path]:
    try:
        is_folder = given.is_dir()
    except OSError:  # refused by its name when it is read
        is_folder = False
    if not is_folder:
        return iter([given])
    with quiet_libraries():
        return _studies_of(_scanned(given, skipped, above=frozenset()))


def _studies_of(folder: _Folder) -> Iterator[Path]:
    if folder.own or not (folder.has_zips or len(folder.identities) > 1):
        yield folder.path
        return
    yield from folder.zips
    for below in folder.below:
        yield from _studies_of(below)


def _scanned(path: Path, skipped: frozenset[Path], *, above: frozenset[Path]) -> _Folder:
    """What a folder and those below hold; hidden ones and those in `skipped` apart, no loop of links followed."""
    above |= {path.resolve()}
    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        folders = [entry for entry in entries if entry.is_dir() and entry.resolve() not in skipped | above]
        files = [entry for entry in entries if entry.is_file()]
    except OSError:  # refused by its name when it is read
        return _Folder(path)
    own = next(filter(None, map(_identity, files)), None)
    zips = () if own else tuple(file for file in files if is_dicom_zip(file))
    return _Folder(path, own, zips, tuple(_scanned(folder, skipped, above=above) for folder in folders))


def _identity(path: Path) -> Identity | None:
    """Patient and study of a CT file; None of any other, a damaged one among them."""
    try:
        header = read_header(path)
    except StudyError:
        return None
    if header is None or not header.is_ct:
        return None
    return header.text("PatientID"), header.text("StudyInstanceUID")


def is_dicom_zip(path: Path) -> bool:
    """Whether a file is a zip file with a DICOM file in it; one that is damaged may be."""
    if path.suffix.lower() != ".zip":
        return False
    try:
        with zipfile.ZipFile(path) as packed:
            return any(_is_dicom_entry(packed, entry) for entry in packed.infolist() if not entry.is_dir())
    except (OSError, RuntimeError, *DAMAGED_ZIP):
        return True


def _is_dicom_entry(packed: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    with packed.open(entry) as file:
        return file.read(META_START)[PREAMBLE_LENGTH:] == b"DICM"
