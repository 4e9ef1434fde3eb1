"""Contours become masks: our own come back voxel for voxel, and plastimatch reads others' as we do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from scipy import ndimage

from anatomynet.client.contours import Contour, trace_contours
from anatomynet.client.rtstruct import write_rtstruct
from anatomynet.client.structure_set import ON_CONTOUR, Roi, fill_contours, read_structure_set
from anatomynet.client.study import CTSeries, read_ct_series
from anatomynet.engine.errors import StudyError
from anatomynet.engine.metrics import dice
from anatomynet.engine.structures import STRUCTURES
from anatomynet.engine.volume import LabelMap
from tests.dicom_studies import (
    DIRECTIONS,
    change,
    edit,
    masks_by_plastimatch,
    on_grid,
    random_volume,
    words_of_patient,
    write_study,
)

SHAPE = (12, 48, 52)
CATALOGUE = tuple(STRUCTURES.values())
LARGE_VOXELS = 500
LARGE_DSC = 0.99  # with plastimatch, which draws the same polygons by rules of its own at the very border

Points = NDArray[np.float64]


def ragged_labels() -> NDArray[np.uint8]:
    """Holes, islands, single voxels and voxels that touch by corners; two structures reach the image's border."""
    noise = ndimage.gaussian_filter(np.random.default_rng(3).standard_normal((len(CATALOGUE), *SHAPE)), (0, 1, 2, 2))
    labels = np.where(noise.max(axis=0) > 0.07, noise.argmax(axis=0) + 1, 0).astype(np.uint8)
    labels[3:7, 10:30, 10:30], labels[4:6, 14:26, 14:26], labels[4:6, 18:22, 18:22] = 5, 0, 5
    labels[8, 40, 40] = 1
    return labels


@pytest.fixture
def series(tmp_path: Path) -> CTSeries:
    write_study(tmp_path / "study", random_volume(SHAPE))
    return read_ct_series(tmp_path / "study")


def circle(series: CTSeries, k: int, centre: tuple[float, float], radius: float, *, waves: float = 0.0) -> Points:
    """LPS mm (n, 3) of a smooth contour on slice k, radius and centre (x, y) in mm from the slice's first voxel."""
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    reach = radius * (1 + waves * np.cos(3 * angle + k / 3))
    axes = np.array(series.geometry.direction)[:, :2]
    plane = np.column_stack((centre[0] + reach * np.cos(angle), centre[1] + reach * np.sin(angle)))
    points: Points = plane @ axes.T + series.slices[k].position
    return points


def voxel_path(series: CTSeries, k: int, corners: Sequence[tuple[float, float]]) -> Points:
    """LPS mm (n, 3) of continuous indices (x, y) on slice k."""
    axes = np.array(series.geometry.direction)[:, :2] * series.geometry.spacing[:2]
    points: Points = np.array(corners) @ axes.T + series.slices[k].position
    return points


def square(low: float, high: float) -> list[tuple[float, float]]:
    return [(low, low), (high, low), (high, high), (low, high)]


def item(points: Points, kind: str = "CLOSED_PLANAR") -> Dataset:
    contour = Dataset()
    contour.ContourGeometricType = kind
    contour.NumberOfContourPoints = len(points)
    contour.ContourData = [f"{v:.3f}" for v in points.ravel()]
    return contour


def write_rois(path: Path, series: CTSeries, rois: dict[str, list[Dataset]]) -> Path:
    """An RTSTRUCT as a planning system might write it."""
    labels = np.zeros(series.geometry.shape, np.uint8)
    labels[1:3, 4:6, 4:6] = 1
    write_rtstruct(path, series, trace_contours(LabelMap(labels, series.geometry, CATALOGUE)), overwrite=True)
    dataset = pydicom.dcmread(path)
    dataset.StructureSetROISequence, dataset.ROIContourSequence, dataset.RTROIObservationsSequence = [], [], []
    for number, (name, contours) in enumerate(rois.items(), start=1):
        roi, drawn, observed = Dataset(), Dataset(), Dataset()
        change(roi, ROINumber=number, ROIName=name, ReferencedFrameOfReferenceUID=series.frame_of_reference_uid)
        change(drawn, ReferencedROINumber=number, ContourSequence=contours, ROIDisplayColor=[1, 2, 3])
        change(observed, ObservationNumber=number, ReferencedROINumber=number, RTROIInterpretedType="ORGAN")
        dataset.StructureSetROISequence.append(roi)
        dataset.ROIContourSequence.append(drawn)
        dataset.RTROIObservationsSequence.append(observed)
    dataset.save_as(path)
    return path


def read_one(path: Path, series: CTSeries, contours: list[Dataset]) -> Roi:
    return read_structure_set(write_rois(path, series, {"Larynx": contours}), series).rois[0]


@pytest.mark.parametrize("position", DIRECTIONS)
def test_our_own_contours_come_back_voxel_for_voxel(tmp_path: Path, position: str) -> None:
    write_study(tmp_path / "study", random_volume(SHAPE, DIRECTIONS[position]))
    series = read_ct_series(tmp_path / "study")
    labels = ragged_labels()
    write_rtstruct(
        tmp_path / "rs.dcm", series, trace_contours(LabelMap(labels, series.geometry, CATALOGUE)), overwrite=True
    )
    found = read_structure_set(tmp_path / "rs.dcm", series)
    assert found.roi_names == tuple(s.tg263_name for s in CATALOGUE)
    for label, (roi, structure) in enumerate(zip(found.rois, CATALOGUE, strict=True), start=1):
        assert roi.colour == structure.colour
        np.testing.assert_array_equal(roi.mask(series.geometry), labels == label)


def test_plastimatch_reads_others_contours_as_we_do(tmp_path: Path, series: CTSeries) -> None:
    rois = {
        "Parotid_L": [item(circle(series, k, (24.0, 26.0), 8 + k, waves=0.15)) for k in range(2, 10)],
        "Larynx": [item(circle(series, k, (30.0, 20.0), 14 - abs(k - 6))) for k in range(1, 12)],
        "TwoPieces": [item(circle(series, k, (x, 28.0), 9.0, waves=0.1)) for k in range(1, 12) for x in (13.0, 38.0)],
    }
    path = write_rois(tmp_path / "rs.dcm", series, rois)
    theirs = masks_by_plastimatch(path, tmp_path / "study", tmp_path / "masks")
    for roi in read_structure_set(path, series).rois:
        mask, geometry = theirs[roi.name]
        ours = roi.mask(series.geometry)
        assert ours.sum() > LARGE_VOXELS
        assert dice(ours, on_grid(mask, geometry, series.geometry)) >= LARGE_DSC


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 12))
def test_any_polygon_is_filled_by_the_even_odd_rule(seed: int, corners: int) -> None:
    """scikit-image decides for every centre that is not on the contour, also where the contour crosses itself."""
    import skimage.measure

    points_in_poly: Any = skimage.measure.points_in_poly  # its calls are not typed
    points = np.random.default_rng(seed).uniform(-4, 19, (corners, 2))
    start, box = fill_contours([Contour(1, points)], (3, 14, 16))
    ours = np.zeros((3, 14, 16), np.bool_)
    ours[tuple(slice(a, a + n) for a, n in zip(start, box.shape, strict=True))] = box
    assert not ours[[0, 2]].any()
    y, x = np.indices((14, 16))
    centres = np.column_stack((x.ravel(), y.ravel()))
    clear = distance_to_contour(centres, points) > 2 * ON_CONTOUR
    np.testing.assert_array_equal(ours[1].ravel()[clear], points_in_poly(centres, points)[clear])


def distance_to_contour(centres: NDArray[Any], points: Points) -> Points:
    edges = np.roll(points, -1, axis=0) - points
    offset = centres[:, None] - points
    along = ((offset * edges).sum(axis=2) / (edges**2).sum(axis=1)).clip(0, 1)
    distances: Points = np.linalg.norm(offset - along[..., None] * edges, axis=2).min(axis=1)
    return distances


def test_a_contour_inside_another_is_a_hole_and_one_inside_that_an_island(tmp_path: Path, series: CTSeries) -> None:
    contours = [item(voxel_path(series, 4, square(a, b))) for a, b in ((5.5, 25.5), (9.5, 20.5), (12.5, 15.5))]
    roi = read_one(tmp_path / "rs.dcm", series, contours)
    assert int(roi.box.sum()) == 20**2 - 11**2 + 3**2
    xor = [item(voxel_path(series, 4, square(a, b)), "CLOSEDPLANAR_XOR") for a, b in ((5.5, 25.5), (9.5, 20.5))]
    assert int(read_one(tmp_path / "rs.dcm", series, xor).box.sum()) == 20**2 - 11**2


def test_a_keyhole_leaves_its_hole(tmp_path: Path, series: CTSeries) -> None:
    cut_at_a_centre = [(5.5, 5.5), (12, 5.5), (12, 9.5), (9.5, 9.5), (9.5, 20.5), (20.5, 20.5), (20.5, 9.5), (12, 9.5)]
    path = [*cut_at_a_centre, (12, 5.5), (25.5, 5.5), (25.5, 25.5), (5.5, 25.5)]
    roi = read_one(tmp_path / "rs.dcm", series, [item(voxel_path(series, 4, path))])
    assert int(roi.box.sum()) == 20**2 - 11**2


def test_a_contour_that_is_there_twice_counts_once(tmp_path: Path, series: CTSeries) -> None:
    twice = [item(voxel_path(series, 4, square(5.5, 9.5)))] * 2
    assert int(read_one(tmp_path / "rs.dcm", series, twice).box.sum()) == 16


def test_the_same_contour_begun_elsewhere_turned_round_or_closed_twice_counts_once(
    tmp_path: Path, series: CTSeries
) -> None:
    """By the even-odd rule the second would wipe out the first."""
    points = voxel_path(series, 4, square(5.5, 9.5))
    again = (np.roll(points, 1, axis=0), points[::-1], np.vstack((points, points[:1])))
    roi = read_one(tmp_path / "rs.dcm", series, [item(points), *map(item, again)])
    assert int(roi.box.sum()) == 16


@pytest.mark.parametrize(
    ("second", "kept"),
    [
        pytest.param((15.5, 25.5), None, id="crossing"),
        pytest.param((5.51, 19.49), None, id="drawn twice"),
        pytest.param((5.51, 19.51), None, id="drawn twice, moved a little"),
        pytest.param((6.5, 18.5), 14**2 - 12**2, id="a wall of one voxel"),
        pytest.param((19.51, 25.5), 14**2 + 6**2, id="beside it"),
        pytest.param((19.0, 25.0), 14**2 + 7**2 - 1, id="touching"),
    ],
)
def test_contours_of_one_slice_that_overlap_are_refused(
    tmp_path: Path, series: CTSeries, second: tuple[float, float], kept: int | None
) -> None:
    """By the even-odd rule what both hold is outside: a hole is meant so, and what was drawn by two strokes is not."""
    contours = [voxel_path(series, 4, square(5.5, 19.5)), voxel_path(series, 4, square(*second))]
    roi = read_one(tmp_path / "rs.dcm", series, [item(points) for points in contours])
    if kept is None:
        assert roi.problem == "contours of slice 5 overlap, or one is there twice: unite them, and export it again"
        assert not roi.box.size
        xor = read_one(tmp_path / "rs.dcm", series, [item(points, "CLOSEDPLANAR_XOR") for points in contours])
        assert not xor.problem
    else:
        assert (int(roi.box.sum()), roi.problem) == (kept, "")


def test_a_centre_on_the_contour_is_inside(tmp_path: Path, series: CTSeries) -> None:
    """PS3.3 C.8.8.6.3; so masks come back whole from tools that run contours through the centres of border voxels."""
    roi = read_one(tmp_path / "rs.dcm", series, [item(voxel_path(series, 4, square(5, 9)))])
    assert roi.mask(series.geometry)[4, 5:10, 5:10].all()
    assert roi.box.sum() == 5**2


def test_what_lies_outside_the_image_is_cut_off(tmp_path: Path, series: CTSeries) -> None:
    inside = read_one(tmp_path / "rs.dcm", series, [item(voxel_path(series, 4, square(-7.5, 3.5)))])
    assert int(inside.box.sum()) == 4**2
    outside = read_one(tmp_path / "rs.dcm", series, [item(voxel_path(series, 4, square(-9.5, -3.5)))])
    assert not outside.box.any()
    assert outside.problem == "it lies outside this CT"


def test_the_box_holds_no_more_than_the_voxels(tmp_path: Path, series: CTSeries) -> None:
    """A contour that lies between centres reaches a slice, a row or a column, and leaves nothing there."""
    tip = item(voxel_path(series, SHAPE[0] - 1, square(45.3, 45.7)))
    beside = item(voxel_path(series, 4, square(50.2, 50.8)))
    roi = read_one(tmp_path / "rs.dcm", series, [item(voxel_path(series, 4, square(5.5, 9.5))), tip, beside])
    assert (roi.start, roi.box.shape) == ((4, 6, 6), (1, 4, 4))
    assert roi.box.all()
    nothing = read_one(tmp_path / "rs.dcm", series, [tip])
    assert (nothing.box.size, nothing.problem) == (0, "")


def test_contours_may_lie_a_little_off_their_slice(tmp_path: Path, series: CTSeries) -> None:
    points = voxel_path(series, 4, square(5.5, 9.5)) + np.array((0, 0, 0.4))
    near = read_one(tmp_path / "rs.dcm", series, [item(points)])
    assert near.start[0] == 4
    assert near.box.sum() == 16


@pytest.mark.parametrize(
    ("shift_mm", "kind", "problem"),
    [
        ((0, 0, 1.25), "CLOSED_PLANAR", "1 of 2 contours do not lie on a slice"),
        ((0, 0, 900), "CLOSED_PLANAR", "1 of 2 contours do not lie on a slice"),
        ((0, 0, 0), "OPEN_PLANAR", "1 of 2 contours are open"),
        ((0, 0, 0), "OPEN_NONPLANAR", "1 of 2 contours are open"),
        ((0, 0, 0), "", "1 of 2 contours are of no known type"),
    ],
)
def test_an_roi_that_cannot_be_drawn_says_why(
    tmp_path: Path, series: CTSeries, shift_mm: tuple[float, ...], kind: str, problem: str
) -> None:
    points = voxel_path(series, 4, square(5.5, 9.5))
    roi = read_one(tmp_path / "rs.dcm", series, [item(points), item(points + shift_mm, kind)])
    assert problem in roi.problem
    assert not roi.box.size


def test_a_contour_across_the_slices_is_refused(tmp_path: Path, series: CTSeries) -> None:
    points = voxel_path(series, 4, square(5.5, 9.5))
    points[:2, 2] += 5.0
    assert "do not lie on a slice" in read_one(tmp_path / "rs.dcm", series, [item(points)]).problem


def test_points_are_no_contour(tmp_path: Path, series: CTSeries) -> None:
    point = item(voxel_path(series, 4, [(3, 3)]), "POINT")
    closed = item(voxel_path(series, 4, square(5.5, 9.5)))
    assert read_one(tmp_path / "rs.dcm", series, [point]).problem == "1 points, and no contour"
    assert read_one(tmp_path / "rs.dcm", series, [point, closed]).box.sum() == 16


def test_an_empty_roi_has_no_voxel(tmp_path: Path, series: CTSeries) -> None:
    path = write_rois(tmp_path / "rs.dcm", series, {"Larynx": [], "Mandible": []})
    dataset = pydicom.dcmread(path)
    del dataset.ROIContourSequence[0].ContourSequence, dataset.ROIContourSequence[0].ROIDisplayColor
    dataset.save_as(path)
    for roi in read_structure_set(path, series).rois:
        assert (roi.box.size, roi.problem) == (0, "")
        assert not roi.mask(series.geometry).any()


def test_only_the_wanted_rois_are_drawn(tmp_path: Path, series: CTSeries) -> None:
    contour = item(voxel_path(series, 4, square(5.5, 9.5)))
    path = write_rois(tmp_path / "rs.dcm", series, {"Larynx": [contour], "PTV70": [contour]})
    found = read_structure_set(path, series, wanted=lambda name: name != "PTV70")
    assert [roi.name for roi in found.rois] == ["Larynx"]
    assert found.roi_names == ("Larynx", "PTV70")


@pytest.mark.parametrize("place", ["ROI", "file", "nowhere"])
def test_another_frame_of_reference_is_refused(tmp_path: Path, series: CTSeries, place: str) -> None:
    path = write_rois(tmp_path / "rs.dcm", series, {"Larynx": [item(voxel_path(series, 4, square(5.5, 9.5)))]})
    dataset = pydicom.dcmread(path)
    roi, referenced = dataset.StructureSetROISequence[0], dataset.ReferencedFrameOfReferenceSequence[0]
    if place == "ROI":
        roi.ReferencedFrameOfReferenceUID = "1.2.3.4711"
    elif place == "file":
        referenced.FrameOfReferenceUID = "1.2.3.4711"
    else:
        del roi.ReferencedFrameOfReferenceUID, referenced.FrameOfReferenceUID
    dataset.save_as(path)
    with pytest.raises(StudyError, match=r"rs\.dcm was drawn in frame of reference .*export both together") as error:
        read_structure_set(path, series)
    assert not any(word in str(error.value) for word in words_of_patient())


def test_what_is_no_rtstruct_is_refused(tmp_path: Path, series: CTSeries) -> None:
    with pytest.raises(StudyError, match="is a CT Image Storage; expected an RT Structure Set"):
        read_structure_set(series.slices[0].path, series)
    (tmp_path / "text.dcm").write_text("not DICOM")
    with pytest.raises(StudyError, match=r"text\.dcm is no DICOM file"):
        read_structure_set(tmp_path / "text.dcm", series)
    with pytest.raises(StudyError, match=r"none\.dcm cannot be read"):
        read_structure_set(tmp_path / "none.dcm", series)


@pytest.mark.parametrize("values", [["1", "2"], ["x", "2", "3"], ["1", "2", "inf"]])
def test_a_damaged_contour_is_refused(tmp_path: Path, series: CTSeries, values: list[str]) -> None:
    good = item(voxel_path(series, 4, square(5.5, 9.5)))
    path = write_rois(tmp_path / "rs.dcm", series, {"Larynx": [good]})
    text = "\\".join(str(v) for v in good.ContourData)
    broken = "\\".join([*values, *[str(v) for v in good.ContourData][3:]])
    path.write_bytes(path.read_bytes().replace(text.encode(), broken.ljust(len(text)).encode()))
    with pytest.raises(StudyError, match=r"rs\.dcm is damaged"):
        read_structure_set(path, series)


@pytest.mark.parametrize("number", ["ROINumber", "ReferencedROINumber"])
def test_a_number_that_two_rois_have_is_refused(tmp_path: Path, series: CTSeries, number: str) -> None:
    contour = item(voxel_path(series, 4, square(5.5, 9.5)))
    path = write_rois(tmp_path / "rs.dcm", series, {"Larynx": [contour], "Mandible": [contour]})
    dataset = pydicom.dcmread(path)
    part = dataset.StructureSetROISequence if number == "ROINumber" else dataset.ROIContourSequence
    setattr(part[1], number, 1)
    dataset.save_as(path)
    with pytest.raises(StudyError, match=rf"rs\.dcm: two ROIs have {number} 1: which contours are whose"):
        read_structure_set(path, series)


def test_a_file_without_rois_has_none(tmp_path: Path, series: CTSeries) -> None:
    path = write_rois(tmp_path / "rs.dcm", series, {"Larynx": []})
    edit(path, StructureSetROISequence=None)
    with pytest.raises(StudyError, match="damaged"):
        read_structure_set(path, series)
