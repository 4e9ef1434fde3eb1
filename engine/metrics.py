"""How well a contour agrees with a physician's. A miss is the worst score, never dropped from a mean.

Where only one of the two has the structure, DSC and surface DSC are 0 and the distances the image's diagonal; where
neither has it, they agree: 1, 1 and 0 mm.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.errors import GeometryError
from anatomynet.engine.geometry import Index, Point, VolumeGeometry
from anatomynet.engine.volume import LabelMap

Mask = NDArray[np.bool_]
Outcome = Literal["found", "missed", "invented", "absent"]

# Surface DSC tolerances of Nikolov et al., "Clinically applicable segmentation of head and neck anatomy for
# radiotherapy" (J Med Internet Res 2021;23:e26151): how far two observers' contours of one organ lay apart. mm.
NIKOLOV_TOLERANCES_MM = {
    "BrainStem": 2.5,
    "Mandible": 1.01,
    "OpticNerve_L": 2.5,
    "OpticNerve_R": 2.5,
    "Parotid_L": 2.85,
    "Parotid_R": 2.85,
    "SpinalCord": 2.93,
    "Submandibular_L": 2.02,
    "Submandibular_R": 2.02,
}
# None is published for these: the optic nerve's for the chiasm, a common slice spacing for the others.
OWN_TOLERANCES_MM = {"Chiasm": 2.5, "Esophagus": 3.0, "Larynx": 3.0}
SURFACE_TOLERANCES_MM = NIKOLOV_TOLERANCES_MM | OWN_TOLERANCES_MM

ROBUST_SHARE = 0.95  # of the surface that HD95 looks at

# Marching cubes (Lorensen and Cline 1987) half-way between 2 x 2 x 2 voxels: one code for each way to fill them, up to
# turning, mirroring and exchanging inside and outside. Bit 4 z + 2 y + x is set where inside; of each triangle of the
# surface, the areas of its shadows across z, y and x, in eighths of the face of a voxel.
TRIANGLES: dict[int, tuple[Index, ...]] = {
    0b00000000: (),
    0b00000001: ((1, 1, 1),),
    0b00000011: ((2, 2, 0), (2, 2, 0)),
    0b00000110: ((1, 1, 1), (1, 1, 1)),
    0b00000111: ((1, 1, 1), (2, 2, 2), (4, 0, 0)),
    0b00001111: ((4, 0, 0), (4, 0, 0)),
    0b00010110: ((1, 1, 1), (1, 1, 1), (1, 1, 1)),
    0b00010111: ((1, 1, 1), (1, 1, 1), (2, 2, 2), (2, 2, 2)),
    0b00011000: ((1, 1, 1), (1, 1, 1)),
    0b00011001: ((1, 1, 1), (0, 2, 2), (0, 2, 2)),
    0b00011011: ((1, 1, 1), (3, 3, 3), (0, 2, 2), (2, 0, 2)),
    0b00011110: ((1, 1, 1), (1, 1, 1), (2, 2, 2), (4, 0, 0)),
    0b00111100: ((2, 2, 0), (2, 2, 0), (2, 2, 0), (2, 2, 0)),
    0b01101001: ((1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
}


@dataclass(frozen=True)
class Agreement:
    """How a prediction and a reference agree on one structure.

    Attributes:
        structure: its name.
        outcome: "found" where both have it, "missed" where only the reference has, "invented" where only the prediction
            has, "absent" where neither has.
        dice: Dice similarity coefficient, 0 to 1.
        surface_dice: share of both surfaces that lies within `tolerance_mm` of the other, 0 to 1.
        tolerance_mm: of the surface DSC.
        hd95_mm: the 95th percentile of the distances from one surface to the other, the worse direction.
        mean_surface_distance_mm: mean of the distances from either surface to the other.
        added_path_length_mm: see `added_path_length_mm`.
        prediction_ml, reference_ml: volumes.
    """

    structure: str
    outcome: Outcome
    dice: float
    surface_dice: float
    tolerance_mm: float
    hd95_mm: float
    mean_surface_distance_mm: float
    added_path_length_mm: float
    prediction_ml: float
    reference_ml: float


def compare_label_maps(prediction: LabelMap, reference: LabelMap) -> tuple[Agreement, ...]:
    """The agreement on every structure that both label maps know, in the reference's order.

    Raises:
        GeometryError: label maps on different grids.
    """
    check_same_grid(prediction.geometry, reference.geometry)
    agreements = []
    for label, structure in enumerate(reference.structures, start=1):
        if structure in prediction.structures:
            drawn = prediction.labels == prediction.structures.index(structure) + 1
            truth = reference.labels == label
            agreements.append(compare_masks(drawn, truth, reference.geometry, structure=structure.name))
    return tuple(agreements)


def compare_masks(
    prediction: Mask, reference: Mask, geometry: VolumeGeometry, *, structure: str, tolerance_mm: float | None = None
) -> Agreement:
    """The agreement of two masks (z, y, x) of one grid; computed on the box that holds both.

    Args:
        prediction: of the network.
        reference: of the physician.
        geometry: of both.
        structure: its name; gives the surface DSC's tolerance.
        tolerance_mm: instead of the structure's own.

    Raises:
        GeometryError: masks of another shape than the geometry's.
    """
    if prediction.shape != geometry.shape or reference.shape != geometry.shape:
        raise GeometryError(
            f"{structure}: expected masks of {geometry.shape} (z, y, x), found {prediction.shape} and {reference.shape}"
        )
    tolerance = SURFACE_TOLERANCES_MM[structure] if tolerance_mm is None else tolerance_mm
    box = common_box(prediction, reference)
    drawn, truth = np.pad(prediction[box], 1), np.pad(reference[box], 1)
    outcome = _outcome(has_prediction=bool(drawn.any()), has_reference=bool(truth.any()))
    surface_dice, hd95, mean = _surface_measures(drawn, truth, geometry, tolerance=tolerance, outcome=outcome)
    voxel_ml = geometry.voxel_ml
    return Agreement(
        structure=structure,
        outcome=outcome,
        dice=dice(drawn, truth),
        surface_dice=surface_dice,
        tolerance_mm=tolerance,
        hd95_mm=hd95,
        mean_surface_distance_mm=mean,
        added_path_length_mm=added_path_length_mm(drawn, truth, geometry.spacing),
        prediction_ml=int(drawn.sum()) * voxel_ml,
        reference_ml=int(truth.sum()) * voxel_ml,
    )


def dice(prediction: Mask, truth: Mask) -> float:
    """Dice similarity coefficient of two masks of one shape; 1.0 where both are empty, 0.0 where one is."""
    total = int(prediction.sum()) + int(truth.sum())
    return 1.0 if total == 0 else 2 * int((prediction & truth).sum()) / total


def added_path_length_mm(prediction: Mask, reference: Mask, spacing: Point) -> float:
    """How much of the physician's contours would have to be drawn anew, slice by slice; 0 for an empty reference.

    Border pixels of the reference that are no border pixels of the prediction, times the pixel's side (the mean of its
    two sides); a border pixel has one of its four neighbours in the slice outside. Tolerance 0, as in Vaassen et al.,
    "Evaluation of measures for assessing time-saving of automatic organ-at-risk segmentation in radiotherapy" (Phys
    Imaging Radiat Oncol 2020;13:1-6): contours that shift by one pixel are added whole.

    Args:
        prediction: (z, y, x).
        reference: (z, y, x).
        spacing: mm (x, y, z).
    """
    added = _slice_borders(reference) & ~_slice_borders(prediction)
    return int(added.sum()) * (spacing[0] + spacing[1]) / 2


def diagonal_mm(geometry: VolumeGeometry) -> float:
    """From one outer corner of the image to the opposite one: the distance of a miss."""
    return float(np.linalg.norm(np.multiply(geometry.shape[::-1], geometry.spacing)))


def check_same_grid(first: VolumeGeometry, second: VolumeGeometry) -> None:
    """Raises GeometryError unless two grids have the same voxels in the same places."""
    if not first.is_same_grid(second):
        raise GeometryError(
            f"expected two label maps on one grid, found {first.shape} (z, y, x) of {first.spacing} mm at "
            f"{first.origin} and {second.shape} of {second.spacing} mm at {second.origin}"
        )


def common_box(first: Mask, second: Mask) -> tuple[slice, slice, slice]:
    """The smallest box (z, y, x) that holds both masks; of no voxel where both are empty."""
    slices = np.flatnonzero([a.any() or b.any() for a, b in zip(first, second, strict=True)])
    if not slices.size:
        return slice(0, 0), slice(0, 0), slice(0, 0)
    z = slice(int(slices[0]), int(slices[-1]) + 1)
    plane = first[z].any(axis=0) | second[z].any(axis=0)
    y, x = (np.flatnonzero(plane.any(axis=axis)) for axis in (1, 0))
    return z, slice(int(y[0]), int(y[-1]) + 1), slice(int(x[0]), int(x[-1]) + 1)


def _outcome(*, has_prediction: bool, has_reference: bool) -> Outcome:
    if has_reference:
        return "found" if has_prediction else "missed"
    return "invented" if has_prediction else "absent"


def _surface_measures(
    prediction: Mask, reference: Mask, geometry: VolumeGeometry, *, tolerance: float, outcome: Outcome
) -> tuple[float, float, float]:
    """Surface DSC, HD95 and mean surface distance of two masks with an empty border."""
    if outcome == "absent":
        return 1.0, 0.0, 0.0
    if outcome != "found":
        return 0.0, diagonal_mm(geometry), diagonal_mm(geometry)
    spacing_zyx = geometry.spacing[::-1]
    places, areas = zip(*(_surface(mask, spacing_zyx) for mask in (prediction, reference)), strict=True)
    distances = (_distances(places[0], places[1], spacing_zyx), _distances(places[1], places[0], spacing_zyx))
    area = areas[0].sum() + areas[1].sum()
    close = sum(float(a[d <= tolerance].sum()) for d, a in zip(distances, areas, strict=True))
    mean = sum(float(d @ a) for d, a in zip(distances, areas, strict=True)) / area
    return close / area, max(map(_robust_largest, distances, areas)), mean


def _surface(mask: Mask, spacing_zyx: Sequence[float]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Where 2 x 2 x 2 voxels are partly inside, index (n, 3) of the first of them, and the surface's mm2 there."""
    inside = mask.view(np.uint8)
    depth, height, width = (side - 1 for side in mask.shape)
    code = np.zeros((depth, height, width), np.uint8)
    for z, y, x in itertools.product((0, 1), repeat=3):
        code |= inside[z : z + depth, y : y + height, x : x + width] << np.uint8(4 * z + 2 * y + x)
    places = np.argwhere((code != 0) & (code != 0xFF))
    return places, surface_areas_mm2(*spacing_zyx)[code[tuple(places.T)]]


@cache
def surface_areas_mm2(z: float, y: float, x: float) -> NDArray[np.float64]:
    """mm2 of the surface in each of the 256 ways to fill 2 x 2 x 2 voxels of these sides."""
    areas = np.zeros(256)
    for code, triangles in TRIANGLES.items():
        corners = np.array([code >> bit & 1 for bit in range(8)]).reshape(2, 2, 2)
        for order in itertools.permutations(range(3)):
            shadows = np.array(triangles).reshape(-1, 3)[:, order] / 8 * (y * x, z * x, z * y)
            area = np.linalg.norm(shadows, axis=1).sum()
            for flips in itertools.product((1, -1), repeat=3):
                turned = corners.transpose(order)[:: flips[0], :: flips[1], :: flips[2]].ravel()
                same = int(turned @ (1 << np.arange(8)))
                areas[same] = areas[0xFF - same] = area
    return areas


def _distances(places: NDArray[np.intp], others: NDArray[np.intp], spacing_zyx: Sequence[float]) -> NDArray[np.float64]:
    """mm from each place to the nearest of the others."""
    from scipy.spatial import cKDTree

    _, nearest = cKDTree(others * spacing_zyx).query(places * spacing_zyx)
    # Again from whole indices, so that a distance of two slices is two slices when a tolerance is compared with it.
    distances: NDArray[np.float64] = np.sqrt((((others[nearest] - places) * spacing_zyx) ** 2).sum(axis=1))
    return distances


def _robust_largest(distances: NDArray[np.float64], areas: NDArray[np.float64]) -> float:
    """The distance within which ROBUST_SHARE of the area lies."""
    order = np.argsort(distances)
    share = np.cumsum(areas[order]) / areas.sum()
    return float(distances[order][min(int(np.searchsorted(share, ROBUST_SHARE)), len(order) - 1)])


def _slice_borders(mask: Mask) -> Mask:
    """Pixels of (z, y, x) with one of their four neighbours in the slice outside; beyond the edge is outside."""
    inner = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    core: Mask = inner[:, :-2, 1:-1] & inner[:, 2:, 1:-1] & inner[:, 1:-1, :-2] & inner[:, 1:-1, 2:]
    borders: Mask = mask & ~core
    return borders
