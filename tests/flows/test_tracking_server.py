"""A real `mlflow server` on a real PostgreSQL, both started here: two commands at once, a server that is down, artifacts by its proxy."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from csm import storage
from flows.tracking import Tracker
from flows.tracking_address import Address
from tests.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def kill_group(started):
    """SIGKILL to a process and those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()


@contextmanager
def process(arguments, answers, seconds=120, **options):
    """A process for the length of the block, which begins when ``answers()``."""
    with subprocess.Popen(arguments, **QUIET, **options, start_new_session=True) as started:
        try:
            end = time.monotonic() + seconds
            while not answers():
                assert started.poll() is None, f"{arguments[0]} ended with {started.returncode}"
                assert time.monotonic() < end, f"{arguments[0]} did not answer"
                time.sleep(0.2)
            yield started
        finally:
            kill_group(started)


@pytest.fixture(scope="module")
def postgres():
    """URI of an empty database. PostgreSQL does not run as root, so then it is the user `postgres` of Debian's package."""
    found = shutil.which("initdb")
    assert found, "these tests need PostgreSQL: apt install postgresql"
    programs, port = Path(found).resolve().parent, free_port()
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if as_user:
            shutil.chown(folder, "postgres")
        options = ["-U", "csm", "-A", "trust", "-E", "UTF8", "--no-sync", "-D", f"{folder}/data"]
        subprocess.run([*as_user, programs / "initdb", *options], check=True, cwd=folder, **QUIET)
        server = [*as_user, programs / "postgres", "-D", f"{folder}/data", "-k", folder, "-h", "127.0.0.1", "-p", str(port)]
        place = ["-h", "127.0.0.1", "-p", str(port), "-U", "csm"]

        def answers():
            return subprocess.run([programs / "pg_isready", *place], check=False, **QUIET).returncode == 0

        stack.enter_context(process(server, answers, cwd=folder))
        subprocess.run([programs / "createdb", *place, "mlflow"], check=True, **QUIET)
        yield f"postgresql+psycopg2://csm:unused@127.0.0.1:{port}/mlflow"


@contextmanager
def mlflow_server(postgres, artifacts, port):
    def answers():
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as response:
            return response.status == 200
        return False

    options = ["--backend-store-uri", postgres, "--artifacts-destination", str(artifacts), "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with process([sys.executable, "-m", "mlflow", "server", *options], answers, env=environment) as started:
        yield started


def test_two_commands_at_once_and_one_that_came_before_the_server(postgres, tmp_path, csm, tiny):
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    workspaces = [tmp_path / "a", tmp_path / "b"]
    options = ["--config", str(tiny), "--set", "train.compare=[cross-entropy]", "--tracking-uri", uri]
    early = csm("prepare", *options, "--workspace", workspaces[0])
    assert early.returncode == 0, early.stderr
    assert early.stderr.count("does not answer") == 1
    assert "records for" in early.stderr
    with mlflow_server(postgres, tmp_path / "artifacts", port):
        commands = [
            subprocess.Popen(
                [Path(sys.executable).with_name("csm"), "run", *options, "--workspace", str(workspace), "--json"],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            )
            for workspace in workspaces
        ]  # fmt: skip
        for command in commands:
            out, err = command.communicate(timeout=900)
            assert command.returncode == 0, err
            assert json.loads(out.splitlines()[-1])["metrics"]
            assert "tracking:" not in err
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("csm")
        assert experiment.artifact_location.startswith("mlflow-artifacts:")
        found = client.search_runs([experiment.experiment_id])
        by_workspace = {}
        for run in found:
            by_workspace.setdefault(run.data.tags["csm.workspace"], []).append(run)
        assert len(by_workspace) == 2
        for runs in by_workspace.values():
            names = Counter(run.info.run_name for run in runs)
            assert names == dict.fromkeys(("tiny", "prepare", "train", "model", "evaluate", "report", "cross-entropy-seed0"), 1)
            assert {run.info.status for run in runs} == {"FINISHED"}
            (parent,) = [run for run in runs if run.info.run_name == "tiny"]
            assert {run.data.tags.get("mlflow.parentRunId", parent.info.run_id) for run in runs} == {parent.info.run_id}
            assert any(name.startswith("system/") for name in parent.data.metrics)
            (classifier,) = [run for run in runs if run.info.run_name == "cross-entropy-seed0"]
            tags = classifier.data.tags
            assert (tags["csm.dataset"], tags["csm.method"], tags["csm.seed"]) == ("digits", "cross-entropy", "0")
            (data,) = classifier.inputs.dataset_inputs
            assert data.dataset.name == "digits"
            assert [point.step for point in client.get_metric_history(classifier.info.run_id, "loss")] == [1, 2]
            files = {entry.path for entry in client.list_artifacts(classifier.info.run_id)}
            assert {"model.safetensors", "predictions.parquet", "reliability.png"} <= files
        again = csm("run", *options, "--workspace", workspaces[0])
        assert again.returncode == 0, again.stderr
        assert len(client.search_runs([experiment.experiment_id])) == len(found)
        assert (tmp_path / "artifacts").is_dir()
    assert not (workspaces[0] / "mlflow.db").exists()


def test_a_server_that_is_killed_while_it_is_written_to(postgres, tmp_path):
    """Its last answer may be lost: what it took then comes again, and nothing stands twice."""
    port, address = free_port(), None
    workspace, file = tmp_path / "workspace", tmp_path / "file.txt"
    workspace.mkdir()
    file.write_text("kept")
    address = Address(f"http://127.0.0.1:{port}", "killed")
    tracker = Tracker(workspace, address)

    def work(first):
        for number in range(first, first + 20):
            tracker.open_run(f"run{number}", f"run{number}", {}, {"number": number})
            tracker.log_steps(f"run{number}", [(step, {"loss": 1.0 / step}) for step in range(1, 51)])
            tracker.log_file(f"run{number}", file)
            tracker.close_run(f"run{number}")

    with mlflow_server(postgres, tmp_path / "artifacts", port) as server:
        work(0)
        end = time.monotonic() + 60
        while not 10 < tracker._sender.spool.waiting < 70:
            assert time.monotonic() < end
            time.sleep(0.01)
        kill_group(server)
    work(20)
    with mlflow_server(postgres, tmp_path / "artifacts", port):
        end = time.monotonic() + 120
        while not tracker.flush():
            assert time.monotonic() < end
        tracker.close()
        client = MlflowClient(address.uri)
        runs = client.search_runs([client.get_experiment_by_name("killed").experiment_id])
        assert Counter(run.info.run_name for run in runs) == Counter(f"run{number}" for number in range(40))
        assert {run.info.status for run in runs} == {"FINISHED"}
        for run in runs:
            assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == list(range(1, 51))
            assert [entry.path for entry in client.list_artifacts(run.info.run_id)] == ["file.txt"]
    index = storage.read_json(workspace / f"{address.name}.json")
    assert index["run39"]["steps"] == [[1, 50]]


def test_models_are_registered_on_a_server(postgres, tmp_path):
    port = free_port()
    workspace, folder = tmp_path / "workspace", tmp_path / "mlflow"
    workspace.mkdir()
    folder.mkdir()
    (folder / "MLmodel").write_text("flavors: {}\n")
    with mlflow_server(postgres, tmp_path / "artifacts", port):
        address = Address(f"http://127.0.0.1:{port}", "models")
        for _ in range(2):
            tracker = Tracker(workspace, address)
            tracker.open_run("run", "run", {}, {})
            tracker.register_model("run", folder, "csm-digits", "the best", {"csm.method": "csm"})
            tracker.close_run("run")
            assert tracker.flush()
            tracker.close()
        client = MlflowClient(address.uri)
        (version,) = client.search_model_versions("name = 'csm-digits'")
        assert version.status == "READY"
        assert version.tags["csm.method"] == "csm"
        assert [entry.path for entry in client.list_artifacts(version.run_id, "model")] == ["model/MLmodel"]
