"""What a GPU computes: 3 x 3 x 3 convolutions, and what is between them, in as few passes over its memory as may be.

    TorchOperations         in PyTorch: anywhere, also on a CPU, for tests
    KernelOperations        of engine.gpu_kernels: PyTorch's convolutions, one pass each for what is between them, where
                            Triton's compiler is (it comes with PyTorch for CUDA, and needs a C compiler)
    ConvolutionOperations   of engine.gpu_convolution: these, and convolutions that do it themselves

`rows` are (voxels, channels), a volume with its channels last. Sums are in FP32 or more, whatever the rows are in.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Shape = tuple[int, int, int]  # (z, y, x)


class Operations(Protocol):
    """One network's passes. An operation that returns rows may overwrite its first argument. Convolutions never change
    their inputs: one volume, or two to be concatenated along the channels.

    Attributes:
        without: what of the best is missing, in words for whoever reads the server's log; empty where nothing is.
    """

    without: str

    def fault(self, device: torch.device) -> str:
        """Why they cannot be used on this device, in one line, empty where they compile and compute what they should:
        asked once the network is prepared."""
        ...

    def prepared(self, weight: Tensor, inward: Sequence[int]) -> Tensor:
        """A kernel, (channels out, channels in, 3, 3, 3), as the convolutions want it; `inward` are the channels of
        each of their inputs."""
        ...

    def convolved(self, inputs: Sequence[Tensor], shape: Shape, weight: Tensor) -> Tensor:
        """The convolution, with zeros around the volume."""
        ...

    def convolved_leaky(
        self, inputs: Sequence[Tensor], shape: Shape, weight: Tensor, shift: Tensor | None, others: Tensor | None = None
    ) -> Tensor:
        """leaky(convolution + shift + others); shift FP32 (channels out,), others rows."""
        ...

    def convolved_with_means(self, inputs: Sequence[Tensor], shape: Shape, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution, and its means: FP32 (channels out,)."""
        ...

    def convolved_in_two(self, inputs: Sequence[Tensor], shape: Shape, weight: Tensor) -> tuple[Tensor, Tensor]:
        """leaky(the first half of the convolution's channels), and the second half."""
        ...

    def shift_leaky(self, rows: Tensor, shift: Tensor) -> Tensor:
        """leaky(rows + shift); shift FP32 (channels,)."""
        ...

    def scale_add_leaky(self, rows: Tensor, scale: Tensor, others: Tensor, shift: Tensor) -> Tensor:
        """leaky(rows x scale + others + shift); scale and shift FP32 (channels,)."""
        ...

    def winners(self, rows: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Logits, of which the first `classes` columns count -> labels, uint8 (voxels,), and their probabilities,
        float32 (voxels,)."""
        ...

    def border_confidence(self, labels: Tensor, top: Tensor, classes: int) -> Tensor:
        """Labels, uint8 (z, y, x), and their probabilities, float32 of that shape -> float32 (classes - 1,): see
        engine.network.border_confidence."""
        ...


class TorchConvolutions(ABC):
    """PyTorch's convolutions, and what follows them by the passes of who inherits."""

    @abstractmethod
    def shift_leaky(self, rows: Tensor, shift: Tensor) -> Tensor:
        """See Operations."""

    @abstractmethod
    def leaky(self, rows: Tensor) -> Tensor:
        """leaky(rows), contiguous; rows may be some columns of others, and stay as they are."""

    @abstractmethod
    def add_leaky(self, rows: Tensor, others: Tensor) -> Tensor:
        """leaky(rows + others), over the rows; others may be some columns of others."""

    @abstractmethod
    def channel_means(self, rows: Tensor) -> Tensor:
        """FP32 (channels,)."""

    def prepared(self, weight: Tensor, inward: Sequence[int]) -> Tensor:
        """See Operations."""
        return weight.contiguous(memory_format=torch.channels_last_3d)

    def convolved(self, inputs: Sequence[Tensor], shape: Shape, weight: Tensor) -> Tensor:
        """See Operations."""
        rows = inputs[0] if len(inputs) == 1 else torch.cat(tuple(inputs), dim=1)
        return rows_of(F.conv3d(volume_of(rows, shape), weight, padding=1))

    def convolved_leaky(
        self, inputs: Sequence[Tensor], shape: Shape, weight: Tensor, shift: Tensor | None, others: Tensor | None = None
    ) -> Tensor:
        """See Operations."""
        rows = self.convolved(inputs, shape, weight)
        if others is not None:
            return self.add_leaky(rows if shift is None else rows.add_(shift.to(rows.dtype)), others)
        return self.leaky(rows) if shift is None else self.shift_leaky(rows, shift)

    def convolved_with_means(self, inputs: Sequence[Tensor], shape: Shape, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See Operations."""
        rows = self.convolved(inputs, shape, weight)
        return rows, self.channel_means(rows)

    def convolved_in_two(self, inputs: Sequence[Tensor], shape: Shape, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See Operations."""
        both = self.convolved(inputs, shape, weight)
        half = both.shape[1] // 2
        return self.leaky(both[:, :half]), both[:, half:]


class TorchOperations(TorchConvolutions):
    """In PyTorch alone."""

    without = "without kernels of its own"

    def fault(self, device: torch.device) -> str:
        """See Operations."""
        return ""

    def shift_leaky(self, rows: Tensor, shift: Tensor) -> Tensor:
        """See Operations."""
        return F.leaky_relu_(rows.add_(shift.to(rows.dtype)))

    def leaky(self, rows: Tensor) -> Tensor:
        """See TorchConvolutions."""
        return F.leaky_relu(rows).contiguous()

    def add_leaky(self, rows: Tensor, others: Tensor) -> Tensor:
        """See TorchConvolutions."""
        return F.leaky_relu_(rows.add_(others))

    def scale_add_leaky(self, rows: Tensor, scale: Tensor, others: Tensor, shift: Tensor) -> Tensor:
        """See Operations."""
        return F.leaky_relu_(rows.mul_(scale.to(rows.dtype)).add_(others).add_(shift.to(rows.dtype)))

    def channel_means(self, rows: Tensor) -> Tensor:
        """See TorchConvolutions."""
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


def first_line(error: BaseException) -> str:
    """What an error says, as a fault: compilers say more than a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def rows_of(volume: Tensor) -> Tensor:
    """(1, channels, z, y, x) -> (voxels, channels); a view where channels come last."""
    return volume.permute(0, 2, 3, 4, 1).reshape(-1, volume.shape[1])


def volume_of(rows: Tensor, shape: Shape) -> Tensor:
    """(voxels, channels) -> (1, channels, z, y, x), channels last."""
    return rows.view(1, *shape, rows.shape[1]).permute(0, 4, 1, 2, 3)


def _extreme(labels: Tensor, of: Callable[..., Tensor]) -> Tensor:
    """The highest or lowest label among each voxel and its 26 neighbours, axis by axis."""
    for axis in range(3):
        rest, extreme = labels.shape[axis] - 1, labels.clone()
        for to, source in ((0, 1), (1, 0)):
            part = extreme.narrow(axis, to, rest)
            of(part, labels.narrow(axis, source, rest), out=part)
        labels = extreme
    return labels
