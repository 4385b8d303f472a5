import pytest
import torch

from csm.augment import cutout, random_flip, random_shift


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


def test_a_flip_mirrors_about_half() -> None:
    images = torch.arange(200 * 6, dtype=torch.int32).view(200, 1, 2, 3)
    flipped = random_flip(images, torch.Generator().manual_seed(0))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(dim=1)
    same = (flipped == images).flatten(1).all(dim=1)
    assert bool((mirrored ^ same).all())
    assert 70 < int(mirrored.sum()) < 130
    assert torch.equal(flipped, random_flip(images, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("side", [1, 2, 5])
def test_cutout_covers_a_square_that_may_hang_over_the_edge(side: int) -> None:
    images = torch.full((300, 2, 6, 7), 200, dtype=torch.uint8)
    fill = torch.tensor([3, 4], dtype=torch.uint8).view(1, 2, 1, 1)
    covered = cutout(images, side, fill, torch.Generator().manual_seed(0))
    hole = covered[:, 0] == 3  # (N, H, W)
    assert torch.equal(hole, covered[:, 1] == 4)
    assert bool(((covered[:, 0] == 200) | hole).all())
    rows, columns = hole.any(dim=2).sum(dim=1), hole.any(dim=1).sum(dim=1)
    assert torch.equal(rows * columns, hole.sum(dim=(1, 2)))  # a rectangle
    assert int(rows.max()) == int(columns.max()) == side
    assert int(rows.min()) >= 1
    assert side == 1 or int(rows.min()) < side


def test_cutout_of_nothing_covers_nothing() -> None:
    images = torch.full((3, 1, 4, 4), 200, dtype=torch.uint8)
    assert cutout(images, 0, torch.zeros(1, 1, 1, 1, dtype=torch.uint8), torch.Generator()) is images
