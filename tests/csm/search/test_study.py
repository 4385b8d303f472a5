import itertools
import json
import logging
import warnings

import numpy as np
import pytest

from csm.errors import InputError
from csm.metrics import METRICS
from csm.search.space import parse_space
from csm.search.study import SEARCHES, Study

FINITE = parse_space(
    {"a": {"values": {"x": {"b": [1, 2, 3]}, "y": {"b": {"low": 0.0, "high": 1.0, "step": 0.5}}, "z": {}}}, "c": [True, 1, None]}
)
REAL = parse_space(
    {
        "x": {"low": -5.0, "high": 5.0},
        "kind": {"values": {"bowl": {"y": {"low": -5.0, "high": 5.0}}, "flat": {}}},
        "n": {"low": 1, "high": 30, "log": True},
    }
)


def loss(assignment: dict) -> float:
    """Least, 0, at x = 2, y = -1, n = 1."""
    beside = (assignment["y"] + 1) ** 2 if assignment["kind"] == "bowl" else 10.0
    return (assignment["x"] - 2) ** 2 + beside + 0.1 * (assignment["n"] - 1)


def text(assignment: dict) -> str:
    return json.dumps(assignment, sort_keys=True)


def run(study: Study, trials: int, tell=lambda assignment: [loss(assignment)]) -> list[tuple[int, dict, list | None]]:
    """One trial after the other."""
    done = []
    for _ in range(trials):
        number, assignment = study.ask()
        values = tell(assignment)
        study.tell(number, values)
        done.append((number, assignment, values))
    return done


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("together", [False, True])
def test_a_finite_space_is_gone_through_once_and_then_ends(search: str, together: bool) -> None:
    study = Study(FINITE, search, ["nll"], 3)
    asked = []
    while (trial := study.ask()) is not None:
        asked.append(trial)
        if not together:
            study.tell(trial[0], [float(len(asked) > 12)])
    assert [number for number, _ in asked] == list(range(21))
    assert len({text(assignment) for _, assignment in asked}) == FINITE.size == 21
    study.tell(20, None)
    assert study.ask() is None


def test_a_grid_has_every_combination_once_in_an_order_of_its_seed() -> None:
    orders = [
        [text(assignment) for _, assignment, _ in run(Study(FINITE, "grid", ["nll"], seed), 21, lambda a: [0.0])]
        for seed in (0, 1)
    ]
    expected = {text({"a": "x", "b": b, "c": c}) for b, c in itertools.product([1, 2, 3], [True, 1, None])}
    expected |= {text({"a": "y", "b": b, "c": c}) for b, c in itertools.product([0.0, 0.5, 1.0], [True, 1, None])}
    expected |= {text({"a": "z", "c": c}) for c in [True, 1, None]}
    assert {*orders[0]} == {*orders[1]} == expected
    assert orders[0] != orders[1]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("killed", [1, 9, 14])
def test_a_process_that_replays_goes_on_as_the_one_before(search: str, killed: int) -> None:
    space, objectives = (FINITE, ["nll", "accuracy"]) if search == "grid" else (REAL, ["nll", "accuracy"])

    def tell(assignment):
        if len(text(assignment)) % 7 == 0:
            return None  # failed
        return [loss(assignment), -abs(assignment["x"])] if space is REAL else [1.0, 2.0]

    whole = run(Study(space, search, objectives, 5), 20, tell)
    replayed = json.loads(json.dumps(whole[:killed]))
    assert run(Study(space, search, objectives, 5, replayed), 20 - killed, tell) == whole[killed:]


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_with_trials_at_a_time_a_restart_goes_on_too(search: str) -> None:
    """Three at a time, ending out of order; killed while trials 12 and 14 run and 13 has ended."""

    def started() -> tuple[Study, dict[int, dict]]:
        study = Study(REAL, search, ["nll"], 2)
        asked = {}
        for _ in range(15):
            number, asked[number] = study.ask()
            if number >= 2:
                study.tell(number - 2 + (number % 3 == 0) - (number % 3 == 1), [loss(asked[number - 2])])
        return study, asked

    study, asked = started()
    running = set(asked) - set(study._values)
    assert running
    finished = [(number, asked[number], study._values[number]) for number in study._values]
    again = Study(REAL, search, ["nll"], 2, json.loads(json.dumps(finished[::-1])))
    for number in sorted(running, reverse=True):
        again.resume(number, json.loads(json.dumps(asked[number])))
    for _ in range(3):
        assert again.ask() == study.ask()


def test_what_is_best_and_known_is_not_tried_again() -> None:
    """The good choice is one configuration, which TPE would take for ever; the others have no end."""
    space = parse_space({"kind": {"values": {"good": {}, "bad": {"x": {"low": 0.0, "high": 1.0}}}}})
    done = run(Study(space, "tpe", ["nll"], 0), 30, lambda a: [0.0 if a["kind"] == "good" else 1.0 + a["x"]])
    assert len({text(assignment) for _, assignment, _ in done}) == 30


def test_a_number_that_was_lost_is_asked_again_with_the_same_configuration() -> None:
    done = run(Study(REAL, "random", ["nll"], 0), 6)
    again = Study(REAL, "random", ["nll"], 0, [done[0], done[1], done[4]])
    assert [again.ask() for _ in range(3)] == [done[2][:2], done[3][:2], done[5][:2]]


def test_tpe_finds_better_ones_than_random_search() -> None:
    best = {
        search: [min(values[0] for _, _, values in run(Study(REAL, search, ["nll"], seed), 40)) for seed in range(3)]
        for search in ("random", "tpe")
    }
    assert np.mean(best["tpe"]) < 0.5 * np.mean(best["random"])
    assert sum(tpe < random for tpe, random in zip(best["tpe"], best["random"], strict=True)) >= 2


def test_tpe_goes_where_a_metric_is_high_if_higher_is_better() -> None:
    space = parse_space({"x": {"low": 0.0, "high": 1.0}})
    for metric, better in (("accuracy", 1.0), ("nll", 0.0)):
        assert METRICS[metric].higher_is_better == bool(better)
        late = [assignment["x"] for _, assignment, _ in run(Study(space, "tpe", [metric], 0), 40, lambda a: [a["x"]])[20:]]
        assert abs(np.mean(late) - better) < 0.25


def test_tpe_with_two_objectives_goes_to_the_front() -> None:
    """Good are x near 0.2 to 0.4 (what lies between the best of either) with z low; both objectives are to be low."""
    space = parse_space({"x": {"low": 0.0, "high": 1.0}, "z": {"low": 0.0, "high": 1.0}})
    done = run(Study(space, "tpe", ["nll", "ece"], 0), 50, lambda a: [(a["x"] - 0.2) ** 2 + a["z"], (a["x"] - 0.4) ** 2 + a["z"]])
    late = [assignment for _, assignment, _ in done[30:]]
    assert np.mean([assignment["z"] for assignment in late]) < 0.25
    assert np.mean([0.05 < assignment["x"] < 0.55 for assignment in late]) > 0.6


def test_tpe_keeps_away_from_what_fails() -> None:
    """Half of the choices never end well; taken for unknown rather than bad, they would go on being tried."""
    space = parse_space({"which": ["good", "bad"], "x": {"low": 0.0, "high": 1.0}})
    shares = []
    for seed in range(3):
        done = run(Study(space, "tpe", ["nll"], seed), 40, lambda a: None if a["which"] == "bad" else [a["x"]])
        shares.append(np.mean([values is None for _, _, values in done[20:]]))
    assert np.mean(shares) < 0.35


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_counts_as_failed(value: float) -> None:
    study = Study(REAL, "tpe", ["nll"], 0)
    run(study, 14, lambda a: [value])
    assert (
        study.ask()
        == Study(REAL, "tpe", ["nll"], 0, [(number, a, None) for number, a in study._trials.items() if number < 14]).ask()
    )


def test_what_is_asked_is_the_callers_own() -> None:
    study = Study(REAL, "random", ["nll"], 0)
    number, assignment = study.ask()
    assignment["x"] = 99.0
    assert study.ask()[0] == number + 1


def test_another_seed_tries_others() -> None:
    first, second = (Study(REAL, "random", ["nll"], seed).ask()[1] for seed in (0, 1))
    assert first != second


def test_wrong_calls_are_refused() -> None:
    study = Study(REAL, "random", ["nll", "ece"], 0)
    with pytest.raises(ValueError, match="expected a trial that was asked or resumed, got 0"):
        study.tell(0, [1.0, 2.0])
    number, _ = study.ask()
    with pytest.raises(ValueError, match="expected one for each of nll, ece, got 1"):
        study.tell(number, [1.0])
    with pytest.raises(InputError, match="a trial of another space: it lacks x"):
        study.resume(1, {"a": 1})


@pytest.mark.parametrize(
    ("space", "search", "message"),
    [
        (
            {"a": {"low": 0.0, "high": 1.0}, "b": [1]},
            "grid",
            "tune.search: a grid has no end along a; give a step or choices, or take tpe",
        ),
        (
            {"a": {"low": 0, "high": 10_000}, "b": {"low": 0, "high": 999}},
            "grid",
            "a grid of 10,001,000 configurations is more than",
        ),
        ({"a": [1]}, "nope", "tune.search: unknown 'nope'; one of random, grid, tpe"),
    ],
)
def test_a_search_that_cannot_be_is_refused(space: dict, search: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Study(parse_space(space), search, ["nll"], 0)
    assert message in str(caught.value)


def test_optuna_is_silent(capfd, caplog) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("error")
        run(Study(REAL, "tpe", ["nll"], 0), 12)
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")
