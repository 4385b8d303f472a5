import math

import pytest
import torch
from torch.nn import functional as F

from csm.losses.hard import cross_entropy
from csm.losses.margins import acls, cpc, mbls

LABELS = torch.tensor([1, 0, 2, 2])
TARGET = F.one_hot(LABELS, 3).double()
LOGITS = torch.tensor(
    [[14.0, 1.0, -3.0], [-2.0, -1.0, -30.0], [0.5, 0.0, 3.0], [-20.0, -12.0, -40.0]], dtype=torch.float64
)  # a large top; a wide gap below; inside the margin; all negative


@pytest.mark.parametrize("loss", [mbls, acls])
def test_inside_the_margin_it_is_cross_entropy(loss: type) -> None:
    near = torch.tensor([[4.0, -5.0, 0.0]], dtype=torch.float64)
    assert loss(near, TARGET[:1]).item() == cross_entropy(near, TARGET[:1]).item()


def test_mbls_penalty() -> None:
    # Beyond 10 below the top: 13 - 10 and 17 - 10; 29 - 10; none; 28 - 10. Over 4 x 3 logits.
    expected = cross_entropy(LOGITS, TARGET).item() + 0.1 * (3 + 7 + 19 + 18) / 12
    assert mbls(LOGITS, TARGET).item() == pytest.approx(expected, rel=1e-12)


def test_acls_penalty() -> None:
    above = (14 - 10) ** 2 / 4
    below = (3**2 + 7**2 + 19**2 + 18**2) / (4 * 2)
    expected = cross_entropy(LOGITS, TARGET).item() + 0.1 * (above + 0.1 * below)
    assert acls(LOGITS, TARGET).item() == pytest.approx(expected, rel=1e-12)


def test_acls_does_not_move_the_top_to_close_a_gap() -> None:
    logits = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(acls(logits, TARGET) - cross_entropy(logits, TARGET), logits)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    expected[0, 0] = 0.1 * 2 * (14 - 10) / 4  # the bound on the top itself
    for row, column, gap in ((0, 1, 3), (0, 2, 7), (1, 2, 19), (3, 2, 18)):
        expected[row, column] = -0.1 * 0.1 * 2 * gap / (4 * 2)
    assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", [mbls, acls])
def test_equal_top_logits(loss: type) -> None:
    logits = torch.tensor([[12.0, 12.0, -4.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(logits, TARGET[:1]), logits)
    assert gradient.isfinite().all()
    assert gradient[0, 2] < cross_entropy(logits, TARGET[:1]).item()


def test_cpc_of_even_logits() -> None:
    for classes in (2, 3, 7):
        target = F.one_hot(torch.tensor([1]), classes).double()
        exclusion = math.log(2) / 2 if classes > 2 else 0.0
        expected = math.log(classes) + 2.0 * math.log(2) + 3.0 * exclusion
        even = torch.zeros(1, classes, dtype=torch.float64)
        assert cpc(even, target, discrimination=2.0, exclusion=3.0).item() == pytest.approx(expected, rel=1e-12)


def test_cpc_exclusion_is_least_where_the_other_classes_are_even() -> None:
    target = F.one_hot(torch.tensor([0]), 3).double()
    parts = [
        cpc(torch.tensor([[2.0, gap, 0.0]], dtype=torch.float64), target, 0.0, 1.0)
        - cpc(torch.tensor([[2.0, gap, 0.0]], dtype=torch.float64), target, 0.0, 0.0)
        for gap in (0.0, 0.5, -0.5, 3.0)
    ]
    assert parts[0].item() == pytest.approx(math.log(2) / 2, rel=1e-12)
    assert parts[1].item() == pytest.approx(parts[2].item(), rel=1e-12)
    assert parts[0] < parts[1] < parts[3]


def test_cpc_keeps_its_precision_beside_large_logits() -> None:
    logits, target = torch.tensor([[1e4, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    assert cpc(logits, target).item() == pytest.approx(math.log(2) / 2, rel=1e-6)
