import numpy as np
import polars as pl
import pytest
import torch

from csm import tables
from csm.metrics import evaluate
from flows.comparison import compare

CLASSES, IMAGES = 3, 400


@pytest.fixture(scope="module")
def runs():
    """Three seeds of a baseline, of its double, and of one that sees the labels more clearly."""
    draw = np.random.default_rng(0)
    labels = torch.from_numpy(draw.integers(0, CLASSES, IMAGES))
    noise = [torch.from_numpy(draw.normal(size=(IMAGES, CLASSES))) for _ in range(3)]

    def method(signal):
        own = torch.nn.functional.one_hot(labels, CLASSES)
        return [((signal * own + noisy).log_softmax(dim=1), labels) for noisy in noise]

    return {"ce": method(1.0), "same": method(1.0), "better": method(2.0)}


@pytest.fixture(scope="module")
def compared(runs):
    return compare(runs, "none", "ce", n_bins=15, draws=400, seeds=3)


def row(frame, method, metric):
    return frame.filter(method=method, metric=metric).row(0, named=True)


def test_the_means_are_those_of_the_metrics(runs, compared):
    tables.check(compared, tables.COMPARISON)
    assert compared["method"].unique(maintain_order=True).to_list() == ["ce", "same", "better"]
    for method, seeds in runs.items():
        for metric in ("accuracy", "ece", "nll", "brier"):
            expected = np.mean([evaluate(*seed)[metric] for seed in seeds])
            found = row(compared, method, metric)
            assert found["mean"] == pytest.approx(expected, abs=1e-9)
            assert found["low"] < found["mean"] < found["high"]
            if method != "ce":
                assert found["difference"] == pytest.approx(expected - row(compared, "ce", metric)["mean"], abs=1e-9)


def test_what_is_better_differs_and_what_is_equal_does_not(compared):
    better, same = row(compared, "better", "nll"), row(compared, "same", "nll")
    assert better["difference_low"] < better["difference"] < better["difference_high"] < 0
    assert better["p"] == pytest.approx(2 / 401)
    assert better["p_holm"] == pytest.approx(4 / 401)  # of two
    assert same["difference"] == 0
    assert same["p_holm"] == 1


def test_the_baseline_is_not_compared_with_itself(compared):
    assert set(row(compared, "ce", "nll").values()) >= {None}
    assert (
        compared.filter(method="ce").select("difference", "difference_low", "difference_high", "p", "p_holm").null_count().row(0)
        == (4,) * 5
    )


def test_without_a_baseline_there_are_intervals_alone(runs):
    frame = compare({"same": runs["same"]}, "temperature", None, n_bins=15, draws=100, seeds=3)
    tables.check(frame, tables.COMPARISON)
    assert frame["p_holm"].null_count() == len(frame) == 4
    assert frame["posthoc"].unique().to_list() == ["temperature"]
    assert frame["low"].null_count() == 0


def test_a_baseline_alone_has_nothing_to_differ_from(runs):
    frame = compare({"ce": runs["ce"]}, "none", "ce", n_bins=15, draws=100, seeds=3)
    assert frame["p_holm"].null_count() == len(frame) == 4


def test_with_one_seed_nothing_is_tested(runs):
    frame = compare({name: seeds[:1] for name, seeds in runs.items()}, "none", "ce", n_bins=15, draws=100, seeds=1)
    assert frame["p"].null_count() == frame["p_holm"].null_count() == len(frame)
    assert frame.filter(pl.col("method") != "ce")["difference_low"].null_count() == 0
