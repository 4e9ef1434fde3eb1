"""Dice, focal and their hybrid, blind where an organ is not annotated (Zhu et al., sections 2.3 and 2.4)."""

import torch
from torch import Tensor
from torch.nn import functional as F

# Half a false negative and half a false positive weigh as one true positive: the Dice case of Tversky (section 2.3).
FALSE_WEIGHT = 0.5
# One voxel: a structure outside the crop still teaches not to be drawn.
SMOOTHING = 1.0


def dice_loss(probabilities: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Sum over the classes of weight x (1 - soft Dice), section 2.3 equation 2.

    Args:
        probabilities, truth: float (classes, voxels), the truth one-hot.
        weights: float (classes,), 0 where a class is masked.
    """
    hit = (probabilities * truth).sum(dim=1)
    wrong = probabilities.sum(dim=1) + truth.sum(dim=1) - 2 * hit
    dice = (hit + SMOOTHING) / (hit + FALSE_WEIGHT * wrong + SMOOTHING)
    return (weights * (1 - dice)).sum()


def focal_loss(log_probabilities: Tensor, truth: Tensor, weights: Tensor, *, gamma: float) -> Tensor:
    """Mean over the voxels of -weight x (1 - p)^gamma x log p of the true class, section 2.3 equation 3.

    Args:
        log_probabilities, truth: float (classes, voxels), the truth one-hot.
        weights: float (classes,), 0 where a class is masked.
    """
    surprise = -((1 - log_probabilities.exp()) ** gamma) * log_probabilities * truth
    return (weights[:, None] * surprise).sum() / truth.shape[1]


def hybrid_loss(
    logits: Tensor,
    target: Tensor,
    annotated: tuple[bool, ...],
    *,
    class_weights: tuple[float, ...] = (),
    focal_weight: float = 0.5,
    focal_gamma: float = 2.0,
    missing: str = "mask",
) -> Tensor:
    """L_Dice + lambda L_focal, section 2.3, with unannotated structures masked out, section 2.4.

    No gradient comes through a masked class's probabilities; its logit still takes part in the softmax of the others.

    Args:
        logits: float (1, classes, z, y, x).
        target: int64 (z, y, x), labels; voxels of a structure that is not annotated count as background.
        annotated: for each structure, whether the case has its contours.
        class_weights: one a class, background first; empty for all ones.
        focal_weight: lambda.
        focal_gamma: gamma.
        missing: "mask" drops the terms of what is not annotated, and the background's with them; "marginal" adds its
            probability to the background's, so that every other voxel still teaches.

    Returns:
        A scalar; zero if nothing is annotated and `missing` is "mask".
    """
    classes = logits.shape[1]
    flat = logits[0].float().reshape(classes, -1)
    weights = torch.tensor(class_weights or (1.0,) * classes, device=flat.device)
    if missing == "marginal":
        flat, kept = _merged_into_background(flat, annotated)
        weights = weights[kept]
        new_label = torch.zeros(classes, dtype=torch.int64, device=flat.device)
        new_label[kept] = torch.arange(len(kept), device=flat.device)
        labels = new_label[target.reshape(-1)]
    else:
        known = (all(annotated), *annotated)
        weights = weights * torch.tensor(known, device=flat.device)
        labels = target.reshape(-1)
    log_probabilities = flat.log_softmax(dim=0)
    truth = F.one_hot(labels, len(flat)).T.float()
    dice = dice_loss(log_probabilities.exp(), truth, weights)
    return dice + focal_weight * focal_loss(log_probabilities, truth, weights, gamma=focal_gamma)


def _merged_into_background(flat: Tensor, annotated: tuple[bool, ...]) -> tuple[Tensor, list[int]]:
    """Logits (classes, voxels) -> those of background + unannotated and each annotated class, and which classes."""
    kept = [0, *(i + 1 for i, known in enumerate(annotated) if known)]
    merged = [0, *(i + 1 for i, known in enumerate(annotated) if not known)]
    background = flat[merged].logsumexp(dim=0, keepdim=True)
    return torch.cat((background, flat[kept[1:]])), kept
