import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from csm.errors import InputError
from flows import ui
from flows.tracking import store_uri
from flows.ui import serve, view_address
from flows.ui_views import TAG, views_of, write_views
from tests.flows.chromium import Page
from tests.ports import free_port

EXPERIMENT = "csm"
TESTED = {
    "test_accuracy": 0.8,
    "test_ece": 0.05,
    "test_nll": 0.6,
    "test_brier": 0.3,
    "test_ece_temperature": 0.04,
    "temperature": 1.5,
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Two methods with two seeds, an old sweep of one trial and a new one of three, a stage."""
    root = tmp_path_factory.mktemp("ui")
    client = MlflowClient(store_uri(root))
    experiment = client.create_experiment(EXPERIMENT, artifact_location=(root / "mlartifacts").as_uri())
    clock = iter(range(1, 100))

    def run(name, kind, params=None, metrics=None, **tags):
        tags = {"csm.kind": kind, **{key.replace("_", "."): value for key, value in tags.items()}}
        made = client.create_run(experiment, start_time=next(clock), run_name=name, tags=tags).info.run_id
        values = [Metric(key, value, 1, 0) for key, value in (metrics or {}).items()]
        client.log_batch(made, values, [Param(key, str(value)) for key, value in (params or {}).items()])
        client.set_terminated(made)
        return made

    run("prepare", "stage")
    for method, loss in (("ce", "cross-entropy"), ("focal", "focal")):
        for seed in range(2):
            params = {"method": method, "loss": loss, "seed": seed, "network": "small-cnn", "description": method}
            measured = {name: value + seed / 100 for name, value in TESTED.items()}
            run(f"{method}-seed{seed}", "classifier", params, measured, csm_method=method, csm_seed=str(seed), csm_loss=loss)
    for sweep, trials in (("old", 1), ("new", 3)):
        parent = run(sweep, "sweep")
        for number in range(trials):
            params = {"optimizer.learning_rate": 0.1 * (number + 1), "loss": ["focal", "adafocal"][number % 2], "seeds": 1}
            measured = {"val_nll": 0.6 + number / 10, "val_ece": 0.05, "val_accuracy": 0.8 - number / 10}
            run(f"{sweep}-{number}", "trial", params, measured, mlflow_parentRunId=parent)
    return root


@pytest.fixture
def client(workspace):
    return MlflowClient(store_uri(workspace))


@pytest.fixture
def views(client):
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return {view.key: view.state for view in views_of(client, experiment.experiment_id)}


def found(client, state):
    """Names of the runs that a view shows, in its order: MLflow's own search says whether filter and order are well formed."""
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    order = f"{state['orderByKey']} {'ASC' if state['orderByAsc'] else 'DESC'}"
    return [run.info.run_name for run in client.search_runs([experiment], state["searchFilter"], order_by=[order])]


def test_classifiers_are_shown_without_stages_the_best_first(client, views):
    names = found(client, views["classifiers"])
    assert sorted(names) == ["ce-seed0", "ce-seed1", "focal-seed0", "focal-seed1"]
    assert {name[-1] for name in names[:2]} == {"0"}  # NLL 0.60 before 0.61
    assert found(client, views["methods"]) == names
    assert views["methods"]["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "csm.method"}]


def test_trials_are_those_of_the_newest_sweep(client, views):
    assert found(client, views["trials"]) == ["new-0", "new-1", "new-2"]


def test_parallel_coordinates_have_what_differs(views):
    def axes(key):
        (chart,) = [chart for chart in views[key]["compareRunCharts"] if chart["type"] == "PARALLEL"]
        return chart["selectedParams"], chart["selectedMetrics"]

    assert axes("trials") == (["optimizer.learning_rate", "loss"], ["val_nll", "val_ece", "val_accuracy"])
    assert axes("classifiers")[0] == ["method", "loss", "seed"]


def test_every_chart_has_a_name_of_its_own_and_an_open_section(views):
    for state in views.values():
        names = [chart["uuid"] for chart in state["compareRunCharts"]]
        assert len(set(names)) == len(names)
        open_sections = {section["uuid"] for section in state["compareRunSections"] if section["display"]}
        assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == open_sections


def test_a_store_without_a_sweep_has_no_view_of_trials(client, tmp_path):
    empty = client.create_experiment("empty", artifact_location=tmp_path.as_uri())
    assert [view.key for view in views_of(client, empty)] == ["classifiers", "methods"]


def test_views_are_written_once_and_a_users_own_stays(client, monkeypatch):
    write_views(client, client.get_experiment_by_name(EXPERIMENT))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    envelope = json.loads(experiment.tags[f"{TAG}trials"])
    assert json.loads(envelope["state"])["searchFilter"].startswith("tags.`csm.kind` = 'trial'")
    written = []
    monkeypatch.setattr(MlflowClient, "set_experiment_tag", lambda self, number, key, value: written.append(key))
    write_views(client, experiment)
    assert written == []
    experiment.tags[f"{TAG}trials"] = json.dumps({**envelope, "state": "{}"})  # of another version of csm, or of other runs
    write_views(client, experiment)
    assert written == [f"{TAG}trials"]
    del envelope["by"]  # as MLflow's page saves it
    experiment.tags[f"{TAG}trials"] = json.dumps({**envelope, "state": "{}"})
    write_views(client, experiment)
    assert written == [f"{TAG}trials"]


def test_a_workspaces_store_is_served_and_a_database_too(workspace, monkeypatch, capsys, tmp_path):
    started = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append(arguments))
    serve(workspace, "127.0.0.1", 5001, "", EXPERIMENT)
    serve(tmp_path, "127.0.0.1", 5001, store_uri(workspace), EXPERIMENT)
    for arguments in started:
        assert arguments[arguments.index("--backend-store-uri") + 1] == store_uri(workspace)
        assert arguments[arguments.index("--port") + 1] == "5001"
    assert len(started) == 2
    assert "viewStateShareKey=trials" in capsys.readouterr().err


def test_a_server_is_not_started_again(workspace, monkeypatch, capsys):
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("a second server"))
    asked = []
    monkeypatch.setattr(ui, "MlflowClient", lambda store: (asked.append(store), MlflowClient(store_uri(workspace)))[1])
    serve(Path("nowhere"), "127.0.0.1", 5001, "http://me:secret@tracking:5000/", EXPERIMENT)
    assert asked == ["http://me:secret@tracking:5000/"]
    said = capsys.readouterr().err
    assert "MLflow on http://tracking:5000\n" in said
    assert "http://tracking:5000/#/experiments/" in said
    assert "secret" not in said


def test_what_is_not_there_is_said_in_a_line(workspace, tmp_path):
    with pytest.raises(InputError, match=r"has no mlflow\.db yet"):
        serve(tmp_path, "127.0.0.1", 5001, "", EXPERIMENT)
    with pytest.raises(InputError, match="--experiment other: there is no such experiment yet"):
        serve(workspace, "127.0.0.1", 5001, "", "other")


def test_a_server_that_is_down_is_said_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match="no MLflow store answers there \\(it cannot be reached\\)"):
        serve(tmp_path, "127.0.0.1", 5001, f"http://127.0.0.1:{free_port()}", EXPERIMENT)
    for driver, reason in (("+psycopg2", r"no MLflow store answers there \(it cannot be reached"), ("+nodriver", ".*nodriver")):
        with pytest.raises(InputError, match=reason) as refusal:
            serve(tmp_path, "127.0.0.1", 5001, f"postgresql{driver}://me:secret@127.0.0.1:{free_port()}/mlflow", EXPERIMENT)
        assert "secret" not in str(refusal.value)


@pytest.fixture(scope="module")
def server(workspace, tmp_path_factory):
    """`csm ui` on the workspace, as a user starts it."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("log") / "server.txt"
    command = [sys.executable, "-m", "flows.cli", "ui", "--workspace", str(workspace), "--port", str(port)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": ""}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        end = time.monotonic() + 150
        while True:
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except OSError:
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_the_page_shows_columns_order_and_charts_of_the_views(server, client, tmp_path):
    experiment = client.get_experiment_by_name(EXPERIMENT)
    views = {view.key: view for view in views_of(client, experiment.experiment_id)}
    cells = "[...document.querySelectorAll('.ag-header-cell')]"
    left_to_right = f"{cells}.sort((a, b) => a.getBoundingClientRect().left - b.getBoundingClientRect().left)"
    ids = f"{left_to_right}.map(cell => cell.getAttribute('col-id'))"
    rows = "[...document.querySelectorAll('.ag-pinned-left-cols-container .ag-row, .ag-center-cols-container .ag-row')]"
    with Page(tmp_path / "profile", width=2600) as page:
        page.open(view_address(server, experiment.experiment_id, views["trials"]))
        page.wait("document.querySelectorAll('.js-plotly-plot, .parcoords').length >= 4")
        page.wait("document.body.innerText.includes('Parallel Coordinates')")
        text = page.evaluate("document.body.innerText")
        assert "val_accuracy vs. val_ece" in text
        assert "new-0" in text
        assert "old-0" not in text
        assert "Trials of the newest sweep" in text
        page.open(view_address(server, experiment.experiment_id, views["classifiers"]).replace("CHART", "TABLE"))
        recorded = [
            name for name in views["classifiers"].state["selectedColumns"] if "annotator" not in name and "nll_t" not in name
        ]
        page.wait(
            f"JSON.stringify({ids}.filter(id => /^(tags|metrics)/.test(id))) === {json.dumps(json.dumps(recorded))}.replaceAll(', ', ',')"
        )
        page.wait(f"{rows}.some(row => row.innerText.includes('ce-seed0'))")
        assert "prepare" not in page.evaluate("document.body.innerText")
        page.open(view_address(server, experiment.experiment_id, views["methods"]))
        page.wait("document.body.innerText.includes('Group: focal')")
        page.wait("document.querySelectorAll('.js-plotly-plot').length >= 4")
        assert [error for error in page.errors if "404" not in error] == []  # MLflow asks for one of its own pages in vain
