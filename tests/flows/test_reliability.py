import numpy as np
import pytest

from flows.reliability import Predictions, Reliability, diagram, is_drawable


def predictions(seeds=3, images=400):
    """Right 0.2 less often than it says, in confidences between 0.5 and 1."""
    draw = np.random.default_rng(0)
    confidence = draw.uniform(0.5, 1, (seeds, images))
    return Predictions(confidence, draw.uniform(size=confidence.shape) < confidence - 0.2)


def test_bars_pool_the_seeds():
    side = predictions()
    pooled = Predictions(side.confidence.ravel(), side.correct.ravel())
    drawn, flat = (diagram(Reliability(p), 10) for p in (side, pooled))
    assert drawn["bars"] == flat["bars"]
    assert (drawn["count"], drawn["ece"]) == (1200, flat["ece"])
    for bar in drawn["bars"]["before"]:
        inside = (side.confidence > bar.low) & (side.confidence <= bar.high)
        assert bar.accuracy == pytest.approx(side.correct[inside].mean())
        assert bar.share == pytest.approx(inside.mean())


def test_the_smooth_curve_is_near_the_truth_inside_its_band():
    (piece,) = diagram(Reliability(predictions()), 10)["curves"]["before"]
    assert 0.5 <= piece[0].confidence < 0.52  # the predictions' own range, though the kernel sees beyond it
    assert 0.98 < piece[-1].confidence <= 1
    for point in piece:
        assert 0 <= point.low <= point.high <= 1
        if 0.55 <= point.confidence <= 0.95:
            assert point.accuracy == pytest.approx(point.confidence - 0.2, abs=0.1)
            assert point.low - 0.02 <= point.accuracy <= point.high + 0.02


def test_the_curve_ends_where_no_prediction_is_near():
    draw = np.random.default_rng(0)
    confidence = np.concatenate([draw.uniform(0.1, 0.2, (1, 500)), draw.uniform(0.8, 0.9, (1, 500))], axis=1)
    side = Predictions(confidence, draw.uniform(size=confidence.shape) < confidence)
    pieces = diagram(Reliability(side), 10)["curves"]["before"]
    assert len(pieces) == 2
    assert pieces[0][-1].confidence < 0.5 < pieces[1][0].confidence


def test_before_alone_has_no_after():
    drawn = diagram(Reliability(predictions()), 10)
    assert (drawn["bars"]["after"], drawn["curves"]["after"], drawn["ece"]["after"]) == ([], [], "")


def test_what_is_empty_or_not_finite_is_not_drawn():
    good, empty = predictions(), Predictions(np.zeros((1, 0)), np.zeros((1, 0), bool))
    broken = Predictions(np.full((1, 3), np.nan), np.zeros((1, 3), bool))
    assert is_drawable(Reliability(good, good))
    assert not is_drawable(Reliability(empty))
    assert not is_drawable(Reliability(good, broken))
