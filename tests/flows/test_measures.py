import pytest

from csm.assessment import Assessment, Estimate
from csm.metrics import METRICS
from flows.measures import MEASURES, best_of, chance_sentence


def test_every_metric_has_words():
    assert set(MEASURES) == set(METRICS)


@pytest.mark.parametrize(("metric", "value", "text"), [("ece", 0.0312, "3.1"), ("ece", 0.0042, "0.42"), ("nll", 0.5, "0.500")])
def test_texts(metric, value, text):
    assert MEASURES[metric].text(value) == text


def test_intervals_do_not_begin_below_0_and_may_be_missing():
    assert MEASURES["ece"].interval(Estimate(0.02, -0.001, 0.05)) == "0.00–5.0"
    assert MEASURES["ece"].interval(Estimate(0.02)) == ""


def test_the_best_are_those_that_look_best():
    estimates = {"a": Estimate(0.0301), "b": Estimate(0.0299), "c": Estimate(0.05)}
    assert best_of("ece", estimates) == {"a", "b"}
    assert best_of("accuracy", estimates) == {"c"}
    assert best_of("brier_uncertainty", estimates) == set()
    assert best_of("ece", {"a": Estimate(0.1), "b": Estimate(0.1)}) == set()


def test_chance_in_words():
    sentence = chance_sentence(Assessment(1200, {}, Estimate(0.031, 0.02, 0.042)))
    assert sentence == (
        "A perfectly calibrated model with these confidences would show an ECE of 3.1 % on 1,200 images by chance alone "
        "(95 % of such: 2.0–4.2 %)."
    )
