from dataclasses import replace

import pytest

from csm.errors import InputError
from csm.methods import MixedTerm
from csm.optimization import OptimizerConfig
from csm.runs import Method, MixedSource, RunSpec
from flows.config import load_config
from flows.sweep_records import SweepFolder, TrialRecord, sweep_settings
from flows.sweep_specs import ReadSpecs


@pytest.fixture
def folder(tmp_path):
    return SweepFolder(tmp_path)


def record(number=0, **fields):
    return TrialRecord(number, {"train.optimizer.learning_rate": 0.1 + 0.2, "method.loss": "brier", "x": None}, **fields)


@pytest.fixture
def specs(tmp_path):
    root = tmp_path.absolute()
    source = MixedSource(root / "plan.parquet", root / "mixed", root / "annotations", root / "calibration.json")
    method = Method(loss="focal", parameters={"gamma": 2.0}, mixed=MixedTerm(annotator="lda", weight=0.1))
    return tuple(
        RunSpec(
            f"trial-0-seed{seed}",
            "csm",
            seed,
            root / f"seed{seed}",
            root,
            "small-cnn",
            {"width": 4},
            method,
            OptimizerConfig(),
            source,
            "f",
        )
        for seed in (0, 1)
    )


def test_a_trial_comes_back_as_it_was_written(folder):
    ended = record(3, status="done", epochs=2, seconds=1.5, val={"nll": (0.1 + 0.2, None, None), "ece": (0.1, 0.0, 0.3)})
    for trial in (record(11, status="failed", error="FloatingPointError: no"), ended):
        folder.write_trial(trial)
    assert list(folder.records()) == [ended, record(11, status="failed", error="FloatingPointError: no")]


def test_trainings_come_back_as_they_were_written(folder, specs):
    folder.write_specs(record(), specs)
    assert ReadSpecs(folder.trials)(0, record().values) == specs


def test_a_population_changes_the_settings_of_a_training_and_what_it_is_known_by(folder, specs):
    values = {"train.optimizer.learning_rate": 0.1, "method.mixed.weight": 0.1, "method.parameters.gamma": 2.0}
    folder.write_specs(TrialRecord(0, values), specs)
    read = ReadSpecs(folder.trials)
    assert read(0, values) == specs
    (changed, other) = read(0, {**values, "method.mixed.weight": 0.12, "method.parameters.gamma": 2.4})
    assert changed.settings.mixed == replace(specs[0].settings.mixed, weight=0.12)
    assert changed.settings.parameters == {"gamma": 2.4}
    assert changed.optimizer == specs[0].optimizer
    assert changed.fingerprint == other.fingerprint != "f"
    assert changed == read(0, {**values, "method.mixed.weight": 0.12, "method.parameters.gamma": 2.4})[0]
    folder.write_specs(TrialRecord(0, {"method.mixed.temperature": 1.0}), specs)
    with pytest.raises(InputError, match=r"mixed\.temperature: expected"):
        read(0, {"method.mixed.temperature": -1.0})


def test_more_trials_and_more_at_a_time_are_the_same_sweep():
    config = load_config("demo")
    for same in ("tune.trials=99", "tune.concurrent=1", "train.seeds=9", "train.compare=[csm]", "resources.train.cpus=0.5"):
        assert sweep_settings(load_config("demo", [same])) == sweep_settings(config), same
    for other in ("tune.seeds=2", "tune.seed=1", "tune.space.method.loss=null", "train.optimizer.epochs=9", "data.noise=0.2"):
        assert sweep_settings(load_config("demo", [other])) != sweep_settings(config), other


def test_a_space_written_in_sections_is_the_same_as_with_dotted_keys():
    config = load_config("demo")
    sections, keys = {"train": {"network": ["small-cnn"]}}, {"train.network": ["small-cnn"]}
    first, second = (replace(config, tune=replace(config.tune, space=space)) for space in (sections, keys))
    assert sweep_settings(first) == sweep_settings(second)


def test_choices_that_are_no_text_are_the_same_sweep_again(folder):
    config = load_config(
        "demo", ["tune.space.train.optimizer.flip={values: {true: {}, false: {}}}", "tune.space.plan.shard_rows=[300, 360]"]
    )
    first = folder.open(config)
    folder.write_trial(record())
    assert folder.open(config) == first


def test_a_sweep_of_before_there_was_guidance_goes_on():
    settings = sweep_settings(load_config("digits"))
    assert "guidance" not in settings["mix"]
    assert "label_dropout" not in settings["generator"]
    guided = sweep_settings(load_config("digits", ["generator.label_dropout=0.1", "mix.guidance=2"]))
    assert (guided["mix"]["guidance"], guided["generator"]["label_dropout"]) == (2.0, 0.1)
    assert settings["plan"]["noise"] == "image"
    assert "noise" not in sweep_settings(load_config("digits", ["plan.noise=set"]))["plan"]


def test_another_sweep_is_refused_once_there_are_trials(folder):
    first = folder.open(load_config("demo"))
    other = load_config("demo", ["tune.seeds=2"])
    second = folder.open(other)  # nothing was tried, so nothing is lost
    assert second.key != first.key
    assert folder.open(other) == second
    folder.write_trial(record())
    assert folder.open(other) == second
    with pytest.raises(InputError, match=r"holds trials of another sweep \(tune\.seeds 2 -> 1\); .*--force tune"):
        folder.open(load_config("demo"))
    folder.drop()
    assert list(folder.records()) == []
    assert folder.open(load_config("demo")).key != first.key  # the old one's runs in MLflow stay what they are
