import math

import pytest
import torch
from torch.nn import functional as F

from csm.losses import HARD, build_loss
from csm.losses.focal import AdaFocal, dual_focal, flsd_53, focal
from csm.losses.hard import cross_entropy


def logits_with(*probs: float) -> torch.Tensor:
    """One image per probability of class 0, the rest evenly on two others."""
    rows = torch.tensor([[p, (1 - p) / 2, (1 - p) / 2] for p in probs], dtype=torch.float64)
    return rows.log()


def first_class(rows: int) -> torch.Tensor:
    return F.one_hot(torch.zeros(rows, dtype=torch.int64), 3).double()


def test_without_focus_they_are_cross_entropy() -> None:
    logits = 2 * torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for target in (first_class(6), logits.flip(0).softmax(dim=1)):
        expected = cross_entropy(logits, target).item()
        assert focal(logits, target, gamma=0.0).item() == pytest.approx(expected, rel=1e-12)
        assert dual_focal(logits, target, gamma=0.0).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", [focal, dual_focal])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 3.0])
def test_a_gradient_where_the_softmax_saturates(loss: type, gamma: float) -> None:
    logits = torch.tensor([[60.0, 0.0], [0.0, 60.0], [20.0, 0.0]], requires_grad=True)  # float32: p is exactly 1
    loss(logits, torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]]), gamma).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[1, 0] < -0.3  # certain and wrong: nothing is taken from its weight


def test_flsd_changes_gamma_at_a_fifth() -> None:
    for p, gamma in ((0.05, 5.0), (0.199, 5.0), (0.201, 3.0), (0.9, 3.0)):
        expected = focal(logits_with(p), first_class(1), gamma).item()
        assert flsd_53(logits_with(p), first_class(1)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("probs", "label", "below"),
    [
        ([0.5, 0.3, 0.2], 0, 0.3),  # right: the runner-up
        ([0.5, 0.3, 0.2], 1, 0.2),  # wrong: the next one down, not the winner
        ([0.5, 0.3, 0.2], 2, 0.0),  # none below
        ([0.4, 0.4, 0.2], 0, 0.2),  # an equal is not below
        ([0.25, 0.25, 0.25, 0.25], 3, 0.0),
        ([0.5, 0.5], 1, 0.0),
    ],
)
def test_the_class_below_in_dual_focal(probs: list[float], label: int, below: float) -> None:
    logits = torch.tensor([probs], dtype=torch.float64).log().requires_grad_()
    target = F.one_hot(torch.tensor([label]), len(probs)).double()
    loss = dual_focal(logits, target, 3.0)
    assert loss.item() == pytest.approx(-((1 - probs[label] + below) ** 3) * math.log(probs[label]), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()


def test_adafocal_starts_as_focal_with_gamma_one() -> None:
    logits = logits_with(0.1, 0.5, 0.9)
    assert AdaFocal()(logits, first_class(3)).item() == pytest.approx(focal(logits, first_class(3), 1.0).item(), rel=1e-12)


def test_adafocal_raises_gamma_by_overconfidence_and_lowers_it_by_underconfidence() -> None:
    loss = AdaFocal(bins=2)
    # Two images at 0.5, one of them right: calibrated. Two at 0.9, none right: 0.9 too sure.
    loss.observe(logits_with(0.9, 0.5, 0.9, 0.5), torch.tensor([1, 0, 2, 1]))
    assert loss.gamma.tolist() == pytest.approx([1.0, math.exp(0.9)], rel=1e-6)
    assert loss.edges.tolist() == pytest.approx([0.9])
    # Now the lower half is right twice.
    loss.observe(logits_with(0.5, 0.5, 0.8, 0.8), torch.tensor([0, 0, 0, 1]))
    assert loss.gamma.tolist() == pytest.approx([math.exp(-0.5), math.exp(0.9 + 0.3)], rel=1e-6)
    assert loss.edges.tolist() == pytest.approx([0.8])


def test_adafocal_gives_an_image_the_gamma_of_its_bin() -> None:
    loss = AdaFocal(bins=2)
    loss.observe(logits_with(0.9, 0.5, 0.9, 0.5), torch.tensor([1, 0, 2, 1]))
    for p, gamma in ((0.01, 1.0), (0.5, 1.0), (0.89, 1.0), (0.91, math.exp(0.9)), (0.999, math.exp(0.9))):
        assert loss(logits_with(p), first_class(1)).item() == pytest.approx(-((1 - p) ** gamma) * math.log(p), rel=1e-5)


def test_adafocal_switches_sides_at_the_threshold_and_back() -> None:
    loss = AdaFocal(bins=1, rate=1.0, gamma=0.3)
    right, wrong = torch.tensor([0]), torch.tensor([1])
    loss.observe(logits_with(0.5), right)  # 0.3 exp(-0.5) = 0.18: too near 0
    assert loss.gamma.tolist() == pytest.approx([-0.2])
    # Inverse focal: it weighs the certain.
    assert loss(logits_with(0.7), first_class(1)).item() == pytest.approx(-(1.7**0.2) * math.log(0.7), rel=1e-6)
    loss.observe(logits_with(0.5), right)  # still underconfident: further down
    assert loss.gamma.tolist() == pytest.approx([-0.2 * math.exp(0.5)], rel=1e-6)
    loss.observe(logits_with(0.9), wrong)  # overconfident: up again, and over
    assert loss.gamma.tolist() == pytest.approx([0.2])


def test_adafocal_clips_gamma() -> None:
    loss = AdaFocal(bins=1, rate=10.0, gamma_max=5.0)
    loss.observe(logits_with(0.9), torch.tensor([1]))
    assert loss.gamma.tolist() == [5.0]
    for _ in range(3):
        loss.observe(logits_with(0.4), torch.tensor([0]))
    assert loss.gamma.tolist() == [-2.0]


def test_adafocal_cuts_bins_of_equal_mass() -> None:
    confidence = 0.4 + 0.5 * torch.rand(103, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.randint(0, 3, (103,), generator=torch.Generator().manual_seed(1))
    loss = AdaFocal(bins=10)
    loss.observe(logits_with(*confidence.tolist()), labels)
    groups = [[] for _ in range(10)]
    for rank, image in enumerate(sorted(range(103), key=lambda image: confidence[image])):
        groups[rank * 10 // 103].append(image)
    assert {len(group) for group in groups} == {10, 11}
    gaps = [sum(confidence[image].item() - (labels[image].item() == 0) for image in group) / len(group) for group in groups]
    expected = [math.exp(gap) for gap in gaps]
    assert loss.gamma.tolist() == pytest.approx([value if value >= 0.2 else -0.2 for value in expected], rel=1e-5)
    assert loss.edges.tolist() == pytest.approx(
        [min(confidence[image].item() for image in group) for group in groups[1:]], rel=1e-6
    )


def test_adafocal_with_fewer_images_than_bins_never_uses_an_empty_one() -> None:
    loss = AdaFocal(bins=5)
    loss.observe(logits_with(0.5, 0.9), torch.tensor([1, 1]))
    used = [value for value in loss.gamma.tolist() if value != 1.0]
    assert used == pytest.approx([math.exp(0.5), math.exp(0.9)], rel=1e-6)
    for p, gamma in ((0.1, used[0]), (0.6, used[0]), (0.95, used[1])):
        assert loss(logits_with(p), first_class(1)).item() == pytest.approx(-((1 - p) ** gamma) * math.log(p), rel=1e-5)


def test_adafocal_state_is_all_in_its_state_dict() -> None:
    logits = logits_with(0.4, 0.6, 0.8, 0.95)
    loss = build_loss(HARD, "adafocal", {"bins": 3}, "here")
    loss.observe(logits, torch.tensor([0, 1, 0, 2]))
    again = build_loss(HARD, "adafocal", {"bins": 3}, "here")
    assert again(logits, first_class(4)).item() != loss(logits, first_class(4)).item()
    again.load_state_dict(loss.state_dict())
    for _ in range(2):
        assert again(logits, first_class(4)).item() == loss(logits, first_class(4)).item()
        for each in (loss, again):
            each.observe(logits.flip(0), torch.tensor([0, 1, 0, 2]))
    assert not list(loss.parameters())


@pytest.mark.parametrize("target", [first_class(4), torch.full((4, 3), 1 / 3, dtype=torch.float64)])
def test_adafocal_gradient_with_focal_and_inverse_focal_bins(target: torch.Tensor) -> None:
    loss = AdaFocal(bins=2, rate=4.0, gamma_max=5.0).double()
    loss.observe(logits_with(0.5, 0.5, 0.9, 0.9), torch.tensor([0, 0, 1, 1]))
    low, high = loss.gamma.tolist()
    assert low < 0 < high
    logits = logits_with(0.1, 0.45, 0.93, 0.99).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, target), (logits,))
    certain = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]], dtype=torch.bfloat16, requires_grad=True)
    value = loss(certain, first_class(2))
    (gradient,) = torch.autograd.grad(value, certain)
    assert value.isfinite()
    assert gradient.isfinite().all()
