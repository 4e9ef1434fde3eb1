"""`segment`: a CT in, a LabelMap on the same grid out, wherever the network runs."""

from anatomynet.engine.runtime import Runtime

from anatomynet.engine.errors import ModelError
from anatomynet.engine.postprocess import source_labels_from_network
from anatomynet.engine.preprocess import prepare
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
    given = prepare(volume, runtime.model)
    labels, confidence = runtime.infer(given.hu)
    if labels.shape != given.hu.shape or labels.max(initial=0) > len(runtime.model.structures):
        raise ModelError(
            f"the model answered with labels up to {labels.max(initial=0)} of shape {labels.shape}: expected "
            f"up to {len(runtime.model.structures)} of shape {given.hu.shape}"
        )
    return LabelMap(
        source_labels_from_network(labels, given, volume),
        volume.geometry,
        structures_by_name(runtime.model.structures),
        tuple(confidence.tolist()),
        given.notes,
    )
