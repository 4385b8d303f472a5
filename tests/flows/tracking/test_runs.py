import errno
import json
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from cluster.training import RunEvent
from csm import storage
from csm.datasets import DatasetInfo
from csm.errors import InputError
from csm.methods import Method
from csm.optimization import OptimizerConfig
from csm.runs import RunSpec
from flows import training
from flows.tracking import PARAM_CHARACTERS, Tracker, flatten
from flows.tracking_address import EXPERIMENT, Address
from flows.tracking_store import BATCH, store_uri

PARENT = "mlflow.parentRunId"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One store for the tests of this module, each of which uses keys of its own: to make a store takes seconds."""
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture
def tracker(root):
    """Closed at the end, so that the next one starts as a process of its own would."""
    made = Tracker(root)
    yield made
    if made._sender.error is None:
        made.close()


class Sent:
    """An MLflow client that waits, before each look, until ``tracker`` has sent everything."""

    def __init__(self, tracker, root):
        self.tracker, self.client = tracker, MlflowClient(store_uri(root))

    def __getattr__(self, name):
        assert self.tracker.flush()
        return getattr(self.client, name)


@pytest.fixture
def client(tracker, root):
    return Sent(tracker, root)


def runs(client, name):
    """Runs with that name."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return [run for run in client.search_runs([experiment.experiment_id], max_results=1000) if run.info.run_name == name]


def again(tracker, root):
    """The tracker of the next command."""
    tracker.close()
    return Tracker(root)


def test_a_key_opens_one_run_however_often(root):
    tracker = Tracker(root)
    tracker.open_run("once", "once", {"a": "1"}, {})
    first = tracker.run_id("once")
    tracker.open_run("once", "once", {"a": "1"}, {})
    assert tracker.run_id("once") == first
    tracker = again(tracker, root)
    tracker.open_run("once", "once", {"a": "1"}, {})
    assert tracker.run_id("once") == first
    (run,) = runs(Sent(tracker, root), "once")
    assert run.info.run_id == first
    tracker.close()


def test_children_name_their_parent_and_their_tags(tracker, client):
    tracker.open_run("parent", "family", {"csm.kind": "pipeline"}, {})
    tracker.open_run("child", "member", {"csm.kind": "stage"}, {}, "parent")
    (family,), (member,) = runs(client, "family"), runs(client, "member")
    assert PARENT not in family.data.tags
    assert member.data.tags[PARENT] == tracker.run_id("parent") == family.info.run_id
    assert (family.data.tags["csm.kind"], member.data.tags["csm.kind"]) == ("pipeline", "stage")


def test_parameters_are_flat_whole_and_may_be_many(tracker, client):
    params = {
        "plan": {"pairs": [[0, 1]], "more": {"seed": 0}},
        **{f"p{number}": number for number in range(150)},
        "long": "x" * 9000,
    }
    tracker.open_run("params", "params", {}, params)
    logged = runs(client, "params")[0].data.params
    assert logged["plan.pairs"] == "[[0, 1]]"
    assert logged["plan.more.seed"] == "0"
    assert len(logged) == 153
    assert logged["long"] == "x" * PARAM_CHARACTERS


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_with_its_status_and_runs_again_when_it_goes_on(tracker, client, status):
    tracker.open_run(status, status, {}, {})
    assert runs(client, status)[0].info.status == "RUNNING"
    tracker.close_run(status, status)
    assert runs(client, status)[0].info.status == status
    assert runs(client, status)[0].info.end_time is not None
    tracker.open_run(status, status, {}, {})
    assert runs(client, status)[0].info.status == "RUNNING"
    tracker.close_run(status)
    assert runs(client, status)[0].info.status == "FINISHED"


def test_no_step_stands_twice_after_work_went_on(root):
    tracker = Tracker(root)
    tracker.open_run("steps", "steps", {}, {})
    tracker.log_steps("steps", [(1, {"loss": 3.0}), (2, {"loss": 2.0})])
    tracker = again(tracker, root)  # another process, that tells the second epoch again
    tracker.log_steps("steps", [(2, {"loss": 2.0}), (3, {"loss": 1.0, "rate": 0.5})])
    tracker.log_steps("steps", [])
    run, client = tracker.run_id("steps"), MlflowClient(store_uri(root))
    tracker.close()
    assert [(point.step, point.value) for point in client.get_metric_history(run, "loss")] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert [point.step for point in client.get_metric_history(run, "rate")] == [3]


def test_more_points_than_mlflow_takes_at_once(tracker, client):
    tracker.open_run("many", "many", {}, {})
    tracker.log_steps("many", [(step, {"a": step, "b": -step}) for step in range(1, BATCH)])
    run = tracker.run_id("many")
    assert [point.step for point in client.get_metric_history(run, "b")] == list(range(1, BATCH))


def test_a_final_metric_has_its_last_value(tracker, client):
    tracker.open_run("final", "final", {}, {})
    tracker.log_metrics("final", {"test_ece": 0.2})
    tracker.log_metrics("final", {"test_ece": 0.1})
    assert runs(client, "final")[0].data.metrics == {"test_ece": 0.1}


def test_files_lie_in_the_workspace(tracker, client, root, tmp_path):
    tracker.open_run("file", "file", {}, {})
    (tmp_path / "model.json").write_text("{}")
    tracker.log_file("file", tmp_path / "model.json", "model")
    (tmp_path / "model.json").unlink()  # it was copied when it was logged
    run = tracker.run_id("file")
    assert [entry.path for entry in client.list_artifacts(run, "model")] == ["model/model.json"]
    assert (root / "mlartifacts" / run / "artifacts" / "model" / "model.json").read_text() == "{}"


def test_a_run_that_was_deleted_for_good_is_made_anew(root):
    Tracker(root).close()
    index = storage.read_json(root / "tracking.json")
    index["lost"] = {"run_id": "0" * 32, "step": 7}
    storage.write_json(root / "tracking.json", index)
    tracker = Tracker(root)
    tracker.open_run("lost", "lost", {}, {})
    tracker.log_steps("lost", [(1, {"loss": 1.0})])
    run = tracker.run_id("lost")
    tracker.close()
    assert [point.step for point in MlflowClient(store_uri(root)).get_metric_history(run, "loss")] == [1]


def test_a_run_that_was_deleted_in_the_ui_is_made_anew(tracker, client):
    tracker.open_run("binned", "binned", {}, {})
    first = tracker.run_id("binned")
    client.delete_run(first)
    tracker.open_run("binned", "binned", {}, {})
    tracker.log_metrics("binned", {"ece": 0.1})
    (run,) = runs(client, "binned")
    assert run.info.run_id != first
    assert run.data.metrics == {"ece": 0.1}


def test_an_unknown_key_is_an_error(tracker):
    with pytest.raises(KeyError):
        tracker.log_metrics("never opened", {"a": 1.0})
    with pytest.raises(KeyError):
        tracker.close_run("never opened")


def test_flatten():
    assert flatten({"a": {"b": {"c": 1}, "d": []}, "e": None}) == {"a.b.c": 1, "a.d": [], "e": None}
    assert flatten({}) == {}


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


def test_two_clients_at_once_on_a_made_store(tracker, root, client):
    """`csm ui` reads, and perhaps writes, while a run writes."""
    clients, errors = [MlflowClient(store_uri(root)) for _ in range(2)], []
    tracker.open_run("shared", "shared", {}, {})
    run = tracker.run_id("shared")

    def work(number):
        try:
            for step in range(5):
                client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
                clients[number].log_metric(run, f"m{number}", step, step=step)
        except MlflowException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert runs(client, "shared")[0].data.metrics == {"m0": 4, "m1": 4}


@pytest.mark.parametrize(
    ("words", "code"), [("database or disk is full", errno.ENOSPC), ("disk I/O error", errno.EIO)], ids=["full", "broken"]
)
def test_a_disk_that_takes_no_more_is_the_systems_error(root, tmp_path, monkeypatch, words, code):
    """The write that meets it is made later, by another thread: the end of the command says it at the latest."""

    def refuse(*arguments, **options):
        raise MlflowException(f"(sqlite3.OperationalError) {words} [SQL: INSERT ...]")

    (tmp_path / "x").touch()
    for write in (
        lambda tracker: tracker.log_steps(words, [(1, {"loss": 1.0})]),
        lambda tracker: tracker.log_metrics(words, {"loss": 1.0}),
        lambda tracker: tracker.log_file(words, tmp_path / "x"),
        lambda tracker: tracker.close_run(words),
    ):
        tracker = Tracker(root)
        tracker.open_run(words, words, {}, {})
        assert tracker.flush()
        with monkeypatch.context() as patch:
            for name in ("log_batch", "set_terminated", "log_artifact"):
                patch.setattr(tracker._store._client, name, refuse)
            write(tracker)
            for say in (tracker.flush, lambda tracker=tracker: tracker.log_metrics(words, {"loss": 1.0}), tracker.close):
                with pytest.raises(OSError, match=r"mlflow\.db") as caught:
                    say()
                assert caught.value.errno == code
    tracker = Tracker(root)  # the disk has room again: nothing was lost
    (run,) = runs(Sent(tracker, root), words)
    tracker.close()
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"loss": 1.0}


def test_what_else_mlflow_refuses_is_not_taken_for_a_full_disk(tracker):
    tracker.open_run("other", "other", {}, {})
    with pytest.raises(MlflowException, match="metric"):
        tracker.log_metrics("other", {"a metric, with a comma, $": 1.0})


@pytest.fixture
def model(tmp_path):
    """As good as an MLflow model for a registry: ``model(weights)`` writes a folder of it."""

    def write(weights):
        folder = tmp_path / "mlflow"
        folder.mkdir(exist_ok=True)
        for name, text in (("MLmodel", f"made: {time.time()}"), ("weights", weights)):
            storage.write_text(folder / name, text)
        return folder

    return write


def versions(client, name):
    return sorted(client.search_model_versions(f"name = '{name}'"), key=lambda version: int(version.version))


def test_a_model_has_a_version_for_each_content_and_the_files_of_each_stay(tracker, client, model):
    tracker.open_run("model", "model", {}, {})
    for weights in ("first", "first", "second"):
        tracker.register_model("model", model(weights), "csm-digits", "the best", {"csm.method": "csm"})
    first, second = versions(client, "csm-digits")
    assert [version.run_id for version in (first, second)] == [tracker.run_id("model")] * 2
    assert first.tags["csm.method"] == "csm"
    assert first.description == "the best"
    assert client.get_registered_model("csm-digits").tags["csm.made_by"] == "csm"
    texts = [(Path(unquote(urlsplit(version.source).path)) / "weights").read_text() for version in (first, second)]
    assert texts == ["first", "second"]


def test_a_registered_model_of_somebody_else_is_left_alone(tracker, client, model, capsys):
    client.create_registered_model("theirs")
    tracker.open_run("refused", "refused", {}, {})
    for refused in (
        lambda: tracker.check_model_name("theirs"),
        lambda: tracker.register_model("refused", model("x"), "theirs", "", {}),
    ):
        with pytest.raises(InputError, match="there is a registered model theirs that csm did not make; choose another name"):
            refused()
    tracker.check_model_name("free")
    # made by somebody else between the check and the sending, as with a server that was down
    folder = model("x")
    tracker._sender.append({"do": "model", "key": "refused", "name": "theirs", "description": "", "tags": {}}, folder)
    assert tracker.flush()
    assert "refused a record (there is a registered model theirs" in capsys.readouterr().err
    assert versions(client, "theirs") == []


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "it's"])
def test_a_name_that_no_model_can_have(tracker, name):
    with pytest.raises(InputError, match="choose another name"):
        tracker.check_model_name(name)


def test_a_deleted_experiment_is_one_line(root, tracker, client):
    gone = client.create_experiment("gone")
    client.delete_experiment(gone)
    uri = store_uri(root)
    with pytest.raises(InputError, match="experiment gone was deleted there; restore it, or give another --experiment"):
        Tracker(root, Address(uri, "gone"))


def test_a_store_that_is_no_database_is_one_line(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database")
    with pytest.raises(InputError, match=r"mlflow\.db is not a usable MLflow store"):
        Tracker(tmp_path)
