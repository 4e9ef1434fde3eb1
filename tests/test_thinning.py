"""Thinned contours: never farther from the full ones than the tolerance, and the same in their topology."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from skimage.measure import euler_number

from anatomynet.client.contours import Contour, exact_tolerance_mm, trace_contours
from anatomynet.client.rtstruct import write_rtstruct
from anatomynet.client.study import read_ct_series
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.metrics import dice
from anatomynet.engine.structures import STRUCTURES
from anatomynet.engine.volume import LabelMap
from tests.dicom_studies import masks_by_plastimatch, on_grid, random_volume, write_study
from tests.test_contours import drawn

CATALOGUE = tuple(STRUCTURES.values())
SPACING = (0.9, 1.1, 2.5)
ROUNDING_MM = 1e-9
SAMPLES_PER_EDGE = 7
LEAST_DSC, LEAST_VOXELS = 0.999, 500

Points = NDArray[np.float64]
Mask = NDArray[np.bool_]
small_masks = arrays(np.bool_, array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=12), elements=st.booleans())
tolerances = st.floats(0.01, 3)


def traced(mask: Mask, tolerance_mm: float) -> tuple[Contour, ...]:
    depth, height, width = mask.shape
    geometry = VolumeGeometry((depth, height, width), SPACING)
    found = trace_contours(LabelMap(mask.astype(np.uint8), geometry, CATALOGUE), tolerance_mm=tolerance_mm)
    return found[0].contours if found else ()


def edges_in_mm(contour: Contour) -> tuple[Points, Points]:
    points = contour.points * SPACING[:2]
    return points, np.roll(points, -1, axis=0)


def largest_distance(one: Contour, other: Contour) -> float:
    """From any place on a contour, corners and between, to the nearest on the other, in mm."""
    start, end = edges_in_mm(one)
    share = np.linspace(0, 1, SAMPLES_PER_EDGE)[:, None, None]
    places = (start + share * (end - start)).reshape(-1, 1, 2)
    a, b = edges_in_mm(other)
    along = b - a
    nearest = (((places - a) * along).sum(-1) / (along**2).sum(-1)).clip(0, 1)
    return float(np.linalg.norm(places - a - nearest[..., None] * along, axis=-1).min(axis=1).max())


def proper_crossings(contours: list[Contour]) -> int:
    """Pairs of edges, of all contours of a slice, that pass through each other."""
    ends = [edges_in_mm(c) for c in contours]
    start, end = (np.concatenate(parts) for parts in zip(*ends, strict=True))

    def side(p: Points, q: Points, r: Points) -> Points:
        cross: Points = (q - p)[..., 0] * (r - p)[..., 1] - (q - p)[..., 1] * (r - p)[..., 0]
        return np.where(np.abs(cross) < ROUNDING_MM, 0, cross)

    p, q = start[:, None], end[:, None]
    apart = (side(p, q, start[None]) * side(p, q, end[None])) < 0
    return int((apart & apart.T).sum()) // 2


def by_slice(contours: tuple[Contour, ...]) -> dict[int, list[Contour]]:
    return {z: [c for c in contours if c.slice_index == z] for z in {c.slice_index for c in contours}}


@given(small_masks, tolerances)
@settings(max_examples=150, deadline=None)
def test_no_place_lies_farther_off_than_the_tolerance(mask: Mask, tolerance_mm: float) -> None:
    full, thinned = traced(mask, 0), traced(mask, tolerance_mm)
    assert [c.slice_index for c in full] == [c.slice_index for c in thinned]
    for one, other in zip(full, thinned, strict=True):
        assert largest_distance(one, other) <= tolerance_mm + ROUNDING_MM
        assert largest_distance(other, one) <= tolerance_mm + ROUNDING_MM


@given(small_masks, tolerances)
@settings(max_examples=150, deadline=None)
def test_contours_keep_apart_and_have_an_area(mask: Mask, tolerance_mm: float) -> None:
    for contours in by_slice(traced(mask, tolerance_mm)).values():
        assert min(len(c.points) for c in contours) >= 3
        assert proper_crossings(contours) == 0


@given(small_masks)
@settings(max_examples=200, deadline=None)
def test_at_the_default_every_centre_keeps_its_side(mask: Mask) -> None:
    depth, height, width = mask.shape
    tolerance_mm = exact_tolerance_mm(VolumeGeometry((depth, height, width), SPACING))
    contours = traced(mask, tolerance_mm)
    np.testing.assert_array_equal(drawn(contours, mask.shape), mask)
    for same_slice in by_slice(contours).values():
        assert proper_crossings(same_slice) == 0


@given(small_masks, tolerances)
@settings(max_examples=100, deadline=None)
def test_keyholes_stay_cuts_of_no_width(mask: Mask, tolerance_mm: float) -> None:
    """As many edges there and back as there are holes, which scikit-image counts."""
    contours = traced(mask, tolerance_mm)
    for z, plane in enumerate(mask):
        pieces = [c.points for c in contours if c.slice_index == z]
        edges = [frozenset(map(tuple, edge)) for p in pieces for edge in pairwise([*p.tolist(), p[0].tolist()])]
        holes = len(pieces) - euler_number(np.pad(plane, 1), connectivity=2)  # type: ignore[no-untyped-call]
        assert len(edges) - len(set(edges)) == holes


@pytest.mark.parametrize("share", [0.05, 0.35, 0.6, 2])
def test_a_larger_tolerance_leaves_fewer_points(share: float) -> None:
    y, x = np.indices((64, 64)) - 31.7
    disc = (x**2 + y**2 < 27**2)[None]
    counts = [len(traced(disc, tolerance)[0].points) for tolerance in (0, share * 0.9, 2 * share * 0.9)]
    assert counts == sorted(counts, reverse=True)
    assert share < 0.35 or counts[1] < counts[0]


def test_plastimatch_reads_every_structure_as_it_was(tmp_path: Path) -> None:
    shape = (9, 96, 100)
    write_study(tmp_path / "study", random_volume(shape))
    series = read_ct_series(tmp_path / "study")
    z, y, x = np.indices(shape)
    labels = np.zeros(shape, np.uint8)
    labels[((x - 30.3) / 22) ** 2 + ((y - 40.2) / 30) ** 2 + ((z - 4) / 4.2) ** 2 < 1] = 1
    labels[((x - 33.3) / 9) ** 2 + ((y - 47.2) / 11) ** 2 + ((z - 4) / 3) ** 2 < 1] = 0  # a hole
    labels[np.hypot(x - 75.1, y - 30.4 - 3 * z) < 7.3] = 2
    label_map = LabelMap(labels, series.geometry, CATALOGUE)
    contours = trace_contours(label_map, tolerance_mm=exact_tolerance_mm(series.geometry))
    assert sum(len(c.points) for f in contours for c in f.contours) < sum(
        len(c.points) for f in trace_contours(label_map) for c in f.contours
    )
    write_rtstruct(tmp_path / "rs.dcm", series, contours)
    masks = masks_by_plastimatch(tmp_path / "rs.dcm", tmp_path / "study", tmp_path / "masks")
    for label, structure in enumerate(CATALOGUE[:2], start=1):
        assert np.count_nonzero(labels == label) > LEAST_VOXELS
        found = on_grid(*masks[structure.tg263_name], series.geometry)
        assert dice(found, labels == label) >= LEAST_DSC
