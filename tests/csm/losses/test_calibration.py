import pytest
import torch
from torch.nn import functional as F

from csm.losses.calibration import mdca, mmce
from csm.losses.focal import focal
from csm.losses.hard import cross_entropy


def logits_with(*probs: float) -> torch.Tensor:
    """One image per probability of class 0 of two."""
    return torch.tensor([[p, 1 - p] for p in probs], dtype=torch.float64).log()


def labels_as_targets(*labels: int) -> torch.Tensor:
    return F.one_hot(torch.tensor(labels), 2).double()


def mmce_alone(logits: torch.Tensor, target: torch.Tensor) -> float:
    return (mmce(logits, target) - cross_entropy(logits, target)).item()


def test_mmce_of_one_image_is_its_calibration_gap() -> None:
    assert mmce_alone(logits_with(0.8), labels_as_targets(0)) == pytest.approx(0.2, rel=1e-9)
    assert mmce_alone(logits_with(0.8), labels_as_targets(1)) == pytest.approx(0.8, rel=1e-9)


def test_mmce_of_equal_confidences_is_the_calibration_error() -> None:
    assert mmce_alone(logits_with(0.7, 0.7, 0.7, 0.7), labels_as_targets(0, 0, 1, 1)) == pytest.approx(0.2, rel=1e-9)


def test_mmce_of_a_calibrated_batch_has_a_gradient_of_cross_entropy_alone() -> None:
    logits = logits_with(0.75, 0.75, 0.75, 0.75).requires_grad_()  # three of four are right: the root is of 0
    target = labels_as_targets(0, 0, 0, 1)
    gradients = [torch.autograd.grad(loss(logits, target), logits)[0] for loss in (mmce, cross_entropy)]
    assert mmce_alone(logits, target) == pytest.approx(0, abs=1e-12)
    assert torch.allclose(*gradients, atol=1e-12)


def test_mmce_takes_the_chance_to_be_right_under_a_soft_target() -> None:
    assert mmce_alone(logits_with(0.8), torch.tensor([[0.8, 0.2]], dtype=torch.float64)) == pytest.approx(0, abs=1e-12)
    assert mmce_alone(logits_with(0.8), torch.tensor([[0.3, 0.7]], dtype=torch.float64)) == pytest.approx(0.5, rel=1e-9)


def test_mmce_is_finite_in_float32_for_large_batches_of_near_equals() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = (1e-4 * torch.randn(512, 10, generator=draw)).requires_grad_()
    loss = mmce(logits, F.one_hot(torch.arange(512) % 10, 10).float())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.norm() < 1


def test_mdca_is_of_probabilities_and_not_softened_twice() -> None:
    logits, target = logits_with(0.9, 0.9, 0.6), labels_as_targets(0, 0, 0)
    apart = (mdca(logits, target) - cross_entropy(logits, target)).item()
    assert apart == pytest.approx(1 - (0.9 + 0.9 + 0.6) / 3, rel=1e-9)  # the same for both classes


def test_mdca_is_zero_for_right_frequencies() -> None:
    logits, target = logits_with(0.75, 0.25), labels_as_targets(0, 1)
    assert mdca(logits, target).item() == pytest.approx(cross_entropy(logits, target).item(), rel=1e-12)


def test_the_base_of_mdca_is_focal() -> None:
    logits, target = logits_with(0.8, 0.3), labels_as_targets(0, 0)
    for gamma in (0.0, 0.5, 3.0):
        assert mdca(logits, target, weight=0.0, gamma=gamma).item() == pytest.approx(
            focal(logits, target, gamma).item(), rel=1e-12
        )
