"""A label lands on the voxels it belongs to, in whatever orientation and at whatever spacing the study comes.

The runtimes here are whole ones, but draw by Hounsfield units instead of by a network, so that the truth is known.
"""

from dataclasses import dataclass, replace
from itertools import permutations, product

import numpy as np
import pytest
from numpy.typing import NDArray

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import GeometryError, ModelError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.segment import draw_reduced, segment
from anatomynet.engine.volume import CTVolume, HounsfieldArray, LabelArray, LabelMap

AIR, TISSUE, BRIGHT = -1000, 0, 300
MODEL = ModelConfig(
    "test", ("BrainStem", "Parotid_L", "Parotid_R"), 1, (1.0, 1.0, 2.0), (2.0, 2.0, 3.0), (-250.0, 550.0)
)
STEM, LEFT, RIGHT = 1, 2, 3
LEAST_DICE = 0.96  # of balls of 12 to 17 mm radius, drawn on voxels of 2 or 3 mm
LARGEST_SHIFT = 0.15  # mm, of their middle
ORIENTATIONS = [
    np.eye(3)[:, order] * signs for order in permutations(range(3)) for signs in product((1.0, -1.0), repeat=3)
]


def overlap(drawn: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """DSC."""
    return float(2 * (drawn & truth).sum() / (drawn.sum() + truth.sum()))


@dataclass
class Thresholds:
    """Draws what is bright: BrainStem above the middle slice, a parotid below, its side by where it lies."""

    model: ModelConfig = MODEL
    description: str = "thresholds"

    def infer(self, hu: HounsfieldArray) -> tuple[LabelArray, NDArray[np.float32]]:
        grid = np.indices(hu.shape)
        z, x = grid[0], grid[2]
        to_the_left = x > x[hu > AIR / 2].mean()
        to_the_head = z > z[hu > AIR / 2].mean()
        labels = np.where(to_the_head, STEM, np.where(to_the_left, LEFT, RIGHT)) * (hu > (TISSUE + BRIGHT) / 2)
        present = np.bincount(labels.ravel(), minlength=4)[1:] > 0
        return labels.astype(np.uint8), present.astype(np.float32)


@dataclass
class Answer:
    """Answers every question alike."""

    labels: NDArray[np.generic]
    confidence: tuple[float, ...]
    model: ModelConfig = MODEL
    description: str = "an answer"

    def infer(self, hu: HounsfieldArray) -> tuple[LabelArray, NDArray[np.float32]]:
        return self.labels, np.array(self.confidence, np.float32)  # type: ignore[return-value]  # wrong on purpose


def patient(
    direction: NDArray[np.float64], spacing: tuple[float, float, float], size: float
) -> tuple[CTVolume, LabelArray]:
    """A patient of `size` mm around LPS (7, -5, 40), in the array axes of `direction`, and what must be drawn.

    Organs: one ball to the patient's left and below, one to the right and below, smaller and more to the back,
    one in the midline, to the head and the front. Every mirrored patient is another one.
    """
    centre = np.array([7.0, -5.0, 40.0])
    along = np.abs(direction.T @ [1.3, 1.1, 1.2]) * size  # mm of each index axis; no two alike
    x, y, z = (int(side) for side in np.ceil(along / spacing))
    first = centre - direction @ ((np.array([x, y, z]) - 1) / 2 * spacing)
    row_x, row_y, row_z = (tuple(row) for row in direction.tolist())
    geometry = VolumeGeometry((z, y, x), spacing, (first[0], first[1], first[2]), (row_x, row_y, row_z))
    index_z, index_y, index_x = np.indices(geometry.shape)
    place = geometry.points_from_indices(np.stack((index_x, index_y, index_z), axis=-1)) - centre

    hu = np.where(np.abs(place).max(axis=-1) < 0.45 * size, TISSUE, AIR).astype(np.int16)
    truth = np.zeros(geometry.shape, np.uint8)
    for label, offset, radius in (
        (LEFT, (0.2, -0.1, -0.2), 0.15),
        (RIGHT, (-0.25, 0.15, -0.2), 0.12),
        (STEM, (0.0, -0.2, 0.2), 0.17),
    ):
        truth[np.linalg.norm(place / size - offset, axis=-1) <= radius] = label
    hu[truth > 0] = BRIGHT
    return CTVolume(hu, geometry), truth


def middle(mask: NDArray[np.bool_], geometry: VolumeGeometry) -> NDArray[np.float64]:
    """LPS mm."""
    return geometry.points_from_indices([side.mean() for side in np.nonzero(mask)[::-1]])


@pytest.mark.parametrize("direction", ORIENTATIONS)
def test_left_is_left_in_every_orientation(direction: NDArray[np.float64]) -> None:
    volume, truth = patient(direction, (1.5, 1.5, 2.0) if direction[2, 2] else (2.0, 2.0, 2.0), 40.0)
    label_map = segment(volume, Thresholds())
    assert isinstance(label_map, LabelMap)
    assert label_map.geometry == volume.geometry
    assert np.array_equal(label_map.labels, truth)
    assert label_map.labels.flags.c_contiguous
    assert label_map.notes == ()
    # The same by millimetres: the patient's left is where LPS x grows.
    z, y, x = np.nonzero(label_map.labels == LEFT)
    assert volume.geometry.points_from_indices(np.stack((x, y, z), axis=-1))[:, 0].min() > 7.0


@pytest.mark.parametrize("spacing", [(0.75, 0.75, 1.25), (2.6, 2.6, 2.6), (1.0, 1.0, 5.0)])
@pytest.mark.parametrize("direction", [ORIENTATIONS[0], ORIENTATIONS[22], ORIENTATIONS[45]])
def test_a_resampled_study_is_drawn_on_its_own_grid(
    direction: NDArray[np.float64], spacing: tuple[float, float, float]
) -> None:
    volume, truth = patient(direction, spacing, 100.0)
    label_map = segment(volume, Thresholds())
    assert label_map.geometry == volume.geometry
    for label in (STEM, LEFT, RIGHT):
        drawn = label_map.labels == label
        assert overlap(drawn, truth == label) >= LEAST_DICE
        shift = middle(drawn, volume.geometry) - middle(truth == label, volume.geometry)
        assert np.abs(shift).max() <= LARGEST_SHIFT
    assert len(label_map.notes) == 1
    assert "resampled" in label_map.notes[0]


def test_structures_and_confidence_are_the_models() -> None:
    volume, _ = patient(ORIENTATIONS[0], (1.5, 1.5, 2.0), 40.0)
    label_map = segment(volume, Thresholds())
    assert [structure.name for structure in label_map.structures] == list(MODEL.structures)
    assert label_map.confidence == (1.0, 1.0, 1.0)


def test_a_structure_that_resampling_loses_has_no_confidence() -> None:
    # One voxel of the network's finer slices, too little for a voxel of the study.
    volume = CTVolume(np.zeros((20, 20, 20), np.int16), VolumeGeometry((20, 20, 20), (1.5, 1.5, 6.0)))
    labels = np.zeros((40, 20, 20), np.uint8)
    labels[20:30, 5:15, 5:15] = STEM
    labels[4, 4, 4] = LEFT
    label_map = segment(volume, Answer(labels, (0.9, 0.8, 0.0)))
    assert not (label_map.labels == LEFT).any()
    assert label_map.confidence == pytest.approx((0.9, 0.0, 0.0))


def test_nothing_found_is_an_empty_map() -> None:
    volume = CTVolume(np.zeros((16, 16, 16), np.int16), VolumeGeometry((16, 16, 16), (1.5, 1.5, 2.0)))
    label_map = segment(volume, Thresholds())
    assert not label_map.labels.any()
    assert label_map.confidence == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("labels", "confidence"),
    [
        (np.zeros((16, 16, 15), np.uint8), (0.0, 0.0, 0.0)),
        (np.full((16, 16, 16), 4, np.uint8), (0.0, 0.0, 0.0)),
        (np.zeros((16, 16, 16), np.int64), (0.0, 0.0, 0.0)),
        (np.zeros((16, 16, 16), np.uint8), (0.0, 0.0)),
        (np.zeros((0, 0, 0), np.uint8), (0.0, 0.0, 0.0)),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(labels: NDArray[np.generic], confidence: tuple[float, ...]) -> None:
    volume = CTVolume(np.zeros((16, 16, 16), np.int16), VolumeGeometry((16, 16, 16), (1.5, 1.5, 2.0)))
    with pytest.raises(ModelError, match="expected"):
        segment(volume, Answer(labels, confidence))


def test_oblique_and_too_small_volumes_are_refused() -> None:
    tilted = VolumeGeometry(
        (16, 16, 16), (1.5, 1.5, 2.0), direction=((0.8, -0.6, 0.0), (0.6, 0.8, 0.0), (0.0, 0.0, 1.0))
    )
    with pytest.raises(GeometryError, match="oblique"):
        segment(CTVolume(np.zeros((16, 16, 16), np.int16), tilted), Thresholds())
    small = CTVolume(np.zeros((16, 16, 16), np.int16), VolumeGeometry((16, 16, 16), (1.5, 1.5, 2.0)))
    with pytest.raises(GeometryError, match="expected at least"):
        segment(small, Thresholds(replace(MODEL, in_plane_stride=4)))


def test_strays_are_left_out_and_counted() -> None:
    geometry = VolumeGeometry((16, 32, 32), (1.5, 1.5, 2.5))
    labels = np.zeros(geometry.shape, np.uint8)
    labels[4:8, 8:16, 8:16] = STEM
    labels[12, 28, 28:30] = STEM
    drawn = segment(CTVolume(np.full(geometry.shape, TISSUE, np.int16), geometry), Answer(labels, (1.0, 0.0, 0.0)))
    assert np.count_nonzero(drawn.labels == STEM) == 4 * 8 * 8
    assert drawn.stray_ml == pytest.approx((2 * 1.5 * 1.5 * 2.5 / 1000, 0, 0))


@dataclass
class Bright:
    """Draws what is above 300 HU as the first structure, voxel by voxel."""

    model: ModelConfig
    description: str = "bright"

    def infer(self, hu: HounsfieldArray) -> tuple[LabelArray, NDArray[np.float32]]:
        labels = (hu > 300).astype(np.uint8)
        return labels, np.eye(1, len(self.model.structures), dtype=np.float32)[0]


@pytest.mark.parametrize("stride", [1, 4])
def test_a_drawing_lands_voxel_for_voxel_on_the_reduced_grid(stride: int) -> None:
    geometry = VolumeGeometry((10, 20, 24), (4.0, 4.4, 2.5), (-40.0, 12.0, 300.0))
    x, y, z = geometry.spacing
    spacing = (x / stride, y / stride, z)
    model = replace(MODEL, in_plane_stride=stride, smallest_spacing=spacing, largest_spacing=spacing)
    hu = np.zeros(geometry.shape, np.int16)
    hu[3:6, 5:9, 12:20] = 400
    drawn = draw_reduced(CTVolume(hu, geometry), Bright(model))
    assert drawn.geometry == geometry
    assert np.array_equal(drawn.labels == 1, hu == 400)
