from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csm.metrics.binning import Bins, bin_samples

# Many values on bin edges and ties, where binning goes wrong, among ordinary ones.
confidences = st.one_of(st.floats(0, 1), st.builds(lambda b, n: min(b, n) / n, st.integers(0, 20), st.integers(1, 20)))
samples = st.lists(st.tuples(confidences, st.booleans()), min_size=1, max_size=60)
fast = settings(max_examples=40, deadline=None)


def table(pairs: list[tuple[float, bool]]) -> tuple[torch.Tensor, torch.Tensor]:
    confidence, outcome = zip(*pairs, strict=True)
    return torch.tensor(confidence, dtype=torch.float64), torch.tensor(outcome)


def by_loop(groups: list[list[tuple[float, bool]]]) -> Bins:
    """The oracle's table of groups of samples."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    rows = [[len(g), mean([c for c, _ in g]), mean([float(o) for _, o in g])] for g in groups]
    return Bins(*torch.tensor(rows, dtype=torch.float64).T)


def assert_same(bins: Bins, expected: Bins) -> None:
    for name in ("count", "confidence", "outcome"):
        torch.testing.assert_close(getattr(bins, name), getattr(expected, name), rtol=0, atol=1e-12)


@fast
@given(samples, st.integers(1, 20))
def test_equal_width_is_the_loop_over_intervals(pairs: list[tuple[float, bool]], n_bins: int) -> None:
    groups: list[list[tuple[float, bool]]] = [[] for _ in range(n_bins)]
    for c, o in pairs:
        inside = [b for b in range(n_bins) if b / n_bins < c <= (b + 1) / n_bins]
        groups[inside[0] if c > 0 else 0].append((c, o))
    assert_same(bin_samples(*table(pairs), n_bins), by_loop(groups))


@fast
@given(samples, st.integers(1, 20))
def test_equal_mass_is_the_loop_over_sorted_samples(pairs: list[tuple[float, bool]], n_bins: int) -> None:
    ordered = sorted(pairs, key=lambda pair: pair[0])  # stable, as is ours
    starts = [-(-b * len(pairs) // n_bins) for b in range(n_bins + 1)]  # ceil
    groups = [ordered[low:high] for low, high in pairwise(starts)]
    bins = bin_samples(*table(pairs), n_bins, "equal-mass")
    assert_same(bins, by_loop(groups))
    assert bins.count.max() - bins.count.min() <= 1
    assert bins.count.sum() == len(pairs)


def test_equal_mass_is_array_split_when_bins_divide_samples() -> None:
    rng = np.random.default_rng(0)
    confidence, outcome = rng.random(60), rng.random(60)
    order = confidence.argsort()
    bins = bin_samples(torch.from_numpy(confidence), torch.from_numpy(outcome), 15, "equal-mass")
    np.testing.assert_array_equal(bins.count, 4)
    for got, values in ((bins.confidence, confidence), (bins.outcome, outcome)):
        np.testing.assert_allclose(got, [part.mean() for part in np.array_split(values[order], 15)])


def test_confidence_zero_is_in_the_first_bin_and_one_in_the_last() -> None:
    bins = bin_samples(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0, 1, 0]), 4)
    assert bins.count.tolist() == [1, 0, 0, 2]
    assert bins.confidence.tolist() == [0, 0, 0, 1]
    assert bins.outcome.tolist() == [0, 0, 0, 0.5]


@pytest.mark.parametrize("n_bins", [3, 7, 10, 15, 20, 49, 100])
def test_an_edge_belongs_to_the_bin_on_its_left(n_bins: int) -> None:
    edges = torch.tensor([b / n_bins for b in range(1, n_bins + 1)], dtype=torch.float64)
    assert bin_samples(edges, torch.ones_like(edges), n_bins).count.tolist() == [1] * n_bins
    above = torch.nextafter(edges[:-1], torch.tensor(2.0, dtype=torch.float64))
    assert bin_samples(above, torch.ones_like(above), n_bins).count.tolist() == [0] + [1] * (n_bins - 1)


def test_empty_bins_are_zero_not_nan() -> None:
    bins = bin_samples(torch.tensor([0.95]), torch.tensor([1.0]), 10)
    assert bins.count.tolist() == [0] * 9 + [1]
    assert bins.confidence[:9].tolist() == bins.outcome[:9].tolist() == [0] * 9


@pytest.mark.parametrize("n_bins", [2, 15])
def test_equal_mass_keeps_every_sample_when_there_are_fewer_than_bins(n_bins: int) -> None:
    bins = bin_samples(torch.tensor([0.3]), torch.tensor([1.0]), n_bins, "equal-mass")
    assert sorted(bins.count.tolist()) == [0] * (n_bins - 1) + [1]
    assert bins.outcome.sum() == 1


def test_equal_mass_keeps_the_least_confident_sample() -> None:
    bins = bin_samples(torch.tensor([0.9, 0.1, 0.8, 0.7, 0.6]), torch.tensor([1, 0, 1, 1, 1]), 2, "equal-mass")
    assert bins.count.tolist() == [3, 2]
    assert bins.outcome.tolist() == [pytest.approx(2 / 3), 1]


def test_equal_mass_ties_follow_input_order() -> None:
    bins = bin_samples(torch.full((4,), 0.5), torch.tensor([1, 1, 0, 0]), 2, "equal-mass")
    assert bins.outcome.tolist() == [1, 0]


@pytest.mark.parametrize("scheme", ["equal-width", "equal-mass"])
def test_leading_dimensions_are_binned_apart(scheme: str) -> None:
    generator = torch.Generator().manual_seed(0)
    confidence, outcome = torch.rand(2, 3, 4, 17, generator=generator, dtype=torch.float64)
    bins = bin_samples(confidence, outcome, 5, scheme)  # type: ignore[arg-type]
    assert bins.count.shape == (3, 4, 5)
    for i in range(3):
        for j in range(4):
            alone = bin_samples(confidence[i, j], outcome[i, j], 5, scheme)  # type: ignore[arg-type]
            assert_same(Bins(bins.count[i, j], bins.confidence[i, j], bins.outcome[i, j]), alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_are_float64_whatever_comes_in(dtype: torch.dtype) -> None:
    bins = bin_samples(torch.tensor([0.25, 1.0], dtype=dtype), torch.tensor([True, False]), 2)
    assert {bins.count.dtype, bins.confidence.dtype, bins.outcome.dtype} == {torch.float64}
    assert bins.confidence.tolist() == [0.25, 1]


half = torch.tensor([0.5])


@pytest.mark.parametrize(
    ("confidence", "outcome", "n_bins", "scheme", "message"),
    [
        (half, half, 0, "equal-width", "n_bins must be an int > 0, got 0"),
        (half, half, 1.5, "equal-width", "n_bins must be an int > 0, got 1.5"),
        (half, half, True, "equal-width", "n_bins must be an int > 0, got True"),
        (half, half, 5, "width", "scheme must be .* got 'width'"),
        (half, torch.ones(2), 5, "equal-width", r"one shape \(\.\.\., N\), got \(1,\) and \(2,\)"),
        (torch.tensor(0.5), torch.tensor(0.5), 5, "equal-width", r"got \(\) and \(\)"),
        (torch.ones(0), torch.ones(0), 5, "equal-mass", r"at least one sample, got shape \(0,\)"),
        (torch.tensor([1.5]), half, 5, "equal-width", r"confidence must lie in \[0, 1\].* to 1.5"),
        (torch.tensor([0.5, torch.nan]), torch.ones(2), 5, "equal-mass", "confidence must lie .* nan"),
        (half, torch.tensor([-1]), 5, "equal-width", r"outcome must lie in \[0, 1\].* from -1"),
    ],
)
def test_wrong_arguments(confidence: torch.Tensor, outcome: torch.Tensor, n_bins: int, scheme: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bin_samples(confidence, outcome, n_bins, scheme)  # type: ignore[arg-type]
