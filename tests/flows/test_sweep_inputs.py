from dataclasses import replace

import pytest

from csm.errors import InputError
from csm.search.space import parse_space
from flows.config import load_config
from flows.sweep_inputs import input_choices, input_config, input_part
from flows.sweeps import trial_config


def choices(space):
    return input_choices(parse_space(space))


def swept(space, *overrides):
    config = load_config("demo", overrides)
    return replace(config, tune=replace(config.tune, space=space))


def test_trials_share_their_images_unless_a_key_makes_others():
    space = {
        "train.optimizer.learning_rate": {"low": 0.1, "high": 0.2},
        "method.mixed.annotator": ["teacher", "lda"],
        "annotate.annotator": ["teacher", "lda"],
        "method.mixed.sets": [1, 2],
    }
    assert choices({}) == choices(space) == [{}]


def test_every_combination_of_choices_needs_its_own():
    space = {"plan.sets_per_pair": [2, 4], "train.network": ["small-cnn"], "annotate.members": [1, 3]}
    assert choices(space) == [{"annotate.members": members, "plan.sets_per_pair": sets} for sets in (2, 4) for members in (1, 3)]


def test_a_key_beside_a_choice_is_combined_with_that_choice_alone():
    space = {"mix.operator": {"values": {"embedding": {"plan.sets_per_pair": [2, 4]}, "output": {}}}, "method.loss": ["brier"]}
    assert choices(space) == [
        {"mix.operator": "embedding", "plan.sets_per_pair": 2},
        {"mix.operator": "embedding", "plan.sets_per_pair": 4},
        {"mix.operator": "output"},
    ]
    beside_training = {"method.loss": {"values": {"brier": {"plan.sets_per_pair": [2]}, "focal": {}, "cross-entropy": {}}}}
    assert choices(beside_training) == [{"plan.sets_per_pair": 2}, {}]


def test_a_range_of_images_is_refused():
    with pytest.raises(InputError, match=r"tune\.space\.plan\.sets_per_pair: .* give a list of choices, not a range"):
        choices({"method.loss": {"values": {"brier": {"plan.sets_per_pair": {"low": 1, "high": 4}}}}})


def test_the_part_of_a_trial_is_one_of_the_choices():
    values = {"train.network": "small-cnn", "plan.sets_per_pair": 2, "annotate.members": 3, "annotate.annotator": "lda"}
    assert input_part(values) == {"annotate.members": 3, "plan.sets_per_pair": 2}


def test_inputs_are_labelled_by_every_annotator_that_a_trial_may_ask():
    space = {"method": ["cross-entropy", "csm", "paper"], "annotate.annotator": ["teacher", "qda"]}
    config = swept(space)
    assert set(input_config(config, {}).annotators) == {"teacher", "qda", "projection"}
    config = swept({"method.mixed.annotator": ["lda", "knn"], "plan.sets_per_pair": [3, 5]})
    wide = input_config(config, {"plan.sets_per_pair": 5})
    assert set(wide.annotators) == {"lda", "knn", config.annotate.annotator}
    assert wide.plan.sets_per_pair == 5
    assert wide.mixes


def test_inputs_of_methods_without_mixed_images_are_the_data_alone():
    config = swept({"train.optimizer.learning_rate": [0.1, 0.2]}, "tune.method=focal", "tune.space=null")
    assert not input_config(config, {}).mixes


def test_the_teacher_is_that_of_the_configuration_for_all_trials():
    config = swept({"train.network": ["small-cnn", "resnet18"]})
    of_inputs, of_trial = input_config(config, {}), trial_config(config, {"train.network": "resnet18"})
    assert of_inputs.annotate == of_trial.annotate
    assert of_trial.annotate.teacher.network == "small-cnn"
