"""DICOM files -> CTSeries -> CTVolume: the first two steps of the path.

Whatever would let a contour land in the wrong place is refused here, once: what leaves this module is one regular,
axis-aligned stack of CT slices, each with its own position in the patient.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from anatomynet.client.headers import CTHeader, patient_and_study, read_headers
from anatomynet.client.pixels import StoredPixels, check_codecs, read_hu, stored_pixels
from anatomynet.engine.errors import GeometryError, StudyError
from anatomynet.engine.geometry import Direction, Point, VolumeGeometry
from anatomynet.engine.volume import CTVolume, HounsfieldArray

# Positions written with one decimal make neighbouring gaps differ by up to 0.1 mm.
SPACING_TOLERANCE_MM = 0.1
# Less than this along the normal is the same position: no scanner reconstructs so finely.
SAME_POSITION_MM = 0.02
# How far slices may drift sideways over the whole stack; a gantry tilt of 1 degree drifts 0.05 mm a slice.
DRIFT_TOLERANCE_MM = 0.1
# Orientation cosines and pixel spacing come as text of 16 characters, often of 6 digits.
HEADER_TOLERANCE = 1e-4
TILT_TOLERANCE_DEGREES = 0.05
# A localizer stands across the slices: cosine between the normals. More than this many are no localizers.
ACROSS_COSINE = 0.5
LARGEST_LOCALIZER_COUNT = 8
# ImageType words of images computed from slices: thick, projected or rendered, not what the scanner measured.
REFORMAT_WORDS = frozenset({"MPR", "REFORMATTED", "CPR", "MIP", "MINIP", "MAXIP", "PROJECTION", "VRT", "SSD"})
UID_TAIL_LENGTH = 8
READ_THREADS = 2


@dataclass(frozen=True)
class CTSlice:
    """One CT image on disk.

    Attributes:
        path: of its file.
        sop_instance_uid, sop_class_uid: what an RTSTRUCT refers to.
        position: LPS mm (x, y, z) of the centre of its first voxel.
        pixels: how its values are stored.
    """

    path: Path
    sop_instance_uid: str
    sop_class_uid: str
    position: Point
    pixels: StoredPixels

    def read_hu(self, out: HounsfieldArray) -> None:
        """Fill `out`, int16 (y, x) and contiguous, with Hounsfield units; padding becomes air.

        Raises:
            StudyError: pixels that cannot be read or decoded.
        """
        read_hu(self.path, self.pixels, out)


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
        series_instance_uid: which series, whole or its last digits; needed where the folder holds several.

    Raises:
        StudyError: no folder, no CT, several series, an unreadable file, a missing tag, slices that do not belong
            together.
        GeometryError: slices that do not make a regular, axis-aligned stack.
    """
    headers, others = read_headers(Path(study_dir))
    by_series: dict[str, list[CTHeader]] = {}
    for header in headers:
        by_series.setdefault(header.required_text("SeriesInstanceUID"), []).append(header)
    if not by_series:
        found = ", ".join(f"{count} {what}" for what, count in sorted(others.items())) or "nothing"
        raise StudyError(f"no CT slices in {study_dir}: found {found}; expected a folder with one CT series")
    uid = _choose_series(by_series, series_instance_uid)
    return _series_from_headers(_stack(by_series[uid]))


def volume_from_series(series: CTSeries) -> CTVolume:
    """Read the pixels: HU int16 (z, y, x), hu[k] from series.slices[k] in that slice's own rows and columns.

    Raises:
        StudyError: pixels that cannot be read or decoded.
    """
    check_codecs(s.pixels for s in series.slices)
    hu = np.empty(series.geometry.shape, np.int16)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for _ in pool.map(CTSlice.read_hu, series.slices, hu):
            pass
    return CTVolume(hu, series.geometry)


def uid_tail(uid: str) -> str:
    """The last digits of a UID, enough to tell it from its neighbours and not to trace it."""
    return f"...{uid[-UID_TAIL_LENGTH:]}"


# ---- choosing the slices ----


def _choose_series(by_series: dict[str, list[CTHeader]], wanted: str | None) -> str:
    """The UID of the series to draw on: the wanted one, else the only one that is a stack of slices."""
    if wanted is not None:
        matches = [uid for uid in by_series if uid == wanted] or [uid for uid in by_series if uid.endswith(wanted)]
        if wanted and len(matches) == 1:
            return matches[0]
        problem = (
            f"{len(matches)} CT series end in {wanted[-UID_TAIL_LENGTH:]}" if wanted else "no series UID was given"
        )
        raise StudyError(f"{problem}; expected one of {_list_of_series(by_series)}: choose with --series")
    usable = [uid for uid, headers in by_series.items() if _is_stack(headers)] or list(by_series)
    if len(usable) > 1:
        listed = _list_of_series({uid: by_series[uid] for uid in usable})
        raise StudyError(
            f"{len(usable)} CT series in the folder: {listed}; choose one with --series UID or its last digits"
        )
    return usable[0]


def _is_stack(headers: list[CTHeader]) -> bool:
    placed = [h for h in headers if h.placed]
    return len(placed) > 1 and len(_across_and_along(placed)[1]) > 1 and not headers[0].image_type & REFORMAT_WORDS


def _list_of_series(by_series: dict[str, list[CTHeader]]) -> str:
    length = UID_TAIL_LENGTH
    while len({uid[-length:] for uid in by_series}) < len(by_series):
        length += 4
    return ", ".join(
        f"...{uid[-length:]} ({len(headers)} slices{_spacing_in_words(headers)})" for uid, headers in by_series.items()
    )


def _spacing_in_words(headers: list[CTHeader]) -> str:
    placed = [h for h in headers if h.placed]
    if len(placed) < 2:
        return ""
    along = np.sort([h.position @ placed[0].normal for h in placed])
    return f" every {np.median(np.diff(along)):.4g} mm"


def _across_and_along(headers: list[CTHeader]) -> tuple[list[CTHeader], list[CTHeader]]:
    """Images that stand across most others, and those that lie along with them."""
    rounded: Counter[tuple[float, ...]] = Counter(tuple(np.abs(h.normal).round(1).tolist()) for h in headers)
    commonest = rounded.most_common(1)[0][0]
    reference = next(h.normal for h in headers if tuple(np.abs(h.normal).round(1).tolist()) == commonest)
    across = [h for h in headers if abs(h.normal @ reference) < ACROSS_COSINE]
    along = [h for h in headers if abs(h.normal @ reference) >= ACROSS_COSINE]
    return across, along


def _stack(headers: list[CTHeader]) -> list[CTHeader]:
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


# ---- checking that they make a volume ----


def _series_from_headers(headers: list[CTHeader]) -> CTSeries:
    first = headers[0]
    _check_uniform(headers)
    headers = _sorted_along_normal(headers)
    geometry = _geometry_from_headers(headers)
    return CTSeries(
        slices=tuple(_slice_from_header(h) for h in headers),
        study_instance_uid=first.required_text("StudyInstanceUID"),
        series_instance_uid=first.required_text("SeriesInstanceUID"),
        frame_of_reference_uid=first.required_text("FrameOfReferenceUID"),
        geometry=geometry,
        header=patient_and_study(first),
    )


def _check_uniform(headers: list[CTHeader]) -> None:
    """Refuse slices that differ where a volume must not; a value is named only where it cannot name a patient."""
    checks: list[tuple[str, Callable[[CTHeader], Any], bool]] = [
        ("Rows", lambda h: h.word("Rows"), True),
        ("Columns", lambda h: h.word("Columns"), True),
        ("PixelSpacing", lambda h: h.numbers("PixelSpacing", 2), True),
        ("ImageOrientationPatient", lambda h: h.numbers("ImageOrientationPatient", 6), True),
        ("FrameOfReferenceUID", lambda h: h.required_text("FrameOfReferenceUID"), False),
        ("StudyInstanceUID", lambda h: h.required_text("StudyInstanceUID"), False),
        ("PatientID", lambda h: h.text("PatientID"), False),
    ]
    for keyword, read, tell in checks:
        reference = read(headers[0])
        for header in headers[1:]:
            value = read(header)
            if value == reference or (tell and np.allclose(value, reference, rtol=0, atol=HEADER_TOLERANCE)):
                continue
            values = f": {_in_words(reference)} and {_in_words(value)}" if tell else ""
            raise GeometryError(
                f"slices of one series differ in {keyword}{values} ({headers[0].path.name} and {header.path.name}); "
                "export each as a series of its own"
            )


def _in_words(value: float | tuple[float, ...]) -> str:
    return " \\ ".join(f"{v:g}" for v in (value if isinstance(value, tuple) else (value,)))


def _sorted_along_normal(headers: list[CTHeader]) -> list[CTHeader]:
    normal = headers[0].normal
    return sorted(headers, key=lambda h: (float(h.position @ normal), h.path))


def _geometry_from_headers(headers: list[CTHeader]) -> VolumeGeometry:
    """The grid of sorted slices. Raises GeometryError where they are not one."""
    first = headers[0]
    row_spacing, column_spacing = first.numbers("PixelSpacing", 2)
    cosines = first.numbers("ImageOrientationPatient", 6)
    positions = np.array([h.position for h in headers])
    along = positions @ first.normal
    _check_even_spacing(headers, along)
    _check_upright(headers, positions)
    columns = np.column_stack([cosines[:3], cosines[3:], first.normal])
    x, y, z = first.position.tolist()
    geometry = VolumeGeometry(
        shape=(len(headers), first.word("Rows"), first.word("Columns")),
        spacing=(column_spacing, row_spacing, float(along[-1] - along[0]) / (len(headers) - 1)),
        origin=(x, y, z),
        direction=_direction(columns),
    )
    geometry.canonical_axes()
    return geometry


def _direction(matrix: NDArray[np.float64]) -> Direction:
    (a, b, c), (d, e, f), (g, h, i) = matrix.tolist()
    return ((a, b, c), (d, e, f), (g, h, i))


def _check_even_spacing(headers: list[CTHeader], along: NDArray[np.float64]) -> None:
    gaps = np.diff(along)
    places = _Places(headers)
    same = np.flatnonzero(gaps < SAME_POSITION_MM)
    if same.size:
        acquisitions = {h.text("AcquisitionNumber") for h in headers}
        reason = f" ({len(acquisitions)} acquisitions in one series)" if len(acquisitions) > 1 else ""
        raise GeometryError(
            f"{same.size + 1} slices share a position{reason}: {places.between(same)}; expected one slice at each: "
            "remove copies, or export each acquisition as a series of its own"
        )
    usual = float(np.median(gaps))
    uneven = np.flatnonzero(np.abs(gaps - usual) > SPACING_TOLERANCE_MM)
    if uneven.size:
        missing = np.rint(gaps / usual) - 1
        whole = np.abs(gaps - (missing + 1) * usual) <= SPACING_TOLERANCE_MM
        if whole.all() and (missing >= 0).all():
            problem = f"{int(missing.sum())} slices missing"
        else:
            problem = f"uneven spacing, {gaps.min():.4g} to {gaps.max():.4g} mm"
        raise GeometryError(
            f"{problem}: {places.between(uneven)}; expected a slice every {usual:.4g} mm: export the whole series again"
        )


class _Places:
    """Names places in a stack of slices for a message."""

    def __init__(self, headers: list[CTHeader]) -> None:
        self.headers = headers
        self.axis = int(np.abs(headers[0].normal).argmax())

    def between(self, indices: Iterable[int]) -> str:
        """The places of the gaps after these slices: the first three."""
        listed = [
            f"{self._name(i)} and {self._name(i + 1)} ({self.headers[i].path.name}, {self.headers[i + 1].path.name})"
            for i in indices
        ]
        more = f" and {len(listed) - 3} more places" if len(listed) > 3 else ""
        return "between " + ", ".join(listed[:3]) + more

    def _name(self, index: int) -> str:
        return f"{'xyz'[self.axis]} = {self.headers[index].position[self.axis]:.2f}"


def _check_upright(headers: list[CTHeader], positions: NDArray[np.float64]) -> None:
    """Refuse slices that do not stand straight above each other, and headers that say they were tilted."""
    normal = headers[0].normal
    offsets = positions - positions[0]
    drift = float(np.linalg.norm(offsets - np.outer(offsets @ normal, normal), axis=1).max())
    if drift > DRIFT_TOLERANCE_MM:
        angle = math.degrees(math.atan2(drift, abs(float((positions[-1] - positions[0]) @ normal))))
        raise GeometryError(
            f"slices drift sideways by {drift:.2f} mm over the stack (gantry tilt of about {angle:.1f} degrees?); "
            "expected each straight above the last: reconstruct the series without tilt"
        )
    for header in headers:
        if header.text("GantryDetectorTilt") and abs(header.number("GantryDetectorTilt")) > TILT_TOLERANCE_DEGREES:
            raise GeometryError(
                f"{header.path.name}: GantryDetectorTilt is {header.number('GantryDetectorTilt'):.2f} degrees; "
                "expected slices without tilt: reconstruct the series without tilt"
            )


def _slice_from_header(header: CTHeader) -> CTSlice:
    x, y, z = header.position.tolist()
    return CTSlice(
        path=header.path,
        sop_instance_uid=header.required_text("SOPInstanceUID"),
        sop_class_uid=header.required_text("SOPClassUID"),
        position=(x, y, z),
        pixels=stored_pixels(header),
    )
