"""All of ``HARD`` against loops over images; what is special to a loss is in the test of its module."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from csm.errors import InputError
from csm.losses import HARD, SOFT, Loss, build_loss
from csm.losses.hard import brier, cross_entropy, entropy_penalty, label_smoothing


def softmax(row: np.ndarray) -> np.ndarray:
    raised = np.exp(row - row.max())
    return raised / raised.sum()


def focal_of(p: np.ndarray, y: int, gamma: float) -> float:
    return -((1 - p[y]) ** gamma) * math.log(p[y])


def dual_focal_of(p: np.ndarray, y: int, gamma: float = 5.0) -> float:
    return -((1 - p[y] + max([q for q in p if q < p[y]], default=0.0)) ** gamma) * math.log(p[y])


def mbls_of(z: np.ndarray, y: int, weight: float = 0.1, margin: float = 10.0) -> float:
    return -math.log(softmax(z)[y]) + weight * sum(max(max(z) - v - margin, 0) for v in z) / len(z)


def acls_of(
    z: np.ndarray, y: int, weight: float = 0.1, positive: float = 1.0, negative: float = 0.1, margin: float = 10.0
) -> float:
    top = int(np.argmax(z))
    below = [max(z[top] - v - margin, 0) ** 2 for k, v in enumerate(z) if k != top]
    penalty = positive * max(z[top] - margin, 0) ** 2 + negative * sum(below) / len(below)
    return -math.log(softmax(z)[y]) + weight * penalty


def cpc_of(z: np.ndarray, y: int, discrimination: float = 1.0, exclusion: float = 1.0) -> float:
    def cost(i: int, j: int) -> float:
        return math.log1p(math.exp(z[j] - z[i]))

    rest = [k for k in range(len(z)) if k != y]
    against = sum(cost(y, k) for k in rest) / len(rest)
    pairs = [(cost(i, j) + cost(j, i)) / 2 for i in rest for j in rest if i < j]
    even = sum(pairs) / len(pairs) / 2 if pairs else 0.0
    return -math.log(softmax(z)[y]) + discrimination * against + exclusion * even


# Of one image (logits, class) -> loss; the loss of a batch is the mean, of a soft target its mean over the classes.
OF_IMAGE: dict[str, Callable[..., float]] = {
    "cross-entropy": lambda z, y: -math.log(softmax(z)[y]),
    "label-smoothing": lambda z, y, alpha=0.05: (
        -(1 - alpha) * math.log(softmax(z)[y]) - alpha * float(np.mean([math.log(p) for p in softmax(z)]))
    ),
    "focal": lambda z, y, gamma=3.0: focal_of(softmax(z), y, gamma),
    "flsd-53": lambda z, y: focal_of(softmax(z), y, 5.0 if softmax(z)[y] < 0.2 else 3.0),
    "adafocal": lambda z, y, gamma=1.0: focal_of(softmax(z), y, gamma),  # before the first epoch has ended
    "dual-focal": lambda z, y, gamma=5.0: dual_focal_of(softmax(z), y, gamma),
    "brier": lambda z, y: sum((p - (k == y)) ** 2 for k, p in enumerate(softmax(z))),
    "mbls": mbls_of,
    "cpc": cpc_of,
    "entropy-penalty": lambda z, y, weight=0.1: -math.log(softmax(z)[y]) + weight * sum(p * math.log(p) for p in softmax(z)),
    "acls": acls_of,
}


def mmce_of(logits: np.ndarray, target: np.ndarray, weight: float = 1.0) -> float:
    probs, total = [softmax(z) for z in logits], 0.0
    for p, s in zip(probs, target, strict=True):
        for q, t in zip(probs, target, strict=True):
            distance = abs(max(p) - max(q))
            total += (s[np.argmax(p)] - max(p)) * (t[np.argmax(q)] - max(q)) * math.exp(-distance / 0.4)
    return batch_of("cross-entropy", logits, target) + weight * math.sqrt(total) / len(logits)


def mdca_of(logits: np.ndarray, target: np.ndarray, weight: float = 1.0, gamma: float = 0.0) -> float:
    probs, classes = [softmax(z) for z in logits], target.shape[1]
    apart = [abs(sum(p[k] for p in probs) - sum(t[k] for t in target)) / len(target) for k in range(classes)]
    return batch_of("focal", logits, target, gamma=gamma) + weight * sum(apart) / classes


OF_BATCH: dict[str, Callable[..., float]] = {"mmce": mmce_of, "mdca": mdca_of}
NAMES = [*OF_IMAGE, *OF_BATCH]
# Settings that make every part of a loss count.
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("label-smoothing", {"alpha": 0.3}),
    ("focal", {"gamma": 0.3}),
    ("focal", {"gamma": 2.5}),
    ("adafocal", {"gamma": 2.0}),
    ("dual-focal", {"gamma": 0.5}),
    ("dual-focal", {"gamma": 1.0}),
    ("mbls", {"weight": 0.7, "margin": 1.0}),
    ("cpc", {"discrimination": 0.4, "exclusion": 3.0}),
    ("entropy-penalty", {"weight": 2.0}),
    ("acls", {"weight": 0.7, "positive": 0.6, "negative": 0.3, "margin": 0.5}),
    ("mmce", {"weight": 3.0}),
    ("mdca", {"weight": 3.0, "gamma": 2.0}),
]


def batch_of(name: str, logits: np.ndarray, target: np.ndarray, **parameters: float) -> float:
    if name in OF_BATCH:
        return OF_BATCH[name](logits, target, **parameters)
    rows = [sum(t * OF_IMAGE[name](z, y, **parameters) for y, t in enumerate(row)) for z, row in zip(logits, target, strict=True)]
    return float(np.mean(rows))


def built(name: str, **parameters: Any) -> Loss:
    return build_loss(HARD, name, parameters, "here")


def logits_of(rows: int = 6, classes: int = 4, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets_of(kind: str, rows: int = 6, classes: int = 4) -> torch.Tensor:
    if kind == "one-hot":
        return F.one_hot(torch.arange(rows) % classes, classes).double()
    if kind == "one class":
        return F.one_hot(torch.ones(rows, dtype=torch.int64), classes).double()
    if kind == "pair":  # as pixel mixing makes them
        return 0.7 * targets_of("one-hot", rows, classes) + 0.3 * targets_of("one-hot", rows, classes).roll(1, dims=0)
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(9), dtype=torch.float64).softmax(dim=1)


def test_every_loss_is_tested() -> None:
    assert set(NAMES) == set(HARD)


@pytest.mark.parametrize(("rows", "classes"), [(6, 4), (6, 2), (1, 4), (1, 2), (7, 3)])
@pytest.mark.parametrize("kind", ["one-hot", "one class", "pair", "soft"])
@pytest.mark.parametrize("name", NAMES)
def test_value_by_hand(name: str, kind: str, rows: int, classes: int) -> None:
    logits, target = logits_of(rows, classes), targets_of(kind, rows, classes)
    value = built(name)(logits, target)
    assert value.shape == ()
    assert value.item() == pytest.approx(batch_of(name, logits.numpy(), target.numpy()), rel=1e-9)


@pytest.mark.parametrize("kind", ["one-hot", "soft"])
@pytest.mark.parametrize(("name", "parameters"), SETTINGS)
def test_value_by_hand_with_settings(name: str, parameters: dict[str, Any], kind: str) -> None:
    logits, target = 3 * logits_of(), targets_of(kind)
    expected = batch_of(name, logits.numpy(), target.numpy(), **parameters)
    assert built(name, **parameters)(logits, target).item() == pytest.approx(expected, rel=1e-9)
    assert expected != pytest.approx(batch_of(name, logits.numpy(), target.numpy()), rel=1e-3)  # the settings do something


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("kind", ["one-hot", "one class", "soft"])
@pytest.mark.parametrize("name", NAMES)
def test_gradient(name: str, kind: str, rows: int) -> None:
    for classes in (2, 4):
        logits = logits_of(rows, classes).requires_grad_()
        assert torch.autograd.gradcheck(lambda z: built(name)(z, targets_of(kind, rows, classes)), (logits,))  # noqa: B023


@pytest.mark.parametrize(("name", "parameters"), [entry for entry in SETTINGS if entry[0] != "acls"])
def test_gradient_with_settings(name: str, parameters: dict[str, Any]) -> None:
    loss = built(name, **parameters)
    assert torch.autograd.gradcheck(lambda z: loss(z, targets_of("pair")), (logits_of().requires_grad_(),))


@pytest.mark.parametrize("name", OF_IMAGE)
def test_a_batch_is_the_mean_of_its_rows(name: str) -> None:
    logits, target, loss = logits_of(), targets_of("soft"), built(name)
    rows = [loss(logits[row : row + 1], target[row : row + 1]).item() for row in range(6)]
    assert loss(logits, target).item() == pytest.approx(sum(rows) / 6, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_a_batch_does_not_matter(name: str) -> None:
    logits, target, loss = logits_of(), targets_of("pair"), built(name)
    assert loss(logits.flip(0), target.flip(0)).item() == pytest.approx(loss(logits, target).item(), rel=1e-12)


@pytest.mark.parametrize("size", [1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "parameters"), [*((name, {}) for name in NAMES), *SETTINGS])
def test_certain_predictions_are_finite_right_or_wrong(
    name: str, parameters: dict[str, Any], dtype: torch.dtype, size: float
) -> None:
    certain = torch.tensor([size, 0.0, -size], dtype=dtype)  # softmax is exactly 1, 0, 0
    right, wrong, half = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 0, 1]), torch.tensor([0.5, 0.5, 0])
    for rows in ([right], [wrong], [half], [right] * 3, [right, wrong, half]):
        logits = certain.expand(len(rows), 3).clone().requires_grad_()
        loss = built(name, **parameters)(logits, torch.stack(rows).to(dtype))
        assert loss.isfinite()
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        loss.backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_prediction_that_is_certain_is_pulled_back(name: str) -> None:
    logits = torch.tensor([[60.0, 0.0, 0.0]] * 2, requires_grad=True)  # float32: p is exactly 1, and 1e-26
    built(name)(logits, torch.tensor([[0.0, 1.0, 0.0]] * 2)).backward()
    assert logits.grad is not None
    if name == "brier":  # p (1 - p) has no slope left
        assert logits.grad.abs().max() < 1e-6
    else:
        assert logits.grad[0, 1] < -0.3


@pytest.mark.parametrize("name", ["cross-entropy", "focal", "flsd-53", "adafocal", "dual-focal", "brier", "mmce", "mdca"])
def test_a_certain_right_prediction_costs_nothing(name: str) -> None:
    logits = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    loss = built(name)(logits, torch.tensor([[1.0, 0.0]]))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near_float64(name: str) -> None:
    # Rounded before, so that what differs is the arithmetic alone.
    logits, target = logits_of(rows=32).bfloat16(), targets_of("soft", rows=32).bfloat16()
    low = built(name)(logits, target)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(built(name)(logits.double(), target.double()).item(), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_arithmetic_is_float32_under_autocast(name: str) -> None:
    logits, target = logits_of(rows=32).bfloat16(), targets_of("one-hot", rows=32).float()
    with torch.autocast("cpu", torch.bfloat16):
        low = built(name)(logits, target)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(built(name)(logits, target).item(), rel=1e-6)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"adafocal"}))
def test_most_losses_have_no_state(name: str) -> None:
    loss = built(name)
    before = loss(logits_of(), targets_of("soft")).item()
    loss.observe(logits_of(), torch.arange(6) % 4)
    assert not loss.state_dict()
    assert loss(logits_of(), targets_of("soft")).item() == before


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_label_smoothing_is_torchs(alpha: float) -> None:
    logits, labels = logits_of(), torch.arange(6) % 4
    expected = torch.nn.CrossEntropyLoss(label_smoothing=alpha)(logits, labels)  # from indices, another path through torch
    assert label_smoothing(logits, targets_of("one-hot"), alpha).item() == pytest.approx(expected.item(), rel=1e-12)


def test_entropy_penalty_is_that_of_torchs_categorical() -> None:
    entropy = torch.distributions.Categorical(logits=logits_of()).entropy().mean()
    expected = cross_entropy(logits_of(), targets_of("one-hot")) - 0.3 * entropy
    assert entropy_penalty(logits_of(), targets_of("one-hot"), 0.3).item() == pytest.approx(expected.item(), rel=1e-12)


def test_brier_is_bounded_by_two_and_least_where_the_target_is() -> None:
    assert brier(torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item() == 2
    target = targets_of("soft")
    least = brier(target.log(), target).item()
    assert least == pytest.approx((1 - target.square().sum(dim=1)).mean().item(), rel=1e-12)
    for seed in range(10):
        assert brier(target.log() + 0.3 * logits_of(seed=seed), target).item() > least


def test_parameters_are_bound() -> None:
    assert built("focal", gamma=5)(logits_of(), targets_of("soft")).item() == pytest.approx(
        batch_of("focal", logits_of().numpy(), targets_of("soft").numpy(), gamma=5.0), rel=1e-9
    )


def test_an_unknown_loss_is_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"train.loss: unknown loss 'hinge'; one of cross-entropy, label-smoothing, focal"):
        build_loss(HARD, "hinge", {}, "train.loss")


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("focal", {"beta": 1.0}, r"here.beta: no such setting; allowed: gamma"),
        ("focal", {"gamma": "much"}, r"here.gamma: expected a number, got 'much'"),
        ("focal", {"gamma": -1}, r"here.gamma: expected a number greater than or equal to 0, got -1"),
        ("focal", {"gamma": math.inf}, r"here.gamma: expected a finite number, got inf"),
        ("focal", {"gamma": math.nan}, r"here.gamma: expected a finite number, got nan"),
        ("label-smoothing", {"alpha": 1.1}, r"here.alpha: expected a number less than or equal to 1, got 1.1"),
        ("label-smoothing", {"alpha": -0.1}, r"here.alpha: expected a number greater than or equal to 0, got -0.1"),
        ("mbls", {"margin": -1.0}, r"here.margin: expected a number greater than or equal to 0"),
        ("acls", {"alpha": 1.0}, r"here.alpha: no such setting; allowed: weight, positive, negative, margin"),
        ("adafocal", {"bins": 0}, r"here.bins: expected a number greater than or equal to 1, got 0"),
        ("adafocal", {"bins": 2.5}, r"here.bins: expected a whole number"),
        ("adafocal", {"gamma_min": 1.0}, r"here.gamma_min: expected a number less than 0, got 1.0"),
        ("adafocal", {"edges": 1.0}, r"here.edges: no such setting; allowed: rate, bins, gamma, switch, gamma_min, gamma_max"),
    ],
)
def test_a_wrong_parameter_is_named(name: str, parameters: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        build_loss(HARD, name, parameters, "here")


def test_soft_losses_have_no_parameters() -> None:
    for name in SOFT:
        with pytest.raises(InputError, match=r"here.gamma: no such setting; allowed: none"):
            build_loss(SOFT, name, {"gamma": 1.0}, "here")
