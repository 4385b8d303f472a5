"""Classifiers in the store: every epoch once, however often their training was interrupted."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from cluster.training import RunEvent
from csm import storage
from csm.datasets import DatasetInfo
from csm.methods import Method
from csm.optimization import OptimizerConfig
from csm.runs import RunSpec
from flows import training
from tests.flows.tracking.conftest import runs

INFO = DatasetInfo("digits", (8, 8, 1), ("0", "1"), (0.5,), (0.2,), {"train": 6, "val": 2, "test": 2}, "d" * 16)


def make_spec(directory, run):
    storage.write_json(directory / "dataset.json", asdict(INFO))
    return RunSpec(
        run=run, method="plain", seed=3, directory=directory / run, data=directory, network="small-cnn", parameters={},
        settings=Method(), optimizer=OptimizerConfig(epochs=4), mixed=None, fingerprint="f",
    )  # fmt: skip


class FakeContext:
    """What ``fit_runs`` asks of a context."""

    def __init__(self, tracker, root):
        self.tracker = tracker
        self.workspace = SimpleNamespace(root=root)
        self.data, self.forced = None, frozenset()
        self.config = SimpleNamespace(resources=SimpleNamespace(train=None), train=SimpleNamespace(workers=1))

    def connect(self):
        """Nothing to join."""

    def child(self, key, name, tags, params, parent=None):
        self.tracker.open_run(key, name, tags, params)
        return key


def epochs(run, first, last):
    return [RunEvent(run, "epoch", epoch, {"loss": 1 / epoch}, "") for epoch in range(first, last + 1)]


def write_run(spec):
    """The files of a finished training of four epochs."""
    spec.directory.mkdir()
    for file in ("model.safetensors", "model.json", "predictions.parquet"):
        (spec.directory / file).touch()
    history = [{"epoch": event.epoch, **event.values} for event in epochs(spec.run, 1, 4)]
    storage.write_json(spec.directory / "history.json", history)
    storage.write_json(spec.directory / "run.json", {"fingerprint": spec.fingerprint})


def test_a_classifier_that_was_interrupted_has_every_epoch_once_in_the_end(tracker, client, root, tmp_path, monkeypatch):
    spec = make_spec(tmp_path, "interrupted")
    context = FakeContext(tracker, root)

    def interrupted(specs, group, directory, name, on_event, together):
        for event in epochs(spec.run, 1, 3):
            on_event(event)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit_many", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.fit_runs(context, [spec], "train", "classifier")
    assert [run.info.status for run in runs(client, spec.run)] == ["KILLED"]

    def went_on(specs, group, directory, name, on_event, together):
        write_run(spec)
        for event in [*epochs(spec.run, 3, 4), RunEvent(spec.run, "done", 0, {}, "")]:  # from its last state, after epoch 2
            on_event(event)

    monkeypatch.setattr(training, "fit_many", went_on)
    training.fit_runs(context, [spec], "train", "classifier")
    (run,) = runs(client, spec.run)
    assert run.info.status == "FINISHED"
    assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")] == [
        (epoch, 1 / epoch) for epoch in (1, 2, 3, 4)
    ]
    assert run.data.tags["csm.kind"] == "classifier"
    assert (run.data.params["seed"], run.data.params["optimizer.epochs"]) == ("3", "4")
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("digits", INFO.digest)
    assert json.loads(data.dataset.profile) == {"images": INFO.counts, "shape": [8, 8, 1], "classes": 2}
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "training")]
    assert {entry.path for entry in client.list_artifacts(run.info.run_id)} == {
        "model.safetensors",
        "model.json",
        "predictions.parquet",
    }


def test_a_classifier_whose_session_ended_before_it_was_logged_is_logged_later(tracker, client, root, tmp_path, monkeypatch):
    """Ctrl-C or a kill between the last file of a training and its last line in the store."""
    spec = make_spec(tmp_path, "unlogged")
    context = FakeContext(tracker, root)
    write_run(spec)
    monkeypatch.setattr(training, "fit_many", lambda *arguments: pytest.fail("it is trained already"))
    for _ in range(2):
        training.fit_runs(context, [spec], "train", "classifier")
        (run,) = runs(client, spec.run)
        assert run.info.status == "FINISHED"
        assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4]
    assert "model.json" in {entry.path for entry in client.list_artifacts(run.info.run_id)}


def test_an_interrupt_while_a_classifier_is_logged_is_made_good(tracker, client, root, tmp_path, monkeypatch):
    spec = make_spec(tmp_path, "cut")
    context = FakeContext(tracker, root)

    def trains(specs, group, directory, name, on_event, together):
        write_run(spec)
        for event in [*epochs(spec.run, 1, 4), RunEvent(spec.run, "done", 0, {}, "")]:
            on_event(event)

    def pressed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "fit_many", trains)
        patch.setattr(tracker, "log_file", pressed)
        with pytest.raises(KeyboardInterrupt):
            training.fit_runs(context, [spec], "train", "classifier")
    assert [run.info.status for run in runs(client, spec.run)] == ["KILLED"]
    training.fit_runs(context, [spec], "train", "classifier")
    (run,) = runs(client, spec.run)
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4]
    assert "model.json" in {entry.path for entry in client.list_artifacts(run.info.run_id)}


def test_a_classifier_that_failed_is_marked_and_keeps_its_epochs(tracker, client, root, tmp_path, monkeypatch):
    spec = make_spec(tmp_path, "failed")

    def fails(specs, group, directory, name, on_event, together):
        for event in [*epochs(spec.run, 1, 2), RunEvent(spec.run, "failed", 0, {}, "FloatingPointError: loss is nan")]:
            on_event(event)
        raise RuntimeError("1 of 1 trainings failed")

    monkeypatch.setattr(training, "fit_many", fails)
    with pytest.raises(RuntimeError, match="1 of 1"):
        training.fit_runs(FakeContext(tracker, root), [spec], "train", "classifier")
    (run,) = runs(client, spec.run)
    assert run.info.status == "FAILED"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [1, 2]
