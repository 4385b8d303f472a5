"""Runs that the tracker opens, goes on with and closes: parameters, metrics, files."""

import pytest
from mlflow.tracking import MlflowClient

from csm import storage
from flows.tracking import PARAM_CHARACTERS, Tracker, flatten
from flows.tracking_store import BATCH, store_uri
from tests.flows.tracking.conftest import Sent, runs

PARENT = "mlflow.parentRunId"


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
