import polars as pl

from flows.shift_summary import shift_tables
from flows.summary import NONE, TEMPERATURE
from tests.flows.measured import METHODS, shift_metrics


def test_means_over_corruptions_and_seeds_for_each_severity():
    corrupted = shift_tables(shift_metrics(), METHODS)[0]
    assert (corrupted.shift, corrupted.posthoc, corrupted.corruptions) == ("corrupted", NONE, ("blur", "noise"))
    assert corrupted.columns == ("1", "5")
    assert [group.metric for group in corrupted.groups] == ["accuracy", "ece", "nll"]
    # of csm: 0.9 - 0.1 severity - (0 or 0.2) + 0.02 + (0 or 0.02)
    assert [cell[0] for cell in corrupted.rows["csm"]] == ["73.0", "33.0", "27.0", "67.0", "127.0", "167.0"]
    assert list(corrupted.rows) == ["ce", "focal", "csm"]  # as the methods are given
    assert all(best for _, best in corrupted.rows["csm"])
    assert not any(best for _, best in corrupted.rows["ce"])


def test_accuracy_is_not_said_again_with_the_temperature():
    found = shift_tables(shift_metrics(), METHODS)
    assert [(table.shift, table.posthoc) for table in found] == [
        (s, p) for s in ("corrupted", "letters") for p in (NONE, TEMPERATURE)
    ]
    assert [group.metric for group in found[1].groups] == ["ece", "nll"]


def test_sets_out_of_distribution_have_one_column_for_each_measure():
    letters = shift_tables(shift_metrics(), METHODS)[2]
    assert (letters.corruptions, letters.columns) == ((), ("",))
    assert letters.rows["csm"] == [("82.0", True), ("42.0", False)]  # a high AUROC is good, a high FPR95 is not
    assert letters.rows["focal"] == [("80.0", False), ("40.0", True)]


def test_what_is_missing_or_not_finite_is_a_gap_and_never_the_best():
    broken = pl.when((pl.col("method") == "csm") & (pl.col("metric") == "ece") & (pl.col("seed") == 0)).then(float("nan"))
    frame = shift_metrics().with_columns(value=broken.otherwise("value")).filter(pl.col("method") != "focal")
    corrupted = shift_tables(frame, METHODS)[0]
    assert corrupted.rows["focal"] == [None] * 6
    assert corrupted.rows["csm"][2:4] == [None, None]
    assert not any(best for _, best in corrupted.rows["ce"])  # alone in its columns, or worse
    assert shift_tables(frame.clear(), METHODS) == []
