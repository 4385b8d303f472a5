import numpy as np
import pytest
import torch

from csm.noise import fresh_noise, initial_noise, mix_seeds

GOLDEN, MASK = 0x9E3779B97F4A7C15, 2**64 - 1


def splitmix64(state: int) -> tuple[int, int]:
    """The next state and output of Steele, Lea & Flood's generator, in unbounded integers."""
    state = (state + GOLDEN) & MASK
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return state, z ^ (z >> 31)


def folded(key: int, *values: int) -> int:
    for value in values:
        _, key = splitmix64((key * GOLDEN + value) & MASK)
    return key & (2**63 - 1)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31, 2**63 - 1])
def test_noise_is_that_of_torchs_generator(seed: int) -> None:
    expected = torch.randn((2, 3, 4), generator=torch.Generator(device="cpu").manual_seed(seed))
    noise = initial_noise([seed], (2, 3, 4))
    assert noise.dtype == torch.float32
    assert torch.equal(noise[0], expected)


def test_noise_depends_on_the_seed_not_on_batch_or_order() -> None:
    seeds = [7, 3, 7, 2**62, 0]
    together = initial_noise(seeds, (1, 2, 2))
    for order in ([4, 3, 2, 1, 0], [2, 0], [1]):
        assert torch.equal(initial_noise([seeds[row] for row in order], (1, 2, 2)), together[order])
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])


def test_noise_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    undisturbed = torch.rand(3)
    torch.manual_seed(5)
    initial_noise([1, 2], (1, 2, 2))
    assert torch.equal(torch.rand(3), undisturbed)


def test_noise_is_standard_normal() -> None:
    values = initial_noise(range(400), (1, 8, 8)).flatten()
    assert values.mean().item() == pytest.approx(0, abs=0.02)
    assert values.std().item() == pytest.approx(1, abs=0.02)
    assert (values.abs() > 1.96).float().mean().item() == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize(("state", "output"), [(0, 0xE220A8397B1DCDAF), (1234567, 6457827717110365317)])
def test_the_hash_of_one_column_is_the_published_splitmix64(state: int, output: int) -> None:
    assert splitmix64(state)[1] == output
    assert mix_seeds(0, [state])[0] == output & (2**63 - 1)


@pytest.mark.parametrize("key", [0, 1, 0xDEADBEEF, 2**63, 2**64 - 1])
def test_seeds_equal_plain_integer_arithmetic(key: int) -> None:
    draw = np.random.default_rng(0)
    columns = [draw.integers(0, 2**16, 50, dtype=np.uint16), draw.integers(0, 2**32, 50, dtype=np.uint32), np.arange(50)]
    seeds = mix_seeds(key, *columns)
    assert seeds.dtype == np.int64
    assert seeds.tolist() == [folded(key, *map(int, row)) for row in zip(*columns, strict=True)]
    assert seeds.min() >= 0


def test_seeds_are_a_function_of_the_row() -> None:
    a, b = np.arange(40), np.arange(40)[::-1]
    assert mix_seeds(9, a, b)[5:9].tolist() == mix_seeds(9, a[5:9], b[5:9]).tolist()
    assert mix_seeds(9, a, b)[::-1].tolist() == mix_seeds(9, a[::-1], b[::-1]).tolist()
    assert mix_seeds(9, a, b).tolist() != mix_seeds(9, b, a).tolist()


def test_no_two_rows_of_a_large_grid_share_a_seed() -> None:
    first, second, group = (axis.ravel() for axis in np.meshgrid(np.arange(60), np.arange(60), np.arange(60), indexing="ij"))
    seeds = np.concatenate([mix_seeds(key, first, second, group) for key in (0, 1)])
    assert len(np.unique(seeds)) == 2 * 60**3


def test_every_bit_is_used() -> None:
    seeds = mix_seeds(3, np.arange(4000)).astype(np.uint64)
    for bit in range(63):
        assert ((seeds >> np.uint64(bit)) & np.uint64(1)).mean() == pytest.approx(0.5, abs=0.04)


def test_fresh_noise_belongs_to_the_seed_and_the_step() -> None:
    seeds, shape = [5, 2**62, 5, 6], (1, 2, 3)
    noise = fresh_noise(seeds, shape, 3)
    assert noise.dtype == torch.float32
    assert torch.equal(noise[0], noise[2])
    for row, seed in enumerate(seeds):  # the batch does not matter
        assert torch.equal(noise[row], fresh_noise([seed], shape, 3)[0])
    rows = [initial_noise([5, 6], shape), *(fresh_noise([5, 6], shape, step) for step in range(4))]
    flat = torch.cat(rows).flatten(1)
    assert len({tuple(row.tolist()) for row in flat}) == 10


def test_fresh_noise_is_standard_normal_and_independent_of_the_first_noise() -> None:
    seeds, shape = list(range(3000)), (1, 2, 2)
    noise = torch.stack([initial_noise(seeds, shape), *(fresh_noise(seeds, shape, step) for step in (0, 1))]).flatten(1).double()
    count = noise.shape[1]
    assert noise.mean(dim=1).abs().max() < 4.5 / count**0.5
    assert (noise.std(dim=1) - 1).abs().max() < 4.5 / (2 * count) ** 0.5
    assert (torch.corrcoef(noise) - torch.eye(3)).abs().max() < 4.5 / count**0.5
