"""What a GPU does between convolutions and behind them, in as few passes over its memory as may be.

    TorchOperations     in PyTorch: anywhere, also on a CPU, for tests
    KernelOperations    of engine.gpu_kernels: one pass each, where Triton's compiler is (it comes with PyTorch for
                        CUDA, and needs a C compiler)

`rows` are (voxels, channels), a volume with its channels last. Sums are in FP32 or more, whatever the rows are in.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Operations(Protocol):
    """One network's passes. Those that return rows may write them over those that they were given first."""

    def shift_leaky(self, rows: Tensor, shift: Tensor) -> Tensor:
        """leaky(rows + shift); shift FP32 (channels,)."""
        ...

    def leaky(self, rows: Tensor) -> Tensor:
        """leaky(rows), contiguous; rows may be some columns of others, and stay as they are."""
        ...

    def add_leaky(self, rows: Tensor, others: Tensor) -> Tensor:
        """leaky(rows + others); others may be some columns of others."""
        ...

    def scale_add_leaky(self, rows: Tensor, scale: Tensor, others: Tensor, shift: Tensor) -> Tensor:
        """leaky(rows x scale + others + shift); scale and shift FP32 (channels,)."""
        ...

    def channel_means(self, rows: Tensor) -> Tensor:
        """FP32 (channels,)."""
        ...

    def winners(self, rows: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Logits, of which the first `classes` columns count -> labels, uint8 (voxels,), and their probabilities,
        float32 (voxels,)."""
        ...

    def border_confidence(self, labels: Tensor, top: Tensor, classes: int) -> Tensor:
        """Labels, uint8 (z, y, x), and their probabilities, float32 of that shape -> float32 (classes - 1,): see
        engine.network.border_confidence."""
        ...


class TorchOperations:
    """In PyTorch alone."""

    def shift_leaky(self, rows: Tensor, shift: Tensor) -> Tensor:
        """See Operations."""
        return F.leaky_relu_(rows.add_(shift.to(rows.dtype)))

    def leaky(self, rows: Tensor) -> Tensor:
        """See Operations."""
        return F.leaky_relu(rows).contiguous()

    def add_leaky(self, rows: Tensor, others: Tensor) -> Tensor:
        """See Operations."""
        return F.leaky_relu_(rows.add_(others))

    def scale_add_leaky(self, rows: Tensor, scale: Tensor, others: Tensor, shift: Tensor) -> Tensor:
        """See Operations."""
        return F.leaky_relu_(rows.mul_(scale.to(rows.dtype)).add_(others).add_(shift.to(rows.dtype)))

    def channel_means(self, rows: Tensor) -> Tensor:
        """See Operations."""
        return rows.mean(dim=0, dtype=torch.float32)

    def winners(self, rows: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """See Operations."""
        logits = rows[:, :classes].float()
        highest, label = logits.max(dim=1)
        return label.to(torch.uint8), (logits - highest[:, None]).exp_().sum(dim=1).reciprocal_()

    def border_confidence(self, labels: Tensor, top: Tensor, classes: int) -> Tensor:
        """See Operations."""
        border = (_extreme(labels, torch.maximum) != _extreme(labels, torch.minimum)).flatten()
        found = labels.flatten()[border].to(torch.int64)
        # Doubles: a sum of millions in FP32, one after the other, loses digits.
        sums = torch.bincount(found, weights=top.flatten()[border].double(), minlength=classes)[1:]
        return (sums / torch.bincount(found, minlength=classes)[1:].clamp(min=1)).float()


def _extreme(labels: Tensor, of: Callable[..., Tensor]) -> Tensor:
    """The highest or lowest label among each voxel and its 26 neighbours, axis by axis."""
    for axis in range(3):
        rest, extreme = labels.shape[axis] - 1, labels.clone()
        for to, source in ((0, 1), (1, 0)):
            part = extreme.narrow(axis, to, rest)
            of(part, labels.narrow(axis, source, rest), out=part)
        labels = extreme
    return labels
