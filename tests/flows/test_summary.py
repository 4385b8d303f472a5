import polars as pl
import pytest

from csm.tables import METRICS
from flows.summary import NONE, TEMPERATURE, baseline_of, decimals, is_compared, select, shown, summary_table
from tests.flows.measured import ECE, METHODS, NLL, comparison, metrics


def cell(summary, method, metric, posthoc):
    return summary.row(
        by_predicate=(pl.col("method") == method) & (pl.col("metric") == metric) & (pl.col("posthoc") == posthoc),
        named=True,
    )


def test_mean_and_sample_standard_deviation_over_seeds():
    row = cell(summary_table(metrics(), METHODS), "ce", "nll", NONE)
    assert row["mean"] == pytest.approx(1.2)
    assert row["std"] == pytest.approx(0.2)  # n - 1: with n it would be 0.163
    assert row["count"] == 3


def test_order_of_rows_does_not_matter():
    frame = metrics()
    shuffled = frame.sample(fraction=1, shuffle=True, seed=3)
    left, right = summary_table(frame, METHODS), summary_table(shuffled, METHODS)
    assert left.drop("mean", "std").equals(right.drop("mean", "std"))
    assert left["mean"].to_list() == pytest.approx(right["mean"].to_list())


def test_rows_of_a_temperature_that_happens_to_be_one_stay_apart():
    frame = metrics().with_columns(temperature=pl.lit(1.0, pl.Float32))
    summary = summary_table(frame, METHODS)
    assert cell(summary, "ce", "nll", NONE)["mean"] == pytest.approx(1.2)
    assert cell(summary, "ce", "nll", TEMPERATURE)["mean"] == pytest.approx(0.9)
    assert str(shown(summary, "ce", "temperature", TEMPERATURE)) == "1.00 ± 0.00"


def test_the_fitted_temperature_is_counted_once_per_seed():
    row = cell(summary_table(metrics(), METHODS), "ce", "temperature", TEMPERATURE)
    assert (row["mean"], row["std"], row["count"], row["rank"]) == (2.0, 0.5, 3, None)


def test_best_is_highest_accuracy_and_lowest_error():
    frame = pl.concat([metrics().filter(pl.col("method") != "csm"), metrics(accuracy=0.8).filter(method="csm")])
    summary = summary_table(frame, METHODS)
    best = summary.filter("best").select("method", "metric", "posthoc").rows()
    assert sorted(best) == sorted(
        [("csm", metric, posthoc) for metric in ("accuracy", "nll", "brier") for posthoc in (NONE, TEMPERATURE)]
        + [("focal", metric, NONE) for metric in ("ece", "aece")]
        + [("ce", metric, TEMPERATURE) for metric in ("ece", "aece")]
    )


def test_what_looks_equal_is_equally_good():
    ece = {**ECE, "csm": ([0.0302] * 3, [0.0] * 3)}  # 3.02 next to 3.00 ...
    summary = summary_table(metrics(ece=ece), METHODS)
    assert decimals(summary, "ece") == 2  # ... told apart, for the column is shown with two decimals
    assert not cell(summary, "csm", "ece", NONE)["best"]
    ece = {**ECE, "csm": ([0.0302] * 3, [0.05] * 3)}
    summary = summary_table(metrics(ece=ece), METHODS)
    assert decimals(summary, "ece") == 1
    assert cell(summary, "csm", "ece", NONE)["rank"] == cell(summary, "focal", "ece", NONE)["rank"] == 1


def test_a_single_method_is_not_the_best_of_anything():
    summary = summary_table(metrics(), METHODS[:1])
    assert summary["method"].unique().to_list() == ["ce"]
    assert not summary["best"].any()


def test_one_seed_has_no_spread():
    summary = summary_table(metrics().filter(seed=0), METHODS)
    assert summary["std"].null_count() == len(summary)
    assert shown(summary, "ce", "nll", NONE)[:4] == ("100.0", "", 2, False)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_diverged_seed_is_shown_as_missing_and_wins_nothing(broken):
    summary = summary_table(metrics(nll={**NLL, "csm": ([0.8, 0.8, broken], [0.7] * 3)}), METHODS)
    row = cell(summary, "csm", "nll", NONE)
    assert (row["mean"], row["std"], row["rank"], row["best"]) == (None, None, None, False)
    assert shown(summary, "csm", "nll", NONE) is None
    assert cell(summary, "ce", "nll", NONE)["best"]
    assert not summary["mean"].is_nan().any()


def test_other_splits_and_bin_counts_are_left_out():
    noise = metrics(nll={m: ([9.0] * 3, [9.0] * 3) for m in NLL})
    other = pl.concat([noise.with_columns(split=pl.lit("val", METRICS["split"])), metrics(bins=10).filter(metric="ece")])
    frame = pl.concat([other, metrics()])
    assert len(select(frame, METHODS)) == len(metrics())
    assert cell(summary_table(frame, METHODS, split="val"), "ce", "nll", NONE)["mean"] == 9.0


def test_the_same_measurement_twice_is_refused():
    with pytest.raises(ValueError, match=r"one row per .*'ce'"):
        summary_table(pl.concat([metrics(), metrics().filter(method="ce")]), METHODS)


def test_no_rows_give_an_empty_summary():
    assert summary_table(metrics().clear(), METHODS).is_empty()


def test_intervals_and_significance_come_from_the_comparison():
    summary = summary_table(metrics(), METHODS, comparison({"focal": 0.2, "csm": 0.049}))
    figure = shown(summary, "csm", "nll", NONE)
    assert (figure.mean, figure.low, figure.high, figure.half, figure.differs) == ("80.0", "49.0", "53.0", "2.0", True)
    assert str(figure) == "80.0"  # its spread is the interval, not the standard deviation
    assert not shown(summary, "focal", "nll", NONE).differs
    assert not shown(summary, "ce", "nll", NONE).differs  # the baseline itself
    assert shown(summary, "csm", "aece", NONE)[4:] == ("", "", "", False)  # is not compared
    assert (is_compared(summary), is_compared(summary_table(metrics(), METHODS))) == (True, False)
    assert cell(summary, "csm", "nll", TEMPERATURE)["difference"] == -0.1


def test_a_p_of_exactly_the_level_is_no_difference():
    summary = summary_table(metrics(), METHODS, comparison({"focal": 0.05, "csm": 0.05}))
    assert not any(shown(summary, m.name, "ece", p).differs for m in METHODS for p in (NONE, TEMPERATURE))


def test_comparing_adds_no_row_and_changes_no_order():
    plain, with_more = summary_table(metrics(), METHODS), summary_table(metrics(), METHODS, comparison({}))
    columns = ["method", "metric", "posthoc", "mean", "std", "rank", "best"]
    assert with_more.select(columns).equals(plain.select(columns))


def test_as_trained_comes_before_every_posthoc_method():
    histogram = metrics().filter(posthoc=NONE).with_columns(posthoc=pl.lit("histogram"))
    summary = summary_table(pl.concat([histogram, metrics()]), METHODS)
    assert summary["posthoc"].unique(maintain_order=True).to_list() == [NONE, "histogram", TEMPERATURE]
    assert summary.filter(metric="temperature")["posthoc"].unique().to_list() == [TEMPERATURE]


def test_the_baseline_is_the_method_that_says_so():
    assert baseline_of(METHODS) == "ce"
    assert baseline_of(METHODS[1:]) is None
