"""The sender against a small HTTP server that speaks MLflow's REST, and can be down, slow or refuse."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from csm import storage
from flows import tracking_sender
from flows.artifacts import Workspace
from flows.config import load_config
from flows.stages import Context
from flows.tracking import Tracker
from flows.tracking_address import Address
from flows.tracking_store import ranges
from tests.flows.rest import Rest, serving


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits as a test can bear them; the names and limits of the environment as MLflow has them."""
    monkeypatch.setattr(tracking_sender, "RETRY", (0.05, 0.1))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


@pytest.fixture
def rest():
    return Rest()


@pytest.fixture
def down():
    """A socket bound to a port at which nothing listens yet, and no other process can."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound


@pytest.fixture
def port(down):
    return down.getsockname()[1]


def work(tracker, key="run", first=1):
    """What a classifier tells."""
    tracker.open_run(key, key, {"csm.kind": "classifier"}, {"seed": 0})
    tracker.log_steps(key, [(step, {"loss": 1 / step}) for step in range(first, first + 3)])
    tracker.log_metrics(key, {"ece": 0.1})
    tracker.close_run(key)


def losses(run):
    return sorted((step, value) for (name, _, step), value in run["points"].items() if name == "loss")


def test_a_server_that_is_down_is_said_once_and_the_next_command_sends_all(rest, down, port, tmp_path, capsys):
    address = Address(f"http://user:hunter2@127.0.0.1:{port}")
    started = time.monotonic()
    tracker = Tracker(tmp_path, address)
    work(tracker)
    assert time.monotonic() - started < 1
    time.sleep(0.5)  # several tries
    tracker.close()
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    spool = tmp_path / f"{address.name}.jsonl"
    assert len(said) == 2
    assert said[0].startswith(f"tracking: http://***@127.0.0.1:{port} does not answer (")
    assert said[0].endswith(f"); work goes on, records wait in {spool}")
    assert said[1] == (
        f"tracking: 4 records for http://***@127.0.0.1:{port} wait in {spool}; the next command with the same options sends them"
    )
    assert "hunter2" not in "".join(path.read_text() for path in tmp_path.iterdir())
    with serving(rest, down):
        tracker = Tracker(tmp_path, address)
        assert tracker.is_finished("run")  # all that it should hold waits
        tracker.close()
    run = rest.named("run")
    assert losses(run) == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert run["status"] == ["RUNNING", "FINISHED"]
    assert run["params"] == {"seed": "0"}
    assert not spool.exists()
    assert capsys.readouterr().err == ""


def test_a_server_that_comes_up_during_the_work_gets_everything(rest, down, port, tmp_path):
    tracker = Tracker(tmp_path, Address(f"http://127.0.0.1:{port}"))
    work(tracker)
    time.sleep(0.2)
    with serving(rest, down):
        tracker.close()
    assert losses(rest.named("run")) == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]


@pytest.mark.parametrize("status", [500, 503, 429, 401, 403])
def test_a_server_that_cannot_now_is_asked_again(rest, tmp_path, status, capsys):
    with serving(rest) as uri:
        tracker = Tracker(tmp_path, Address(uri))
        work(tracker, "before")
        while not tracker.flush():  # on a busy machine a server that can is slow
            pass
        assert losses(rest.named("before")) == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
        rest.status = status
        work(tracker, "after")
        assert not tracker.flush()
        rest.status = 200
        tracker.close()
    assert losses(rest.named("after")) == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert capsys.readouterr().err.count("does not answer") == 1


def test_a_slow_server_delays_neither_the_work_nor_its_end(rest, tmp_path, monkeypatch, capsys):
    rest.seconds = 0.6
    monkeypatch.setattr(tracking_sender, "LONGEST", 1.5)
    with serving(rest) as uri:
        tracker = Tracker(tmp_path, Address(uri))
        started = time.monotonic()
        for number in range(20):
            work(tracker, f"run{number}")
        assert time.monotonic() - started < 0.5
        tracker.close()
        assert time.monotonic() - started < 4
        assert re.search(r"tracking: \d\d records for .* wait in ", capsys.readouterr().err)
        rest.seconds = 0.0
        monkeypatch.setattr(tracking_sender, "LONGEST", 30.0)
        Tracker(tmp_path, Address(uri)).close()
    assert [rest.named(f"run{number}")["status"][-1] for number in range(20)] == ["FINISHED"] * 20
    assert all(losses(run) == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)] for run in rest.runs.values())


def test_a_record_that_the_server_refuses_is_put_aside_and_said(rest, tmp_path, capsys):
    rest.refuse = "unwanted"
    with serving(rest) as uri:
        tracker = Tracker(tmp_path, Address(uri))
        tracker.open_run("run", "run", {}, {})
        tracker.log_metrics("run", {"unwanted": 1.0})
        tracker.log_metrics("run", {"unwanted": 2.0})
        tracker.log_metrics("run", {"wanted": 1.0})
        tracker.close()
    assert {name for name, _, _ in rest.named("run")["points"]} == {"wanted"}
    refused = tmp_path / f"{Address(uri).name}-refused.jsonl"
    assert [json.loads(line)["metrics"][0][0] for line in refused.read_text().splitlines()] == ["unwanted"] * 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"tracking: {uri} refused a record (INVALID_PARAMETER_VALUE: no unwanted)")


def test_sending_everything_again_changes_nothing(rest, tmp_path):
    """As after a kill between the last answer of the server and the cut of the spool, and again with the index lost."""
    with serving(rest) as uri:
        address = Address(uri)
        tracker = Tracker(tmp_path, address)
        work(tracker)
        with tracker._sender.change:
            lines = tracker._sender.spool.path.read_bytes()
        tracker.close()
        before = json.dumps(rest.runs["0" * 32]["params"]), dict(rest.named("run")["points"])
        for lost in (False, True):
            if lost:
                (tmp_path / f"{address.name}.json").unlink()
            (tmp_path / f"{address.name}.jsonl").write_bytes(lines)
            Tracker(tmp_path, address).close()
            run = rest.named("run")
            assert (json.dumps(run["params"]), run["points"]) == before
            assert run["status"][-1] == "FINISHED"


VICTIM = """
import sys
import time
from pathlib import Path
from flows.tracking import Tracker
from flows.tracking_address import Address
tracker = Tracker(Path(sys.argv[1]), Address(sys.argv[2]))
for number in range(10_000):
    while tracker._sender.spool.waiting > 20:
        time.sleep(0.001)
    tracker.open_run(f"run{number}", f"run{number}", {}, {"number": number})
    tracker.log_steps(f"run{number}", [(1, {"loss": 1.0}), (2, {"loss": 2.0})])
    tracker.log_steps(f"run{number}", [(2, {"loss": 2.0}), (3, {"loss": 3.0})])
    tracker.close_run(f"run{number}")
    print(number, flush=True)
"""


def test_kill_9_between_two_records_loses_nothing_and_makes_nothing_twice(rest, tmp_path):
    with serving(rest) as uri:
        arguments = [sys.executable, "-c", VICTIM, str(tmp_path), uri]
        root = Path(__file__).parents[2]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=root) as victim:
            while len(rest.runs) < 3:
                assert victim.poll() is None
                time.sleep(0.005)
            os.kill(victim.pid, signal.SIGKILL)
            told = [int(line) for line in victim.stdout.read().splitlines() if line.isdigit()]
        tracker = Tracker(tmp_path, Address(uri))
        for number in range(3):  # the next command tells the first ones again
            tracker.open_run(f"run{number}", f"run{number}", {}, {})
            tracker.log_steps(f"run{number}", [(1, {"loss": 1.0}), (2, {"loss": 2.0}), (3, {"loss": 3.0})])
            tracker.close_run(f"run{number}")
        while not tracker.flush():
            pass
        tracker.close()
    names = [run["name"] for run in rest.runs.values()]
    assert len(names) == len(set(names))
    assert {f"run{number}" for number in told} <= set(names)
    for number in told:
        run = rest.named(f"run{number}")
        assert losses(run) == [(1, 1.0), (2, 2.0), (3, 3.0)]
        assert run["status"][-1] == "FINISHED"
        assert run["params"] == {"number": str(number)}


def test_two_workspaces_with_the_same_work_have_runs_of_their_own(rest, tmp_path):
    with serving(rest) as uri:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            tracker = Tracker(tmp_path / name, Address(uri))
            work(tracker)
            tracker.close()
    assert [run["name"] for run in rest.runs.values()] == ["run", "run"]


def test_system_metrics_stand_where_mlflow_looks_for_them(rest, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    with serving(rest) as uri:
        tracker = Tracker(tmp_path, Address(uri))
        tracker.open_run("run", "run", {}, {})
        tracker.watch("run")
        time.sleep(2.3)
        tracker.close_run("run")
        tracker.close()
    points = rest.named("run")["points"]
    assert {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_megabytes",
        "system/disk_usage_percentage",
        "system/network_receive_megabytes",
    } <= {name for name, _, _ in points}
    assert [step for name, _, step in sorted(points) if name == "system/cpu_utilization_percentage"][:2] == [1, 2]


def test_no_system_metrics_where_mlflow_is_told_so(rest, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    with serving(rest) as uri:
        tracker = Tracker(tmp_path, Address(uri))
        tracker.open_run("run", "run", {}, {})
        tracker.watch("run")
        assert tracker._system is None
        tracker.close()


def test_a_command_names_its_data_and_passes_on_what_an_earlier_one_left(rest, down, port, tmp_path):
    info = {"name": "digits", "shape": [8, 8, 1], "class_names": ["0", "1"], "mean": [0.5], "std": [0.2]}
    storage.write_json(tmp_path / "dataset.json", {**info, "counts": {"train": 6}, "digest": "d" * 16})
    address = Address(f"http://127.0.0.1:{port}")

    def context(uri=address):
        return Context(load_config("digits"), Workspace(tmp_path), {}, command="csm run", tracking=uri)

    first = context()
    first.tracker  # noqa: B018
    first.child("classifier", "csm-seed0", {"csm.kind": "classifier"}, {})
    first.child("trial", "trial-0", {}, {}, parent="classifier")
    first.close("FINISHED")
    nothing_waits = context(Address(f"http://127.0.0.1:{port}", "other"))
    nothing_waits.send_waiting()
    assert nothing_waits._sender is None
    rest.log_inputs = []
    rest.runs_log_inputs = lambda body: rest.log_inputs.append(body) or (200, {})
    with serving(rest, down):
        second = context()
        second.send_waiting()
        second.close("FINISHED")
    parent, child, trial = (rest.named(name) for name in ("digits", "csm-seed0", "trial-0"))
    ids = list(rest.runs)
    assert [run["tags"]["csm.dataset"] for run in (parent, child, trial)] == ["digits"] * 3
    assert [run["tags"].get("mlflow.parentRunId") for run in (parent, child, trial)] == [None, ids[0], ids[1]]
    assert parent["status"][-1] == "FINISHED"
    assert parent["tags"]["mlflow.source.name"] == "csm run"
    assert parent["params"]["train.seeds"] == str(load_config("digits").train.seeds)
    (body,) = rest.log_inputs
    assert body["datasets"][0]["dataset"]["digest"] == "d" * 16


@pytest.mark.parametrize(
    ("pairs", "merged"),
    [
        ([], []),
        ([[0, -1]], []),
        ([[0, -1], [1, 1], [2, 2]], [[1, 2]]),
        ([[9, 10], [1, 4], [5, 8]], [[1, 10]]),
        ([[1, 3], [2, 2], [6, 6]], [[1, 3], [6, 6]]),
    ],
)
def test_ranges(pairs, merged):
    assert ranges(pairs) == merged
