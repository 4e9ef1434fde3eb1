"""Proof that an exported model draws what its checkpoint draws. Second step of `anatomynet-export`, and its gate.

On one CT, every voxel on which the checkpoint's FP32 logits are not nearly tied must keep its label; a FP16 export must
keep it also when every activation is rounded to half precision, which no CPU runtime does by itself.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import ParityError
from anatomynet.engine.folding import folded
from anatomynet.engine.network import AnatomyNet, ServedNetwork, border_confidence
from anatomynet.engine.runtime import Runtime
from anatomynet.engine.volume import HounsfieldArray, LabelArray

# Between the two best logits, on the CT's own grid. Below it a label may change: other sums in another order.
FP32_MARGIN = 0.001
FP16_MARGIN = 0.05
SMALLEST_DSC = 0.99
SMALLEST_JUDGED_VOXELS = 500  # a few near ties weigh too much in a smaller structure's DSC
FP32_CONFIDENCE = 0.001
FP16_CONFIDENCE = 0.02
LARGEST_HALF = 16_384.0  # a quarter of FP16's range: another CT may reach higher
SLAB_SLICES = 16


@dataclass(frozen=True)
class ParityReport:
    """How far an exported model is from its checkpoint on one CT.

    Attributes:
        subject: what was compared, one phrase.
        voxels: compared.
        changed: voxels with another label.
        worst_margin: the largest margin between the reference's two best logits among these; 0 if there are none.
        smallest_dsc: over the structures of more than 500 voxels; 1 if there are none.
        worst_structure: whose DSC that is.
        confidence_difference: the largest, less what near ties explain.
        largest_activation: of the network with all rounded to half; None where that was not asked for.
    """

    subject: str
    voxels: int
    changed: int
    worst_margin: float
    smallest_dsc: float
    worst_structure: str
    confidence_difference: float
    largest_activation: float | None = None

    def __str__(self) -> str:
        activation = "" if self.largest_activation is None else f", largest activation {self.largest_activation:.1f}"
        return (
            f"{self.subject}: {self.changed:,} of {self.voxels:,} labels changed, "
            f"worst margin {self.worst_margin:.5f}, smallest DSC {self.smallest_dsc:.5f} ({self.worst_structure}), "
            f"confidence within {self.confidence_difference:.5f}{activation}"
        )


@dataclass(frozen=True, eq=False)
class Reference:
    """What a checkpoint itself draws on one CT, in FP32.

    Attributes:
        served: the checkpoint.
        hu: int16 (z, y, x), the CT.
        coarse: logits, float32 (1, classes, z, y, x), at the network's resolution.
        labels: uint8 (z, y, x), on the CT's grid.
    """

    served: ServedNetwork
    hu: HounsfieldArray
    coarse: Tensor
    labels: LabelArray


def draw_reference(network: AnatomyNet, config: ModelConfig, hu: HounsfieldArray) -> Reference:
    """Runs the checkpoint, in PyTorch, on a CT in which it finds every structure.

    Raises:
        ParityError: a structure that it does not find: nothing would be proven for that.
    """
    served = ServedNetwork(network, config).eval()
    with torch.inference_mode():
        coarse = served.network(served.network_input_from_hu(torch.from_numpy(hu)))
    labels = labels_from_coarse_logits(served, coarse, hu.shape)
    voxels = np.bincount(labels.ravel(), minlength=config.classes)
    absent = [name for label, name in enumerate(config.structures, start=1) if not voxels[label]]
    if absent:
        raise ParityError(
            f"the checkpoint itself finds no {', '.join(absent)} in this CT, so nothing would be proven: give a CT on "
            "which it finds every structure with --parity-input"
        )
    return Reference(served, hu, coarse, labels)


def check_parity(reference: Reference, runtime: Runtime, *, fp16: bool) -> tuple[ParityReport, ...]:
    """Holds a runtime against the checkpoint it was exported from.

    Args:
        fp16: the exported file is FP16. The checkpoint must then also bear FP16 rounding of every activation.

    Returns:
        Report of the runtime; for FP16 that of the rounded network before it.

    Raises:
        ParityError: what differs.
    """
    config = reference.served.config
    if runtime.model != config:
        raise ParityError(
            f"the exported file is of checkpoint {runtime.model.checkpoint_sha256[:12]} ({runtime.model.name}), "
            f"expected {config.checkpoint_sha256[:12]} ({config.name})"
        )
    # The rounded network first: the runtime keeps its memory once it has computed.
    reports = [_compare_rounded(reference)] if fp16 else []
    labels, confidence = runtime.infer(reference.hu)
    reports.append(_compare(reference, labels, confidence, subject=runtime.description))
    for report in reports:
        _judge(report, fp16=fp16)
    return tuple(reports)


def half_rounded_logits(served: ServedNetwork, hu: HounsfieldArray) -> tuple[Tensor, float]:
    """What FP16 does to the network: weights and the result of every operation rounded to half, sums in FP32.

    So GPUs compute FP16: they accumulate in FP32 and round what they store. Means over the volume are summed in FP32.

    Returns:
        Logits, float32 (1, classes, z, y, x), at the network's resolution; the largest magnitude on the way.
    """
    network = folded(served.network)
    for parameter in network.parameters():
        parameter.data = parameter.data.half().float()
    with torch.inference_mode():
        x = served.network_input_from_hu(torch.from_numpy(hu)).half().float()
        with _RoundToHalf() as rounding:
            logits = network(x)
    return logits, rounding.largest


def labels_from_coarse_logits(served: ServedNetwork, coarse: Tensor, shape: tuple[int, ...]) -> LabelArray:
    """Logits (1, classes, z, y, x) at the network's resolution -> label map, uint8 of `shape` (z, y, x)."""
    labels = np.empty(shape, np.uint8)
    for slab in _slabs(shape[0]):
        labels[slab] = _fine_logits(served, coarse, slab, shape).argmax(dim=0).to(torch.uint8).numpy()
    return labels


def _fine_logits(served: ServedNetwork, coarse: Tensor, slab: slice, shape: tuple[int, ...]) -> Tensor:
    """Logits (classes, slab, y, x) on the CT's grid. A slab is exact: nothing is interpolated along z.

    All of them at once would be 1.5 GB for 8 classes on 178 x 512 x 512.
    """
    size = torch.Size((slab.stop - slab.start, *shape[1:]))
    with torch.inference_mode():
        return served.logits_on_grid(coarse[:, :, slab], size)[0]


def _slabs(depth: int) -> list[slice]:
    return [slice(start, min(start + SLAB_SLICES, depth)) for start in range(0, depth, SLAB_SLICES)]


def _compare_rounded(reference: Reference) -> ParityReport:
    coarse, largest = half_rounded_logits(reference.served, reference.hu)
    labels = labels_from_coarse_logits(reference.served, coarse, reference.hu.shape)
    confidence = border_confidence(coarse).numpy()
    report = _compare(reference, labels, confidence, subject="PyTorch, every activation rounded to FP16")
    return replace(report, largest_activation=largest)


def _compare(
    reference: Reference, labels: LabelArray, confidence: NDArray[np.float32], *, subject: str
) -> ParityReport:
    changed = reference.labels != labels
    structures = reference.served.config.structures
    count = len(structures) + 1
    expected, found = (np.bincount(array.ravel(), minlength=count)[1:] for array in (reference.labels, labels))
    common = np.bincount(reference.labels[~changed], minlength=count)[1:]
    judged = [i for i in range(len(structures)) if expected[i] > SMALLEST_JUDGED_VOXELS]
    dsc = {structures[i]: float(2 * common[i] / (expected[i] + found[i])) for i in judged}
    worst = min(dsc, key=dsc.__getitem__, default="none is large enough")
    expected_confidence = border_confidence(reference.coarse).numpy()
    beyond_ties = np.abs(expected_confidence - confidence) - confidence_of_ties(reference.coarse)
    return ParityReport(
        subject=subject,
        voxels=labels.size,
        changed=int(changed.sum()),
        worst_margin=worst_margin(reference, changed),
        smallest_dsc=dsc.get(worst, 1.0),
        worst_structure=worst,
        confidence_difference=float(np.maximum(beyond_ties, 0).max()),  # NaN stays NaN
    )


def confidence_of_ties(coarse: Tensor) -> NDArray[np.float32]:
    """How much the confidences may differ where nearly tied voxels take their second best label.

    A border is a few hundred voxels, and one that changes sides takes up to 26 neighbours in or out with it.

    Args:
        coarse: logits, float32 (1, classes, z, y, x).

    Returns:
        float32 (structures,): the sum over the voxels whose two best logits are within FP32_MARGIN.
    """
    count = coarse.shape[1]
    top, label = (tensor[0].numpy() for tensor in coarse.softmax(dim=1).max(dim=1))
    label = label.astype(np.uint8)
    best, order = coarse[0].topk(2, dim=0)
    tied = np.argwhere((best[0] - best[1] < FP32_MARGIN).numpy())
    changes = np.zeros(count, np.float32)
    if len(tied):
        sums, voxels = _border_sums(top, label, count)
        for voxel in tied:
            around = tuple(slice(max(0, i - 2), i + 3) for i in voxel)
            other = label[around].copy()
            other[tuple(i - part.start for i, part in zip(voxel, around, strict=True))] = order[1][tuple(voxel)]
            before, after = (_border_sums(top[around], patch, count) for patch in (label[around], other))
            moved = (sums + after[0] - before[0]) / np.maximum(voxels + after[1] - before[1], 1)
            changes += np.abs(moved - sums / np.maximum(voxels, 1)).astype(np.float32)
    return changes[1:]


def _border_sums(
    top: NDArray[np.float32], label: LabelArray, count: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Of each label, the top probabilities along its border, and their number, as `border_confidence` takes them."""
    border = ndimage.maximum_filter(label, 3, mode="nearest") != ndimage.minimum_filter(label, 3, mode="nearest")
    voxels = np.bincount(label[border], minlength=count)
    sums: NDArray[np.float64] = np.bincount(label[border], top[border], minlength=count)  # type: ignore[assignment]
    return sums, voxels


def worst_margin(reference: Reference, changed: NDArray[np.bool_]) -> float:
    """The largest margin between the reference's two best logits among voxels, bool (z, y, x); 0 if there are none."""
    worst = 0.0
    for slab in _slabs(changed.shape[0]):
        if changed[slab].any():
            logits = _fine_logits(reference.served, reference.coarse, slab, changed.shape)[
                :, torch.from_numpy(changed[slab])
            ]
            best, second = logits.topk(2, dim=0).values
            worst = max(worst, float((best - second).max()))
    return worst


def _judge(report: ParityReport, *, fp16: bool) -> None:
    margin, confidence = (FP16_MARGIN, FP16_CONFIDENCE) if fp16 else (FP32_MARGIN, FP32_CONFIDENCE)
    largest = report.largest_activation or 0.0
    # Written so that NaN fails.
    if not (
        report.worst_margin <= margin
        and report.smallest_dsc >= SMALLEST_DSC
        and report.confidence_difference <= confidence
        and largest < LARGEST_HALF
    ):
        raise ParityError(
            f"the export does not draw what its checkpoint draws. {report}. Expected a margin up to {margin}, "
            f"DSC from {SMALLEST_DSC}, confidence within {confidence}, activations below {LARGEST_HALF:.0f}"
        )


class _RoundToHalf(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch's class has no types
    """Rounds what every operation gives to half precision, and keeps the largest magnitude seen."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0.0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or result.dtype != torch.float32:
            return result
        low, high = result.aminmax()
        magnitude = max(-low.item(), high.item())
        self.largest = max(self.largest, magnitude) if math.isfinite(magnitude) else math.inf
        return result.half().float()
