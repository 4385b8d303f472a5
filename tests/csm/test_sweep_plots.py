import numpy as np
import pytest

from csm.sweep_plots import importance_bars, objective_history, pareto_plot, slices


def test_history_has_every_trial_and_the_best_so_far():
    (axes,) = objective_history([0, 2, 3, 5], [0.5, 0.7, 0.4, 0.6], "nll").axes
    trials, best = axes.lines
    np.testing.assert_array_equal(trials.get_xydata(), [[0, 0.5], [2, 0.7], [3, 0.4], [5, 0.6]])
    np.testing.assert_array_equal(best.get_ydata(), [0.5, 0.5, 0.4, 0.4])
    (axes,) = objective_history([0, 1, 2], [0.5, 0.7, 0.4], "accuracy", is_higher_better=True).axes
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), [0.5, 0.7, 0.7])


def test_a_trial_that_diverged_does_not_flatten_the_others():
    values = [0.5 + 0.01 * number for number in range(30)] + [1e6]
    (axes,) = objective_history(range(31), values, "nll").axes
    low, high = axes.get_ylim()
    assert low < 0.5
    assert 0.75 < high < 2


def test_the_pareto_front_is_joined_from_left_to_right_and_named():
    (axes,) = pareto_plot([3.0, 1.0, 2.0], [3.0, 1.0, 5.0], [True, True, False], ("a", "b"), ["x", "y", "z"]).axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[2, 5]])
    np.testing.assert_array_equal(axes.lines[1].get_xydata(), [[1, 1], [3, 3]])
    assert [text.get_text() for text in axes.texts] == ["y", "x"]


def test_slices_leave_out_trials_without_the_setting_and_mark_the_best():
    tried = {"rate": [0.001, 0.1, None], "flag": [True, False, True], "epochs": [10, 20, 30]}
    figure = slices(tried, [3.0, 1.0, 2.0], "nll")
    rate, flag, epochs = figure.axes
    np.testing.assert_array_equal(rate.lines[0].get_xydata(), [[0.001, 3], [0.1, 1]])
    np.testing.assert_array_equal(rate.lines[1].get_xydata(), [[0.1, 1]])
    assert (rate.get_xscale(), epochs.get_xscale()) == ("log", "linear")
    assert [text.get_text() for text in flag.get_xticklabels()] == ["False", "True"]
    np.testing.assert_array_equal(flag.lines[0].get_xdata(), [1, 0, 1])


def test_importance_is_drawn_from_top_to_bottom():
    (axes,) = importance_bars({"a": 0.7, "b": 0.1}, "share").axes
    assert [bar.get_width() for bar in axes.patches] == [0.7, 0.1]
    assert axes.yaxis_inverted()
    assert [text.get_text() for text in axes.texts] == ["0.70", "0.10"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: objective_history([], [], "nll"),
        lambda: objective_history([1], [1.0, 2.0], "nll"),
        lambda: pareto_plot([1.0], [1.0, 2.0], [True], ("a", "b"), ["x"]),
        lambda: slices({}, [1.0], "nll"),
        lambda: slices({"a": [1]}, [1.0, 2.0], "nll"),
        lambda: importance_bars({}, "share"),
    ],
)
def test_nothing_to_draw_or_another_number_is_refused(draw):
    with pytest.raises(ValueError, match="must"):
        draw()
