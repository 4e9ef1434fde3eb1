"""What a stride does: enlarging and reducing undo each other."""

import numpy as np
import pytest

from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.resolution import block_means, enlarged, reduced_labels
from anatomynet.engine.volume import CTVolume

GEOMETRY = VolumeGeometry((10, 20, 24), (4.0, 4.4, 2.5), (-40.0, 12.0, 300.0))


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
