from dataclasses import replace

import pytest

from csm.errors import InputError
from flows import fit_annotators, fit_teacher, train
from flows.config import Config, load_config
from flows.config_layers import config_names
from flows.stages import plain_settings
from flows.sweeps import TuneConfig, best_config, check_tune, trial_config

SPACE = """
plan: {sets_per_pair: 12}
tune:
  space:
    train:
      optimizer:
        learning_rate: {low: 0.02, high: 0.5, log: true}
    train.network: [small-cnn, resnet18]
    method.mixed.annotator: [null, lda]
    method.mixed.sets: {low: 4, high: 12, step: 4}
    method.loss:
      values:
        cross-entropy:
        label-smoothing: {method.parameters.alpha: [0.05, 0.1]}
        focal: {method.parameters.gamma: {low: 0.5, high: 5.0}}
"""
VALUES = {
    "train.optimizer.learning_rate": 0.123456789,
    "train.network": "resnet18",
    "method.mixed.annotator": "lda",
    "method.mixed.sets": 8,
    "method.loss": "focal",
    "method.parameters.gamma": 2.5,
}


@pytest.fixture
def mine(tmp_path):
    def load(text: str = SPACE, *overrides: str) -> Config:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return load_config(str(path), overrides)

    return load


def refused(*overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config("demo", overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(set(config_names()) - {"default"}))
def test_the_sweep_of_every_bundled_configuration_can_be_run(name: str) -> None:
    config = load_config(name, ("data.path=somewhere",) if name == "image-folder" else ())
    check_tune(config)
    assert config.tune.search_space.size is None
    assert {"train.optimizer.learning_rate", "method.mixed.weight"} <= {*config.tune.search_space.keys}
    assert {*config.tune.search_space.choices("method.mixed.annotator")} <= {*config.annotate.candidates}


def test_a_trial_is_one_method_with_the_seeds_of_the_sweep(mine) -> None:
    config = mine(SPACE, "tune.seeds=2", "train.seeds=5", "train.loss=brier")
    trial = trial_config(config, VALUES)
    assert list(trial.train.chosen) == ["csm"]
    method = trial.train.chosen["csm"]
    assert (method.loss, method.parameters, method.mixed.annotator, method.mixed.sets) == ("focal", {"gamma": 2.5}, "lda", 8)
    assert method.mixed.weight == config.train.methods["csm"].mixed.weight
    assert (trial.train.seeds, trial.train.loss, trial.train.network) == (2, None, "resnet18")
    assert trial.train.optimizer == replace(config.train.optimizer, learning_rate=0.123456789)
    assert trial.tune == config.tune
    assert trial.train.methods == {**config.train.methods, "csm": method}


def test_a_trial_leaves_the_labels_alone(mine) -> None:
    """Whatever of training is tried, the teacher, and so what annotates, is that of the sweep's configuration."""
    config = mine(SPACE, "train.optimizer.epochs=30", "train.parameters.width=8")
    trial = trial_config(config, {**VALUES, "method.mixed.annotator": "teacher"})
    assert fit_teacher.STAGE.settings(trial) == fit_teacher.STAGE.settings(config)
    assert train.STAGE.settings(trial) != train.STAGE.settings(config)
    assert trial.train.parameters == {}  # the width was of the other network
    assert fit_annotators.STAGE.settings(trial_config(config, {})) == fit_annotators.STAGE.settings(
        replace(config, train=replace(config.train, compare=("csm",)))
    )


def test_a_teacher_that_is_tried_is_not_pinned(mine) -> None:
    config = mine("tune: {space: {annotate.teacher.network: [small-cnn, resnet18], annotate.teacher.optimizer.epochs: [5, 9]}}")
    settings = fit_teacher.STAGE.settings(
        trial_config(config, {"annotate.teacher.network": "resnet18", "annotate.teacher.optimizer.epochs": 9})
    )
    assert (settings["train"]["network"], settings["train"]["parameters"]) == ("resnet18", {})
    assert settings["train"]["optimizer"] == {**fit_teacher.STAGE.settings(config)["train"]["optimizer"], "epochs": 9}


@pytest.mark.parametrize("value", ["cross-entropy", "brier"])
def test_parameters_go_with_the_loss_that_they_are_of(mine, value: str) -> None:
    config = mine("tune: {space: {method.loss: [focal, cross-entropy, brier]}}", "tune.method=focal")
    assert trial_config(config, {"method.loss": value}).train.chosen["focal"].parameters == {}
    assert trial_config(config, {"method.loss": "focal"}).train.chosen["focal"].parameters == {"gamma": 3.0}


def test_null_is_the_default_of_a_setting(mine) -> None:
    config = mine("tune: {space: {method.mixed.annotator: [null, lda]}}", "train.methods.csm.mixed.annotator=qda")
    assert trial_config(config, {"method.mixed.annotator": None}).train.chosen["csm"].mixed.annotator is None
    assert trial_config(config, {}).train.chosen["csm"].mixed.annotator == "qda"


def test_the_method_itself_can_be_tried(mine) -> None:
    space = "tune: {space: {method: {values: {csm: {method.mixed.weight: [1, 2]}, focal: {method.parameters.gamma: [1, 2]}, brier: }}}}"
    config = mine(space)
    focal = trial_config(config, {"method": "focal", "method.parameters.gamma": 2})
    assert list(focal.train.chosen) == ["focal"]
    assert focal.train.chosen["focal"].parameters == {"gamma": 2.0}
    assert focal.train.methods["csm"] == config.train.methods["csm"]
    assert list(best_config(config, {"method": "brier"}).train.chosen) == ["cross-entropy", "brier"]


def test_images_and_data_can_be_tried(mine) -> None:
    config = mine(
        "tune: {space: {data.source: [digits, digits-hard], plan.ratios: [4, 8], generator.steps: [100]}}", "data.noise=0.3"
    )
    other = trial_config(config, {"data.source": "digits", "plan.ratios": 4, "generator.steps": 100})
    assert (other.data, other.plan.ratios, other.generator.steps) == ({"source": "digits"}, 4, 100)
    assert trial_config(config, {"data.source": "digits-hard"}).data == config.data


def test_values_that_do_not_fit_together_are_refused(mine) -> None:
    with pytest.raises(InputError, match="warm_start: expected fewer than the 60 epochs"):
        trial_config(mine(), {"method.mixed.warm_start": 60})


@pytest.mark.parametrize("values", [{}, VALUES, {**VALUES, "method.mixed.annotator": None, "train.network": "small-cnn"}])
def test_the_best_can_be_written_down_and_run_again(mine, tmp_path, values: dict) -> None:
    config = mine(SPACE, "train.seeds=4", "tune.seeds=2", "train.parameters.width=8")
    best = best_config(config, values)
    path = tmp_path / "best.yaml"
    path.write_text(best.to_yaml())
    again = load_config(str(path))
    assert again == best
    assert again.to_yaml() == best.to_yaml()
    assert plain_settings(again) == plain_settings(best)
    assert list(again.train.chosen) == ["cross-entropy", "csm"]
    trial = trial_config(config, values)
    assert again.train.chosen["csm"] == trial.train.chosen["csm"]
    for part in ("data", "generator", "plan", "mix", "annotate"):
        assert getattr(again, part) == getattr(trial, part)
    for part in ("network", "parameters", "optimizer", "workers"):
        assert getattr(again.train, part) == getattr(trial.train, part)
    assert (again.train.seeds, trial.train.seeds) == (4, 2)
    assert again.tune == config.tune
    assert "csm tune on mine" in again.description
    if values:
        assert "method.loss focal" in again.description
    check_tune(again)  # it can be searched around


def test_a_setting_that_the_method_has_of_its_own_is_searched_there() -> None:
    own = "train.methods.csm.optimizer.learning_rate=0.05"
    message = r"^tune.space.train.optimizer.learning_rate: csm has its own; write method.optimizer.learning_rate"
    with pytest.raises(InputError, match=message):
        check_tune(load_config("demo", [own]))
    values = {"method.optimizer.learning_rate": 0.3, "method.mixed.weight": 2.0}
    train = trial_config(load_config("demo", [own]), values).train
    assert train.optimizer_of(train.methods["csm"]).learning_rate == 0.3


def test_without_a_baseline_the_best_is_alone(mine) -> None:
    config = mine("tune: {space: {}}", "train.methods.cross-entropy=null", "train.compare=[csm]")
    assert list(best_config(config, {}).train.chosen) == ["csm"]
    assert list(best_config(mine("tune: {method: cross-entropy}"), {}).train.chosen) == ["cross-entropy"]


def test_a_space_of_a_file_replaces_the_default_whole(mine) -> None:
    assert mine("tune: {space: {train.optimizer.clip: [1, 2]}}").tune.space == {"train.optimizer.clip": [1, 2]}
    assert mine("tune: {space: {}}").tune.space == {}
    assert mine("tune: {trials: 3}").tune.space == mine("").tune.space != {}
    assert load_config("demo").tune.space != load_config("digits").tune.space


def test_overrides_change_add_and_remove_keys(mine) -> None:
    config = mine(
        SPACE,
        "tune.space.train.network=null",
        "tune.space.method.loss.values.focal=null",
        "tune.space.method.loss.values.brier={}",
        "tune.space.train.optimizer.learning_rate.low=0.1",
        "tune.space.train.optimizer.momentum={low: 0.5, high: 0.95}",
        "tune.space.method.mixed.sets=[4, 8]",
    )
    assert config.tune.space == {
        "train.optimizer.learning_rate": {"low": 0.1, "high": 0.5, "log": True},
        "method.mixed.annotator": [None, "lda"],
        "method.mixed.sets": [4, 8],
        "method.loss": {
            "values": {"cross-entropy": None, "label-smoothing": {"method.parameters.alpha": [0.05, 0.1]}, "brier": {}}
        },
        "train.optimizer.momentum": {"low": 0.5, "high": 0.95},
    }
    assert [key for key in config.tune.search_space.keys if key.startswith("method.parameters")] == ["method.parameters.alpha"]
    assert mine(SPACE, "tune.space.method=null").tune.space.keys() == {"train.optimizer.learning_rate", "train.network"}
    assert mine(SPACE, "tune.space=null").tune.space == {}


def test_the_scheduler_looks_at_the_first_objective_if_a_training_measures_it() -> None:
    assert TuneConfig(objectives=("ece", "accuracy")).scheduler_metric == "ece"
    assert TuneConfig(objectives=("smooth_ece", "accuracy")).scheduler_metric == "nll"
    assert load_config("demo", ["tune.objectives=[accuracy]", "tune.scheduler.metric=ece"]).tune.scheduler_metric == "ece"


def test_what_is_only_tried_makes_no_other_pipeline() -> None:
    assert plain_settings(load_config("demo", ["tune.trials=9"])) == plain_settings(load_config("demo"))


def test_a_bundled_sweep_does_not_stand_in_the_way_of_other_settings() -> None:
    config = load_config("demo", ["annotate.annotators.experts=null", "annotate.candidates=[teacher]"])
    with pytest.raises(InputError, match=r"^tune.space.method.mixed.annotator: unknown 'experts'"):
        check_tune(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tune.nope=1", "tune.nope: no such setting; allowed: method, space, trials, search"),
        ("tune.method=nope", "tune.method: unknown 'nope'; one of cross-entropy"),
        (
            "tune.method=deep-ensemble",
            "tune.method: a trial trains one classifier for each seed, deep-ensemble an ensemble of 5: tune with train.methods.deep-",
        ),
        (
            "tune.space.method.members=[1, 3]",
            "tune.space.method.members: a trial trains one classifier for each seed, csm an ensemble of 3",
        ),
        ("tune.search=nope", "tune.search: expected 'random', 'grid' or 'tpe', got 'nope'"),
        ("tune.search=grid", "tune.search: a grid has no end along train.optimizer.learning_rate, method.mixed.weight,"),
        ("tune.trials=0", "tune.trials: expected a number greater than or equal to 1, got 0"),
        ("tune.objectives=[]", "tune.objectives: empty; name what is to be good"),
        ("tune.objectives=[nope]", "tune.objectives: unknown 'nope'; one of accuracy"),
        ("tune.objectives=[nll, ece, nll]", "tune.objectives: 'nll' is named more than once"),
        ("tune.posthoc=nope", "tune.posthoc: unknown 'nope'; one of none, temperature"),
        ("tune.scheduler.kind=nope", "tune.scheduler.kind: expected 'none', 'asha' or 'pbt', got 'nope'"),
        ("tune.scheduler.metric=smooth_ece", "tune.scheduler.metric: expected 'nll', 'accuracy' or 'ece', got 'smooth_ece'"),
        ("tune.space=[1]", "tune.space: expected a section with keys, got [1]"),
        ("tune.space.nope.x=[1]", "tune.space.nope.x: cannot be tried; expected a key that starts with one of method, data"),
        ("tune.space.tune.trials=[1]", "tune.space.tune.trials: cannot be tried"),
        ("tune.space.train.seeds=[1]", "tune.space.train.seeds: a trial cannot have train.seeds of its own; leave it out"),
        ("tune.space.train.workers=[1, 2]", "tune.space.train.workers: a trial cannot have train.workers of its own"),
        ("tune.space.train.compare=[[csm]]", "tune.space.train.compare: a trial cannot have train.compare of its own"),
        ("tune.space.train.methods.csm.mixed.weight=[1]", "write method.mixed.weight"),
        ("tune.space.train.optimizer.nope=[1]", "tune.space.train.optimizer.nope: no such setting; allowed: kind, epochs"),
        ("tune.space.method.mixed.nope=[1]", "tune.space.method.mixed.nope: no such setting; allowed: annotator, loss"),
        ("tune.space.method.mixed.annotator=[lda, x]", "tune.space.method.mixed.annotator: unknown 'x'; one of auto, ratio"),
        ("tune.space.method.loss=[focal, mse]", "tune.space.method.loss: unknown loss 'mse'; one of cross-entropy"),
        (
            "tune.space.method.loss.values.focal.method.parameters.x=[1]",
            "tune.space.method.parameters.x: no such setting; allowed: gamma",
        ),
        (
            "tune.space.method.mixed.weight={low: -1, high: 2, log: null}",
            "tune.space.method.mixed.weight: expected a number greater",
        ),
        (
            "tune.space.method.mixed.weight.high=0.1",
            "tune.space.method.mixed.weight: empty range; expected low below high, got 1.0 and 0.1",
        ),
        (
            "tune.space.method.mixed.per_real={low: 0.5, high: 2.5}",
            "tune.space.method.mixed.per_real: expected a whole number, got 0.5",
        ),
        ("tune.space.method.mixed.sets=[13]", "tune.space.method.mixed.sets: expected no more than the 12 of plan.sets_per_pair"),
        ("tune.space.method=[csm, nope]", "tune.space.method: tune.method: unknown 'nope'; one of cross-entropy"),
        (
            "train.methods.csm.mixed.sets=13",
            "train.methods.csm.mixed.sets: expected no more than the 12 of plan.sets_per_pair, got 13",
        ),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_runs(override: str, message: str) -> None:
    assert message in refused(override)
