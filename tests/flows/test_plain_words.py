import numpy as np
import pytest
from scipy.stats import binomtest

from flows.plain_words import _right, plain_words
from flows.reliability import Predictions, Reliability
from flows.summary import summary_table
from tests.flows.measured import METHODS, NLL, comparison, metrics


def says(level, of_100, seeds=3, images=100):
    """Predictions that all say ``level`` per cent, of which ``of_100`` of 100 are right."""
    correct = np.tile(np.arange(images) % 100 < of_100, (seeds, 1))
    return Predictions(np.full((seeds, images), level / 100), correct)


def told(reliability=None, table=None, methods=METHODS, frame=None):
    frame = metrics() if frame is None else frame
    summary = summary_table(frame, methods, table)
    return plain_words(summary, methods, reliability or {}, dataset="digits", classes=10, images=100)


def test_the_sentence_for_somebody_who_relies_on_the_confidence():
    pairs = {
        "csm": Reliability(says(90, 85), says(90, 88)),
        "ce": Reliability(says(90, 70), says(90, 81)),
    }
    words = told(pairs)
    assert words.best.startswith("Best is csm, with the fitted temperature: its probabilities fit what is true better")
    assert words.meaning == (
        "When it says 90 % (85 to 95 %), it is right in 88 of 100 cases; when ce says so, in 70 (as trained) or 81 (with the fitted "
        "temperature). On the whole it is too sure by 2 points: it says 90 % on average and is right in 88 %."
    )
    assert words.names == ["csm, with the fitted temperature", "ce, as trained", "ce, with the fitted temperature"]
    ((level, cells),) = words.levels
    assert level == "about 90\u00a0%"
    assert [cell.of_100 for cell in cells] == [88, 70, 81]


def test_another_level_is_told_where_few_say_90():
    words = told({"csm": Reliability(says(70, 60), says(70, 60))})
    assert words.meaning.startswith("When it says 70 % (65 to 75 %), it is right in 60 of 100 cases.")
    assert "too sure by 10 points" in words.meaning


def test_too_unsure_and_as_sure_as_it_should_be():
    assert "too unsure by 9 points" in told({"csm": Reliability(says(90, 99), says(90, 99))}).meaning
    assert "about as sure as it should be" in told({"csm": Reliability(says(90, 90), says(90, 90))}).meaning


def test_nothing_is_said_of_a_few_predictions():
    few = Predictions(np.full((1, 29), 0.9), np.ones((1, 29), bool))
    assert _right(few, 90) is None
    assert told({"csm": Reliability(few, few)}).levels == []


@pytest.mark.parametrize("of_100", [0, 3, 50, 99, 100])
def test_the_interval_is_that_of_wilson_over_images_not_seeds(of_100):
    right = _right(says(90, of_100, seeds=5), 90)
    interval = binomtest(of_100, 100).proportion_ci(0.95, "wilson")
    assert (right.low, right.high, right.count) == (round(100 * interval.low), round(100 * interval.high), 500)


def test_caveats_name_seeds_chance_and_the_kind_of_images():
    words = told(table=comparison({"csm": 0.3, "focal": 0.5}))
    assert words.caveats[0].startswith("3 trainings of each are few")
    assert words.caveats[1] == "That csm fits better than ce may be chance (p = 0.3)."
    sure = told(table=comparison({"csm": 0.0001, "focal": 0.5}))
    assert sure.caveats[1] == "That csm fits better than ce is more than chance explains (p less than 0.001)."
    assert "holds for images like these" in words.caveats[-1]
    once = told(frame=metrics({name: (a[:1], b[:1]) for name, (a, b) in NLL.items()}))
    assert once.caveats[0].startswith("Each was trained once.")
    assert ", once, and measured" in once.tried


def test_one_method_and_none_measured():
    alone = told(methods=METHODS[2:])
    assert alone.tried.startswith("One way of training a classifier on digits (10 classes) was tried")
    assert alone.best.startswith(
        "csm was trained alone, so there is nothing to compare it with. It names the right class in 70.0 %"
    )
    assert told(frame=metrics().clear()).best == ""
