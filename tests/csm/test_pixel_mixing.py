import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from csm.errors import InputError
from csm.losses import HARD, build_loss
from csm.pixel_mixing import PIXEL_MIXING, CutMix, Mixup, RankMixup, RegMixup, build_pixel_mixing


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", PIXEL_MIXING)
def test_it_mixes_images_as_it_mixes_targets(kind: str) -> None:
    images = torch.randint(0, 256, (6, 2, 8, 7), generator=draw()).to(torch.uint8)
    means = images.double().mean(dim=(2, 3))
    seen = set()
    for seed in range(20):
        mixed, target = build_pixel_mixing(kind, {"alpha": 1.0}, "here").mix(images, torch.eye(6), draw(seed))
        assert mixed.dtype == torch.float32
        assert mixed.shape == images.shape
        # Targets are r * I + (1 - r) * a permutation: with an identity for labels they tell who was mixed with whom.
        if kind == "cutmix":  # every pixel is that of one of the two, in the proportion of the target
            for image, row in zip(mixed, target, strict=True):
                partner = int((row - torch.eye(6)[row.argmax()]).argmax()) if row.max() < 1 else int(row.argmax())
                own = (image == images[row.argmax()].float()).all(dim=0)
                pasted = (image == images[partner].float()).all(dim=0)
                assert (own | pasted).all()
                assert own.double().mean().item() == pytest.approx(row.max().item(), abs=1e-6)
        else:
            expected = torch.einsum("ij,jchw->ichw", target.double(), images.double())
            assert torch.allclose(mixed.double(), expected, atol=1e-3)
            assert torch.allclose(mixed.double().mean(dim=(2, 3)), target.double() @ means, atol=1e-3)
        assert torch.allclose(target.sum(dim=1), torch.ones(6))
        assert torch.allclose(target.sum(dim=0), torch.ones(6))  # everyone is used once as itself and once as a partner
        ratios = {round(value, 5) for value in target.diagonal().tolist() if value < 0.99999}
        assert len(ratios) <= 1  # one ratio for the batch
        seen |= ratios
    assert len(seen) > 10


@pytest.mark.parametrize("kind", PIXEL_MIXING)
def test_it_depends_on_the_generator_alone(kind: str) -> None:
    images, target = torch.rand(5, 1, 6, 6, generator=draw()), F.one_hot(torch.arange(5), 5).float()
    mixing = build_pixel_mixing(kind, {}, "here")
    before = images.clone()
    torch.manual_seed(1)
    np.random.seed(1)
    first = mixing.mix(images, target, draw(8))
    torch.manual_seed(2)
    np.random.seed(2)
    again = mixing.mix(images, target, draw(8))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert torch.equal(images, before)
    assert not torch.equal(mixing.mix(images, target, draw(9))[0], first[0])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", PIXEL_MIXING)
def test_it_does_not_depend_on_the_device(kind: str) -> None:
    images, target = torch.rand(5, 1, 6, 6, generator=draw()), torch.eye(5)
    here = build_pixel_mixing(kind, {}, "here").mix(images, target, draw(3))
    there = build_pixel_mixing(kind, {}, "here").mix(images.cuda(), target.cuda(), draw(3))
    assert torch.allclose(there[0].cpu(), here[0])
    assert torch.allclose(there[1].cpu(), here[1])


@pytest.mark.parametrize("kind", PIXEL_MIXING)
def test_one_image_is_mixed_with_itself(kind: str) -> None:
    image, target = torch.rand(1, 1, 2, 2, generator=draw()), torch.tensor([[0.2, 0.8]])
    mixed, label = build_pixel_mixing(kind, {}, "here").mix(image, target, draw())
    assert torch.allclose(mixed, image)
    assert torch.allclose(label, target)


def test_the_draws_of_mixup_are_what_they_were() -> None:
    images = torch.arange(8.0).reshape(4, 1, 1, 2)
    mixed, target = Mixup(0.2).mix(images, torch.eye(4), draw(5))
    generator = draw(5)
    ratio = np.random.default_rng(int(torch.randint(0, 2**31, (1,), generator=generator))).beta(0.2, 0.2)
    other = torch.randperm(4, generator=generator)
    assert torch.equal(mixed, ratio * images + (1 - ratio) * images[other])
    assert torch.equal(target, ratio * torch.eye(4) + (1 - ratio) * torch.eye(4)[other])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_ratio_of_mixup_is_drawn_from_the_beta_distribution(alpha: float) -> None:
    # Of two images, half the permutations change nothing; row 0 of the others holds the ratio.
    targets = [Mixup(alpha).mix(torch.zeros(2, 1, 1, 1), torch.eye(2), draw(seed))[1][0, 0].item() for seed in range(2000)]
    ratios = torch.tensor([value for value in targets if value != 1.0])
    assert ratios.mean().item() == pytest.approx(0.5, abs=0.03)
    assert ratios.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_cutmix_pastes_one_box() -> None:
    images = torch.stack([torch.zeros(3, 9, 7), torch.ones(3, 9, 7)])
    shares = set()
    for seed in range(200):
        mixed, target = CutMix().mix(images, torch.eye(2), draw(seed))
        pasted = mixed[0, 0] == 1
        assert (mixed[0] == mixed[0, :1]).all()  # the same in every channel
        assert torch.equal(mixed[1], 1 - mixed[0]) or not mixed[0].any()
        rows, columns = pasted.any(dim=1), pasted.any(dim=0)
        assert torch.equal(pasted, rows[:, None] & columns)  # a rectangle
        for side in (rows, columns):
            assert side.diff().sum() <= 2  # in one piece
        assert target[0, 1].item() == pytest.approx(pasted.double().mean().item(), abs=1e-6)
        shares.add(round(target[0, 1].item(), 6))
    assert len(shares) > 20
    assert max(shares) > 0.8


def test_the_middle_of_a_cutmix_box_is_uniform_and_its_size_follows_the_ratio() -> None:
    images = torch.zeros(2, 1, 32, 32)
    images[1] = 1.0
    sizes, covered = [], torch.zeros(32)
    for seed in range(3000):
        mixed, _ = CutMix(alpha=1e8).mix(images, torch.eye(2), draw(seed))  # r is 1/2
        if mixed[0].any():
            rows = mixed[0, 0].any(dim=1)
            sizes.append(int(rows.sum()))
            covered += rows
    assert max(sizes) == round(32 * math.sqrt(0.5)) == 23
    assert min(sizes) == 12  # around a pixel of the border
    # Row j is in the box if the middle, uniform in 0..31, is at most 11 away.
    expected = torch.tensor([len([middle for middle in range(32) if abs(middle - row) <= 11]) / 32 for row in range(32)])
    assert (covered / len(sizes) - expected).abs().max() < 0.05


def test_a_cutmix_box_of_no_pixels_mixes_nothing() -> None:
    images, nothing = torch.rand(4, 1, 2, 2, generator=draw()), 0
    for seed in range(60):
        mixed, target = CutMix(alpha=0.01).mix(images, torch.eye(4), draw(seed))
        nothing += torch.equal(mixed, images) and torch.equal(target, torch.eye(4))
        assert mixed.isfinite().all()
    assert 10 < nothing < 50  # r is near 0 or near 1


def test_regmixup_adds_the_cross_entropy_of_the_mixture() -> None:
    logits, mixed_logits = torch.randn(4, 3, generator=draw()), torch.randn(4, 3, generator=draw(1))
    labels, mixed_target = torch.tensor([0, 1, 2, 1]), torch.randn(4, 3, generator=draw(2)).softmax(dim=1)
    target = F.one_hot(labels, 3).float()
    loss = RegMixup(weight=0.7).loss(build_loss(HARD, "cross-entropy", {}, "here"), logits, target, mixed_logits, mixed_target)
    expected = F.cross_entropy(logits, labels) - 0.7 * (mixed_target * mixed_logits.log_softmax(dim=1)).sum() / 4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_rankmixup_asks_a_margin_between_the_largest_logits() -> None:
    hard = build_loss(HARD, "brier", {}, "here")
    logits = torch.tensor([[5.0, 1.0], [0.0, 2.0], [3.0, 0.0], [9.0, 0.0]], dtype=torch.float64)
    mixed_logits = torch.tensor([[4.5, 0.0], [0.0, -1.0], [7.0, 1.0], [8.0, 9.0]], dtype=torch.float64)
    target = F.one_hot(torch.tensor([0, 1, 0, 0]), 2).double()
    mixed_target = 0.6 * target + 0.4 * target[[1, 2, 1, 0]]  # the last was mixed with one of its own class
    loss = RankMixup(margin=1.0, weight=0.5).loss(hard, logits, target, mixed_logits, mixed_target)
    # 4.5 - 5 + 1; below by more than the margin; 7 - 3 + 1; the last does not count, but is one of four.
    assert loss.item() == pytest.approx(hard(logits, target).item() + 0.5 * (0.5 + 0 + 5) / 4, rel=1e-12)


@pytest.mark.parametrize("kind", ["regmixup", "rankmixup"])
@pytest.mark.parametrize("name", HARD)
def test_gradients_reach_both_with_every_loss(kind: str, name: str) -> None:
    mixing, hard = build_pixel_mixing(kind, {}, "here"), build_loss(HARD, name, {}, "here")
    logits = torch.randn(4, 3, generator=draw(), dtype=torch.float64, requires_grad=True)
    mixed_logits = torch.randn(4, 3, generator=draw(1), dtype=torch.float64, requires_grad=True)
    target = F.one_hot(torch.tensor([0, 1, 2, 1]), 3).double()
    mixed_target = 0.7 * target + 0.3 * target.roll(1, dims=0)
    assert torch.autograd.gradcheck(lambda z, y: mixing.loss(hard, z, target, y, mixed_target), (logits, mixed_logits))
    low = mixing.loss(hard, logits.bfloat16(), target.bfloat16(), mixed_logits.bfloat16(), mixed_target.bfloat16())
    assert low.dtype == torch.float32
    certain = (1e4 * torch.eye(3)[[0, 1, 0, 1]]).requires_grad_()
    loss = mixing.loss(hard, certain, target.float(), certain.flip(0), mixed_target.float())
    (gradient,) = torch.autograd.grad(loss, certain)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_which_mixtures_take_the_place_of_the_real_images() -> None:
    assert {kind: mixing.replaces for kind, mixing in PIXEL_MIXING.items()} == {
        "mixup": True, "cutmix": True, "regmixup": False, "rankmixup": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "parameters", "message"),
    [
        ("blur", {}, "here.kind: unknown 'blur'; one of mixup, cutmix, regmixup, rankmixup"),
        ("mixup", {"margin": 1}, "here.parameters.margin: no such setting; allowed: alpha"),
        ("rankmixup", {"mix": 1}, "here.parameters.mix: no such setting; allowed: alpha, margin, weight"),
        ("mixup", {"alpha": 0}, "here.parameters.alpha: expected a number greater than 0, got 0"),
        ("cutmix", {"alpha": -1.0}, "here.parameters.alpha: expected a number greater than 0, got -1.0"),
        ("cutmix", {"alpha": math.inf}, "here.parameters.alpha: expected a finite number, got inf"),
        ("regmixup", {"weight": -1}, "here.parameters.weight: expected a number greater than or equal to 0, got -1"),
        ("rankmixup", {"margin": "wide"}, "here.parameters.margin: expected a number, got 'wide'"),
    ],
)
def test_a_wrong_setting_is_named(kind: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        build_pixel_mixing(kind, parameters, "here")
    assert str(caught.value) == message


def test_settings_are_checked_without_a_configuration_too() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        Mixup(alpha=-1.0)
    assert build_pixel_mixing("regmixup", {"alpha": "20"}, "here") == RegMixup(alpha=20.0, weight=1.0)
