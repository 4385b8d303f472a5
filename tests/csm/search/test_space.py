import itertools
import json

import optuna
import pytest

from csm.errors import InputError
from csm.search.sections import dotted, merge_spaces
from csm.search.space import parse_space

CONDITIONAL = {
    "train": {"optimizer": {"learning_rate": {"low": 0.1, "high": 0.5, "step": 0.1}}},
    "method.loss": {
        "values": {
            "cross-entropy": {},
            "focal": {
                "method.parameters.gamma": [1.0, 3.0],
                "deep": {"values": {"yes": {"deeper": {"low": 1, "high": 3}}, "no": None}},
            },
            "mdca": {"method": {"parameters": {"gamma": {"low": 0, "high": 4, "step": 2}}}},
        }
    },
    "flags": [True, 1, 1.0, None, "1", [1, 2]],
}
REAL = {**CONDITIONAL, "weight": {"low": 0.5, "high": 16, "log": True}}


def combinations(space: dict) -> list[dict]:
    """Every configuration of ``CONDITIONAL``, written out by hand."""
    losses = [{"method.loss": "cross-entropy"}]
    for gamma in (1.0, 3.0):
        focal = {"method.loss": "focal", "method.parameters.gamma": gamma}
        losses += [{**focal, "deep": "yes", "deeper": deeper} for deeper in (1, 2, 3)] + [{**focal, "deep": "no"}]
    losses += [{"method.loss": "mdca", "method.parameters.gamma": gamma} for gamma in (0, 2, 4)]
    return [
        {"train.optimizer.learning_rate": rate, **loss, "flags": flag}
        for rate, loss, flag in itertools.product((0.1, 0.2, 0.3, 0.4, 0.5), losses, CONDITIONAL["flags"])
    ]


def texts(assignments) -> list[str]:
    """As JSON, in which 1, 1.0 and true differ."""
    return sorted(json.dumps(assignment, sort_keys=True) for assignment in assignments)


def refused(space: object) -> str:
    with pytest.raises(InputError) as caught:
        parse_space(space)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_configuration_of_a_conditional_space_stands_at_one_index() -> None:
    space = parse_space(CONDITIONAL)
    expected = combinations(CONDITIONAL)
    assert space.size == len(expected) == 360
    assert texts(space.at(index) for index in range(360)) == texts(expected)


def test_keys_of_all_branches() -> None:
    space = parse_space(REAL)
    assert space.keys == (
        "train.optimizer.learning_rate",
        "method.loss",
        "method.parameters.gamma",
        "deep",
        "deeper",
        "flags",
        "weight",
    )
    assert space.size is None
    assert space.endless() == ("weight",)


def test_a_key_in_two_branches_is_named_once() -> None:
    space = parse_space({"a": {"values": {"x": {"b": [1, 2]}, "y": {"b": [2, 3]}}}})
    assert space.keys == ("a", "b")
    assert space.size == 4


def test_sampling_gives_what_exists_together_and_all_of_it() -> None:
    space, finite = parse_space(REAL), combinations(CONDITIONAL)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = []
    for _ in range(400):
        trial = study.ask()
        assignment = space.sample(trial)
        assert 0.5 <= assignment["weight"] <= 16
        settings = space.settings(json.loads(json.dumps(assignment)))
        assert {setting.key: setting.value for setting in settings} == assignment
        assert {setting.name: setting.domain.encode(setting.value) for setting in settings} == trial.params
        assert {setting.name: setting.domain.distribution for setting in settings} == trial.distributions
        seen.append({key: value for key, value in assignment.items() if key != "weight"})
    assert {*texts(seen)} <= {*texts(finite)}
    assert len({*texts(seen)}) > 180


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ({"low": 1, "high": 4}, [1, 2, 3, 4]),
        ({"low": 1, "high": 8, "step": 3}, [1, 4, 7]),
        ({"low": 0.1, "high": 0.7, "step": 0.2}, [0.1, 0.3, 0.5, 0.7]),
        ({"low": 0, "high": 1, "step": 0.25}, [0.0, 0.25, 0.5, 0.75, 1.0]),
        ({"low": 2, "high": 4, "log": True}, [2, 3, 4]),
        ({"low": -1, "high": 0}, [-1, 0]),
    ],
)
def test_ranges_that_can_be_counted(entry: dict, values: list) -> None:
    space = parse_space({"key": entry})
    assert space.size == len(values)
    counted = [space.at(index)["key"] for index in range(len(values))]
    assert json.dumps(counted) == json.dumps(values)  # 0.1 + 0.2 is 0.3
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    assert json.dumps(sorted({space.sample(study.ask())["key"] for _ in range(200)})) == json.dumps(values)


def test_a_logarithmic_range_is_drawn_evenly_in_ratios() -> None:
    space = parse_space({"key": {"low": 0.01, "high": 1, "log": True}})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.sample(study.ask())["key"] for _ in range(400)]
    assert sum(value < 0.1 for value in drawn) / 400 == pytest.approx(0.5, abs=0.08)


def test_corners_hold_each_choice_and_each_end_and_are_of_the_space() -> None:
    space = parse_space(REAL)
    corners = list(space.corners())
    for key, assignment in corners:
        assert key in assignment
        space.settings(assignment)
    held = {(key, json.dumps(assignment[key])) for _, assignment in corners for key in assignment}
    assert {("flags", json.dumps(value)) for value in CONDITIONAL["flags"]} <= held
    assert {("weight", "0.5"), ("weight", "16.0"), ("deeper", "1"), ("deeper", "3"), ("method.parameters.gamma", "4")} <= held
    assert len(corners) == 2 + (1 + 1 + 2 + 2 + 2 + 1 + 2) + 1 + 6 + 2 - 1  # no product of the keys


def test_an_empty_space_has_one_configuration_and_no_corner() -> None:
    space = parse_space({})
    assert (space.keys, space.size, space.at(0), list(space.corners())) == ((), 1, {}, [])


def test_ways_of_writing_a_space_are_one_and_other_values_are_not() -> None:
    written = parse_space({"a.b": [1, 2], "c": {"low": 0, "high": 1}})
    assert parse_space({"a": {"b": {"values": [1, 2]}}, "c": {"low": 0, "high": 1, "log": False}}) == written
    for other in ({"a.b": [1, 2], "c": [0, 1]}, {"a.b": {"values": {1: {}, 2: {"d": [1]}}}, "c": {"low": 0, "high": 1}}):
        assert parse_space(other) != written


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ([1], "tune.space: expected a section with keys, got [1]"),
        (None, "tune.space: expected a section with keys, got None"),
        ({1: [2]}, "tune.space: expected dotted keys, got 1"),
        ({"a..b": [1]}, "tune.space: expected dotted keys, got 'a..b'"),
        (
            {"a": 3},
            "tune.space.a: expected a list of choices, {values: ...}, or {low: ..., high: ..., log: ..., step: ...}, got 3",
        ),
        ({"a": {"b": {}}}, "tune.space.a.b: expected a list of choices"),
        ({"a": {"low": 1, "hi": 2}}, "tune.space.a: expected a list of choices"),
        ({"a": {"values": [1], "low": 1}}, "tune.space.a: expected a list of choices"),
        ({"a": []}, "tune.space.a: empty; name what may be chosen"),
        ({"a": {"values": {}}}, "tune.space.a.values: empty; name what may be chosen"),
        ({"a": {"values": 3}}, "tune.space.a.values: expected a list of choices, or a section"),
        ({"a": [1, 2, 1]}, "tune.space.a: 1 stands there more than once"),
        ({"a": [[1], [1]]}, "tune.space.a: [1] stands there more than once"),
        ({"a": [object]}, "tune.space.a: expected texts, numbers, true, false or null, got"),
        ({"a": {"low": 1}}, "tune.space.a.high: missing; a range has both ends"),
        ({"a": {"low": "x", "high": 2}}, "tune.space.a.low: expected a number"),
        ({"a": {"low": "1e-3", "high": 2}}, "write 1.0e-3"),
        ({"a": {"low": True, "high": 2}}, "tune.space.a.low: expected a number, got True"),
        ({"a": {"low": 0, "high": float("inf")}}, "tune.space.a.high: expected a number, got inf"),
        ({"a": {"low": 2, "high": 2}}, "tune.space.a: empty range; expected low below high, got 2 and 2"),
        ({"a": {"low": 3.0, "high": 2}}, "tune.space.a: empty range"),
        ({"a": {"low": 0, "high": 2, "log": True}}, "tune.space.a.low: expected more than 0 with log: true, got 0"),
        ({"a": {"low": 1, "high": 2, "log": "yes"}}, "tune.space.a.log: expected true or false, got 'yes'"),
        (
            {"a": {"low": 1, "high": 2, "step": 0}},
            "tune.space.a.step: expected more than 0 and at most the 1 between low and high, got 0",
        ),
        ({"a": {"low": 1, "high": 2, "step": 3}}, "tune.space.a.step: expected more than 0 and at most the 1 between"),
        ({"a": {"low": 1, "high": 2, "step": 1, "log": True}}, "tune.space.a.step: goes not with log: true"),
        ({"a": {"values": {"x": {"b": {"low": 2, "high": 1}}}}}, "tune.space.a.values.x.b: empty range"),
        ({"a": {"b": [1]}, "a.b": [2]}, "tune.space.a.b: stands there twice"),
        ({"a": {"values": {"x": {"b": [1]}}}, "b": [2]}, "tune.space: b would be set twice at once"),
        ({"a": {"values": {"x": {"b": [1]}}}, "c": {"values": {"y": {"b": [1]}}}}, "tune.space: b would be set twice at once"),
        ({"a": {"values": {"x": {"a": [1]}}}}, "tune.space: a would be set twice at once"),
    ],
)
def test_what_is_no_space_is_refused_in_one_line(space: object, message: str) -> None:
    assert message in refused(space)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ({"a": "x"}, "it lacks b"),
        ({"a": "y", "b": 1}, "it has b"),
        ({"a": "z"}, "a: expected one of ['x', 'y'], got 'z'"),
        ({"a": "x", "b": 9}, "b: expected a number from 1 to 3, got 9"),
        ({"a": "x", "b": True}, "b: expected a number from 1 to 3, got True"),
    ],
)
def test_an_assignment_of_another_space_is_refused(assignment: dict, message: str) -> None:
    space = parse_space({"a": {"values": {"x": {"b": {"low": 1, "high": 3}}, "y": {}}}})
    with pytest.raises(InputError, match="a trial of another space: ") as caught:
        space.settings(assignment)
    assert str(caught.value).endswith(message)


BASE = {"a": [1, 2], "b.c": {"low": 1, "high": 5, "log": True}, "b.d": [1], "e": {"values": {"x": {"f": [1], "g": [1]}, "y": {}}}}


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ({}, {}),
        ({"a": [3]}, {"a": [3]}),
        ({"b": {"c": {"low": 2}}}, {"b.c": {"low": 2, "high": 5, "log": True}}),
        ({"b": {"c": {"log": None}}}, {"b.c": {"low": 1, "high": 5}}),
        ({"b.c": [1, 2]}, {"b.c": [1, 2]}),
        ({"a": {"low": 1, "high": 2}}, {"a": {"low": 1, "high": 2}}),
        ({"b.c": {"values": {"x": None}}}, {"b.c": {"values": {"x": None}}}),
        ({"e": {"values": {"y": None}}}, {"e": {"values": {"x": {"f": [1], "g": [1]}}}}),
        ({"e": {"values": {"x": {"f": None}, "z": {"h": [1]}}}}, {"e": {"values": {"x": {"g": [1]}, "y": {}, "z": {"h": [1]}}}}),
        ({"e": {"values": ["x"]}}, {"e": {"values": ["x"]}}),
        ({"n": {"m": [1]}}, {"n.m": [1]}),
        ({"a": None, "nothing": None}, {"a": None}),
        ({"b": None}, {"b.c": None, "b.d": None}),
    ],
)
def test_a_space_laid_on_another(over: dict, expected: dict) -> None:
    whole = {**BASE, **expected}
    assert merge_spaces(BASE, over) == {key: value for key, value in whole.items() if value is not None}


def test_dotted_keys_from_sections_within_sections() -> None:
    assert dotted({"a": {"b.c": {"d": [1]}, "e": {"low": 1}}, "f": 2}) == {"a.b.c.d": [1], "a.e": {"low": 1}, "f": 2}
