"""A head so simple that every voxel of it is known: for tests of what becomes of cases."""

import numpy as np

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.data import Case
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.volume import CTVolume

STRUCTURES = ("BrainStem", "Parotid_L", "Parotid_R")
STEM, LEFT, RIGHT = 1, 2, 3
MODEL = ModelConfig("test", STRUCTURES, 1, (1.0, 1.0, 2.0), (2.0, 2.0, 3.0), (-250.0, 550.0))


def head() -> Case:
    """24 x 48 x 48 voxels: soft tissue in air, the left parotid bright, the right one half as bright and smaller."""
    z, y, x = np.indices((24, 48, 48))
    hu = np.where((abs(y - 24) < 20) & (abs(x - 24) < 20), -100, -1000)
    labels = np.zeros(hu.shape, np.uint8)
    for label, centre, radius, brightness in ((LEFT, (14, 26, 36), 7, 550), (RIGHT, (10, 22, 12), 6, 250)):
        inside = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 <= radius**2
        labels[inside], hu[inside] = label, brightness
    geometry = VolumeGeometry((24, 48, 48), (1.5, 1.5, 2.5))
    return Case("head", CTVolume(hu.astype(np.int16), geometry), labels, (False, True, True))
