"""The review page: a CT and its contours as one HTML file that opens offline in any browser.

Last step beside rtstruct.py: what was drawn is looked at before it is used. The file holds the CT reduced in plane,
every structure's mask at full resolution, and the viewer (client/review_page). Nothing in it names the patient unless
a header is given, and its content security policy keeps it from every network.

    CT          turned to the patient's axes -> reduced -> differences along each row -> zlib -> base64
    structures  their boxes, turned alike -> one bit a voxel -> zlib -> base64; the page traces them in all three planes
"""

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anatomynet.client.structure_set import StructureSet
from anatomynet.client.study import CTSeries
from anatomynet.engine.aliases import load_aliases, structure_from_roi_name
from anatomynet.engine.findings import Finding
from anatomynet.engine.geometry import Index, VolumeGeometry
from anatomynet.engine.output import refuse_existing, write_whole
from anatomynet.engine.preprocess import canonical_from_array
from anatomynet.engine.structure_region import StructureRegion, middle_of
from anatomynet.engine.volume import CTVolume, HounsfieldArray

LARGEST_SIDE = 256  # in plane: enough behind contours that are drawn in mm
# Slices are never merged, so a long scan is reduced further in plane: about a byte a voxel, 12 to 18 MB of page.
LARGEST_VOXEL_COUNT = 200 * LARGEST_SIDE**2
HU_RANGE = (-1024, 3071)  # 12 bit
SLICES_PER_BLOCK = 16  # of the CT; the page shows its progress block by block
COMPRESSION_THREADS = 2
# For ROIs without a colour of their own, in turn.
SPARE_COLOURS = ((0, 158, 115), (230, 159, 0), (86, 180, 233), (204, 121, 167), (240, 228, 66), (213, 94, 0))
PAGE = resources.files("anatomynet.client") / "review_page"
SCRIPTS = ("study.js", "planes.js", "pane.js", "page.js")  # in the order in which they need one another


def write_review(
    path: Path,
    volume: CTVolume,
    drawn: Sequence[StructureRegion],
    *,
    reference: Sequence[StructureRegion] = (),
    warnings: Sequence[Finding] = (),
    notes: Sequence[str] = (),
    header: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the review page.

    Args:
        path: of the HTML file.
        volume: the CT; its array may lie in any orientation along the patient's axes.
        drawn: what is reviewed, on the CT's grid.
        reference: what it is compared with, on the same grid; paired by structure, or by name.
        warnings: what the reviewer should look at first.
        notes: sentences shown below the study's size.
        header: what is said of the patient, term -> text; nothing without.
        overwrite: replaces a file that exists.

    Raises:
        GeometryError: an oblique volume.
        OutputError: a file that exists, or cannot be written.
    """
    refuse_existing(path, overwrite=overwrite)
    ct, ct_geometry = reduce_ct(volume)
    turn = _Turn(volume.geometry)
    content = {
        "grid": _grid_json(volume.geometry.canonical()),
        "ct": _grid_json(ct_geometry),
        "structures": [_structure_json(*row, turn) for row in _rows(drawn, reference)],
        "warnings": [
            {"structure": w.name, "text": w.text, "index": w.index and turn.index(w.index)[::-1]} for w in warnings
        ],
        "notes": list(notes),
        "header": dict(header) if header else None,
    }
    write_whole(path, _page_html(content, _packed_blocks(ct)).encode(), overwrite=overwrite)


def regions_from_structure_set(structure_set: StructureSet) -> tuple[tuple[StructureRegion, ...], tuple[Finding, ...]]:
    """The ROIs of a file as regions, and a finding for each that could not be drawn."""
    aliases = load_aliases()
    regions, findings = [], []
    for number, roi in enumerate(structure_set.rois):
        structure = structure_from_roi_name(roi.name, aliases)
        colour = roi.colour or (structure.colour if structure else SPARE_COLOURS[number % len(SPARE_COLOURS)])
        regions.append(StructureRegion(roi.name, colour, roi.start, roi.box, structure))
        if roi.problem:
            findings.append(Finding(roi.name, f"could not be shown: {roi.problem}", None))
    return tuple(regions), tuple(findings)


def patient_header(series: CTSeries) -> dict[str, str]:
    """What a page may say of the patient, for --with-patient-header: name, ID, birth date and the study's date."""
    header = {
        "Patient": " ".join(str(series.header.get("PatientName", "")).replace("^", " ").split()),
        "ID": str(series.header.get("PatientID", "")),
        "Born": _date(str(series.header.get("PatientBirthDate", ""))),
        "Study": _date(str(series.header.get("StudyDate", ""))),
    }
    return {term: text for term, text in header.items() if text}


def _date(text: str) -> str:
    """DICOM's 20240203 -> 2024-02-03 (PS3.5 6.2, DA); other text as it is."""
    return f"{text[:4]}-{text[4:6]}-{text[6:]}" if len(text) == 8 and text.isdigit() else text


def reduce_ct(volume: CTVolume) -> tuple[HounsfieldArray, VolumeGeometry]:
    """The CT turned to the patient's axes and averaged in plane to what a page holds; int16 (z, y, x), 12 bit.

    Raises:
        GeometryError: an oblique volume.
    """
    hu = canonical_from_array(volume.hu, volume.geometry)
    canonical = volume.geometry.canonical()
    depth, height, width = canonical.shape
    limit = max(1, min(LARGEST_SIDE, math.isqrt(LARGEST_VOXEL_COUNT // depth)))
    share = min(1.0, limit / max(height, width))
    rows, columns = (max(1, round(side * share)) for side in (height, width))
    by_row, by_column = _area_weights(height, rows), _area_weights(width, columns).T
    reduced = np.empty((depth, rows, columns), np.int16)
    for target, plane in zip(reduced, hu, strict=True):
        target[:] = np.rint(by_row @ plane.astype(np.float32) @ by_column).clip(*HU_RANGE)
    spacing = (canonical.spacing[0] * width / columns, canonical.spacing[1] * height / rows, canonical.spacing[2])
    return reduced, canonical.resampled(spacing)


class _Turn:
    """From a volume's own array to the patient's axes: boxes and indices, as canonical_from_array turns arrays."""

    def __init__(self, geometry: VolumeGeometry) -> None:
        self.order, self.flips = geometry.canonical_axes()
        self.shape = geometry.canonical().shape
        self.voxel_ml = geometry.voxel_ml
        self._geometry = geometry

    def index(self, index: Index) -> list[int]:
        """(z, y, x) of the own array -> (z, y, x) along the patient's axes."""
        turned = [index[axis] for axis in self.order]
        return [n - 1 - i if flip else i for i, flip, n in zip(turned, self.flips, self.shape, strict=True)]

    def box(self, region: StructureRegion) -> tuple[list[int], NDArray[np.bool_]]:
        """A region's start and box, turned alike."""
        corners = (self.index(region.start), self.index(_last(region)))
        return np.minimum(*corners).tolist(), canonical_from_array(region.box, self._geometry)


def _last(region: StructureRegion) -> Index:
    z, y, x = (np.add(region.start, region.box.shape) - 1).tolist()
    return (z, y, x)


def _area_weights(old: int, new: int) -> NDArray[np.float32]:
    """float32 (new, old): the mean over each of `new` equal stretches of `old` voxels."""
    edges = np.arange(new + 1) * (old / new)
    covered = (edges[:, None] - np.arange(old)).clip(0, 1)
    return (np.diff(covered, axis=0) * (new / old)).astype(np.float32)


def _packed_blocks(ct: HounsfieldArray) -> list[str]:
    """Base64 of zlib of each block of slices: low bytes, then high bytes, of what undoDifferences in study.js reads."""
    blocks = [ct[first : first + SLICES_PER_BLOCK] for first in range(0, len(ct), SLICES_PER_BLOCK)]
    with ThreadPoolExecutor(COMPRESSION_THREADS) as threads:
        return list(threads.map(_packed_block, blocks))


def _packed_block(slices: HounsfieldArray) -> str:
    differences = slices.copy()
    differences[..., 1:] -= slices[..., :-1]
    zigzag = ((differences << 1) ^ (differences >> 15)).view(np.uint16)
    # Differences are noise but for runs of air: matching strings finds nothing more, and takes three times as long.
    packer = zlib.compressobj(strategy=zlib.Z_RLE)
    packed = packer.compress((zigzag & 0xFF).astype(np.uint8).tobytes())
    packed += packer.compress((zigzag >> 8).astype(np.uint8).tobytes()) + packer.flush()
    return base64.b64encode(packed).decode()


def _rows(
    drawn: Sequence[StructureRegion], reference: Sequence[StructureRegion]
) -> Iterator[tuple[StructureRegion, StructureRegion | None, StructureRegion | None]]:
    """What to name, drawn, reference: each drawn region, then the references that nothing was drawn for."""
    left = list(reference)
    for region in drawn:
        partner = next((other for other in left if _same(region, other)), None)
        if partner:
            left.remove(partner)
        yield region, region, partner
    yield from ((other, None, other) for other in left)


def _same(region: StructureRegion, other: StructureRegion) -> bool:
    if region.structure and other.structure:
        return region.structure == other.structure
    return region.name == other.name


def _structure_json(
    named: StructureRegion, drawn: StructureRegion | None, reference: StructureRegion | None, turn: _Turn
) -> dict[str, Any]:
    """One row of the page's list. Boxes, indices and shapes in (x, y, z) order, as everything the page reads."""
    present = [region for region in (drawn, reference) if region and region.voxels]
    middle = middle_of(present[0]) if present else None
    return {
        "name": named.name,
        "colour": "#{:02x}{:02x}{:02x}".format(*named.colour),
        "middle": middle and turn.index(middle)[::-1],
        "drawn": _mask_json(drawn, turn),
        "reference": _mask_json(reference, turn),
        "drawn_ml": drawn and round(drawn.voxels * turn.voxel_ml, 3),
        "reference_ml": reference and round(reference.voxels * turn.voxel_ml, 3),
        "dice": round(_dice(drawn, reference), 3) if drawn and reference and present else None,
        "confidence": drawn and drawn.confidence,
    }


def _mask_json(region: StructureRegion | None, turn: _Turn) -> dict[str, Any] | None:
    if region is None or not region.voxels:
        return None
    start, box = turn.box(region)
    bits = base64.b64encode(zlib.compress(np.packbits(box).tobytes())).decode()
    return {"start": start[::-1], "shape": list(box.shape[::-1]), "bits": bits}


def _dice(first: StructureRegion, second: StructureRegion) -> float:
    """Dice similarity coefficient of two regions of one grid, of which one has a voxel."""
    low = np.maximum(first.start, second.start)
    high = np.minimum(_last(first), _last(second)) + 1
    common = 0
    if (low < high).all():
        common = np.count_nonzero(_part(first, low, high) & _part(second, low, high))
    return 2 * common / (first.voxels + second.voxels)


def _part(region: StructureRegion, low: NDArray[np.intp], high: NDArray[np.intp]) -> NDArray[np.bool_]:
    return region.box[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, region.start, strict=True))]


def _grid_json(geometry: VolumeGeometry) -> dict[str, Any]:
    return {"shape": geometry.shape[::-1], "spacing": geometry.spacing, "origin": geometry.origin}


def _page_html(content: Mapping[str, Any], blocks: Sequence[str]) -> str:
    """The template, filled; scripts and style stand in the policy by their hash, so nothing else can run."""
    style = (PAGE / "page.css").read_text(encoding="utf-8")
    scripts = [(PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS]
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {' '.join(map(_hash, scripts))}"
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")  # no text of a study can end the element
    parts = {
        "policy": policy,
        "style": style,
        "data": f'<script type="application/json" id="review-data">{data}</script>\n'
        + "\n".join(f'<script type="application/octet-stream" class="ct">{block}</script>' for block in blocks),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    page = (PAGE / "page.html").read_text(encoding="utf-8")
    head, *rest = page.split("{{")
    return head + "".join(parts[key] + text for key, text in (piece.split("}}", 1) for piece in rest))


def _hash(source: str) -> str:
    """How a content security policy names one inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
