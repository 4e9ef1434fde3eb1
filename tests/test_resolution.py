"""What a stride does: enlarging and reducing undo each other, and a drawing lands on the reduced grid."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from anatomynet.engine.config import ModelConfig, load_config
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.resolution import block_means, draw_reduced, enlarged, reduced_labels
from anatomynet.engine.volume import CTVolume, HounsfieldArray, LabelArray

GEOMETRY = VolumeGeometry((10, 20, 24), (4.0, 4.4, 2.5), (-40.0, 12.0, 300.0))
MODEL = load_config("openkbp7")[0]


def volume() -> CTVolume:
    hu = np.random.default_rng(0).integers(-1000, 1000, GEOMETRY.shape, dtype=np.int16)
    return CTVolume(hu, GEOMETRY)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_mean_of_an_enlarged_voxel_is_the_voxel(stride: int) -> None:
    fine = enlarged(volume(), stride)
    assert np.array_equal(block_means(fine.hu, stride), volume().hu)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_faces_stay_in_the_patient(stride: int) -> None:
    fine = enlarged(volume(), stride).geometry
    for corner in (np.zeros(3), np.ones(3)):
        own = corner * GEOMETRY.shape[::-1] - 0.5
        np.testing.assert_allclose(
            fine.points_from_indices(corner * fine.shape[::-1] - 0.5), GEOMETRY.points_from_indices(own)
        )


def test_half_a_block_is_inside() -> None:
    labels = np.zeros((1, 2, 4), np.uint8)
    labels[0, 0, :2] = 1  # half of the first block
    labels[0, 1, 3] = 2  # a quarter of the second
    assert reduced_labels(labels, 2, count=2).tolist() == [[[1, 0]]]


@pytest.mark.parametrize("stride", [2, 4])
def test_a_label_is_where_it_fills_half_of_a_block_wherever_its_box_begins(stride: int) -> None:
    labels = np.zeros((5, 24, 32), np.uint8)
    labels[1:4, 3:22, 5:31] = np.random.default_rng(0).integers(0, 4, (3, 19, 26))
    labels[:, 10:17, 9:19] = 5
    labels[2, 23, 31] = 6
    expected = np.zeros((5, 24 // stride, 32 // stride), np.uint8)
    for place in np.ndindex(expected.shape):
        z, y, x = place
        block = labels[z, y * stride : (y + 1) * stride, x * stride : (x + 1) * stride]
        for label in range(1, 8):
            if 2 * np.count_nonzero(block == label) >= block.size:
                expected[place] = label
    assert np.array_equal(reduced_labels(labels, stride, count=7), expected)


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
    x, y, z = GEOMETRY.spacing
    spacing = (x / stride, y / stride, z)
    model = replace(MODEL, in_plane_stride=stride, smallest_spacing=spacing, largest_spacing=spacing)
    hu = np.zeros(GEOMETRY.shape, np.int16)
    hu[3:6, 5:9, 12:20] = 400
    drawn = draw_reduced(CTVolume(hu, GEOMETRY), Bright(model))
    assert drawn.geometry == GEOMETRY
    assert np.array_equal(drawn.labels == 1, hu == 400)
