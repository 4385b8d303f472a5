"""The oracle: a run trained in a group equals a direct `csm.runs.fit_run`, bit for bit."""

from dataclasses import replace
from typing import NamedTuple

import pytest

from cluster import groups
from cluster.resources import Group
from cluster.training import RunEvent, TrainingError, fit_many
from csm import storage
from csm.errors import InputError
from csm.methods import Method, MixedTerm
from csm.optimization import OptimizerConfig
from csm.runs import MixedSource, RunSpec, fit_run, is_finished

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session", "one_thread")]

EPOCHS = 2
FILES = ("model.safetensors", "model.json", "predictions.parquet", "history.json")


class Trained(NamedTuple):
    """Three good runs and one that fails, in one group; ``before`` was finished beforehand."""

    specs: dict[str, RunSpec]
    error: TrainingError
    events: list[RunEvent]
    groups: int
    time_before: int


def make_specs(finished, root) -> dict[str, RunSpec]:
    source = MixedSource(
        plan=finished.root / "plan.parquet",
        mixed=finished.root / "mixed",
        annotations=finished.root / "annotations" / "teacher",
        calibration=finished.root / "annotators" / "teacher" / "calibration.json",
    )
    plain = RunSpec(
        run="plain",
        method="plain",
        seed=0,
        directory=root / "plain",
        data=finished.root,
        network="small-cnn",
        parameters={"width": 8},
        settings=Method(),
        optimizer=OptimizerConfig(epochs=EPOCHS),
        mixed=None,
        fingerprint="plain",
    )
    soft = Method(mixed=MixedTerm("teacher", loss="kl", schedule="interior"))
    wild = replace(plain.optimizer, learning_rate=1e30)
    specs = [
        replace(plain, run="before", seed=3, directory=root / "before", fingerprint="before"),
        replace(plain, run="wild", directory=root / "wild", optimizer=wild, fingerprint="wild"),
        plain,
        replace(plain, run="soft", seed=1, directory=root / "soft", settings=soft, mixed=source, fingerprint="soft"),
    ]
    return {spec.run: spec for spec in specs}


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory, ray_session, one_thread):
    root = tmp_path_factory.mktemp("training")
    specs = make_specs(finished, root)
    fit_run(specs["before"])
    before = (specs["before"].directory / "run.json").stat().st_mtime_ns
    events, started = [], []
    with pytest.MonkeyPatch.context() as patch:
        group = groups.TorchTrainer
        patch.setattr(groups, "TorchTrainer", lambda *args, **kwargs: started.append(1) or group(*args, **kwargs))
        with pytest.raises(TrainingError) as caught:
            fit_many(list(specs.values()), Group(workers=1), root / "ray", "test", events.append)
    return Trained(specs, caught.value, events, len(started), before)


@pytest.mark.parametrize("run", ["plain", "soft"])
def test_a_run_of_the_group_equals_a_direct_one(trained, run, tmp_path):
    spec = trained.specs[run]
    assert is_finished(spec)
    direct = replace(spec, directory=tmp_path)
    fit_run(direct)
    for file in FILES:
        assert (spec.directory / file).read_bytes() == (tmp_path / file).read_bytes(), file


def test_runs_share_a_group(trained):
    assert trained.groups == 1


def test_a_finished_run_is_not_trained_again(trained):
    assert "before" not in {event.run for event in trained.events}
    assert (trained.specs["before"].directory / "run.json").stat().st_mtime_ns == trained.time_before


def test_a_failing_run_is_named_and_leaves_the_others_alone(trained):
    assert str(trained.error).startswith("1 of 3 trainings failed; wild: FloatingPointError: training: loss is ")
    assert "learning_rate" in str(trained.error)
    assert list(trained.error.errors) == ["wild"]
    assert not is_finished(trained.specs["wild"])
    assert [event for event in trained.events if event.kind == "failed"] == [
        RunEvent("wild", "failed", 0, {}, str(trained.error).partition("wild: ")[2])
    ]


@pytest.mark.parametrize("run", ["plain", "soft"])
def test_events_tell_every_epoch_in_order_and_then_the_end(trained, run):
    events = [event for event in trained.events if event.run == run]
    assert [(event.kind, event.epoch) for event in events] == [("epoch", 1), ("epoch", 2), ("done", 0)]
    history = storage.read_json(trained.specs[run].directory / "history.json")
    assert [{"epoch": event.epoch, **event.values} for event in events[:EPOCHS]] == history


def test_nothing_to_train_starts_no_group(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "TorchTrainer", lambda *args, **kwargs: pytest.fail("a group was started"))
    good = [trained.specs[run] for run in ("before", "plain", "soft")]
    fit_many(good, Group(), tmp_path, "test", pytest.fail)
    fit_many([], Group(), tmp_path, "test", pytest.fail)


def test_a_group_that_does_not_fit_is_refused_before_work(trained, tmp_path):
    with pytest.raises(InputError, match=r"resources\.train: 9 workers .* do not fit the cluster's 2 CPU"):
        fit_many([trained.specs["wild"]], Group(workers=9), tmp_path, "test", pytest.fail)
