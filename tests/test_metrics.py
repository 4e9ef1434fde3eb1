"""Measures: DeepMind's surface-distance and SimpleITK find the same; small cases are counted by hand."""

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from anatomynet.engine.errors import GeometryError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.metrics import (
    SURFACE_TOLERANCES_MM,
    Agreement,
    added_path_length_mm,
    compare_label_maps,
    compare_masks,
    diagonal_mm,
    dice,
    surface_areas_mm2,
)
from anatomynet.engine.structures import STRUCTURES, structures_by_name
from anatomynet.engine.volume import LabelMap

SPACING = (0.9, 1.1, 2.5)
GEOMETRY = VolumeGeometry((30, 60, 50), SPACING)
ROUNDING = 1e-9

Mask = NDArray[np.bool_]


def blob(seed: int, shape: tuple[int, int, int] = GEOMETRY.shape) -> Mask:
    """A ragged structure of several pieces with holes, some at the image's border."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 3)
    found: Mask = noise > np.quantile(noise, 0.9)
    return found


def surface_distance() -> Any:
    if int(np.__version__.split(".")[0]) >= 2:
        pytest.skip("surface-distance 0.1 needs numpy 1")
    return pytest.importorskip("surface_distance.metrics")


def judged_by_deepmind(prediction: Mask, reference: Mask, tolerance_mm: float) -> tuple[float, float, float]:
    """Surface DSC, HD95 and the mean over both surfaces."""
    judge = surface_distance()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of scipy's old module names, in that package
        found = judge.compute_surface_distances(reference, prediction, SPACING[::-1])
    there, back = found["surfel_areas_gt"], found["surfel_areas_pred"]
    moved = (found["distances_gt_to_pred"] * there).sum() + (found["distances_pred_to_gt"] * back).sum()
    return (
        judge.compute_surface_dice_at_tolerance(found, tolerance_mm),
        judge.compute_robust_hausdorff(found, 95),
        moved / (there.sum() + back.sum()),
    )


@pytest.mark.parametrize("tolerance_mm", [1.01, 2.5, 2.85])
@pytest.mark.parametrize("seed", range(4))
def test_deepmind_finds_the_same(seed: int, tolerance_mm: float) -> None:
    reference, prediction = blob(seed), np.roll(blob(seed), 2, axis=1) | blob(seed + 10)
    ours = compare_masks(prediction, reference, GEOMETRY, structure="Larynx", tolerance_mm=tolerance_mm)
    theirs = judged_by_deepmind(prediction, reference, tolerance_mm)
    assert (ours.surface_dice, ours.hd95_mm, ours.mean_surface_distance_mm) == pytest.approx(theirs, abs=ROUNDING)


def test_every_surface_element_has_deepmind_s_area() -> None:
    surface_distance()
    from surface_distance import lookup_tables

    theirs = lookup_tables.create_table_neighbour_code_to_surface_area(SPACING[::-1])
    ours = surface_areas_mm2(*SPACING[::-1])
    for code in range(256):
        corners = np.array([code >> bit & 1 for bit in range(8)]).reshape(2, 2, 2)
        same = int((corners * lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL).sum())
        assert ours[code] == pytest.approx(theirs[same], abs=ROUNDING)


@pytest.mark.parametrize("seed", range(3))
def test_simpleitk_finds_the_same_overlap_and_volumes(seed: int) -> None:
    import SimpleITK

    sitk: Any = SimpleITK  # its calls are not typed
    reference, prediction = blob(seed), blob(seed + 20) | np.roll(blob(seed), 1, axis=2)
    ours = compare_masks(prediction, reference, GEOMETRY, structure="Larynx")
    images: list[Any] = [sitk.GetImageFromArray(mask.astype(np.uint8)) for mask in (prediction, reference)]
    volumes = []
    for image in images:
        image.SetSpacing(SPACING)
        shape = sitk.LabelShapeStatisticsImageFilter()
        shape.Execute(image)
        volumes.append(shape.GetPhysicalSize(1) / 1000)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(images[1], images[0])
    assert ours.dice == pytest.approx(overlap.GetDiceCoefficient(), abs=ROUNDING)
    assert (ours.prediction_ml, ours.reference_ml) == pytest.approx(volumes, abs=ROUNDING)


def test_a_shifted_slab_by_hand() -> None:
    """A slab through the whole image in plane, 4 slices of 2 mm, shifted by one: both faces lie 2 mm apart."""
    geometry = VolumeGeometry((12, 30, 30), (1.0, 1.0, 2.0))
    reference, prediction = np.zeros((2, 12, 30, 30), np.bool_)
    reference[4:8], prediction[5:9] = True, True
    at_two = compare_masks(prediction, reference, geometry, structure="Larynx", tolerance_mm=2.0)
    below = compare_masks(prediction, reference, geometry, structure="Larynx", tolerance_mm=1.99)
    assert at_two.dice == 2 * 3 / (4 + 4)
    assert at_two.hd95_mm == 2.0
    # A distance of just the tolerance is within it; below, the faces no longer agree: two thirds of the surface.
    assert at_two.surface_dice == 1.0
    assert 0.2 < below.surface_dice < 0.4
    assert at_two.prediction_ml == 4 * 30 * 30 * 2.0 / 1000


def test_a_cube_s_surface_by_hand() -> None:
    """One voxel: its eight corners cut off, marching cubes leave an octahedron of 8 x 0.2165 = sqrt(3) mm2."""
    assert surface_areas_mm2(1.0, 1.0, 1.0)[1] * 8 == pytest.approx(np.sqrt(3), abs=ROUNDING)
    assert surface_areas_mm2(2.0, 1.0, 3.0)[0b00001111] == 3.0  # a face across z: y times x
    assert surface_areas_mm2(2.0, 1.0, 3.0)[0b00110011] == 6.0  # across y: z times x
    assert surface_areas_mm2(2.0, 1.0, 3.0)[0b01010101] == 2.0  # across x: z times y


def test_added_path_length_by_hand() -> None:
    """A square of 5 x 5 has 16 border pixels; of a square one pixel to the right, 8 of them are border pixels too."""
    reference, prediction = np.zeros((2, 1, 9, 9), np.bool_)
    reference[0, 2:7, 2:7], prediction[0, 2:7, 3:8] = True, True
    nothing = np.zeros_like(reference)
    assert added_path_length_mm(prediction, reference, (0.5, 0.5, 3.0)) == 8 * 0.5
    assert added_path_length_mm(nothing, reference, (0.5, 0.5, 3.0)) == 16 * 0.5
    assert added_path_length_mm(prediction, nothing, (0.5, 0.5, 3.0)) == 0
    assert added_path_length_mm(reference, reference, (0.5, 0.5, 3.0)) == 0


def test_path_length_counts_the_border_of_a_mask_at_the_edge_of_the_image() -> None:
    whole = np.ones((2, 4, 5), np.bool_)
    assert added_path_length_mm(np.zeros_like(whole), whole, (1.0, 1.0, 1.0)) == 2 * (4 * 5 - 2 * 3)


EMPTY, FULL = np.zeros(GEOMETRY.shape, np.bool_), blob(0)
# How far the farthest corners of the image lie apart: 30 x 2.5, 60 x 1.1 and 50 x 0.9 mm.
DIAGONAL_MM = float(np.sqrt(75.0**2 + 66.0**2 + 45.0**2))


@pytest.mark.parametrize(
    ("prediction", "reference", "outcome", "overlap", "distance"),
    [
        (EMPTY, FULL, "missed", 0.0, DIAGONAL_MM),
        (FULL, EMPTY, "invented", 0.0, DIAGONAL_MM),
        (EMPTY, EMPTY, "absent", 1.0, 0.0),
        (FULL, FULL, "found", 1.0, 0.0),
    ],
)
def test_a_miss_is_the_worst_score(
    prediction: Mask, reference: Mask, outcome: str, overlap: float, distance: float
) -> None:
    agreement = compare_masks(prediction, reference, GEOMETRY, structure="Parotid_L")
    assert agreement.outcome == outcome
    assert (agreement.dice, agreement.surface_dice) == (overlap, overlap)
    assert (agreement.hd95_mm, agreement.mean_surface_distance_mm) == pytest.approx((distance, distance))
    assert diagonal_mm(GEOMETRY) == pytest.approx(DIAGONAL_MM)


def test_dice_of_empty_masks() -> None:
    assert dice(EMPTY, EMPTY) == 1.0
    assert dice(EMPTY, FULL) == 0.0


def test_the_place_in_the_image_makes_no_difference() -> None:
    """In the corner, where the image's border cuts the box, as in the middle."""
    small, other = blob(3, (8, 9, 10)), blob(4, (8, 9, 10))
    found: list[Agreement] = []
    for corner in itertools.product((0, 5, 12), repeat=3):
        geometry = VolumeGeometry((20, 21, 22), SPACING)
        masks = np.zeros((2, *geometry.shape), np.bool_)
        box = tuple(slice(a, a + n) for a, n in zip(corner, small.shape, strict=True))
        masks[0][box], masks[1][box] = small, other
        found.append(compare_masks(masks[0], masks[1], geometry, structure="Larynx"))
    assert all(agreement == found[0] for agreement in found)


def label_map(labels: NDArray[np.uint8], names: tuple[str, ...], spacing: tuple[float, float, float]) -> LabelMap:
    depth, height, width = labels.shape
    return LabelMap(labels, VolumeGeometry((depth, height, width), spacing), structures_by_name(names))


def test_label_maps_are_compared_by_name() -> None:
    labels = np.zeros((6, 12, 12), np.uint8)
    labels[1:3, 2:6, 2:6], labels[3:5, 6:11, 6:11] = 1, 2
    reference = label_map(labels, ("BrainStem", "Larynx"), SPACING)
    prediction = label_map(np.where(labels == 2, 1, 0).astype(np.uint8), ("Larynx", "Mandible", "BrainStem"), SPACING)
    found = {a.structure: a.outcome for a in compare_label_maps(prediction, reference)}
    assert found == {"BrainStem": "missed", "Larynx": "found"}


def test_other_grids_are_refused() -> None:
    labels = np.zeros((6, 12, 12), np.uint8)
    one, other = (label_map(labels, ("Larynx",), (1.0, 1.0, z)) for z in (2.0, 2.5))
    with pytest.raises(GeometryError, match=r"one grid.*2\.5"):
        compare_label_maps(one, other)
    with pytest.raises(GeometryError, match="Larynx"):
        compare_masks(EMPTY, EMPTY[:-1], GEOMETRY, structure="Larynx")


def test_every_structure_has_a_tolerance() -> None:
    assert SURFACE_TOLERANCES_MM.keys() == STRUCTURES.keys()
