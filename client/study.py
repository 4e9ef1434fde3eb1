"""DICOM files -> CTSeries -> CTVolume: the first two steps of the path.

Whatever would let a contour land in the wrong place is refused here, once: what leaves this module is one regular,
axis-aligned stack of CT slices, each with its own position in the patient.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from anatomynet.client.codecs import check_codecs
from anatomynet.client.decoder_process import DecoderProcesses
from anatomynet.client.frames import check_parts, frame_headers
from anatomynet.client.headers import UID_TAIL_LENGTH, CTHeader, files_under, patient_and_study, read_headers, uid_tail
from anatomynet.client.pixels import StoredPixels, read_hu, stored_pixels
from anatomynet.client.quiet import quiet_libraries
from anatomynet.client.stack import sorted_slices
from anatomynet.engine.errors import GeometryError, StudyError
from anatomynet.engine.geometry import Point, VolumeGeometry
from anatomynet.engine.volume import CTVolume, HounsfieldArray

# A localizer stands across the slices: cosine between the normals. More than this many are no localizers.
ACROSS_COSINE = 0.5
LARGEST_LOCALIZER_COUNT = 8
# ImageType words of images computed from slices: thick, projected or rendered, not what the scanner measured.
REFORMAT_WORDS = frozenset({"MPR", "REFORMATTED", "CPR", "MIP", "MINIP", "MAXIP", "PROJECTION", "VRT", "SSD"}) | {
    "SAMPLED", "DISTORTED", "CURVEDMPR", "VOLUMERENDER", "SURFACERENDER",  # an enhanced CT's (PS3.3 C.8.16.2)
}  # fmt: skip
READ_THREADS = 2


@dataclass(frozen=True)
class CTSlice:
    """One CT image on disk: a file, or a frame of an enhanced CT.

    Attributes:
        path: of its file.
        sop_instance_uid, sop_class_uid: what an RTSTRUCT refers to.
        position: LPS mm (x, y, z) of the centre of its first voxel.
        pixels: how its values are stored.
        frame: its number in its file, from 1; 0 where the file is one slice.
        frame_count: how many frames its file has, 1 where it is one slice.
    """

    path: Path
    sop_instance_uid: str
    sop_class_uid: str
    position: Point
    pixels: StoredPixels
    frame: int = 0
    frame_count: int = 1


@dataclass(frozen=True, eq=False)
class CTSeries:
    """One regular, axis-aligned stack of CT slices.

    Attributes:
        slices: sorted along the slice normal (row direction x column direction): slices[k] is index z = k.
        study_instance_uid, series_instance_uid, frame_of_reference_uid: of all of them.
        geometry: of the volume they make.
        header: the patient and study attributes that an RTSTRUCT copies; never to be logged.
    """

    slices: tuple[CTSlice, ...]
    study_instance_uid: str
    series_instance_uid: str
    frame_of_reference_uid: str
    geometry: VolumeGeometry
    header: Dataset = field(repr=False)

    @property
    def rows(self) -> int:
        """Voxels along y."""
        return self.geometry.shape[1]

    @property
    def columns(self) -> int:
        """Voxels along x."""
        return self.geometry.shape[2]


def read_ct_series(study_dir: Path, *, series_instance_uid: str | None = None) -> CTSeries:
    """Find the CT series in a folder, whatever else lies in it and in the folders below.

    Pixels stay on disk. Files that are not DICOM, other modalities, localizers and reformats are passed over.

    Args:
        study_dir: the folder.
        series_instance_uid: which series, whole or its last digits, needed where the folder holds several; of an
            enhanced CT with several stacks, "UID/StackID".

    Raises:
        StudyError: no folder, no CT, several series, an unreadable file, a missing tag, slices that do not belong
            together.
        GeometryError: slices that do not make a regular, axis-aligned stack.
    """
    return _chosen_series(_read_stacks(study_dir), series_instance_uid)


def read_ct_files(files: Iterable[Path]) -> CTSeries:
    """The CT series that files make which are known to be of one: `read_ct_series` without a look at any other.

    Raises:
        StudyError, GeometryError: as `read_ct_series`.
    """
    return _chosen_series(_stacks_of(files, "among a series' files"), None)


def list_ct_series(study_dir: Path) -> tuple[str, ...]:
    """What `read_ct_series` may be asked for: every CT series of a folder that is a stack of slices, else every one.

    Raises:
        StudyError: no folder, no CT, an unreadable file, a missing tag.
    """
    return tuple(_usable(_read_stacks(study_dir)))


def volume_from_series(series: CTSeries) -> CTVolume:
    """Read the pixels: HU int16 (z, y, x), hu[k] from series.slices[k] in that slice's own rows and columns.

    Raises:
        StudyError: pixels that cannot be read or decoded.
    """
    check_codecs(s.pixels.transfer_syntax_uid for s in series.slices if s.pixels.offset is None)
    try:
        hu = np.empty(series.geometry.shape, np.int16)
    except MemoryError as error:
        raise StudyError(
            f"{series.geometry.shape} voxels (z, y, x) are more than this machine has memory for; expected one CT"
        ) from error
    with quiet_libraries(), DecoderProcesses() as decoders, ThreadPoolExecutor(READ_THREADS) as pool:
        deque(pool.map(partial(_read_slice, series, hu, decoders), range(len(hu))), maxlen=0)
    return CTVolume(hu, series.geometry)


def _read_slice(series: CTSeries, hu: HounsfieldArray, decoders: DecoderProcesses, z: int) -> None:
    """Fill hu[z]; an error says where in the series it was."""
    found = series.slices[z]
    try:
        read_hu(found.path, found.pixels, hu[z], decoders)
    except StudyError as error:
        # The cause stays: a node tries again what was the disk's fault.
        raise StudyError(f"slice {z + 1} of {len(hu)}, {error}") from error.__cause__


def _read_stacks(study_dir: Path) -> dict[str, list[CTHeader]]:
    return _stacks_of(files_under(Path(study_dir)), f"in {study_dir}")


def _stacks_of(files: Iterable[Path], where: str) -> dict[str, list[CTHeader]]:
    with quiet_libraries():
        found, others = read_headers(files)
        headers = [header for file in found for header in slice_headers(file)]
    if not headers:
        raise no_ct_error(where, others)
    return _stacks_by_name(headers)


def slice_headers(header: CTHeader) -> list[CTHeader]:
    """A header of each slice of a CT file: of an enhanced one, of each frame.

    Raises:
        StudyError: as `frame_headers`.
    """
    return frame_headers(header) if header.enhanced else [header]


def no_ct_error(where: str, others: Mapping[str, int]) -> StudyError:
    """Of files without a CT slice among them; `others` counts what they are."""
    found = ", ".join(f"{count} x {what}" for what, count in sorted(others.items())) or "nothing"
    return StudyError(f"no CT slices {where}: found {found}; expected CT images")


def _chosen_series(stacks: dict[str, list[CTHeader]], wanted: str | None) -> CTSeries:
    chosen = stacks[_choose_stack(stacks, wanted)]
    check_parts(chosen)
    return _series_from_headers(_slices(chosen))


def _series_from_headers(headers: list[CTHeader]) -> CTSeries:
    headers, geometry = sorted_slices(headers)
    first = headers[0]
    return CTSeries(
        slices=tuple(_slice_from_header(h) for h in headers),
        study_instance_uid=first.required_text("StudyInstanceUID"),
        series_instance_uid=first.required_text("SeriesInstanceUID"),
        frame_of_reference_uid=first.required_text("FrameOfReferenceUID"),
        geometry=geometry,
        header=patient_and_study(first),
    )


def _slice_from_header(header: CTHeader) -> CTSlice:
    x, y, z = header.position.tolist()
    return CTSlice(
        frame=header.frame,
        frame_count=header.frame_count,
        path=header.path,
        sop_instance_uid=header.required_text("SOPInstanceUID"),
        sop_class_uid=header.required_text("SOPClassUID"),
        position=(x, y, z),
        pixels=stored_pixels(header),
    )


def _stacks_by_name(headers: list[CTHeader]) -> dict[str, list[CTHeader]]:
    """Slices that may make a volume, by their series' UID; by "UID/StackID" where a series holds several stacks."""
    by_series: dict[str, dict[str, list[CTHeader]]] = {}
    for header in headers:
        by_series.setdefault(header.required_text("SeriesInstanceUID"), {}).setdefault(header.stack, []).append(header)
    return {
        f"{uid}/{stack}" if len(stacks) > 1 else uid: slices
        for uid, stacks in by_series.items()
        for stack, slices in stacks.items()
    }


def _choose_stack(stacks: dict[str, list[CTHeader]], wanted: str | None) -> str:
    """The name of what to draw on: the wanted one, else the only one that is a stack of slices."""
    names = list(stacks)
    if wanted is not None:
        names = _matching(names, wanted) if wanted else []
        if len(names) == 1:
            return names[0]
        if len({name.partition("/")[0] for name in names}) != 1:
            tail = wanted[-UID_TAIL_LENGTH:]
            problem = f"{len(names)} CT series end in {tail}" if wanted else "no series UID was given"
            raise StudyError(f"{problem}; expected one of {_list_of_stacks(stacks)}: choose with --series")
    usable = _usable({name: stacks[name] for name in names})
    if len(usable) > 1:
        listed = _list_of_stacks({name: stacks[name] for name in usable})
        raise StudyError(
            f"{len(usable)} CT series in the folder: {listed}; choose one with --series UID or its last digits"
        )
    return usable[0]


def _matching(names: list[str], wanted: str) -> list[str]:
    whole = [name for name in names if wanted in (name, name.partition("/")[0])]
    return whole or [name for name in names if name.endswith(wanted) or name.partition("/")[0].endswith(wanted)]


def _usable(stacks: dict[str, list[CTHeader]]) -> list[str]:
    return [name for name, headers in stacks.items() if is_stack(headers)] or list(stacks)


def is_stack(headers: list[CTHeader]) -> bool:
    """Whether a series' headers, in the order of its files, are of a stack of slices: no localizer, no reformat.

    Of which a part is one, the whole is one.
    """
    placed = [h for h in headers if h.placed]
    return len(placed) > 1 and len(_across_and_along(placed)[1]) > 1 and not headers[0].image_type & REFORMAT_WORDS


def _list_of_stacks(stacks: dict[str, list[CTHeader]]) -> str:
    length = UID_TAIL_LENGTH
    while len({name[-length:] for name in stacks}) < len(stacks):
        length += 4
    return ", ".join(
        f"...{name[-length:]} ({len(headers)} slices{_spacing_in_words(headers)})" for name, headers in stacks.items()
    )


def _spacing_in_words(headers: list[CTHeader]) -> str:
    placed = [h for h in headers if h.placed]
    if len(placed) < 2:
        return ""
    along = np.sort([h.position @ placed[0].normal for h in placed])
    return f" every {np.median(np.diff(along)):.4g} mm"


def _across_and_along(headers: list[CTHeader]) -> tuple[list[CTHeader], list[CTHeader]]:
    """Images that stand across most others, and those that lie along with them."""
    rounded = [tuple(row) for row in np.abs([h.normal for h in headers]).round(1).tolist()]
    commonest = Counter(rounded).most_common(1)[0][0]
    reference = headers[rounded.index(commonest)].normal
    is_across = [abs(h.normal @ reference) < ACROSS_COSINE for h in headers]
    across = [h for h, other in zip(headers, is_across, strict=True) if other]
    along = [h for h, other in zip(headers, is_across, strict=True) if not other]
    return across, along


def _slices(headers: list[CTHeader]) -> list[CTHeader]:
    """A series' slices without its localizers, which its ImageType does not always tell from slices."""
    tail = uid_tail(headers[0].required_text("SeriesInstanceUID"))
    placed = [h for h in headers if h.placed or "LOCALIZER" not in h.image_type]
    if not placed:
        raise StudyError(f"series {tail} holds only localizers; expected a stack of CT slices")
    across, along = _across_and_along(placed)
    if len(across) > LARGEST_LOCALIZER_COUNT:
        raise GeometryError(
            f"series {tail} holds {len(along)} slices of one orientation and {len(across)} of another; "
            "expected one stack: export them as separate series"
        )
    if len(along) < 2:
        raise StudyError(f"series {tail} has a single slice; expected a stack of CT slices")
    words = sorted(along[0].image_type & REFORMAT_WORDS)
    if words:
        raise StudyError(
            f"series {tail} is a reformat (ImageType {', '.join(words)}); "
            "expected slices as the scanner reconstructed them"
        )
    return along
