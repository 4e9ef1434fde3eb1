"""Network output -> LabelMap on the source grid. Second half of `segment`: undoes preprocess.py, step by step."""

import numpy as np

from anatomynet.engine.boxes import boxes_of, slices_of
from anatomynet.engine.geometry import Index
from anatomynet.engine.preprocess import NetworkInput, array_from_canonical, canonical_from_array, resample_linear
from anatomynet.engine.runs import pieces_of, runs_of
from anatomynet.engine.volume import CTVolume, LabelArray

# A piece of a structure smaller than this share of its largest piece is a stray; the network's known weakness.
STRAY_SHARE = 0.1


def source_labels_from_network(labels: LabelArray, given: NetworkInput, volume: CTVolume) -> LabelArray:
    """Labels of the network's box -> uint8 (z, y, x) on the CT's own grid and in its own orientation.

    Where the CT was resampled, each structure's mask is mapped back by linear interpolation.
    """
    if given.grid == given.canonical:
        whole = np.zeros(volume.geometry.shape, np.uint8)
        stop = np.add(given.start, labels.shape)
        canonical = canonical_from_array(whole, volume.geometry)  # a view: what is written there is turned already
        canonical[slices_of(given.start, stop)] = labels
        return whole
    return np.ascontiguousarray(array_from_canonical(_labels_resampled(labels, given), volume.geometry))


def drop_strays(labels: LabelArray) -> LabelArray:
    """Each structure without its pieces (26-connected) under a tenth of its largest; a copy."""
    kept = labels.copy()
    for label, box in enumerate(boxes_of(labels, int(labels.max(initial=0))), start=1):
        if box is None:
            continue
        runs = runs_of(labels[box] == label)
        piece = pieces_of(runs)
        sizes = np.bincount(piece, weights=runs.length)
        stray = sizes < STRAY_SHARE * sizes.max()
        if stray.any():
            kept[box][np.unravel_index(runs.voxels(stray[piece]), runs.shape)] = 0
    return kept


def _labels_resampled(labels: LabelArray, given: NetworkInput) -> LabelArray:
    """Labels of the box -> the canonical grid of another spacing: masks interpolated, then argmax."""
    best = np.zeros(given.canonical.shape, np.float32)
    total = np.zeros(given.canonical.shape, np.float32)
    whole = np.zeros(given.canonical.shape, np.uint8)
    grid_labels = np.zeros(given.grid.shape, np.uint8)
    stop = np.add(given.start, labels.shape)
    grid_labels[slices_of(given.start, stop)] = labels
    for label, box in enumerate(boxes_of(grid_labels, int(labels.max(initial=0))), start=1):
        if box is None:
            continue
        first, last = _reach(box, given)
        target = slices_of(first, last)
        mask = resample_linear(grid_labels == label, given.canonical.shape, start=first, stop=last)
        wins = mask > best[target]
        whole[target][wins] = label
        np.maximum(best[target], mask, out=best[target])
        total[target] += mask
    whole[best <= 1 - total] = 0  # the background's share is what the structures leave
    return whole


def _reach(box: tuple[slice, slice, slice], given: NetworkInput) -> tuple[Index, Index]:
    """The part of the canonical grid that a box of the network's grid can reach, a voxel of it wider."""
    ratio = np.divide(given.canonical.shape, given.grid.shape)
    first = np.floor([(s.start - 1) * r for s, r in zip(box, ratio, strict=True)]).astype(int)
    last = np.ceil([(s.stop + 1) * r for s, r in zip(box, ratio, strict=True)]).astype(int)
    (z0, y0, x0), (z1, y1, x1) = np.maximum(first, 0).tolist(), np.minimum(last, given.canonical.shape).tolist()
    return (z0, y0, x0), (z1, y1, x1)
