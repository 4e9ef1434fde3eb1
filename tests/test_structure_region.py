"""Structure regions: each structure of a label map in its box, and a middle that lies inside it."""

import numpy as np

from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.structure_region import middle_of, regions_from_label_map
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


def test_middle_lies_inside_a_horseshoe() -> None:
    labels = np.zeros(GEOMETRY.shape, np.uint8)
    labels[1, 0:6, 1] = labels[1, 0:6, 6] = labels[1, 0, 1:7] = 1
    (horseshoe,) = regions_from_label_map(LabelMap(labels, GEOMETRY, structures_by_name(("Mandible",))))
    middle = middle_of(horseshoe)
    assert middle is not None
    assert labels[middle] == 1
