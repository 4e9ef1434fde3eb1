"""Strays go, and a mask comes back from another spacing to where it was."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.geometry import Index, VolumeGeometry
from anatomynet.engine.postprocess import drop_strays, source_labels_from_network
from anatomynet.engine.preprocess import prepare
from anatomynet.engine.volume import CTVolume

CONFIG = ModelConfig("test", ("BrainStem", "Parotid_L"), 1, (1.0, 1.0, 2.0), (2.0, 2.0, 3.0), (-250.0, 550.0))
LEAST_DICE = 0.98  # of a ball of 2 cm radius, resampled there and back


def overlap(drawn: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """DSC."""
    return float(2 * (drawn & truth).sum() / (drawn.sum() + truth.sum()))


def labels_with(shape: Index, **boxes: tuple[slice, slice, slice]) -> NDArray[np.uint8]:
    """Labels, each box named a1, b1, a2 ...: a letter and its label."""
    labels = np.zeros(shape, np.uint8)
    for name, box in boxes.items():
        labels[box] = int(name[1:])
    return labels


def test_a_stray_is_dropped_and_the_largest_piece_kept() -> None:
    whole = (slice(0, 5), slice(0, 5), slice(0, 5))
    stray = (slice(8, 10), slice(8, 10), slice(8, 10))  # 8 voxels, of 125
    labels = labels_with((12, 12, 12), a1=whole, b1=stray)
    before = labels.copy()
    assert np.array_equal(drop_strays(labels), labels_with((12, 12, 12), a1=whole))
    assert np.array_equal(labels, before)


def test_a_tenth_of_the_largest_piece_is_no_stray() -> None:
    labels = np.zeros((12, 12, 12), np.uint8)
    labels[0, 0, :10] = 1
    labels[5, 5, 5] = 1
    assert np.array_equal(drop_strays(labels), labels)
    labels[0, 0, 10] = 1
    assert drop_strays(labels)[5, 5, 5] == 0


def test_voxels_that_touch_at_a_corner_are_one_piece() -> None:
    labels = np.zeros((16, 16, 16), np.uint8)
    labels[:6, :6, :6] = 2
    labels[6, 6, 6] = 2
    assert np.array_equal(drop_strays(labels), labels)


def test_each_structure_has_its_own_largest_piece() -> None:
    # The small structure lies inside the box of the large one, and is larger than that one's stray.
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[:10] = 1
    labels[19, 19, 19] = 1
    labels[12, 12, 12:14] = 2
    kept = drop_strays(labels)
    assert (kept == 2).sum() == 2
    assert kept[19, 19, 19] == 0
    assert (kept == 1).sum() == 4000


def test_no_label_stays_no_label() -> None:
    assert not drop_strays(np.zeros((3, 4, 5), np.uint8)).any()


def ball(geometry: VolumeGeometry, centre: tuple[float, float, float], radius: float) -> NDArray[np.bool_]:
    z, y, x = np.indices(geometry.shape)
    return np.asarray(
        np.linalg.norm(geometry.points_from_indices(np.stack((x, y, z), axis=-1)) - centre, axis=-1) <= radius
    )


def there_and_back(geometry: VolumeGeometry, config: ModelConfig, *masks: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Labels drawn exactly on the network's grid, brought back: what postprocess does to a perfect network."""
    hu = np.full(geometry.shape, 40, np.int16)
    volume = CTVolume(hu, geometry)
    given = prepare(volume, config)
    shares = [prepare(CTVolume((1000 * mask).astype(np.int16), geometry), config).hu for mask in masks]
    outside = 1000 - np.sum(shares, axis=0)
    labels = np.argmax(np.stack([outside, *shares]), axis=0).astype(np.uint8)
    return source_labels_from_network(labels, given, volume)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((100, 140, 140), (0.5, 0.5, 0.75)), ((30, 40, 40), (2.5, 2.5, 2.5)), ((24, 60, 64), (1.5, 1.5, 5.0))],
)
def test_a_resampled_ball_comes_back(shape: Index, spacing: tuple[float, float, float]) -> None:
    geometry = VolumeGeometry(shape, spacing)
    middle = tuple(geometry.points_from_indices(np.array(shape[::-1]) / 2 + 0.3).tolist())
    truth = ball(geometry, (middle[0], middle[1], middle[2]), 20.0)
    back = there_and_back(geometry, CONFIG, truth)
    assert back.shape == shape
    assert overlap(back == 1, truth) >= LEAST_DICE
    # Not shifted by a fraction of a voxel either.
    offset = np.array([np.mean(side) for side in np.nonzero(back)]) - [np.mean(side) for side in np.nonzero(truth)]
    assert np.abs(offset).max() < 0.1


def test_touching_structures_leave_no_gap_where_they_were_resampled() -> None:
    geometry = VolumeGeometry((30, 80, 80), (0.5, 0.5, 2.5))
    first, second = np.zeros(geometry.shape, bool), np.zeros(geometry.shape, bool)
    first[5:25, 20:60, 20:41] = True
    second[5:25, 20:60, 41:60] = True
    back = there_and_back(geometry, CONFIG, first, second)
    inside = back[8:22, 24:56, 24:56]
    assert (inside > 0).all()
    # Between them runs the middle of one of the network's voxels: it may fall to either.
    assert np.array_equal(back[:, :, :40] == 1, first[:, :, :40])
    assert np.array_equal(back[:, :, 42:] == 2, second[:, :, 42:])


def test_where_four_structures_meet_none_of_them_is_background() -> None:
    # In the middle each has a quarter, and the background nothing.
    config = replace(CONFIG, structures=("BrainStem", "Parotid_L", "Parotid_R", "Mandible"))
    volume = CTVolume(np.full((16, 50, 50), 40, np.int16), VolumeGeometry((16, 50, 50), (0.4, 0.4, 2.5)))
    given = prepare(volume, config)
    labels = np.kron(np.array([[[1, 2], [3, 4]]]), np.ones((16, 10, 10))).astype(np.uint8)
    assert labels.shape == given.hu.shape
    back = source_labels_from_network(labels, given, volume)
    assert back.all()
    assert [int(back[8, y, x]) for y, x in ((5, 5), (5, 45), (45, 5), (45, 45))] == [1, 2, 3, 4]


def test_a_structure_at_the_volumes_face_comes_back_to_the_face() -> None:
    geometry = VolumeGeometry((20, 48, 48), (0.5, 0.5, 5.0))
    truth = np.zeros(geometry.shape, bool)
    truth[:10, :, 30:] = True
    assert np.array_equal(there_and_back(geometry, CONFIG, truth) == 1, truth)


def test_a_trained_spacing_comes_back_voxel_for_voxel() -> None:
    geometry = VolumeGeometry((20, 48, 48), (1.5, 1.5, 2.5))
    truth = np.random.default_rng(0).random(geometry.shape) < 0.6
    config = replace(CONFIG, structures=("BrainStem",))
    assert np.array_equal(there_and_back(geometry, config, truth) == 1, truth)
