import numpy as np
import pytest

from flows.scatter import HEIGHT, WIDTH, nice_ticks, scatter


@pytest.mark.parametrize(("low", "high"), [(0.5, 17.3), (60, 61), (3.0, 3.0), (0.001, 0.002), (0, 0), (99, 5000)])
def test_ticks_are_few_even_and_enclose(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert high <= ticks[-1]
    assert 3 <= len(ticks) <= 7
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])
    assert nice_ticks(low, high, include_zero=True)[0] == 0


def test_points_lie_where_the_ticks_say():
    plot = scatter("t", "x", "y", [(0.0, 0.0, "other", "a"), (10.0, 5.0, "first", "b")], [(0.0, 5.0), (10.0, 0.0)])
    places, heights = ({float(text): place for place, text in ticks} for ticks in (plot.x_ticks, plot.y_ticks))
    assert [(dot.x, dot.y) for dot in plot.dots] == [(places[0], heights[0]), (places[10], heights[5])]
    assert plot.line == [(0, 0), (WIDTH, HEIGHT)]


def test_numbers_of_many_sizes_have_a_logarithmic_axis():
    plot = scatter("t", "", "y", [(x, 1.0, "other", "") for x in (0.001, 0.01, 0.1)])
    gaps = np.diff([dot.x for dot in plot.dots])
    assert gaps[0] == pytest.approx(gaps[1], abs=0.2)
    assert [text for _, text in plot.x_ticks] == ["0.001", "0.01", "0.1"]


def test_texts_are_side_by_side():
    plot = scatter("t", "", "y", [("b", 1.0, "other", ""), ("a", 2.0, "other", ""), ("b", 3.0, "other", "")])
    assert [text for _, text in plot.x_ticks] == ["a", "b"]
    assert plot.dots[0].x == plot.dots[2].x == WIDTH * 0.75


def test_one_value_and_what_is_not_finite():
    assert scatter("t", "", "y", [(1.0, float("nan"), "other", "")]) is None
    plot = scatter("t", "", "y", [(3.0, 2.0, "other", ""), (float("inf"), 2.0, "other", "")])
    assert len(plot.dots) == 1
    assert 0 <= plot.dots[0].x <= WIDTH
