"""Contours: what a reader that looks at voxel centres draws from them is the label map, voxel for voxel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from scipy import ndimage
from skimage.draw import polygon2mask
from skimage.measure import find_contours, label

from anatomynet.client.contours import Contour, trace_contours
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.structures import STRUCTURES
from anatomynet.engine.volume import LabelMap

CATALOGUE = tuple(STRUCTURES.values())
# A diagonal that cuts a voxel's corner off passes this far from its centre, in voxels: sqrt(1/8).
NEAREST_TO_CENTRE = 0.35
EIGHT_CONNECTED = np.ones((3, 3))

Labels = NDArray[np.uint8]
small_masks = arrays(np.bool_, array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=9), elements=st.booleans())


def label_map(labels: Labels) -> LabelMap:
    depth, height, width = labels.shape
    return LabelMap(labels, VolumeGeometry((depth, height, width), (1.0, 1.0, 1.0)), CATALOGUE)


def contours_of(mask: NDArray[np.bool_]) -> tuple[Contour, ...]:
    found = trace_contours(label_map(mask.astype(np.uint8)))
    return found[0].contours if found else ()


def contours_of_slice(*rows: str) -> list[NDArray[np.float64]]:
    """Contours of one slice drawn in text, # inside."""
    return [c.points for c in contours_of(np.array([[[c == "#" for c in row] for row in rows]]))]


def drawn(contours: tuple[Contour, ...], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """What scikit-image draws; a margin, since it leaves out what it takes for the border."""
    mask = np.zeros(shape, np.bool_)
    for contour in contours:
        padded = polygon2mask((shape[1] + 2, shape[2] + 2), contour.points[:, ::-1] + 1)  # type: ignore[no-untyped-call]
        mask[contour.slice_index] |= padded[1:-1, 1:-1]
    return mask


def signed_area(points: NDArray[np.float64]) -> float:
    x, y = points.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


@given(small_masks)
@settings(max_examples=300, deadline=None)
def test_drawn_at_the_centres_it_is_the_mask_again(mask: NDArray[np.bool_]) -> None:
    np.testing.assert_array_equal(drawn(contours_of(mask), mask.shape), mask)


@given(small_masks)
@settings(max_examples=200, deadline=None)
def test_no_contour_comes_near_a_centre(mask: NDArray[np.bool_]) -> None:
    centres = np.stack(np.meshgrid(np.arange(mask.shape[2]), np.arange(mask.shape[1])), axis=-1).reshape(-1, 2)
    for contour in contours_of(mask):
        start, end = contour.points, np.roll(contour.points, -1, axis=0)
        along = end - start
        share = ((centres[:, None] - start) * along).sum(-1) / (along * along).sum(-1)
        nearest = start + np.clip(share, 0, 1)[..., None] * along
        assert np.linalg.norm(centres[:, None] - nearest, axis=-1).min() > NEAREST_TO_CENTRE


@given(small_masks)
@settings(max_examples=200, deadline=None)
def test_areas_are_those_of_marching_squares(mask: NDArray[np.bool_]) -> None:
    contours = contours_of(mask)
    for z, plane in enumerate(mask):
        padded = np.pad(plane.astype(float), 1)
        theirs = find_contours(padded, 0.5, fully_connected="high", positive_orientation="high")  # type: ignore[no-untyped-call]
        ours = [c.points for c in contours if c.slice_index == z]
        assert sum(map(signed_area, ours)) == pytest.approx(-sum(signed_area(c[:-1, ::-1]) for c in theirs))
        assert len(ours) == label(plane, connectivity=2).max()  # type: ignore[no-untyped-call]


@given(small_masks)
@settings(max_examples=100, deadline=None)
def test_every_point_turns(mask: NDArray[np.bool_]) -> None:
    for contour in contours_of(mask):
        assert contour.points.shape[0] >= 3
        ahead = np.roll(contour.points, -1, axis=0) - contour.points
        behind = np.roll(ahead, 1, axis=0)
        turns = ahead[:, 0] * behind[:, 1] != ahead[:, 1] * behind[:, 0]
        assert (turns | ((ahead * behind).sum(axis=1) < 0)).all()


def test_one_voxel_is_a_diamond() -> None:
    (points,) = contours_of_slice("...", ".#.", "...")
    assert {(x, y) for x, y in points} == {(1, 0.5), (1.5, 1), (1, 1.5), (0.5, 1)}


def test_a_row_runs_half_a_voxel_beside_its_centres() -> None:
    (points,) = contours_of_slice(".......", ".#####.", ".......")
    assert {(x, y) for x, y in points} == {(0.5, 1), (1, 0.5), (5, 0.5), (5.5, 1), (5, 1.5), (1, 1.5)}


def test_a_structure_at_the_border_is_closed_outside_it() -> None:
    (points,) = contours_of_slice("##", "##")
    assert points.min() == -0.5
    assert points.max() == 1.5
    assert signed_area(points) == 4 - 0.5


def test_islands_are_apart_and_voxels_at_a_corner_together() -> None:
    assert len(contours_of_slice("##..##", "##..##")) == 2
    assert len(contours_of_slice("#...", ".#..", "..##")) == 1


def test_a_hole_is_reached_by_a_keyhole() -> None:
    (points,) = contours_of_slice("######", "######", "##..##", "######", "######")
    visits = [tuple(p) for p in points]
    cut = {p for p in visits if visits.count(p) == 2}
    assert len(cut) == 2, "one way in, the same way out"
    (a, b) = cut
    assert a[0] == b[0]
    assert a[0] % 1 == 0.5
    assert signed_area(points) == (30 - 0.5) - (2 + 0.5 - 1)


def test_an_island_in_a_hole_is_a_contour_of_its_own() -> None:
    rows = ["#######", "#.....#", "#.###.#", "#.#.#.#", "#.###.#", "#.....#", "#######"]
    assert len(contours_of_slice(*rows)) == 2


def test_structures_keep_their_order_and_their_slices() -> None:
    labels = np.zeros((4, 6, 6), np.uint8)
    labels[1:3, 1:3, 1:3], labels[2:4, 4, 4] = 5, 2
    found = trace_contours(label_map(labels))
    assert [f.structure for f in found] == [CATALOGUE[1], CATALOGUE[4]]
    assert [[c.slice_index for c in f.contours] for f in found] == [[2, 3], [1, 2]]
    assert found[0].geometry.shape == labels.shape


def test_nothing_found_is_nothing() -> None:
    assert trace_contours(label_map(np.zeros((3, 4, 5), np.uint8))) == ()


@given(arrays(np.uint8, array_shapes(min_dims=3, max_dims=3, max_side=9), elements=st.integers(0, 3)), st.floats(0, 2))
@settings(max_examples=100, deadline=None)
def test_a_structure_among_others_is_outlined_as_alone(labels: Labels, tolerance_mm: float) -> None:
    together = trace_contours(label_map(labels), tolerance_mm=tolerance_mm)
    assert [f.structure for f in together] == [CATALOGUE[i - 1] for i in np.unique(labels) if i]
    for found in together:
        label = CATALOGUE.index(found.structure) + 1
        (alone,) = trace_contours(label_map(np.where(labels == label, labels, 0)), tolerance_mm=tolerance_mm)
        assert [c.slice_index for c in found.contours] == [c.slice_index for c in alone.contours]
        for one, other in zip(found.contours, alone.contours, strict=True):
            np.testing.assert_array_equal(one.points, other.points)


def test_a_contour_begins_at_its_highest_point_and_runs_clockwise() -> None:
    (points,) = contours_of_slice("...#", ".###", "....")
    assert points.tolist() == [[3, -0.5], [3.5, 0], [3.5, 1], [3, 1.5], [1, 1.5], [0.5, 1], [1, 0.5], [2, 0.5]]


def test_organs_with_neighbours_and_holes_come_back_whole() -> None:
    generator = np.random.default_rng(1808)
    fields = [ndimage.gaussian_filter(generator.normal(size=(12, 80, 90)), (1, 3, 3)) for _ in range(4)]
    labels = np.argmax([np.full_like(fields[0], 0.02), *fields], axis=0).astype(np.uint8)
    for found in trace_contours(label_map(labels)):
        mask = labels == CATALOGUE.index(found.structure) + 1
        np.testing.assert_array_equal(drawn(found.contours, mask.shape), mask)
