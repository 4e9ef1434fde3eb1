"""Structure regions: each structure of a label map in its box, and a middle that lies inside it."""

import numpy as np
import pytest
from scipy.ndimage import find_objects

from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.structure_region import boxes_of, middle_of, regions_from_label_map
from anatomynet.engine.structures import structures_by_name
from anatomynet.engine.volume import LabelMap

GEOMETRY = VolumeGeometry((4, 6, 8), (1.0, 1.0, 2.0))


def test_boxes_hold_each_structure() -> None:
    labels = np.zeros(GEOMETRY.shape, np.uint8)
    labels[1:3, 2:5, 3] = 2
    labels[2, 3, 3] = 1
    label_map = LabelMap(labels, GEOMETRY, structures_by_name(("Larynx", "Mandible", "Chiasm")), (0.9, 0.8, 0.0))
    larynx, mandible, chiasm = regions_from_label_map(label_map)
    assert (larynx.name, larynx.start, larynx.voxels, larynx.confidence) == ("Larynx", (2, 3, 3), 1, 0.9)
    assert (mandible.start, mandible.box.shape, mandible.voxels) == ((1, 2, 3), (2, 3, 1), 5)
    assert (chiasm.voxels, chiasm.box.shape, middle_of(chiasm)) == (0, (0, 0, 0), None)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5])
@pytest.mark.parametrize("turn", [(0, 1, 2), (2, 0, 1)])
def test_boxes_are_scipys(share: float, turn: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    labels = np.zeros((20, 30, 40), np.uint8)
    inner = labels[3:, 5:27, :33]
    inner[rng.random(inner.shape) < share] = 5
    inner[rng.random(inner.shape) < share] = 2
    turned = labels.transpose(turn)
    assert boxes_of(turned, 7) == (find_objects(turned, max_label=7) or [None] * 7)


def test_a_label_beyond_the_last_has_no_box() -> None:
    labels = np.zeros(GEOMETRY.shape, np.uint8)
    labels[1, 2, 3], labels[2, 3, 4] = 1, 3
    assert boxes_of(labels, 2) == [(slice(1, 2), slice(2, 3), slice(3, 4)), None]


def test_middle_lies_inside_a_horseshoe() -> None:
    labels = np.zeros(GEOMETRY.shape, np.uint8)
    labels[1, 0:6, 1] = labels[1, 0:6, 6] = labels[1, 0, 1:7] = 1
    (horseshoe,) = regions_from_label_map(LabelMap(labels, GEOMETRY, structures_by_name(("Mandible",))))
    middle = middle_of(horseshoe)
    assert middle is not None
    assert labels[middle] == 1
