from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from csm.errors import InputError
from csm.losses import HARD, SOFT, build_loss
from csm.losses.hard import cross_entropy, focal, label_smoothing


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def cross_entropy_by_hand(logits: np.ndarray, target: np.ndarray) -> float:
    return float(
        np.mean([-sum(t * np.log(p) for t, p in zip(*row, strict=True)) for row in zip(target, softmax(logits), strict=True)])
    )


def label_smoothing_by_hand(logits: np.ndarray, target: np.ndarray, alpha: float = 0.05) -> float:
    uniform = np.full_like(target, 1 / target.shape[1])
    return (1 - alpha) * cross_entropy_by_hand(logits, target) + alpha * cross_entropy_by_hand(logits, uniform)


def focal_by_hand(logits: np.ndarray, target: np.ndarray, gamma: float = 3.0) -> float:
    probs = softmax(logits)
    return float(
        np.mean(
            [-sum(t * (1 - p) ** gamma * np.log(p) for t, p in zip(*row, strict=True)) for row in zip(target, probs, strict=True)]
        )
    )


BY_HAND: dict[str, Callable[..., float]] = {
    "cross-entropy": cross_entropy_by_hand,
    "label-smoothing": label_smoothing_by_hand,
    "focal": focal_by_hand,
}


def logits_of(rows: int = 6, classes: int = 4, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets_of(kind: str, rows: int = 6, classes: int = 4) -> torch.Tensor:
    if kind == "one-hot":
        return F.one_hot(torch.arange(rows) % classes, classes).double()
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(9), dtype=torch.float64).softmax(dim=1)


def test_every_loss_is_tested() -> None:
    assert set(BY_HAND) == set(HARD)


@pytest.mark.parametrize("kind", ["one-hot", "soft"])
@pytest.mark.parametrize("name", BY_HAND)
def test_value_by_hand(name: str, kind: str) -> None:
    logits, target = logits_of(), targets_of(kind)
    value = HARD[name](logits, target)
    assert value.shape == ()
    assert value.item() == pytest.approx(BY_HAND[name](logits.numpy(), target.numpy()), rel=1e-9)


@pytest.mark.parametrize("kind", ["one-hot", "soft"])
@pytest.mark.parametrize("name", BY_HAND)
def test_gradient(name: str, kind: str) -> None:
    assert torch.autograd.gradcheck(lambda z: HARD[name](z, targets_of(kind)), (logits_of().requires_grad_(),))


@pytest.mark.parametrize("name", BY_HAND)
def test_a_batch_is_the_mean_of_its_rows(name: str) -> None:
    logits, target = logits_of(), targets_of("soft")
    rows = [HARD[name](logits[row : row + 1], target[row : row + 1]).item() for row in range(6)]
    assert HARD[name](logits, target).item() == pytest.approx(sum(rows) / 6, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BY_HAND)
def test_certain_predictions_are_finite_right_or_wrong(name: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1000.0, 0.0, -1000.0]] * 3, dtype=dtype, requires_grad=True)  # softmax is exactly 1, 0, 0
    loss = HARD[name](logits, torch.eye(3, dtype=dtype))
    assert loss.isfinite()
    assert loss > 100  # two of three are certain and wrong
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", ["cross-entropy", "focal"])
def test_a_certain_right_prediction_costs_nothing(name: str) -> None:
    logits = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    loss = HARD[name](logits, torch.tensor([[1.0, 0.0]]))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("name", BY_HAND)
def test_bfloat16_is_near_float64(name: str) -> None:
    logits, target = logits_of(rows=32), targets_of("soft", rows=32)
    low = HARD[name](logits.bfloat16(), target.bfloat16())
    assert low.item() == pytest.approx(HARD[name](logits, target).item(), rel=0.03)


def test_focal_without_focus_is_cross_entropy() -> None:
    for kind in ("one-hot", "soft"):
        logits, target = logits_of(), targets_of(kind)
        assert focal(logits, target, gamma=0.0).item() == pytest.approx(cross_entropy(logits, target).item(), rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 3.0])
def test_focal_has_a_gradient_where_the_softmax_saturates(gamma: float) -> None:
    logits = torch.tensor([[60.0, 0.0], [0.0, 60.0], [20.0, 0.0]], requires_grad=True)  # float32: p is exactly 1
    focal(logits, torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]]), gamma).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[1, 0] < -0.3  # certain and wrong: nothing is taken from its weight


@pytest.mark.parametrize("gamma", [1.0, 2.5, 5.0])
def test_focal_by_hand_for_other_gammas(gamma: float) -> None:
    logits, target = logits_of(), targets_of("soft")
    assert focal(logits, target, gamma).item() == pytest.approx(focal_by_hand(logits.numpy(), target.numpy(), gamma), rel=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_label_smoothing_is_torchs(alpha: float) -> None:
    logits, labels = logits_of(), torch.arange(6) % 4
    expected = torch.nn.CrossEntropyLoss(label_smoothing=alpha)(logits, labels)  # from indices, another path through torch
    assert label_smoothing(logits, targets_of("one-hot"), alpha).item() == pytest.approx(expected.item(), rel=1e-12)


def test_parameters_are_bound() -> None:
    logits, target = logits_of(), targets_of("one-hot")
    bound = build_loss(HARD, "focal", {"gamma": 5}, "loss.parameters")
    assert bound(logits, target).item() == focal(logits, target, 5.0).item()


def test_an_unknown_loss_is_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"train.loss: unknown loss 'hinge'; one of cross-entropy, label-smoothing, focal"):
        build_loss(HARD, "hinge", {}, "train.loss")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"beta": 1.0}, "here.beta: no such setting; allowed: gamma"), ({"gamma": "much"}, "here.gamma: .* got 'much'")],
)
def test_a_wrong_parameter_is_named(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_loss(HARD, "focal", parameters, "here")


def test_soft_losses_have_no_parameters() -> None:
    for name in SOFT:
        with pytest.raises(InputError, match=r"here.gamma: no such setting; allowed: none"):
            build_loss(SOFT, name, {"gamma": 1.0}, "here")
