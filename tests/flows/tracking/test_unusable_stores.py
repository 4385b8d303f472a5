"""Stores that are shared, full, broken, deleted or none at all."""

import errno
import threading

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from csm.errors import InputError
from flows.tracking import Tracker
from flows.tracking_address import EXPERIMENT, Address
from flows.tracking_store import store_uri
from tests.flows.tracking.conftest import Sent, runs


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
