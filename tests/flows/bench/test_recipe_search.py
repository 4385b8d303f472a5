from dataclasses import replace

import pytest

from csm.errors import InputError
from csm.methods import Method
from flows.bench import recipe_search
from flows.bench.recipe_plan import Entry, RecipePlan, Size
from flows.bench.recipe_search import Trial, choose, chosen_config, double, draw, trial_config
from flows.config import load_config

COMMON = {"optimizer.learning_rate": [0.05, 0.1, 0.2], "optimizer.epochs": ["1x", "3x"]}
METHODS = {
    "csm": Entry("recipe", {"mixed.weight": [4, 32]}),
    "cross-entropy": Entry("loss"),
    "focal": Entry("loss", {"parameters.gamma": [1, 2, 3, 5]}),
    "brier": Entry("loss", {"optimizer.learning_rate": None, "optimizer.epochs": None}),
    "csm-truth": Entry("ceiling", like="csm", change={"mixed.annotator": "truth"}),
}
SIZE = Size(("digits-hard",))


@pytest.fixture
def plan():
    return RecipePlan(SIZE, SIZE, METHODS, COMMON)


@pytest.fixture(scope="module")
def config():
    return load_config("digits-hard", ["train.compare=[csm, cross-entropy, focal]"])


def test_every_method_has_as_many_trials_and_the_first_is_as_it_stands(config, plan):
    for name in ("csm", "cross-entropy", "focal"):
        drawn = draw(config, plan, name, 6)
        assert [trial.name for trial in drawn] == [f"{name}.t{number}" for number in range(6)]
        assert drawn[0].values == {}
        assert len({str(trial.values) for trial in drawn}) == 6


def test_what_is_drawn_depends_on_the_name_and_the_space_alone(config, plan):
    drawn = draw(config, plan, "focal", 6)
    assert draw(config, plan, "focal", 3) == drawn[:3]
    others = replace(plan, methods={name: METHODS[name] for name in ("csm", "focal")})
    assert draw(load_config("gaussians"), others, "focal", 6) == drawn
    plain = draw(config, plan, "cross-entropy", 6)
    assert [trial.values["optimizer.learning_rate"] for trial in plain[1:]] != [
        trial.values["optimizer.learning_rate"] for trial in drawn[1:]
    ]


def test_settings_as_they_stand_are_not_tried_twice(config, plan):
    drawn = draw(config, plan, "cross-entropy", 100)
    assert len(drawn) == 6  # of 3 x 2, one of which is as it stands: learning rate 0.1, 60 epochs
    assert {"optimizer.learning_rate": 0.1, "optimizer.epochs": "1x"} not in [trial.values for trial in drawn]
    assert [trial.values for trial in draw(config, plan, "brier", 6)] == [{}]  # nothing to search


def test_trials_are_methods_of_their_own(config, plan):
    drawn = [trial for name in ("csm", "focal") for trial in draw(config, plan, name, 4)]
    tried = trial_config(config, drawn)
    assert list(tried.train.chosen) == [trial.name for trial in drawn]
    for trial in drawn:
        method = tried.train.chosen[trial.name]
        rate = trial.values.get("optimizer.learning_rate")
        assert method.optimizer.get("learning_rate") == rate
        assert method.optimizer.get("epochs") == {"1x": 60, "3x": 180, None: None}[trial.values.get("optimizer.epochs")]
        if trial.method == "csm":
            assert method.mixed.weight == trial.values.get("mixed.weight", config.train.methods["csm"].mixed.weight)
        else:
            assert method.parameters["gamma"] == trial.values.get("parameters.gamma", 3.0)
    assert tried.annotators == replace(config, train=replace(config.train, compare=("csm", "focal"))).annotators


def test_twice_the_epochs_of_a_trial(config):
    assert double(config, Trial("focal", 0, {}, 0.5)) == Trial("focal", 0, {"optimizer.epochs": "2x"}, times=2)
    tried = Trial("focal", 2, {"parameters.gamma": 5, "optimizer.epochs": "3x"}, 0.5, 9.0, chosen=True)
    assert double(config, tried).values == {"parameters.gamma": 5, "optimizer.epochs": "6x"}
    assert double(config, double(config, tried)).name == "focal.t2x4"
    assert double(config, Trial("focal", 1, {"optimizer.epochs": 25})).values == {"optimizer.epochs": 50}  # the data set has 60
    methods = {**config.train.methods, "focal": replace(config.train.methods["focal"], optimizer={"epochs": 90})}
    own = replace(config, train=replace(config.train, methods=methods))
    assert double(own, Trial("focal", 0, {})).values == {"optimizer.epochs": "3x"}
    tried = trial_config(config, [double(config, Trial("csm", 0, {}))])
    assert tried.train.chosen["csm.t0x2"].optimizer["epochs"] == 120


def test_a_wrong_setting_is_named(config, plan):
    wrong = replace(plan, methods={**METHODS, "focal": Entry("loss", {"parameters.gama": [1, 2]})})
    with pytest.raises(InputError, match=r"train.methods.focal.t1.parameters.gama: no such setting"):
        trial_config(config, draw(config, wrong, "focal", 2))
    wrong = replace(plan, methods={**METHODS, "focal": Entry("loss", {"mixed.weight": [1, 2]})})
    with pytest.raises(InputError, match=r"methods.focal.space.mixed.weight: the method has no mixed"):
        draw(config, wrong, "focal", 2)


def test_the_best_on_validation_is_taken():
    trials = [Trial("a", 0, {}, 0.7), Trial("b", 0, {}, 0.5), Trial("a", 1, {"x": 1}, 0.6), Trial("a", 2, {"x": 2}, 0.6)]
    assert [trial.name for trial in choose(trials) if trial.chosen] == ["b.t0", "a.t1"]
    failed = [Trial("a", 0, {}, error="FloatingPointError: loss is inf"), Trial("a", 1, {}, float("nan")), Trial("a", 2, {}, 2.0)]
    assert [trial.name for trial in choose(failed) if trial.chosen] == ["a.t2"]
    with pytest.raises(InputError, match=r"methods.a: every trial failed \(FloatingPointError"):
        choose(failed[:1])
    assert choose([Trial("a", 0, {})])[0].chosen  # nothing was tried


def test_test_images_have_no_say(monkeypatch, config, plan):
    """On validation the second trial is better, on test the first one would be."""
    nlls = {"val": {"focal.t0": 0.9, "focal.t1": 0.8}, "test": {"focal.t0": 0.1, "focal.t1": 0.9}}
    read = []

    def split_logits(spec, split, n_classes):
        read.append(split)
        return nlls[split][spec.method], None

    monkeypatch.setattr(recipe_search, "split_logits", split_logits)
    monkeypatch.setattr(recipe_search, "evaluate", lambda logits, labels, metrics: {"nll": logits})
    monkeypatch.setattr(recipe_search.storage, "read_json", lambda path: {"seconds": 2.0})
    specs = [Spec("focal.t0", 2000), Spec("focal.t1", 2000), Spec("focal.t1", 2001), Spec("focal.t2", 2000)]
    measured = recipe_search._measure(specs, {"focal.t2-seed2000": "FloatingPointError: inf"}, 10)
    assert measured == {
        "focal.t0": {"nll": 0.9, "seconds": 2.0},
        "focal.t1": {"nll": 0.8, "seconds": 4.0},
        "focal.t2": {"error": "FloatingPointError: inf"},
    }
    assert set(read) == {"val"}
    trials = choose([replace(Trial("focal", number, {}), **measured[f"focal.t{number}"]) for number in range(3)])
    assert [trial.chosen for trial in trials] == [False, True, False]


class Spec:
    def __init__(self, method, seed):
        self.method, self.seed, self.run, self.directory = method, seed, f"{method}-seed{seed}", recipe_search.Path("nowhere")


def test_the_chosen_settings_become_the_methods(config, plan):
    trials = [
        Trial("focal", 1, {"parameters.gamma": 5, "optimizer.epochs": "3x"}, 0.5, chosen=True),
        Trial("csm", 1, {"mixed.weight": 32}, 0.4, chosen=True),
        Trial("csm", 2, {"mixed.weight": 4}, 0.6),
        Trial("cross-entropy", 0, {}, 0.9, chosen=True),
    ]
    data = load_config("gaussians", ["train.seeds=5"])
    final = chosen_config(data, plan, ["csm", "cross-entropy", "focal", "csm-truth"], trials)
    assert list(final.train.chosen) == ["csm", "cross-entropy", "focal", "csm-truth"]
    chosen = final.train.chosen
    assert chosen["focal"].parameters == {"gamma": 5.0}
    assert chosen["focal"].optimizer == {"epochs": 3 * data.train.optimizer.epochs}
    assert chosen["csm"].mixed == replace(data.train.methods["csm"].mixed, weight=32)
    assert chosen["csm-truth"].mixed == replace(chosen["csm"].mixed, annotator="truth")
    assert chosen["cross-entropy"] == data.train.methods["cross-entropy"]
    assert isinstance(chosen["csm-truth"], Method)
    assert chosen["csm-truth"].description == data.train.methods["csm-truth"].description
    assert final.train.seeds == 5
