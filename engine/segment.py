"""`segment`: a CT in, a LabelMap on the same grid out, wherever the network runs."""

import numpy as np

from anatomynet.engine.errors import ModelError
from anatomynet.engine.postprocess import drop_strays, source_labels_from_network
from anatomynet.engine.preprocess import prepare
from anatomynet.engine.runtime import Runtime
from anatomynet.engine.structures import structures_by_name
from anatomynet.engine.volume import CTVolume, LabelMap


def segment(volume: CTVolume, runtime: Runtime) -> LabelMap:
    """Draws every structure of the runtime's model on a CT.

    The result lies voxel for voxel on the CT; a structure that was not found has no voxel and confidence 0.

    Raises:
        GeometryError: an oblique volume, or one too small for the network.
        ModelError: an answer that does not fit the question.
        ServerError: where the runtime is a server, and fails.
    """
    model = runtime.model
    given = prepare(volume, model)
    labels, confidence = runtime.infer(given.hu)
    structures = structures_by_name(model.structures)
    expected = (np.dtype(np.uint8), given.hu.shape, (len(structures),))
    found = (labels.dtype, labels.shape, confidence.shape)
    if found != expected or labels.max() > len(structures):
        raise ModelError(
            f"the model answered with {found[0]} labels of shape {found[1]} up to {labels.max(initial=0)} and "
            f"{found[2]} confidences: expected {expected[0]}, {expected[1]}, {len(structures)}, {expected[2]}"
        )
    kept = drop_strays(labels)
    strays = np.bincount(labels[labels != kept], minlength=len(structures) + 1)[1:]
    source_labels = source_labels_from_network(kept, given, volume)
    if given.grid != given.canonical:  # a voxel or two may be less than one of the study's
        confidence = confidence * np.isin(np.arange(1, len(structures) + 1), source_labels)
    return LabelMap(
        source_labels,
        volume.geometry,
        structures,
        confidence=tuple(confidence.tolist()),
        stray_ml=tuple((strays * given.grid.voxel_ml).tolist()),
        notes=given.notes,
    )
