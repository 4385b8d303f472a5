import polars as pl
import pytest
from rich.console import Console

from csm.tables import METRICS
from flows.summary import Method, decimals, select, shown, summary_table, terminal_table, verdict

METHODS = [
    Method("ce", "cross-entropy", is_baseline=True),
    Method("focal", "focal loss"),
    Method("csm", "semantic mixtures", is_ours=True),
]
# method -> one value per seed, before and after temperature
NLL = {"ce": ([1.0, 1.2, 1.4], [0.9, 0.9, 0.9]), "focal": ([1.3] * 3, [1.1] * 3), "csm": ([0.8] * 3, [0.7] * 3)}
ECE = {"ce": ([0.15] * 3, [0.05] * 3), "focal": ([0.03] * 3, [0.06] * 3), "csm": ([0.04] * 3, [0.055] * 3)}


def metrics(nll=NLL, ece=ECE, split="test", bins=15, accuracy=0.7):
    rows = []
    for method in nll:
        for index, fitted in enumerate((False, True)):
            for seed in range(len(nll[method][index])):
                values = {
                    "accuracy": accuracy,
                    "ece": ece[method][index][seed],
                    "aece": ece[method][index][seed],
                    "nll": nll[method][index][seed],
                    "brier": nll[method][index][seed] / 2,
                }
                temperature = 1.5 + seed / 2 if fitted else 1.0
                for metric, value in values.items():
                    n_bins = bins if metric in ("ece", "aece") else None
                    run = f"{method}-{seed}"
                    rows.append((run, method, seed, split, fitted, temperature, metric, n_bins, value))
    return pl.DataFrame(rows, schema=dict(METRICS), orient="row")


def cell(summary, method, metric, fitted):
    return summary.row(
        by_predicate=(pl.col("method") == method) & (pl.col("metric") == metric) & (pl.col("fitted") == fitted),
        named=True,
    )


def test_mean_and_sample_standard_deviation_over_seeds():
    row = cell(summary_table(metrics(), METHODS), "ce", "nll", False)
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
    assert cell(summary, "ce", "nll", False)["mean"] == pytest.approx(1.2)
    assert cell(summary, "ce", "nll", True)["mean"] == pytest.approx(0.9)
    assert str(shown(summary, "ce", "temperature", True)) == "1.00 ± 0.00"


def test_the_fitted_temperature_is_counted_once_per_seed():
    row = cell(summary_table(metrics(), METHODS), "ce", "temperature", True)
    assert (row["mean"], row["std"], row["count"], row["rank"]) == (2.0, 0.5, 3, None)


def test_best_is_highest_accuracy_and_lowest_error():
    frame = pl.concat([metrics().filter(pl.col("method") != "csm"), metrics(accuracy=0.8).filter(method="csm")])
    summary = summary_table(frame, METHODS)
    best = summary.filter("best").select("method", "metric", "fitted").rows()
    assert sorted(best) == sorted(
        [("csm", metric, fitted) for metric in ("accuracy", "nll", "brier") for fitted in (False, True)]
        + [("focal", metric, False) for metric in ("ece", "aece")]
        + [("ce", metric, True) for metric in ("ece", "aece")]
    )


def test_what_looks_equal_is_equally_good():
    ece = {**ECE, "csm": ([0.0302] * 3, [0.0] * 3)}  # 3.02 next to 3.00 ...
    summary = summary_table(metrics(ece=ece), METHODS)
    assert decimals(summary, "ece") == 2  # ... told apart, for the column is shown with two decimals
    assert not cell(summary, "csm", "ece", False)["best"]
    ece = {**ECE, "csm": ([0.0302] * 3, [0.05] * 3)}
    summary = summary_table(metrics(ece=ece), METHODS)
    assert decimals(summary, "ece") == 1
    assert cell(summary, "csm", "ece", False)["rank"] == cell(summary, "focal", "ece", False)["rank"] == 1


def test_a_single_method_is_not_the_best_of_anything():
    summary = summary_table(metrics(), METHODS[:1])
    assert summary["method"].unique().to_list() == ["ce"]
    assert not summary["best"].any()


def test_one_seed_has_no_spread():
    summary = summary_table(metrics().filter(seed=0), METHODS)
    assert summary["std"].null_count() == len(summary)
    assert shown(summary, "ce", "nll", False) == ("100.0", "", 2, False)
    assert "one seed" in " ".join(verdict(metrics().filter(seed=0), METHODS))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_diverged_seed_is_shown_as_missing_and_wins_nothing(broken):
    summary = summary_table(metrics(nll={**NLL, "csm": ([0.8, 0.8, broken], [0.7] * 3)}), METHODS)
    row = cell(summary, "csm", "nll", False)
    assert (row["mean"], row["std"], row["rank"], row["best"]) == (None, None, None, False)
    assert shown(summary, "csm", "nll", False) is None
    assert cell(summary, "ce", "nll", False)["best"]
    assert not summary["mean"].is_nan().any()


def test_other_splits_and_bin_counts_are_left_out():
    noise = metrics(nll={m: ([9.0] * 3, [9.0] * 3) for m in NLL})
    other = pl.concat([noise.with_columns(split=pl.lit("val", METRICS["split"])), metrics(bins=10).filter(metric="ece")])
    frame = pl.concat([other, metrics()])
    assert len(select(frame, METHODS)) == len(metrics())
    assert cell(summary_table(frame, METHODS, split="val"), "ce", "nll", False)["mean"] == 9.0


def test_the_same_measurement_twice_is_refused():
    with pytest.raises(ValueError, match=r"one row per .*'ce'"):
        summary_table(pl.concat([metrics(), metrics().filter(method="ce")]), METHODS)


def test_no_rows_give_an_empty_summary_and_no_words():
    assert summary_table(metrics().clear(), METHODS).is_empty()
    assert verdict(metrics().clear(), METHODS) == []


def test_verdict_names_winners_baseline_and_seeds():
    before, after, own, raised = verdict(metrics(), METHODS)
    assert before == (
        "Before temperature scaling, csm has the lowest NLL, 80.0 ± 0.0 (×100) against 120.0 ± 20.0 for ce (lower with "
        "all 3 seeds), and focal has the lowest ECE, 3.0 ± 0.0 % against 15.0 ± 0.0 % (lower with all 3 seeds)."
    )
    assert after == (
        "After temperature scaling, csm has the lowest NLL, 70.0 ± 0.0 (×100) against 90.0 ± 0.0 for ce (lower with all "
        "3 seeds), and ce has the lowest ECE, 5.0 ± 0.0 % (it is the baseline itself)."
    )
    assert own == (
        "So semantic mixing comes first in 2 of 4 comparisons (NLL before and NLL after); in ECE before, csm is 2nd of 3 "
        "(4.0 ± 0.0 %) and in ECE after, csm is 2nd of 3 (5.5 ± 0.0 %)."
    )
    assert raised == "Temperature scaling raises the ECE of 2 of 3 methods."


def test_verdict_counts_the_seeds_that_lost():
    nll = {**NLL, "csm": ([1.1, 1.1, 1.1], [0.7] * 3)}
    assert "(lower with 2 of 3 seeds)" in verdict(metrics(nll=nll), METHODS)[0]


def test_verdict_admits_defeat():
    nll, ece = ({**table, "csm": ([2.0] * 3, [2.0] * 3)} for table in (NLL, ECE))
    own = next(s for s in verdict(metrics(nll, {**ece, "csm": ([0.9] * 3, [0.9] * 3)}), METHODS) if s.startswith("So"))
    assert own.startswith("So semantic mixing comes first in none of 4 comparisons; in NLL before, csm is 3rd of 3")


def test_verdict_says_it_when_ours_wins_all():
    words = verdict(metrics(ece={**ECE, "csm": ([0.01] * 3, [0.01] * 3)}), METHODS)
    assert "So semantic mixing comes first in all 4 comparisons." in words


def test_verdict_marks_every_name():
    words = " ".join(verdict(metrics(), METHODS, mark=lambda name: f"<{name}>"))
    assert words.count("<csm>") == words.count("csm") > 0
    assert words.count("<ce>") > 0


def lines(summary, methods, width):
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(terminal_table(summary, methods))
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [100, 80])
def test_terminal_table_fits_and_marks_the_best_without_colour(width):
    methods = [*METHODS[:2], Method("csm_posterior_weight_4", "ours", is_ours=True)]
    frame = metrics().with_columns(pl.col("method").replace("csm", methods[2].name))
    text = lines(summary_table(frame, methods), methods, width)
    assert max(map(len, text)) <= width
    assert not any("…" in line for line in text)
    ours = [line for line in text if "csm_posterior" in line]
    assert "80.0±0.0*" in ours[0]  # NLL before
    assert "70.0±0.0*" in ours[1]
    assert "2.00" in ours[1]  # the fitted temperature
    focal = [line for line in text if line.startswith("focal")]
    assert "3.0±0.0*" in focal[0]
    assert "*" not in focal[1].replace("70.0±0.0*", "")  # accuracies are all equal and all best


def test_terminal_table_shows_a_dash_for_what_is_missing():
    text = lines(summary_table(metrics().filter(~pl.col("fitted")), METHODS), METHODS, 80)
    assert [word for word in text if word.startswith("csm")][1].split() == ["csm", *"------"]
