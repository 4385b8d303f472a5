import pytest

from flows.bench.recipe_reach import reach, reach_table
from flows.options import print_table

FIGURES = {"accuracy": 0.8, "ece": 0.04, "nll": 0.6, "brier": 0.3, "nll_t": 0.6, "brier_t": 0.3, "tv": None}


def row(method, kind, minus=None, dataset="digits-hard", **figures):
    return {"dataset": dataset, "method": method, "kind": kind, "recipe_minus": minus, **FIGURES, **figures}


def minus(high, figures=("nll", "brier", "nll_t", "brier_t", "accuracy", "ece")):
    """Differences whose intervals end at ``high``."""
    return {figure: [high - 0.01, high - 0.02, high] for figure in figures}


ROWS = [
    row("csm", "recipe", accuracy=0.82, ece=0.03, nll=0.48, brier=0.25, nll_t=0.47, brier_t=0.25),
    row("paper", "paper", minus(-0.2), nll=0.01),  # no baseline, whatever it reaches
    row("cross-entropy", "loss", minus(-0.2), accuracy=0.81, ece=0.12, nll=0.9, brier=0.4),
    row("focal", "loss", minus(-0.1), ece=0.02, nll=0.61, nll_t=0.56, brier=0.30),
    row("mixup", "pixel-mixing", minus(-0.1), nll=0.60, brier=0.34, accuracy=0.825),
    row("csm-unmixed", "ablation", minus(-0.005)),
    row("deep-ensemble", "ablation", {**minus(-0.1), "brier": [-0.01, -0.03, 0.001]}),
]


def found(rows):
    return {each.target: each for each in reach(rows)}


def test_each_figure_has_its_own_best_baseline():
    told = found(ROWS)
    nll, brier = told["NLL at most 0.8 of the best baseline's"], told["Brier at most 0.8 of the best baseline's"]
    assert (nll.against, nll.figure, nll.reached) == ("mixup", pytest.approx(0.8), True)
    assert (brier.against, brier.figure, brier.reached) == ("focal", pytest.approx(0.25 / 0.3), False)
    at_t = told["NLL at T at most 0.8 of the best baseline's"]
    assert (at_t.against, at_t.figure, at_t.reached) == ("focal", pytest.approx(0.47 / 0.56), False)
    accuracy = told["accuracy at least the best baseline's"]
    assert (accuracy.against, accuracy.figure, accuracy.reached) == ("mixup", pytest.approx(-0.005), False)
    ece, third = told["ECE at most the best baseline's"], told["ECE at most a third of cross-entropy's"]
    assert (ece.against, ece.reached) == ("focal", False)
    assert (third.against, third.figure, third.reached) == ("cross-entropy", pytest.approx(0.25), True)
    told = found([{**ROWS[0], "ece_chance": 0.031}, *ROWS[1:]])
    assert told["ECE at most a third of cross-entropy's"].detail.endswith("; chance alone gives 3.1")


def test_an_ablation_is_beaten_when_its_interval_lies_below_0():
    told = found(ROWS)
    assert told["NLL below every ablation's, interval without 0"].reached
    assert told["NLL below every ablation's, interval without 0"].against == "csm-unmixed"  # the nearest
    brier = told["Brier below every ablation's, interval without 0"]
    assert (brier.reached, brier.against, brier.figure) == (False, "deep-ensemble", 0.001)
    both = found([*ROWS, row("csm-pixel", "ablation", minus(0.02))])
    assert "not below deep-ensemble, csm-pixel" in both["Brier below every ablation's, interval without 0"].detail


def test_targets_of_known_truth_are_told_where_the_truth_is_known():
    assert not any("TV" in target or "way" in target for target in found(ROWS))
    tvs = {
        "csm": 0.22,
        "cross-entropy": 0.30,
        "focal": 0.26,
        "mixup": 0.27,
        "csm-unmixed": 0.25,
        "deep-ensemble": 0.25,
        "paper": 0.3,
    }
    known = [{**each, "tv": tvs[each["method"]]} for each in ROWS]
    below = found(known)["TV at most 0.85 of the best baseline's"]
    assert (below.against, below.figure, below.reached) == ("focal", pytest.approx(0.22 / 0.26), True)
    way = found([*known, row("csm-truth", "ceiling", minus(0.1), tv=0.18)])
    target = way["60 % of the way from cross-entropy to the true posterior as annotator"]
    assert (target.figure, target.reached) == (pytest.approx(0.08 / 0.12), True)
    short = found([*known, row("csm-truth", "ceiling", minus(0.1), tv=0.15)])
    assert not short["60 % of the way from cross-entropy to the true posterior as annotator"].reached


def test_what_is_not_there_is_not_judged():
    assert reach(ROWS[1:]) == []  # no recipe
    assert {each.target for each in reach([ROWS[0], ROWS[2]])} >= {"ECE at most a third of cross-entropy's"}
    assert not any("ablation" in each.target for each in reach(ROWS[:5]))
    assert reach(ROWS[:1]) == []


def test_the_table_says_how_many_are_reached(capsys):
    targets = reach([*ROWS, *({**each, "dataset": "other"} for each in ROWS)])
    print_table(reach_table(targets), 180)
    shown = capsys.readouterr().out
    assert shown.startswith(f"{sum(each.reached for each in targets)} of {len(targets)} targets reached")
    assert shown.count("digits-hard") == shown.count("other") == 1
    assert " yes " in shown
    assert " no " in shown
