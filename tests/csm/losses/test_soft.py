import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from csm.losses import SOFT
from csm.losses.hard import brier, cross_entropy
from csm.losses.soft import kl, l1, l2

BY_HAND: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "cross-entropy": lambda p, q: float(
        np.mean([-sum(b * math.log(a) for a, b in zip(*row, strict=True)) for row in zip(p, q, strict=True)])
    ),
    "kl": lambda p, q: float(np.mean([sum(rel_entr(b, a)) for a, b in zip(p, q, strict=True)])),
    "l1": lambda p, q: float(np.mean([sum(abs(a - b)) for a, b in zip(p, q, strict=True)])),
    "l2": lambda p, q: float(np.mean([sum((a - b) ** 2) for a, b in zip(p, q, strict=True)])),
    # Each class drawn with its probability, and scored as a label.
    "brier": lambda p, q: float(
        np.mean([sum(b[y] * sum((a - np.eye(len(a))[y]) ** 2) for y in range(len(a))) for a, b in zip(p, q, strict=True)])
    ),
}
TARGETS = {
    "soft": torch.randn(5, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64).softmax(dim=1),
    "pair": torch.tensor(
        [[0.3, 0.7, 0.0], [0.0, 0.5, 0.5], [0.9, 0.0, 0.1], [0.2, 0.8, 0.0], [0.0, 0.1, 0.9]], dtype=torch.float64
    ),
    "one-hot": torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0, 1]],
}


def logits_of() -> torch.Tensor:
    return 2 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_every_loss_is_tested() -> None:
    assert set(BY_HAND) == set(SOFT)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", BY_HAND)
def test_value_by_hand(name: str, kind: str) -> None:
    logits, target = logits_of(), TARGETS[kind]
    value = SOFT[name](logits, target)
    assert value.shape == ()
    assert value.item() == pytest.approx(BY_HAND[name](softmax(logits.numpy(), axis=1), target.numpy()), rel=1e-9)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", BY_HAND)
def test_gradient(name: str, kind: str) -> None:
    assert torch.autograd.gradcheck(lambda z: SOFT[name](z, TARGETS[kind]), (logits_of().requires_grad_(),))


@pytest.mark.parametrize("name", BY_HAND)
def test_a_batch_is_the_mean_of_its_rows(name: str) -> None:
    logits, target = logits_of(), TARGETS["pair"]
    rows = [SOFT[name](logits[row : row + 1], target[row : row + 1]).item() for row in range(5)]
    assert SOFT[name](logits, target).item() == pytest.approx(sum(rows) / 5, rel=1e-9)


@pytest.mark.parametrize("loss", [kl, l1, l2])
def test_the_soft_label_itself_costs_nothing(loss: Callable[..., torch.Tensor]) -> None:
    target = TARGETS["soft"]
    assert loss(target.log(), target).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_soft_label_is_the_minimum(name: str) -> None:
    target = TARGETS["soft"]
    least = SOFT[name](target.log(), target).item()
    for seed in range(20):
        away = 0.3 * torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert SOFT[name](target.log() + away, target).item() > least


def test_brier_trains_as_l2_does_on_another_scale() -> None:
    for target in TARGETS.values():
        gradients = []
        for loss in (brier, l2):
            logits = logits_of().requires_grad_()
            gradients.append(torch.autograd.grad(loss(logits, target), logits)[0])
        assert torch.allclose(*gradients, rtol=1e-12, atol=1e-15)
        apart = (1 - target.square().sum(dim=1)).mean().item()
        assert brier(logits_of(), target).item() == pytest.approx(l2(logits_of(), target).item() + apart, rel=1e-12)


def test_kl_is_cross_entropy_less_the_entropy_of_the_label() -> None:
    logits, target = logits_of(), TARGETS["soft"]
    entropy = -(target * target.log()).sum(dim=1).mean()
    assert kl(logits, target).item() == pytest.approx((cross_entropy(logits, target) - entropy).item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BY_HAND)
def test_certain_predictions_are_finite_right_or_wrong(name: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1000.0, 0.0, -1000.0]] * 4, dtype=dtype, requires_grad=True)  # softmax is exactly 1, 0, 0
    target = torch.cat([torch.eye(3), torch.tensor([[0.5, 0.5, 0.0]])]).to(dtype)
    loss = SOFT[name](logits, target)
    assert loss.isfinite()
    assert loss > 0.5
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("name", "worst"), [("l1", 2.0), ("l2", 2.0), ("brier", 2.0)])
def test_the_worst_prediction(name: str, worst: float) -> None:
    assert SOFT[name](torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item() == worst


@pytest.mark.parametrize("name", BY_HAND)
def test_bfloat16_is_near_float64(name: str) -> None:
    logits, target = logits_of().bfloat16(), TARGETS["pair"].bfloat16()
    low = SOFT[name](logits, target)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(SOFT[name](logits.double(), target.double()).item(), rel=1e-5)
