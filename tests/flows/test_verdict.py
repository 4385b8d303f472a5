import polars as pl

from flows.summary import Method
from flows.verdict import verdict
from tests.flows.measured import ECE, METHODS, NLL, comparison, metrics


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


def test_nothing_measured_gives_no_words():
    assert verdict(metrics().clear(), METHODS) == []


def test_one_seed_is_said():
    assert verdict(metrics().filter(seed=0), METHODS)[-1].endswith("with one seed only, so small differences may be chance.")
    words = verdict(metrics().filter(seed=0), METHODS, comparison({"focal": 0.2, "csm": 0.01}))
    assert words[-1].endswith(
        "with one seed only, so intervals tell of chance in the test images alone, and no difference is tested."
    )


def test_chance_of_the_winners_is_said():
    before, after, *_ = verdict(metrics(), METHODS, comparison({"focal": 0.2, "csm": 0.0004}))
    assert before == (
        "Before temperature scaling, csm has the lowest NLL, 80.0 (×100) against 120.0 for ce (lower with all 3 seeds, p < 0.001), "
        "and focal has the lowest ECE, 3.0 % against 15.0 % (lower with all 3 seeds, not significant, p = 0.2)."
    )
    assert "(lower with all 3 seeds, p < 0.001)" in after


def test_significant_differences_are_named_with_their_side():
    table = comparison({"focal": 0.03, "csm": 0.04})
    worse = pl.when((pl.col("method") == "focal") & (pl.col("metric") == "nll")).then(0.1).otherwise("difference")
    words = verdict(metrics(), METHODS, table.with_columns(difference=worse))
    assert words[2] == (
        "Next to ce, before temperature scaling and beyond chance (p < 0.05), NLL is lower with 1 (csm) and higher with 1 (focal) of 2, "
        "and ECE is lower with 2 (focal and csm) of 2."
    )
    assert words[3].startswith("Next to ce, after temperature scaling")
    none = verdict(metrics(), METHODS, comparison({"focal": 0.3, "csm": 0.4}))[2]
    assert none.endswith("NLL is neither lower nor higher with any of 2, and ECE is neither lower nor higher with any of 2.")


def test_many_methods_are_counted_not_listed():
    names = [f"loss-{index}" for index in range(24)]
    methods = [METHODS[0], *(Method(name, name) for name in names)]
    nll = {"ce": NLL["ce"], **{name: NLL["csm"] for name in names}}
    frame = metrics(nll, {"ce": ECE["ce"], **{name: ECE["csm"] for name in names}})
    words = verdict(frame, methods, comparison(dict.fromkeys(names, 0.01), methods=methods))
    assert "NLL is lower with 24 of 24, and ECE is lower with 24 of 24." in words[2]
    assert words[0].startswith(
        "Before temperature scaling, 24 methods have the lowest NLL, 80.0 (×100) against 120.0 for ce (lower"
    )
    assert "p =" not in words[0]  # of which of them?
