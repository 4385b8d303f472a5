import math

import numpy as np
import pytest
import torch
from torch import Tensor

from csm.metrics import evaluate
from csm.statistics import BOOTSTRAPPED, bootstrap, compare, holm, image_scores, interval, paired_p

Predictions = list[tuple[Tensor, Tensor]]


def predictions(
    images: int = 300, seeds: int = 3, k: int = 4, scale: float = 1.0, seed: int = 0, spread: float = 0.3
) -> Predictions:
    """Runs of one method: the same images, logits with some noise of each seed, sharpened by ``scale``."""
    draw = torch.Generator().manual_seed(0)
    truth = 2 * torch.randn(images, k, generator=draw, dtype=torch.float64)
    labels = torch.multinomial(truth.softmax(dim=1), 1, generator=draw).squeeze(1)
    noise = torch.Generator().manual_seed(seed + 1)
    runs = []
    for _ in range(seeds):
        logits = scale * (truth + spread * torch.randn(truth.shape, generator=noise, dtype=torch.float64))
        runs.append((logits.log_softmax(dim=1), labels))
    return runs


def test_scores_of_images_have_the_metrics_as_means() -> None:
    ((log_probs, labels),) = predictions(seeds=1)
    expected = evaluate(log_probs, labels, metrics=("accuracy", "nll", "brier"))
    found = {name: values.mean().item() for name, values in image_scores(log_probs, labels).items()}
    assert found == pytest.approx(expected)


def test_the_draws_are_centred_on_the_metric() -> None:
    runs = predictions()
    for name, values in bootstrap({"a": runs}, draws=50)["a"].items():
        expected = np.mean([evaluate(*run, metrics=(name,))[name] for run in runs])
        assert values.mean().item() == pytest.approx(expected)
        assert values.shape == (50,)


def test_one_seed_gives_the_standard_error_of_a_mean() -> None:
    runs = predictions(images=500, seeds=1)
    drawn = bootstrap({"a": runs}, metrics=("nll",), draws=4000)["a"]["nll"]
    scores = image_scores(*runs[0])["nll"]
    assert drawn.std().item() == pytest.approx(scores.std(correction=0).item() / math.sqrt(500), rel=0.05)


def test_seeds_add_their_own_spread() -> None:
    # Every image of a seed is right or wrong alike, so images have no spread at all.
    labels = torch.zeros(50, dtype=torch.int64)
    right, wrong = (torch.tensor([p, 1 - p]).log().expand(50, 2) for p in (0.9, 0.2))
    runs = [(right, labels), (right, labels), (wrong, labels), (right, labels)]
    drawn = bootstrap({"a": runs}, metrics=("accuracy",), draws=8000)["a"]["accuracy"]
    assert drawn.mean().item() == pytest.approx(0.75)
    assert drawn.std().item() == pytest.approx(math.sqrt(0.25 / 4), rel=0.05)  # s^2 / S, s^2 = 1/4 unbiased


def test_a_resampled_ece_is_that_of_the_resampled_images() -> None:
    runs = predictions(images=80, seeds=1)
    drawn = bootstrap({"a": runs}, metrics=("ece", "accuracy"), draws=200)["a"]
    log_probs, labels = runs[0]
    rows = torch.randint(80, (200, 80), generator=torch.Generator().manual_seed(0))  # as the draws of seed 0 are made
    for name, values in drawn.items():
        direct = torch.tensor([evaluate(log_probs[r], labels[r], metrics=(name,))[name] for r in rows]).double()
        shift = evaluate(log_probs, labels, metrics=(name,))[name] - direct.mean()
        assert torch.allclose(values, direct + shift)


def test_the_draws_are_a_function_of_the_seed_and_do_not_depend_on_the_other_methods() -> None:
    a, b = predictions(), predictions(scale=2.0)
    both = bootstrap({"a": a, "b": b}, draws=20, seed=3)
    alone = bootstrap({"b": b}, draws=20, seed=3)
    for name in BOOTSTRAPPED:
        assert torch.equal(both["b"][name], alone["b"][name])
    assert not torch.equal(alone["b"]["nll"], bootstrap({"b": b}, draws=20, seed=4)["b"]["nll"])


def test_an_interval_covers_as_often_as_it_says() -> None:
    # The NLL of a classifier that is right with p = 0.7: its mean over all possible images is known.
    log_probs = torch.tensor([[0.8, 0.2]]).log().expand(120, 2)
    expected = -(0.7 * math.log(0.8) + 0.3 * math.log(0.2))
    covered = 0
    for trial in range(200):
        labels = (torch.rand(120, generator=torch.Generator().manual_seed(trial)) < 0.3).long()
        low, high = interval(bootstrap({"a": [(log_probs, labels)]}, metrics=("nll",), draws=300)["a"]["nll"])
        covered += low <= expected <= high
    assert 0.90 <= covered / 200 <= 0.985


def test_an_interval_holds_its_share() -> None:
    assert interval(torch.arange(1001.0), 0.9) == pytest.approx((50.0, 950.0))
    assert interval(torch.arange(1001.0) - 100, 0.9, least=0.0) == pytest.approx((0.0, 850.0))
    with pytest.raises(ValueError, match="level must lie inside"):
        interval(torch.zeros(3), 1.0)


def test_a_paired_p_value_is_never_zero_and_at_most_one() -> None:
    values = torch.linspace(0, 1, 999)
    assert paired_p(values, values + 1) == 2 / 1000
    assert paired_p(values, values) == 1.0
    assert paired_p(values, values.flip(0)) == pytest.approx(1.0, abs=0.01)
    with pytest.raises(ValueError, match="paired draws must have one shape"):
        paired_p(values, values[:5])


def test_under_the_null_small_p_values_are_as_rare_as_they_say() -> None:
    labels = torch.zeros(100, dtype=torch.int64)
    small = 0
    for trial in range(200):
        draw = torch.Generator().manual_seed(trial)
        runs = {name: [((torch.randn(100, 2, generator=draw)).log_softmax(dim=1), labels)] for name in "ab"}
        drawn = bootstrap(runs, metrics=("nll",), draws=199)
        small += paired_p(drawn["a"]["nll"], drawn["b"]["nll"]) <= 0.05
    assert small <= 22  # of 200, 10 expected


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ValueError, match="p-values must lie in"):
        holm([1.5])


def test_a_comparison_tells_the_better_method() -> None:
    runs = {"base": predictions(scale=4.0), "better": predictions(seed=0), "same": predictions(scale=4.0)}
    frame = compare(runs, "base", draws=400)
    assert frame.columns == ["method", "metric", "difference", "low", "high", "p", "p_holm"]
    rows = {(row["method"], row["metric"]): row for row in frame.iter_rows(named=True)}
    assert len(rows) == 2 * len(BOOTSTRAPPED)
    better = rows["better", "nll"]
    assert better["difference"] < better["high"] < 0
    assert better["p_holm"] == pytest.approx(2 * better["p"])
    assert better["p_holm"] < 0.05
    assert (rows["same", "nll"]["difference"], rows["same", "nll"]["p_holm"]) == (0.0, 1.0)


def test_methods_of_other_seeds_or_images_are_refused() -> None:
    runs = predictions()
    with pytest.raises(ValueError, match="b has 2 seeds, a has 3"):
        bootstrap({"a": runs, "b": runs[:2]})
    with pytest.raises(ValueError, match="b, seed number 0: other test images or labels than a has"):
        bootstrap({"a": runs, "b": [(run[0][:9], run[1][:9]) for run in runs]})
    with pytest.raises(ValueError, match="a has no run"):
        bootstrap({"a": []})
    with pytest.raises(ValueError, match="metrics must be names among accuracy, ece, nll, brier, got mce"):
        bootstrap({"a": runs}, metrics=("mce",))
    with pytest.raises(ValueError, match="baseline must be one of a, got b"):
        compare({"a": runs}, "b", draws=5)
    bad = [(log_probs.index_fill(0, torch.tensor([0]), -torch.inf), labels) for log_probs, labels in runs]
    with pytest.raises(ValueError, match="must be finite"):
        bootstrap({"a": bad})
