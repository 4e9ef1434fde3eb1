"""Folders -> what lies in each study: its CT series and RTSTRUCTs. What `pairing.py` brings together.

Every file's header is looked at once, and little more than its path is kept: an archive holds hundreds of patients.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydicom.filereader import read_partial
from pydicom.tag import Tag
from pydicom.uid import RTStructureSetStorage

from anatomynet.client.headers import DAMAGED, CTHeader, files_under, kind_of, read_header
from anatomynet.client.quiet import quiet_libraries
from anatomynet.client.study import REFORMAT_WORDS, is_stack, no_ct_error, slice_headers
from anatomynet.client.study_files import opened_study
from anatomynet.client.study_search import find_studies, is_dicom_zip
from anatomynet.engine.errors import StudyError

REFERENCES = Tag("ReferencedFrameOfReferenceSequence")


@dataclass(frozen=True, eq=False)
class FoundSeries:
    """A CT series of one study.

    Attributes:
        uid: its SeriesInstanceUID.
        study: what `opened_study` opens.
        files: their ways below that.
        stacks: how many stacks of slices it holds; 0 of localizers and reformats.
        patient: PatientID, "" where there is none; never to be told.
    """

    uid: str
    study: Path
    files: tuple[str, ...]
    stacks: int
    patient: str = field(repr=False)


@dataclass(frozen=True, eq=False)
class FoundRtstruct:
    """An RTSTRUCT.

    Attributes:
        study: what `opened_study` opens.
        file: its way below that.
        refers_to: SeriesInstanceUIDs (PS3.3 C.8.8.5).
    """

    study: Path
    file: str
    refers_to: frozenset[str]


@dataclass(eq=False)
class StudyContents:
    """What lies in one study, or beside studies.

    Attributes:
        path: of the study, as `find_studies` found it; of the folder in which the studies lie.
        series, rtstructs: of it, in the order of their files.
        zips: files' ways below it, which were not looked into.
        others: how many files of each other kind.
        problems: a line for each file that could not be read.
    """

    path: Path
    series: list[FoundSeries] = field(default_factory=list)
    rtstructs: list[FoundRtstruct] = field(default_factory=list)
    zips: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def usable(self) -> list[FoundSeries]:
        """The series that are stacks of slices, else all of them: as `list_ct_series`."""
        return [series for series in self.series if series.stacks] or self.series

    def look_through(self, root: Path, files: Iterable[Path]) -> None:
        """Adds what files are that lie below `root`, the opened study."""
        seen: dict[str, _SeenSeries] = {}
        for file in files:
            inside = file.relative_to(root)
            try:
                self._look_at(file, inside, seen)
            except StudyError as error:
                self.problems.append(f"{inside.parent}: {error}" if inside.parent.name else str(error))
        for uid, of in seen.items():
            self.series.append(FoundSeries(uid, self.path, tuple(of.files), len(of.stacks), of.patient))

    def _look_at(self, file: Path, inside: Path, seen: dict[str, "_SeenSeries"]) -> None:
        header = read_header(file)
        if header is not None and header.is_ct:
            for part in slice_headers(header):
                uid, patient = part.required_text("SeriesInstanceUID"), part.text("PatientID")
                seen.setdefault(uid, _SeenSeries(patient)).add(str(inside), part)
            return
        self.others[kind_of(header)] += 1
        if header is not None and RTStructureSetStorage in header.sop_class_uids:
            self.rtstructs.append(FoundRtstruct(self.path, str(inside), _references(file)))
        elif header is None and is_dicom_zip(file):
            self.zips.append(str(inside))


@dataclass
class _SeenSeries:
    """While its study is looked through: headers are kept until some two of them are known for a stack."""

    patient: str
    files: dict[str, None] = field(default_factory=dict)
    stacks: set[str] = field(default_factory=set)
    undecided: dict[str, list[CTHeader]] = field(default_factory=dict)

    def add(self, file: str, header: CTHeader) -> None:
        self.files[file] = None
        if header.stack in self.stacks:
            return
        headers = self.undecided.setdefault(header.stack, [])
        if headers and headers[0].image_type & REFORMAT_WORDS:
            return
        headers.append(header)
        if is_stack(headers):
            self.stacks.add(header.stack)
            del self.undecided[header.stack]


def contents_below(source: Path, *, left_out: Sequence[Path] = ()) -> list[StudyContents]:
    """Of every study that `find_studies` finds below a source, and of what lies beside studies.

    Args:
        source: a study, or a folder of them.
        left_out: folders below it that hold results, and no studies.
    """
    studies = [study.path for study in find_studies([source], left_out=left_out)]
    with quiet_libraries():
        return [*map(_contents_of, studies), *_beside(studies, source)]


def _contents_of(study: Path) -> StudyContents:
    contents = StudyContents(study)
    try:
        with opened_study(study) as root:
            contents.look_through(root, files_under(root))
        if not (contents.series or contents.rtstructs or contents.zips or contents.problems):
            contents.problems.append(str(no_ct_error("in it", contents.others)))
    except StudyError as error:
        contents.problems.append(str(error))
    return contents


def _beside(studies: Sequence[Path], source: Path) -> Iterator[StudyContents]:
    """Of each folder of studies, the files that are no study themselves."""
    known = set(studies)
    for folder in sorted({folder for path in known for folder in path.parents if folder.is_relative_to(source)}):
        contents = StudyContents(folder)
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        contents.look_through(folder, [entry for entry in entries if entry.is_file() and entry not in known])
        yield contents


def _references(path: Path) -> frozenset[str]:
    """The series that an RTSTRUCT refers to; its contours, nearly all of the file, are not read."""
    try:
        with path.open("rb") as file:
            header = read_partial(file, stop_when=lambda tag, _vr, _length: tag > REFERENCES, force=True)
        return frozenset(
            str(item.SeriesInstanceUID)
            for frame in header.get("ReferencedFrameOfReferenceSequence") or ()
            for study in frame.get("RTReferencedStudySequence") or ()
            for item in study.get("RTReferencedSeriesSequence") or ()
        )
    except OSError as error:
        raise StudyError(f"{path.name} cannot be read: {error.strerror or error}") from error
    except DAMAGED as error:
        raise StudyError(f"{path.name} is damaged: what it refers to cannot be read; export it again") from error
