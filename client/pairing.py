"""CT series and RTSTRUCTs -> which belongs to which: the first half of `archive`.

The files decide, not the folders: an RTSTRUCT belongs to the series that it refers to, wherever below the source both
lie. One that refers to none belongs to the only CT series of its own study, never to one of several.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from anatomynet.client.headers import uid_tail
from anatomynet.client.study_contents import FoundRtstruct, FoundSeries, StudyContents, contents_below
from anatomynet.client.study_files import named_path

LISTED = 5  # of what a line names


@dataclass(frozen=True)
class SeriesWithRtstruct:
    """A CT series and its only RTSTRUCT.

    Attributes:
        where, rtstruct_where: the ways below the source to the study, or to the series' folder where the study holds
            several, and to the RTSTRUCT: for the report.
        series, rtstruct: as they were found.
    """

    where: str
    rtstruct_where: str
    series: FoundSeries
    rtstruct: FoundRtstruct


@dataclass(frozen=True)
class Unpaired:
    """What comes to nothing.

    Attributes:
        where: the way below the source to a study, a series' folder or a file.
        problem: why, and what to do.
    """

    where: str
    problem: str


def find_pairs(source: Path, *, left_out: Sequence[Path] = ()) -> Iterator[SeriesWithRtstruct | Unpaired]:
    """Every CT series below a source with the RTSTRUCT that was drawn on it, or what to do so that it has one.

    A study with a file that cannot be read gives no pair: it may be a slice of any of its series. Localizers and
    reformats are passed over where no RTSTRUCT was drawn on them.

    Args:
        source: a study, or a folder of them, as `find_studies` tells them apart.
        left_out: folders below it that hold results, and no studies.
    """
    pairing = _Pairing(source, contents_below(source, left_out=left_out))
    for study in pairing.studies:
        yield from pairing.of_study(study)


class _Pairing:
    """What belongs together of all that lies below a source."""

    def __init__(self, source: Path, studies: Sequence[StudyContents]) -> None:
        self.source, self.studies = source, studies
        self._copies: dict[str, list[FoundSeries]] = {}
        for series in (series for study in studies for series in study.series):
            self._copies.setdefault(series.uid, []).append(series)
        self._drawn_on = {r: self._series_of(r, study) for study in studies for r in study.rtstructs}
        self._rtstructs: dict[FoundSeries, list[FoundRtstruct]] = {}
        for rtstruct, on in self._drawn_on.items():
            for series in on:
                self._rtstructs.setdefault(series, []).append(rtstruct)

    def _series_of(self, rtstruct: FoundRtstruct, own: StudyContents) -> list[FoundSeries]:
        """What an RTSTRUCT may have been drawn on: stacks of slices, if it refers to any."""
        if not rtstruct.refers_to:
            return own.usable if len(own.usable) == 1 else []
        on = [series for uid in sorted(rtstruct.refers_to) for series in self._copies.get(uid, ())]
        return [series for series in on if series.stacks] or on

    def of_study(self, study: StudyContents) -> Iterator[SeriesWithRtstruct | Unpaired]:
        """Of each series, and of what else must be named."""
        if study.problems:
            more = len(study.problems) - LISTED
            told = [*study.problems[:LISTED], *([f"and {more} more files"] if more > 0 else [])]
            yield Unpaired(self._way(study.path), "; ".join(told))
        else:
            usable = set(study.usable)
            series = [one for one in study.series if one in usable or one in self._rtstructs]
            for where, one in zip(self._names(series), series, strict=True):
                yield self._of_series(where, one)
        for rtstruct in study.rtstructs:
            if not self._drawn_on[rtstruct]:
                yield Unpaired(self._way(rtstruct.study, rtstruct.file), _why_on_none(rtstruct, study))
        for zipped in study.zips:
            yield Unpaired(self._way(study.path, zipped), "it lies in a study and was not looked into: unpack it")

    def _of_series(self, where: str, series: FoundSeries) -> SeriesWithRtstruct | Unpaired:
        rtstructs = self._rtstructs.get(series, [])
        problem = self._problem_of(series, rtstructs)
        if problem:
            return Unpaired(where, problem)
        return SeriesWithRtstruct(where, self._way(rtstructs[0].study, rtstructs[0].file), series, rtstructs[0])

    def _problem_of(self, series: FoundSeries, rtstructs: Sequence[FoundRtstruct]) -> str:
        """Why a series has no RTSTRUCT of its own, and what to do; "" where it has."""
        copies = [self._way(copy.study) for copy in self._copies[series.uid]]
        if len(copies) > 1:
            return f"its slices lie in {_listed(copies)}: bring them into one of these, or delete the copies"
        if not rtstructs:
            return "no RTSTRUCT was drawn on it: export that too, or leave the series out"
        named = _listed([self._way(rtstruct.study, rtstruct.file) for rtstruct in rtstructs])
        if len(rtstructs) > 1:
            return f"{len(rtstructs)} RTSTRUCTs were drawn on it: keep only the one to learn from, of {named}"
        if not series.stacks:
            return "it is no stack of slices, but a localizer or a reformat: export the CT that it was made from"
        if series.stacks > 1:
            return f"it holds {series.stacks} stacks of slices: export the one that was drawn on as a series of its own"
        on = len(self._drawn_on[rtstructs[0]])
        if on > 1:
            return f"{named} refers to {on} CT series here: keep only the one that it was drawn on"
        return ""

    def _names(self, series: Sequence[FoundSeries]) -> list[str]:
        """Of a study's series: the study alone; of several their folders, and in one folder their UIDs' ends too."""
        if len(series) == 1:
            return [self._way(series[0].study)]
        insides = [os.path.commonpath([Path(file).parent for file in one.files]) for one in series]
        folders = [self._way(one.study, inside) for one, inside in zip(series, insides, strict=True)]
        count = Counter(folders)
        return [
            f"{folder} ({uid_tail(one.uid)})" if count[folder] > 1 else folder
            for folder, one in zip(folders, series, strict=True)
        ]

    def _way(self, study: Path, inside: str = "") -> str:
        """From the source to a study or what lies in it; its own name where it is the source."""
        path = study / inside
        if path != self.source and path.is_relative_to(self.source):
            return path.relative_to(self.source).as_posix()
        return named_path(path).name


def _listed(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    return " and ".join([*names[:LISTED], *([f"{more} more"] if more > 0 else [])])


def _why_on_none(rtstruct: FoundRtstruct, own: StudyContents) -> str:
    if rtstruct.refers_to:
        return "it was drawn on no CT series here: export its CT too, or leave it out"
    return (
        f"it refers to no CT series, and its study holds {len(own.usable)}: put it into a folder with the one that it "
        "was drawn on, or export it again with its references"
    )
