"""Full resolution and the network's: what a stride of `in_plane_stride` does to a CT and to masks.

Archives such as OpenKBP come reduced to the network's resolution already; the served model takes full ones.
"""

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.boxes import boxes_of
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.volume import CTVolume, LabelArray

INSIDE_SHARE = 0.5  # of a block: from here on its voxel is inside


def block_means(array: NDArray[np.generic], stride: int) -> NDArray[np.float32]:
    """Means of stride x stride voxels in plane, (z, y, x), whose sides are multiples of it."""
    depth, height, width = array.shape
    # Rows first, which are added whole: both axes at once take five times as long.
    rows = array.reshape(depth, height // stride, stride, width).mean(axis=2, dtype=np.float32)
    means: NDArray[np.float32] = rows.reshape(depth, height // stride, width // stride, stride).mean(axis=3)
    return means


def reduced_labels(labels: LabelArray, stride: int, *, count: int) -> LabelArray:
    """Labels 1 to `count` of blocks of stride x stride voxels in plane: inside where at least half of the block is."""
    if stride == 1:
        return labels
    reduced = np.zeros((labels.shape[0], labels.shape[1] // stride, labels.shape[2] // stride), np.uint8)
    for label, box in enumerate(boxes_of(labels, count), start=1):
        if box is not None:
            z, *sides = box
            y, x = (slice(side.start // stride, -(-side.stop // stride)) for side in sides)
            rows, columns = (slice(side.start * stride, side.stop * stride) for side in (y, x))
            reduced[z, y, x][block_means(labels[z, rows, columns] == label, stride) >= INSIDE_SHARE] = label
    return reduced


def enlarged(volume: CTVolume, stride: int) -> CTVolume:
    """The CT with each voxel as stride x stride in plane: their mean is the voxel again, their faces are its faces."""
    geometry = volume.geometry
    depth, height, width = geometry.shape
    x, y, z = geometry.spacing
    first = (1 / stride - 1) / 2  # in voxels, from a voxel's centre to that of its first part
    origin_x, origin_y, origin_z = geometry.points_from_indices((first, first, 0)).tolist()
    fine = VolumeGeometry(
        (depth, height * stride, width * stride),
        (x / stride, y / stride, z),
        (origin_x, origin_y, origin_z),
        geometry.direction,
    )
    return CTVolume(np.ascontiguousarray(volume.hu.repeat(stride, axis=1).repeat(stride, axis=2)), fine)
