import pytest
import torch
from torch.nn.functional import one_hot

from csm.augment import mixup, random_shift


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shifted(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """``image`` (C, H, W) moved, black outside, pixel by pixel."""
    result = torch.zeros_like(image)
    _, height, width = image.shape
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                result[:, y, x] = image[:, y - down, x - right]
    return result


@pytest.mark.parametrize(("pixels", "shape"), [(1, (1, 4, 4)), (2, (3, 3, 5)), (4, (1, 2, 3))])
def test_every_image_is_one_of_the_shifts_and_every_shift_occurs(pixels: int, shape: tuple[int, int, int]) -> None:
    image = torch.randint(1, 256, shape, generator=draw()).to(torch.uint8)
    offsets = [(down, right) for down in range(-pixels, pixels + 1) for right in range(-pixels, pixels + 1)]
    expected = {offset: shifted(image, *offset) for offset in offsets}
    distinct = {tensor.numpy().tobytes() for tensor in expected.values()}
    moved = random_shift(image.expand(30 * len(offsets), *shape), pixels, draw(1))
    assert moved.dtype == torch.uint8
    assert {tensor.numpy().tobytes() for tensor in moved} == distinct


def test_every_image_has_its_own_shift_uniform_on_both_axes() -> None:
    image = torch.zeros(1, 7, 7)
    image[0, 3, 3] = 1.0
    moved = random_shift(image.expand(9000, 1, 7, 7), 1, draw(2))
    counts = moved.sum(dim=(0, 1))[2:5, 2:5]  # the bright pixel never leaves the middle
    assert counts.sum() == 9000
    assert (counts - 1000).abs().max() < 150  # five standard deviations


def test_images_do_not_mix() -> None:
    images = torch.arange(1, 51).view(50, 1, 1, 1).expand(50, 2, 5, 5).float()
    moved = random_shift(images, 2, draw())
    for number, image in enumerate(moved, start=1):
        assert set(image.unique().tolist()) <= {0.0, float(number)}
        assert image[:, 2, 2].tolist() == [number, number]


def test_no_shift_changes_and_draws_nothing() -> None:
    images, generator = torch.ones(2, 1, 3, 3), draw()
    assert torch.equal(random_shift(images, 0, generator), images)
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=draw()))


def test_shift_depends_on_the_generator_alone() -> None:
    images = torch.rand(20, 1, 5, 5, generator=draw())
    torch.manual_seed(1)
    first = random_shift(images, 2, draw(3))
    torch.manual_seed(2)
    assert torch.equal(random_shift(images, 2, draw(3)), first)
    assert not torch.equal(random_shift(images, 2, draw(4)), first)


def test_mixup_mixes_images_as_it_mixes_targets() -> None:
    images = torch.randint(0, 256, (6, 2, 3, 3), generator=draw()).to(torch.uint8)
    seen = set()
    for seed in range(20):
        mixed, target = mixup(images, torch.eye(6), 1.0, draw(seed))
        assert mixed.dtype == torch.float32
        # Targets are r * I + (1 - r) * a permutation: with an identity for labels they tell who was mixed with whom.
        expected = torch.einsum("ij,jchw->ichw", target.double(), images.double())
        assert torch.allclose(mixed.double(), expected, atol=1e-3)
        assert torch.allclose(target.sum(dim=1), torch.ones(6))
        assert torch.allclose(target.sum(dim=0), torch.ones(6))  # everyone is used once as itself and once as a partner
        ratios = {round(value, 5) for value in target.diagonal().tolist() if value < 0.99999}
        assert len(ratios) <= 1  # one ratio for the batch
        seen |= ratios
    assert len(seen) > 10


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_ratio_is_drawn_from_the_beta_distribution(alpha: float) -> None:
    # Of two images, half the permutations change nothing; row 0 of the others holds the ratio.
    targets = [mixup(torch.zeros(2, 1, 1, 1), torch.eye(2), alpha, draw(seed))[1][0, 0].item() for seed in range(2000)]
    ratios = torch.tensor([value for value in targets if value != 1.0])
    assert ratios.mean().item() == pytest.approx(0.5, abs=0.03)
    assert ratios.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_mixup_depends_on_the_generator_alone() -> None:
    images, target = torch.rand(5, 1, 2, 2, generator=draw()), one_hot(torch.arange(5), 5).float()
    torch.manual_seed(1)
    first = mixup(images, target, 0.4, draw(8))
    torch.manual_seed(2)
    again = mixup(images, target, 0.4, draw(8))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_one_image_is_mixed_with_itself() -> None:
    image, target = torch.rand(1, 1, 2, 2, generator=draw()), torch.tensor([[0.2, 0.8]])
    mixed, label = mixup(image, target, 0.4, draw())
    assert torch.allclose(mixed, image)
    assert torch.allclose(label, target)


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha must be > 0, got {alpha}"):
        mixup(torch.zeros(2, 1, 1, 1), torch.eye(2), alpha, draw())
