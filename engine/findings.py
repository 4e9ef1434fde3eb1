"""Findings: what a reviewer should look at first. Rules on the CT and on what was drawn, wherever it was drawn.

The ranges are those of engine/configs/usual_ranges.toml, which benchmarks/usual_ranges.py derives from training
cases. A rule that would often speak without need stays silent: a warning must be worth a look.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.geometry import CUBIC_MM_PER_ML, Index, VolumeGeometry
from anatomynet.engine.postprocess import STRAY_SHARE
from anatomynet.engine.preprocess import BODY_HU
from anatomynet.engine.runs import pieces_of
from anatomynet.engine.structure_region import StructureRegion, middle_of
from anatomynet.engine.structures import STRUCTURES, Structure
from anatomynet.engine.volume import CTVolume

METAL_HU = 2800  # above dense enamel; fillings and implants saturate the scale at 3071
METAL_REACH_MM = 30.0  # around the structures; metal elsewhere is the couch or a mask's buttons
LOW_CONFIDENCE = 0.6  # mean top probability along the border
MIDLINE_MM = 10.0  # an organ of one side may reach across the midline by so much
SMALLEST_PIECE_ML = 0.1
STRAY_ML = 1.0  # left out in all; less happens to good contours too
# No patient's organ is so often larger or smaller than what is usual, however it was contoured.
IMPOSSIBLE_FACTOR = 5.0
# Of organs that no patient here has contours of: anatomy's size, ten times beyond it either way.
IMPOSSIBLE_ML = {
    **dict.fromkeys(("Chiasm", "OpticNerve_L", "OpticNerve_R"), (0.03, 8.0)),
    **dict.fromkeys(("Submandibular_L", "Submandibular_R"), (0.5, 80.0)),
}
# In the median of a structure that is no bone: OpenKBP's reach 110; values stored without their offset begin at 900.
DENSEST_SOFT_TISSUE_HU = 700
BONES = ("Mandible",)
LARGEST_AIR_SHARE = 0.5  # of a structure; an airway fills less of the larynx and the oesophagus
# They run out of every head-and-neck scan towards the feet.
THROUGH_THE_NECK = ("SpinalCord", "Esophagus")
PATIENT_FACES = (("feet", "head"), ("front", "back"), ("right", "left"))  # of the patient, for z, y, x


@dataclass(frozen=True)
class Finding:
    """One thing to look at.

    Attributes:
        name: of the structure, as shown to the user; None for the scan as a whole.
        text: what was found and what was expected, one line.
        index: the voxel (z, y, x) to look at; None where there is no place.
    """

    name: str | None
    text: str
    index: Index | None


def find_warnings(
    volume: CTVolume, regions: Sequence[StructureRegion], *, expected: Sequence[Structure] = ()
) -> tuple[Finding, ...]:
    """What deserves a look, the gravest first; empty where nothing does.

    Regions that are none of our structures are passed over: what a target volume should look like, no rule knows.

    Args:
        volume: the CT, in any orientation along the patient's axes.
        regions: what was drawn on it.
        expected: structures that should be there, besides those in `regions` that have no voxel.

    Raises:
        GeometryError: an oblique volume.
    """
    known = [region for region in regions if region.structure]
    present = {region.structure.name: region for region in known if region.structure and region.voxels}
    findings = [*_no_air(volume), *_exchanged_sides(present, volume), *_missing(known, present, expected)]
    for name, region in present.items():
        findings += _cut_off(name, region, volume.geometry)
        findings += _several_pieces(region, volume.geometry)
        findings += _unusual_size(name, region, volume.geometry)
        findings += _low_confidence(region)
        findings += _strays(region)
    findings += _asymmetry(present)
    findings += _metal(volume, list(present.values()))
    findings += _unusual_scan(volume.geometry)
    return tuple(findings)


def find_contradictions(volume: CTVolume, regions: Sequence[StructureRegion]) -> tuple[Finding, ...]:
    """What cannot be true of any patient, so that nothing may be learnt from it; empty where nothing is.

    A CT without air, sides that are exchanged, a structure in air, soft tissue as dense as bone, a size beyond belief.

    Args:
        volume: the CT, in any orientation along the patient's axes.
        regions: what was drawn on it, by a person.

    Raises:
        GeometryError: an oblique volume.
    """
    present = {region.structure.name: region for region in regions if region.structure and region.voxels}
    findings = [*_no_air(volume), *_exchanged_sides(present, volume)]
    for name, region in present.items():
        findings += _unusual_size(name, region, volume.geometry, factor=IMPOSSIBLE_FACTOR)
        findings += _impossible_size(name, region, volume.geometry)
        box = tuple(slice(a, a + n) for a, n in zip(region.start, region.box.shape, strict=True))
        hu = volume.hu[box][region.box]
        if name not in BONES and (median := float(np.median(hu))) > DENSEST_SOFT_TISSUE_HU:
            text = f"{median:.0f} HU in the median: expected soft tissue; is the CT in Hounsfield units?"
            findings.append(Finding(region.name, text, middle_of(region)))
        air = float((hu < BODY_HU).mean())
        if air > LARGEST_AIR_SHARE:
            text = f"{air:.0%} of it lies in air: it was drawn on another CT, or elsewhere"
            findings.append(Finding(region.name, text, middle_of(region)))
    return tuple(findings)


def judge_contours(volume: CTVolume, regions: Sequence[StructureRegion]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of contours to learn from, a line each: what forbids it, and what deserves a look; both empty where all is well.

    Args:
        volume: the CT, in any orientation along the patient's axes.
        regions: what was drawn on it, by a person.

    Raises:
        GeometryError: an oblique volume.
    """
    wrong = tuple(
        f"{finding.name}: {finding.text}" if finding.name else finding.text
        for finding in find_contradictions(volume, regions)
    )
    # What has no name is of the scan: a network is shown it at a spacing of its own.
    odd = (f"{finding.name}: {finding.text}" for finding in find_warnings(volume, regions) if finding.name)
    return wrong, tuple(line for line in odd if line not in wrong)


def _no_air(volume: CTVolume) -> Iterator[Finding]:
    """A CT that was scaled or windowed, or that holds nothing: air is in every patient's airways, and around most."""
    if not any(pixels.min() <= BODY_HU for pixels in volume.hu):  # the first slice tells, mostly
        least = int(volume.hu.min())
        yield Finding(None, f"no air in the CT, its least value is {least}: is it in Hounsfield units?", None)


def _exchanged_sides(present: Mapping[str, StructureRegion], volume: CTVolume) -> Iterator[Finding]:
    """An organ of one side beyond its partner or, without it, beyond the organs of the middle or the body's middle."""
    geometry = volume.geometry
    middles = [_left_mm(region, geometry) for name, region in present.items() if not STRUCTURES[name].mirror]
    for name, region in present.items():
        mirror = STRUCTURES[name].mirror
        if mirror and mirror in present:
            partner = present[mirror]
            if name.endswith("_L") and _left_mm(region, geometry) < _left_mm(partner, geometry):
                text = f"lies to the patient's right of {partner.name}: left and right are exchanged"
                yield Finding(region.name, text, middle_of(region))
        elif mirror:
            wrong = "right" if name.endswith("_L") else "left"
            middle = float(np.median(middles)) if middles else _middle_of_body_mm(volume, region)
            leftwards = _left_mm(region, geometry) - middle
            if (leftwards if wrong == "left" else -leftwards) > MIDLINE_MM:
                yield Finding(region.name, f"lies on the patient's {wrong}: the side is exchanged", middle_of(region))


def _middle_of_body_mm(volume: CTVolume, region: StructureRegion) -> float:
    """LPS x that halves the body in the region's slices; the region's own where all is air there."""
    (along, _, across), _ = volume.geometry.canonical_axes()
    slices = [slice(None)] * 3
    slices[along] = slice(region.start[along], region.start[along] + region.box.shape[along])
    body = np.count_nonzero(volume.hu[tuple(slices)] > BODY_HU, axis=tuple(a for a in range(3) if a != across))
    if not body.any():
        return _left_mm(region, volume.geometry)
    index = np.zeros(3)
    index[across] = np.searchsorted(np.cumsum(body), body.sum() / 2)
    return float(volume.geometry.points_from_indices(index[::-1])[0])


def _left_mm(region: StructureRegion, geometry: VolumeGeometry) -> float:
    """LPS x of the region's centre of mass."""
    centre = region.runs.centre() + region.start
    return float(geometry.points_from_indices(centre[::-1])[0])


def _missing(
    known: Sequence[StructureRegion], present: Mapping[str, StructureRegion], expected: Sequence[Structure]
) -> Iterator[Finding]:
    empty = {region.structure.name: region.name for region in known if region.structure and not region.voxels}
    wanted = empty | {s.name: s.tg263_name for s in expected if s.name not in present and s.name not in empty}
    for name in wanted:
        yield Finding(wanted[name], "not found on this CT", None)
    for name, region in present.items():
        mirror = STRUCTURES[name].mirror
        if mirror and mirror not in present and mirror not in wanted:
            yield Finding(STRUCTURES[mirror].tg263_name, f"not drawn, though {region.name} is", middle_of(region))


def _cut_off(name: str, region: StructureRegion, geometry: VolumeGeometry) -> Iterator[Finding]:
    """A structure that reaches an outer face of the scan."""
    order, flips = geometry.canonical_axes()
    for axis, flip, (low, high) in zip(order, flips, PATIENT_FACES, strict=True):
        ends = ((0, high if flip else low), (geometry.shape[axis] - 1, low if flip else high))
        for last, face in ends:
            edge = last - region.start[axis]
            if not 0 <= edge < region.box.shape[axis] or (face == "feet" and name in THROUGH_THE_NECK):
                continue
            z, y, x = (np.argwhere(region.box.take([edge], axis)).mean(axis=0).astype(int) + region.start).tolist()
            index = tuple(last if a == axis else i for a, i in enumerate((z, y, x)))
            text = f"reaches the end of the scan towards the {face}: the rest of it may be missing"
            yield Finding(region.name, text, (index[0], index[1], index[2]))


def _several_pieces(region: StructureRegion, geometry: VolumeGeometry) -> Iterator[Finding]:
    piece = pieces_of(region.runs)
    sizes = np.bincount(piece, weights=region.runs.length).astype(np.int64)
    least = max(STRAY_SHARE * sizes.max(), SMALLEST_PIECE_ML / geometry.voxel_ml)
    large = np.flatnonzero(sizes >= least)
    if len(large) > 1:
        second = large[np.argsort(sizes[large])[-2]]
        z, y, x = (region.runs.places[:, np.argmax(piece == second)] + region.start).tolist()
        volume_ml = sizes[second] * geometry.voxel_ml
        text = f"in {len(large)} pieces, one of them {volume_ml:.1f} ml: expected one"
        yield Finding(region.name, text, (z, y, x))


def _unusual_size(
    name: str, region: StructureRegion, geometry: VolumeGeometry, *, factor: float = 1.0
) -> Iterator[Finding]:
    """Volume outside its range by a factor; the mean cross-section where the length depends on the scan."""
    ranges = usual_ranges()
    if name in ranges["volume_ml"]:
        size, unit, what = region.voxels * geometry.voxel_ml, "ml", ""
        low, high = ranges["volume_ml"][name]
    elif name in ranges["cross_section_mm2"]:
        order, _ = geometry.canonical_axes()
        slices = int(region.box.any(axis=tuple(a for a in range(3) if a != order[0])).sum())
        length_mm = slices * geometry.spacing[2 - order[0]]
        size, unit, what = region.voxels * geometry.voxel_ml * CUBIC_MM_PER_ML / length_mm, "mm²", " in cross-section"
        low, high = ranges["cross_section_mm2"][name]
    else:
        return
    if not low / factor <= size <= high * factor:
        kind = "small" if size < low else "large"
        how = f"{'unusually' if factor == 1 else 'impossibly'} {kind}"
        text = f"{how}: {float(f'{size:.3g}'):g} {unit}{what}, expected {low:g} to {high:g}"
        yield Finding(region.name, text, middle_of(region))


def _asymmetry(present: Mapping[str, StructureRegion]) -> Iterator[Finding]:
    for name, limit in usual_ranges()["largest_ratio"].items():
        left, right = present.get(name), present.get(STRUCTURES[name].mirror or "")
        if not left or not right:
            continue
        larger, smaller = sorted((left, right), key=lambda region: region.voxels, reverse=True)
        ratio = larger.voxels / smaller.voxels
        if ratio > limit:
            text = f"{ratio:.1f} times as large as {smaller.name}: expected at most {limit:g} times"
            yield Finding(larger.name, text, middle_of(larger))


def _impossible_size(name: str, region: StructureRegion, geometry: VolumeGeometry) -> Iterator[Finding]:
    """Of an organ whose usual size no patient here has told."""
    low, high = IMPOSSIBLE_ML.get(name, (0.0, np.inf))
    size = region.voxels * geometry.voxel_ml
    if not low <= size <= high:
        kind = "small" if size < low else "large"
        text = f"impossibly {kind}: {size:.3g} ml, expected {low:g} to {high:g}"
        yield Finding(region.name, text, middle_of(region))


def _low_confidence(region: StructureRegion) -> Iterator[Finding]:
    if region.confidence is not None and region.confidence < LOW_CONFIDENCE:
        text = f"border confidence {region.confidence:.2f}, expected {LOW_CONFIDENCE:g} or more: its border is a guess"
        yield Finding(region.name, text, middle_of(region))


def _strays(region: StructureRegion) -> Iterator[Finding]:
    if region.stray_ml >= STRAY_ML:
        text = f"{region.stray_ml:.1f} ml in small pieces apart from it were left out: the network was unsure here"
        yield Finding(region.name, text, middle_of(region))


def metal_near(volume: CTVolume, present: Sequence[StructureRegion]) -> NDArray[np.int64]:
    """The voxels (n, 3), indices z, y, x, of metal around regions that have voxels; streaks run along their slices."""
    starts = np.array([region.start for region in present])
    stops = starts + [region.box.shape for region in present]
    reach = np.ceil(METAL_REACH_MM / np.array(volume.geometry.spacing[::-1])).astype(int)
    low = np.maximum(starts.min(axis=0) - reach, 0)
    high = np.minimum(stops.max(axis=0) + reach, volume.geometry.shape)
    near = volume.hu[tuple(map(slice, low, high))]
    z, y = np.nonzero(near.max(axis=2) >= METAL_HU)  # of few rows; the others are not looked at again
    row, x = np.nonzero(near[z, y] >= METAL_HU)
    places: NDArray[np.int64] = np.stack((z[row], y[row], x), axis=1) + low
    return places


def _metal(volume: CTVolume, present: Sequence[StructureRegion]) -> Iterator[Finding]:
    """More of it than most patients have, and whose slices it lies in."""
    places = metal_near(volume, present) if present else np.empty((0, 3), np.int64)
    volume_ml = len(places) * volume.geometry.voxel_ml
    if volume_ml <= usual_ranges()["most_metal_ml"]:
        return
    axis = volume.geometry.canonical_axes()[0][0]
    slices = np.unique(places[:, axis])
    extents = ((r.name, r.start[axis], r.start[axis] + r.box.shape[axis]) for r in present)
    touched = [name for name, first, stop in extents if _any_in(slices, first, stop)]
    z, y, x = places[len(places) // 2].tolist()
    whose = f"the borders of {', '.join(touched)}" if touched else "borders"
    yield Finding(None, f"metal, {volume_ml:.1f} ml in {len(slices)} slices: streaks may hide {whose}", (z, y, x))


def _any_in(values: Any, first: int, stop: int) -> bool:
    return bool(((values >= first) & (values < stop)).any())


def _unusual_scan(geometry: VolumeGeometry) -> Iterator[Finding]:
    canonical = geometry.canonical()
    pixel, slice_distance = max(canonical.spacing[:2]), canonical.spacing[2]
    width = canonical.shape[2] * canonical.spacing[0]
    length = canonical.shape[0] * slice_distance
    measured = {
        "voxels in plane": pixel,
        "slice distance": slice_distance,
        "field of view": width,
        "length of the scan": length,
    }
    for what, (low, high) in usual_ranges()["scan_mm"].items():
        value = measured[what]
        if not low <= value <= high:
            yield Finding(None, f"{what} {value:.3g} mm: contours were learned on {low:g} to {high:g} mm", None)


@cache
def usual_ranges() -> dict[str, Any]:
    """What usual_ranges.toml holds: most_metal_ml; scan_mm, what -> low, high; volume_ml and cross_section_mm2,
    structure -> low, high; largest_ratio, left of a pair -> how often the larger side may hold the smaller.
    """
    text = (resources.files("anatomynet.engine") / "configs" / "usual_ranges.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
