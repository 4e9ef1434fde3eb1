"""Test-time averaging: a network that looks twice, at the CT and at its mirror image. An option of `accuracy`."""

import torch
from torch import Tensor, nn

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import ModelError
from anatomynet.engine.structures import STRUCTURES, mirrored_labels

SMALLEST_SHARE = 1e-12  # under which a probability has no logarithm worth keeping


class MirroredNetwork(nn.Module):
    """The mean of what a network sees as it is, and left-right flipped with the paired labels exchanged.

    Args:
        network: float (n, 1, z, y, x) -> logits (n, classes, z, y, x).
        model: its structures; of a pair both, or none.

    Raises:
        ModelError: a structure whose partner the model does not know: its mirror image is no class.
    """

    def __init__(self, network: nn.Module, model: ModelConfig) -> None:
        super().__init__()
        alone = [name for name in model.structures if (STRUCTURES[name].mirror or name) not in model.structures]
        if alone:
            raise ModelError(f"{model.name} cannot be mirrored: expected both sides of {', '.join(alone)}")
        self.network = network
        self.register_buffer("mirror", torch.tensor(mirrored_labels(model.structures)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Float (n, 1, z, y, x), of even sides -> logits (n, classes, z, y, x): logarithms of mean probabilities."""
        seen = self.network(x).softmax(dim=1)
        mirrored = self.network(x.flip(-1)).softmax(dim=1).flip(-1)[:, self.get_buffer("mirror")]
        logits: Tensor = ((seen + mirrored) / 2).clamp(min=SMALLEST_SHARE).log()
        return logits
