import numpy as np
import pytest

from csm.search.importance import FEWEST, importance
from csm.search.space import parse_space
from csm.search.study import Study

SPACE = parse_space(
    {
        "rate": {"low": 0.0, "high": 1.0},
        "idle": {"low": 0.0, "high": 1.0},
        "loss": {"values": {"focal": {"gamma": {"low": 0.0, "high": 1.0}, "dull": [1, 2]}, "brier": {}}},
        "same": [7],
    }
)


def tried(trials: int) -> list[dict]:
    study = Study(SPACE, "random", ["nll"], 0)
    return [study.ask()[1] for _ in range(trials)]


def test_shares_are_those_of_an_additive_function() -> None:
    """Of independent uniform u, v: Var(a u) = a^2 / 12."""
    found = importance(SPACE, [(trial, 3 * trial["rate"] + trial["idle"]) for trial in tried(80)])
    shares = {item.key: item.share for item in found}
    assert shares["rate"] == pytest.approx(9 / 10, abs=0.06)
    assert shares["idle"] == pytest.approx(1 / 10, abs=0.06)
    assert shares["loss"] == pytest.approx(0, abs=0.02)
    assert [item.key for item in found][:2] == ["rate", "idle"]
    assert sum(item.share for item in found if not item.beside) <= 1 + 1e-9


def test_a_conditional_setting_is_compared_within_its_branch() -> None:
    trials = tried(70)
    found = importance(SPACE, [(trial, trial["rate"] + 2 * trial.get("gamma", 10.0)) for trial in trials])
    items = {item.key: item for item in found}
    gamma = items["gamma"]
    assert (gamma.beside, gamma.trials) == ("loss=focal", sum(trial["loss"] == "focal" for trial in trials))
    assert gamma.share == pytest.approx(4 / 5, abs=0.12)  # with focal loss, of rate + 2 gamma
    assert items["dull"].share < 0.05
    assert items["loss"].share > 0.9  # over all trials the loss decides
    assert items["loss"].beside == ""
    assert items["loss"].trials == 70
    assert "same" not in items  # a setting with one value


def test_too_few_trials_say_nothing() -> None:
    trials = [(trial, trial["rate"]) for trial in tried(FEWEST)]
    assert importance(SPACE, trials)
    assert importance(SPACE, trials[:-1]) == []
    assert importance(SPACE, []) == []
    failed = [*trials[:-1], (trials[-1][0], float("nan"))]
    assert importance(SPACE, failed) == []


def test_a_branch_of_few_trials_is_left_out() -> None:
    trials = tried(40)
    few = [trial for trial in trials if trial["loss"] == "brier"] + [trial for trial in trials if trial["loss"] == "focal"][
        : FEWEST - 1
    ]
    keys = {item.key for item in importance(SPACE, [(trial, trial["rate"]) for trial in few])}
    assert keys == {"rate", "idle", "loss"}


def test_the_same_objective_everywhere_has_no_cause() -> None:
    assert importance(SPACE, [(trial, 1.0) for trial in tried(30)]) == []


def test_the_seed_decides() -> None:
    trials = [(trial, float(np.sin(9 * trial["rate"]))) for trial in tried(25)]
    assert importance(SPACE, trials, seed=1) == importance(SPACE, trials, seed=1)
