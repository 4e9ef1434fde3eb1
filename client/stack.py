"""Headers of one series -> the grid that their slices make, or the reason why they make none.

Contours are placed on this grid: whatever could move one by more than a fraction of a millimetre is refused.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from anatomynet.client.headers import CTHeader, uid_tail
from anatomynet.engine.errors import GeometryError, StudyError
from anatomynet.engine.geometry import VolumeGeometry

# How far a slice may lie from its place on the even grid: positions are often written with one decimal.
SPACING_TOLERANCE_MM = 0.1
# Less than this along the normal is the same position: no scanner reconstructs so finely.
SAME_POSITION_MM = 0.02
# How far slices may drift sideways over the whole stack; a gantry tilt of 1 degree drifts 0.05 mm a slice.
DRIFT_TOLERANCE_MM = 0.1
TILT_TOLERANCE_DEGREES = 0.05
# Of orientation cosines, and of pixel spacing in mm: 0.05 mm at the far corner of 512 x 512.
HEADER_TOLERANCE = 1e-4
LISTED_PLACES = 3


def sorted_slices(headers: list[CTHeader]) -> tuple[list[CTHeader], VolumeGeometry]:
    """The slices along their normal, row direction x column direction, and the grid they make.

    Args:
        headers: two or more, of one series, without its localizers.

    Raises:
        StudyError: a tag that is missing, a slice that is there twice.
        GeometryError: slices that differ in what they must share, gaps, uneven spacing, tilt, an oblique stack.
    """
    _check_uniform(headers)
    _check_copies(headers)
    normal = headers[0].normal
    headers = sorted(headers, key=lambda h: (float(h.position @ normal), h.path, h.frame))
    _check_even_spacing(headers)
    _check_upright(headers)
    geometry = _geometry_from_sorted(headers)
    geometry.canonical_axes()  # refuses an oblique stack
    return headers, geometry


def _geometry_from_sorted(headers: list[CTHeader]) -> VolumeGeometry:
    first, last = headers[0], headers[-1]
    row_spacing, column_spacing = first.numbers("PixelSpacing", 2)
    slice_spacing = float((last.position - first.position) @ first.normal) / (len(headers) - 1)
    cosines = first.numbers("ImageOrientationPatient", 6)
    (a, b, c), (d, e, f), (g, h, i) = np.column_stack([cosines[:3], cosines[3:], first.normal]).tolist()
    x, y, z = first.position.tolist()
    return VolumeGeometry(
        shape=(len(headers), first.word("Rows"), first.word("Columns")),
        spacing=(column_spacing, row_spacing, slice_spacing),
        origin=(x, y, z),
        direction=((a, b, c), (d, e, f), (g, h, i)),
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
                f"slices of one series differ in {keyword}{values} ({headers[0].name} and {header.name}); "
                "export each as a series of its own"
            )


def _in_words(value: float | tuple[float, ...]) -> str:
    return " \\ ".join(f"{v:g}" for v in (value if isinstance(value, tuple) else (value,)))


def _check_copies(headers: list[CTHeader]) -> None:
    first_with: dict[tuple[str, int], CTHeader] = {}
    for header in headers:
        other = first_with.setdefault((header.required_text("SOPInstanceUID"), header.frame), header)
        if other is not header:
            raise StudyError(
                f"one slice is there twice: {other.name} and {header.name} carry the same SOPInstanceUID "
                f"{uid_tail(header.text('SOPInstanceUID'))}; remove the copies"
            )


def _check_even_spacing(headers: list[CTHeader]) -> None:
    along = np.array([h.position @ headers[0].normal for h in headers])
    gaps = np.diff(along)
    same = np.flatnonzero(gaps < SAME_POSITION_MM)
    if same.size:
        acquisitions = len({h.text("AcquisitionNumber") for h in headers})
        raise GeometryError(
            f"slices share a position{f' ({acquisitions} acquisitions in one series)' if acquisitions > 1 else ''}: "
            f"{_places(headers, same)}; expected one slice at each: export each acquisition as a series of its own"
        )
    if np.abs(along - np.linspace(along[0], along[-1], along.size)).max() <= SPACING_TOLERANCE_MM:
        return
    usual = float(np.median(gaps))
    off = np.abs(gaps - usual)
    uneven = np.flatnonzero(off > min(SPACING_TOLERANCE_MM, off.max() / 2))
    steps = np.rint(gaps / usual)
    if (np.abs(gaps - steps * usual) <= SPACING_TOLERANCE_MM).all() and steps.sum() > gaps.size:
        problem = f"missing slices, {int(steps.sum()) - gaps.size} in all"
    else:
        problem = f"uneven spacing, {gaps.min():.4g} to {gaps.max():.4g} mm"
    raise GeometryError(
        f"{problem}: {_places(headers, uneven)}; expected one every {usual:.4g} mm: export the whole series again"
    )


def _places(headers: list[CTHeader], gaps: Iterable[int]) -> str:
    """Which slices these gaps follow, in words; the first few."""
    axis = int(np.abs(headers[0].normal).argmax())
    listed = [
        f"between {'xyz'[axis]} = {headers[i].position[axis]:.2f} ({headers[i].name}) "
        f"and {headers[i + 1].position[axis]:.2f} ({headers[i + 1].name})"
        for i in gaps
    ]
    more = f" and at {len(listed) - LISTED_PLACES} more places" if len(listed) > LISTED_PLACES else ""
    return ", ".join(listed[:LISTED_PLACES]) + more


def _check_upright(headers: list[CTHeader]) -> None:
    """Refuse slices that do not stand straight above each other, and headers that say they were tilted."""
    normal = headers[0].normal
    offsets = np.array([h.position for h in headers]) - headers[0].position
    along = offsets @ normal
    drift = float(np.linalg.norm(offsets - np.outer(along, normal), axis=1).max())
    if drift > DRIFT_TOLERANCE_MM:
        angle = math.degrees(math.atan2(drift, along[-1]))
        raise GeometryError(
            f"slices drift sideways by {drift:.2f} mm over the stack (gantry tilt of about {angle:.1f} degrees?); "
            "expected each straight above the last: reconstruct the series without tilt"
        )
    for header in headers:
        if header.text("GantryDetectorTilt") and abs(header.number("GantryDetectorTilt")) > TILT_TOLERANCE_DEGREES:
            raise GeometryError(
                f"{header.name}: GantryDetectorTilt is {header.number('GantryDetectorTilt'):.2f} degrees; "
                "expected slices without tilt: reconstruct the series without tilt"
            )
