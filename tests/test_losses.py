"""The losses are MONAI's where MONAI has them, and blind where nothing is annotated."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from anatomynet.engine.losses import SMOOTHING, dice_loss, focal_loss, hybrid_loss

FLOAT_TOLERANCE = 1e-5
CLASSES = 4
WEIGHTS = (0.5, 1.0, 2.0, 3.0)
ALL = (True,) * (CLASSES - 1)
MIDDLE_MISSING = (True, False, True)
MISSING_LABEL = 2


@pytest.fixture
def logits() -> Tensor:
    torch.manual_seed(1)
    return (3 * torch.randn(1, CLASSES, 5, 6, 7)).requires_grad_()


@pytest.fixture
def target() -> Tensor:
    torch.manual_seed(2)
    return torch.randint(0, CLASSES, (5, 6, 7))


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


def monai_dice(logits: Tensor, target: Tensor) -> Tensor:
    """One loss a class."""
    from monai.losses.tversky import TverskyLoss

    loss = TverskyLoss(
        softmax=True, to_onehot_y=True, alpha=0.5, beta=0.5, smooth_nr=SMOOTHING, smooth_dr=SMOOTHING, reduction="none"
    )
    per_class: Tensor = loss(logits, target[None, None])
    return per_class.flatten()


def monai_focal(logits: Tensor, target: Tensor, *, gamma: float = 2.0) -> Tensor:
    """One loss a class, of the mean over the voxels."""
    from monai.losses.focal_loss import FocalLoss

    loss = FocalLoss(use_softmax=True, to_onehot_y=True, gamma=gamma, reduction="none")
    per_voxel: Tensor = loss(logits, target[None, None])
    return per_voxel[0].flatten(1).mean(dim=1)


def test_dice_is_monais_tversky(logits: Tensor, target: Tensor) -> None:
    truth = F.one_hot(target.flatten(), CLASSES).T.float()
    weights = torch.tensor(WEIGHTS)
    found = dice_loss(logits[0].flatten(1).softmax(dim=0), truth, weights)
    assert found.item() == pytest.approx((weights * monai_dice(logits, target)).sum().item(), abs=FLOAT_TOLERANCE)


def test_dice_is_monais_dice(logits: Tensor, target: Tensor) -> None:
    from monai.losses.dice import DiceLoss

    truth = F.one_hot(target.flatten(), CLASSES).T.float()
    # 2 x hit + smoothing over the sums + smoothing: twice ours above and below.
    monai = DiceLoss(softmax=True, to_onehot_y=True, smooth_nr=2 * SMOOTHING, smooth_dr=2 * SMOOTHING, reduction="sum")
    found = dice_loss(logits[0].flatten(1).softmax(dim=0), truth, torch.ones(CLASSES))
    assert found.item() == pytest.approx(monai(logits, target[None, None]).item(), abs=FLOAT_TOLERANCE)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
def test_focal_is_monais(logits: Tensor, target: Tensor, gamma: float) -> None:
    truth = F.one_hot(target.flatten(), CLASSES).T.float()
    weights = torch.tensor(WEIGHTS)
    found = focal_loss(logits[0].flatten(1).log_softmax(dim=0), truth, weights, gamma=gamma)
    expected = (weights * monai_focal(logits, target, gamma=gamma)).sum()
    assert found.item() == pytest.approx(expected.item(), abs=FLOAT_TOLERANCE)


def test_focal_without_gamma_is_cross_entropy(logits: Tensor, target: Tensor) -> None:
    found = hybrid_loss(logits, target, ALL, focal_weight=1.0, focal_gamma=0.0)
    dice = hybrid_loss(logits, target, ALL, focal_weight=0.0)
    assert (found - dice).item() == pytest.approx(F.cross_entropy(logits, target[None]).item(), abs=FLOAT_TOLERANCE)


@pytest.mark.parametrize("missing", ["mask", "marginal"])
def test_the_hybrid_adds_both(logits: Tensor, target: Tensor, missing: str) -> None:
    found = hybrid_loss(logits, target, ALL, class_weights=WEIGHTS, focal_weight=0.3, missing=missing)
    weights = torch.tensor(WEIGHTS)
    expected = (weights * (monai_dice(logits, target) + 0.3 * monai_focal(logits, target))).sum()
    assert found.item() == pytest.approx(expected.item(), abs=FLOAT_TOLERANCE)


def test_masked_terms_are_the_annotated_classes_alone(logits: Tensor, target: Tensor) -> None:
    found = hybrid_loss(logits, target, MIDDLE_MISSING, class_weights=WEIGHTS, missing="mask")
    weights = torch.tensor([0.0, WEIGHTS[1], 0.0, WEIGHTS[3]])  # the background goes with the missing structure
    expected = (weights * (monai_dice(logits, target) + 0.5 * monai_focal(logits, target))).sum()
    assert found.item() == pytest.approx(expected.item(), abs=FLOAT_TOLERANCE)
    assert torch.allclose(gradient(found, logits), gradient(expected, logits), atol=FLOAT_TOLERANCE)


@pytest.mark.parametrize("missing", ["mask", "marginal"])
def test_truth_of_a_missing_structure_does_not_matter(logits: Tensor, target: Tensor, missing: str) -> None:
    without = torch.where(target == MISSING_LABEL, 0, target)
    more = torch.where(target == 0, MISSING_LABEL, target)
    losses = [hybrid_loss(logits, t, MIDDLE_MISSING, missing=missing) for t in (target, without, more)]
    assert losses[0] == losses[1] == losses[2]
    assert torch.equal(gradient(losses[0], logits), gradient(losses[1], logits))
    assert not torch.equal(target, without)


def test_weights_of_masked_terms_do_not_matter(logits: Tensor, target: Tensor) -> None:
    heavy = (99.0, WEIGHTS[1], 99.0, WEIGHTS[3])
    loss = hybrid_loss(logits, target, MIDDLE_MISSING, class_weights=WEIGHTS, missing="mask")
    assert loss == hybrid_loss(logits, target, MIDDLE_MISSING, class_weights=heavy, missing="mask")


def test_masked_terms_have_no_gradient(logits: Tensor, target: Tensor) -> None:
    only_masked_terms = hybrid_loss(logits, target, MIDDLE_MISSING, class_weights=(1.0, 0.0, 1.0, 0.0), missing="mask")
    assert only_masked_terms == 0
    assert not gradient(only_masked_terms, logits).any()


@pytest.mark.parametrize("masked", [(0, MISSING_LABEL), (MISSING_LABEL,), (0, 1, 2, 3)])
def test_the_gradient_through_a_masked_class_is_exactly_zero(
    logits: Tensor, target: Tensor, masked: tuple[int, ...]
) -> None:
    """Section 2.4, of each loss and of what it is given: not small, but zero in every voxel."""
    weights = torch.tensor([0.0 if label in masked else weight for label, weight in enumerate(WEIGHTS)])
    truth = F.one_hot(target.flatten(), CLASSES).T.float()
    log_probabilities = logits[0].flatten(1).log_softmax(dim=0).detach().requires_grad_()
    probabilities = log_probabilities.exp().detach().requires_grad_()
    rows = {
        "dice": gradient(dice_loss(probabilities, truth, weights), probabilities),
        "focal": gradient(focal_loss(log_probabilities, truth, weights, gamma=2.0), log_probabilities),
    }
    for name, found in rows.items():
        zero = [not row.any() for row in found]
        assert zero == [label in masked for label in range(CLASSES)], name


def test_a_masked_logit_moves_by_the_softmax_of_the_annotated_classes_alone(logits: Tensor, target: Tensor) -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 1.0])
    truth = F.one_hot(target.flatten(), CLASSES).T.float()
    shares = logits[0].flatten(1).softmax(dim=0).detach().requires_grad_()
    through = gradient(dice_loss(shares, truth, weights), shares)  # rows of the annotated classes alone
    found = gradient(hybrid_loss(logits, target, MIDDLE_MISSING, focal_weight=0.0, missing="mask"), logits)
    expected = -shares[MISSING_LABEL] * (shares * through).sum(dim=0)
    assert expected.abs().max() > 1e-3
    assert torch.allclose(found[0, MISSING_LABEL].flatten(), expected, atol=FLOAT_TOLERANCE)


def test_nothing_annotated_teaches_nothing_when_masked(logits: Tensor) -> None:
    loss = hybrid_loss(logits, torch.zeros(5, 6, 7, dtype=torch.int64), (False,) * 3, missing="mask")
    assert loss == 0
    assert not gradient(loss, logits).any()


def test_nothing_annotated_teaches_nothing_when_marginal(logits: Tensor) -> None:
    # Everything may be anything: the one class that is left is certain.
    loss = hybrid_loss(logits, torch.zeros(5, 6, 7, dtype=torch.int64), (False,) * 3, missing="marginal")
    assert loss.item() == pytest.approx(0, abs=FLOAT_TOLERANCE)
    assert gradient(loss, logits).abs().max() < FLOAT_TOLERANCE


def test_marginal_by_hand() -> None:
    # Two voxels, background and structures 1 and 2, of which 2 is not annotated.
    shares = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]])
    logits = (shares.log() + torch.tensor([[0.7], [-1.1]])).T.reshape(1, 3, 1, 1, 2)  # softmax forgets the shift
    target = torch.tensor([0, 1]).reshape(1, 1, 2)
    found = hybrid_loss(logits, target, (True, False), class_weights=(1.0, 2.0, 50.0), missing="marginal")
    # Background and structure 2 together: 0.8 and 0.4; structure 1: 0.2 and 0.6.
    background = 1 - (0.8 + 1) / (0.8 + 0.5 * (1.2 + 1 - 2 * 0.8) + 1)
    structure = 1 - (0.6 + 1) / (0.6 + 0.5 * (0.8 + 1 - 2 * 0.6) + 1)
    focal = (1 * 0.2**2 * -math.log(0.8) + 2 * 0.4**2 * -math.log(0.6)) / 2
    assert found.item() == pytest.approx(background + 2 * structure + 0.5 * focal, abs=FLOAT_TOLERANCE)


def test_a_perfect_answer_costs_nothing(target: Tensor) -> None:
    certain = 50.0 * F.one_hot(target, CLASSES).permute(3, 0, 1, 2)[None].float()
    assert hybrid_loss(certain, target, ALL).item() == pytest.approx(0, abs=FLOAT_TOLERANCE)


def test_extreme_logits_stay_finite(target: Tensor) -> None:
    wrong = (1e4 * F.one_hot((target + 1) % CLASSES, CLASSES).permute(3, 0, 1, 2)[None].float()).requires_grad_()
    for missing in ("mask", "marginal"):
        loss = hybrid_loss(wrong, target, MIDDLE_MISSING, missing=missing)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient(loss, wrong)).all()


def test_half_precision_logits_are_summed_in_single_precision(logits: Tensor, target: Tensor) -> None:
    rounded = logits.bfloat16()
    loss = hybrid_loss(rounded, target, ALL)
    assert loss.dtype == torch.float32
    assert loss == hybrid_loss(rounded.float(), target, ALL)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_a_certain_answer_has_a_finite_gradient(target: Tensor, gamma: float) -> None:
    """(1 - p) ** gamma has none at p = 1 for a gamma between 0 and 1: no configuration may have such."""
    certain = (1e4 * F.one_hot(target, CLASSES).permute(3, 0, 1, 2)[None].float()).requires_grad_()
    loss = hybrid_loss(certain, target, ALL, focal_gamma=gamma)
    assert torch.isfinite(gradient(loss, certain)).all()
