"""`segment`: a CT in, a LabelMap on the same grid out, wherever the network runs."""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.boxes import boxes_of
from anatomynet.engine.errors import ModelError, ServerError
from anatomynet.engine.postprocess import drop_strays, source_labels_from_network
from anatomynet.engine.preprocess import NetworkInput, prepare
from anatomynet.engine.region import find_box, finder_of, grown_box, touched_faces
from anatomynet.engine.resolution import enlarged, reduced_labels
from anatomynet.engine.runtime import Runtime
from anatomynet.engine.structures import structures_by_name
from anatomynet.engine.volume import CTVolume, LabelArray, LabelMap

NOT_FOUND = "head and neck were not found: drawn on the whole body"
OUTGROWN = "a structure reached beyond the grown head-and-neck box: drawn on the whole body"
# Scans of head and neck often end above it: that it is not in the box tells nothing of the box.
MAY_BE_BELOW_THE_SCAN = ("Esophagus",)


def segment(volume: CTVolume, runtime: Runtime, *, whole_volume: bool = False) -> LabelMap:
    """Draws every structure of the runtime's model on a CT.

    The result lies voxel for voxel on the CT; a structure that was not found has no voxel and confidence 0.

    Args:
        volume: the CT.
        runtime: what computes the network, and may find head and neck first.
        whole_volume: the network sees the whole body box, whether or not the runtime has a region finder.

    Raises:
        GeometryError: an oblique volume, or one too small for the network.
        ModelError: an answer that does not fit the question.
        ServerError: where the runtime is a server, and fails.
    """
    structures = structures_by_name(runtime.model.structures)
    drawn = _drawn_on_body(prepare(volume, runtime.model), runtime, whole_volume=whole_volume)
    given, kept, confidence = drawn.given, drawn.labels, drawn.confidence
    strays = np.bincount(drawn.with_strays[drawn.with_strays != kept], minlength=len(structures) + 1)[1:]
    source_labels = source_labels_from_network(kept, given, volume)
    if given.grid != given.canonical:  # a voxel or two may be less than one of the study's
        confidence = confidence * [box is not None for box in boxes_of(source_labels, len(structures))]
    return LabelMap(
        source_labels,
        volume.geometry,
        structures,
        confidence=tuple(confidence.tolist()),
        stray_ml=tuple((strays * given.grid.voxel_ml).tolist()),
        notes=given.notes,
        computed_share=given.hu.size / math.prod(given.grid.shape),
    )


def draw_reduced(volume: CTVolume, runtime: Runtime, *, whole_volume: bool = False) -> LabelMap:
    """What the served model draws on a CT that was reduced in plane by its stride, on the reduced grid.

    Enlarged again, drawn by the same `segment` that serves, and reduced as the archive's own masks were.

    Raises:
        GeometryError, ModelError, ServerError: see `segment`.
    """
    stride = runtime.model.in_plane_stride
    drawn = segment(enlarged(volume, stride), runtime, whole_volume=whole_volume)
    labels = reduced_labels(drawn.labels, stride, count=len(drawn.structures))
    return replace(drawn, labels=labels, geometry=volume.geometry)


@dataclass(frozen=True, eq=False)
class _Drawn:
    """What the network drew on a box: uint8 (z, y, x) as it came, and without strays; and its confidence."""

    given: NetworkInput
    with_strays: LabelArray
    labels: LabelArray
    confidence: NDArray[np.float32]


def _drawn_on_body(body: NetworkInput, runtime: Runtime, *, whole_volume: bool) -> _Drawn:
    """What the network draws on head and neck, where they can be found, else on the whole body box.

    A structure that reaches a face of the found box may be cut there: that face moves out, once, and all is drawn
    again; if then one reaches a face still, on the whole. The same is done where an expected structure is not found
    at all: near a face that cuts an organ the network may draw nothing.
    """
    finder = None if whole_volume else finder_of(runtime)
    if finder is None:
        return _draw(body, runtime)
    try:
        box = find_box(body, runtime.model, finder)
    except ServerError as error:  # it saves time, and a study is not lost for it
        return _draw(_noted(body, f"{error}; drawn on the whole body"), runtime)
    if box is None:
        return _draw(_noted(body, NOT_FOUND), runtime)
    shape, stride = body.shape, runtime.model.in_plane_stride
    drawn = _draw(body.cropped(box.start, box.stop), runtime)
    faces = touched_faces(drawn.labels, box, shape, in_plane_stride=stride)
    if faces:
        box = grown_box(box, faces, shape)
        note = (
            f"a structure reached the {' and '.join(faces)} face of the head-and-neck box: drawn again on a larger one"
        )
        drawn = _draw(_noted(body, note).cropped(box.start, box.stop), runtime)
        if touched_faces(drawn.labels, box, shape, in_plane_stride=stride):
            return _draw(_noted(body, OUTGROWN), runtime)
    missing = _not_found(drawn.labels, runtime)
    if missing and drawn.labels.shape != shape:
        note = f"{' and '.join(missing)} not found in the head-and-neck box: drawn again on the whole body"
        drawn = _draw(_noted(body, note), runtime)
    return drawn


def _not_found(labels: LabelArray, runtime: Runtime) -> list[str]:
    """Of the structures that any scan of head and neck should show, and patients taught, those without a voxel."""
    structures = structures_by_name(runtime.model.structures)
    not_expected = (*MAY_BE_BELOW_THE_SCAN, *runtime.model.unvalidated)
    present = np.bincount(labels.ravel(), minlength=len(structures) + 1)[1:] > 0
    return [
        structure.tg263_name
        for structure, found in zip(structures, present, strict=True)
        if not found and structure.name not in not_expected
    ]


def _draw(given: NetworkInput, runtime: Runtime) -> _Drawn:
    labels, confidence = runtime.infer(given.hu)
    structures = len(runtime.model.structures)
    expected = (np.dtype(np.uint8), given.hu.shape, (structures,))
    found = (labels.dtype, labels.shape, confidence.shape)
    if found != expected or labels.max() > structures:
        raise ModelError(
            f"the model answered with {found[0]} labels of shape {found[1]} up to {labels.max(initial=0)} and "
            f"{found[2]} confidences: expected {expected[0]}, {expected[1]}, {structures}, {expected[2]}"
        )
    return _Drawn(given, labels, drop_strays(labels), confidence)


def _noted(given: NetworkInput, note: str) -> NetworkInput:
    return replace(given, notes=(*given.notes, note))
