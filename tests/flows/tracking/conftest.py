"""One MLflow store in a workspace, and a tracker and a client on it."""

import pytest
from mlflow.tracking import MlflowClient

from flows.tracking import Tracker
from flows.tracking_address import EXPERIMENT
from flows.tracking_store import store_uri


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """One store for the tests of this folder, each of which uses keys of its own: to make a store takes seconds."""
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
