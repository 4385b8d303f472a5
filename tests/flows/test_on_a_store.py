"""Verbs in a workspace on a store of files give what they give in one in a folder."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import mlflow
import numpy as np
import polars as pl
import pytest
import torch
from mlflow.tracking import MlflowClient

from csm import storage, tables
from csm.datasets import load_dataset
from csm.errors import InputError
from csm.locations import fetch, listing, location, store
from flows import sweep_inputs, ui
from flows.artifacts import Workspace
from flows.check import check
from flows.compare import compare
from flows.config import load_config
from flows.doctor import diagnose
from flows.export_model import export_model
from flows.models import open_model
from flows.predict import predict
from flows.run import run_verb
from flows.run_names import find
from flows.sweep_records import SweepFolder, TrialRecord
from flows.sweep_specs import ReadSpecs
from flows.tracking import Tracker
from flows.tracking_address import Address
from flows.train import run_specs
from flows.tune import tune
from tests.flows.finished_model import context_of, run_stages

STAGES = ("prepare", "train", "model", "evaluate")
CLASSIFIERS = [f"{method}-seed{seed}" for method in ("cross-entropy", "label-smoothing") for seed in (0, 1)]


@pytest.fixture(scope="module")
def in_a_folder(tmp_path_factory):
    """A workspace with trained classifiers and a finished model."""
    root = tmp_path_factory.mktemp("folder") / "w"
    run_stages(context_of(root), *STAGES)
    return root


def trained(bucket, tmp_path):
    """Bring the same up to date in ``bucket``; which stages were reused."""
    address = Address(f"sqlite:///{tmp_path / 'mlflow.db'}")
    return run_stages(replace(context_of(bucket), tracking=address), *STAGES)


@pytest.mark.slow
def test_a_trained_workspace_is_used_like_one_in_a_folder(bucket, in_a_folder, tmp_path):
    assert not any(trained(bucket, tmp_path).values())
    for place in ("metrics.parquet", "comparison.parquet", "dataset.json", "model/model.safetensors"):
        assert (bucket / place).read_bytes() == (in_a_folder / place).read_bytes(), place
    for run in CLASSIFIERS:
        schema = tables.predictions(10)
        here, there = (tables.read(root / "runs" / run / "predictions.parquet", schema) for root in (bucket, in_a_folder))
        assert here.equals(there)
    assert set(listing(bucket)) >= {"model/mlflow/MLmodel", "tracking.id"}
    assert {name for name in listing(bucket) if name.startswith(("mlflow.db", "mlartifacts", "model/.", "runs/."))} == set()

    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8))
    expected = open_model(str(in_a_folder)).predict(images)
    for name in ("", "/model", "/model/mlflow"):
        assert torch.equal(open_model(f"{bucket}{name}").predict(images), expected)
    np.savez(tmp_path / "images.npz", images=images.numpy())
    assert predict([str(tmp_path / "images.npz")], str(bucket))[0]["images"] == 5
    (here, _), (there, _) = (check(str(root), str(root), draws=100) for root in (bucket, in_a_folder))
    assert {**here, "model": "", "data": ""} == {**there, "model": "", "data": ""}
    export_model(bucket, None, "safetensors", tmp_path / "exported")
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == (bucket / "model/model.safetensors").read_bytes()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    version = client.search_model_versions("name = 'csm-small'")[0]
    loaded = mlflow.pyfunc.load_model(client.get_model_version_download_uri("csm-small", version.version))
    assert np.allclose(loaded.predict(images.numpy()), expected.numpy(), atol=1e-6)
    sources = [json.loads(each.dataset.source) for each in client.get_run(version.run_id).inputs.dataset_inputs]
    assert all(source == {"uri": f"{bucket}/real"} for source in sources)

    here, there = (compare(["label-smoothing", "cross-entropy"], root, draws=100) for root in (bucket, in_a_folder))
    assert here.metrics.equals(there.metrics)
    mixed = compare([f"{bucket}:label-smoothing", f"{bucket}/runs/cross-entropy-seed0"], in_a_folder, draws=100)
    assert mixed.seeds == ((0,), (0,))
    with pytest.raises(InputError, match="no finished method, run or trial of that name in s3://"):
        find(f"{bucket}:nothing", in_a_folder)

    assert all(trained(bucket, tmp_path).values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_pipeline_reuses_and_goes_on_after_kill_9(bucket, finished, processes, tmp_path):
    """The same numbers as of a run in a folder; nothing is done twice; a command that was killed while it trained goes on."""
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    command = [sys.executable, "-m", "flows.cli", "run", "--config", str(finished.config), "--workspace", str(bucket)]
    command += ["--tracking-uri", address, "--json"]

    def run():
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])["stages"], done.stderr

    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not (bucket / "stages" / "train.json").is_file():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.5)
    finally:
        family = [process.pid, *processes.descendants(process.pid)]
        processes.kill(family)
    assert process.wait() == -signal.SIGKILL
    assert processes.left(family, 15) == []

    stages, said = run()
    assert [name for name, stage in stages.items() if not stage["reused"]] == ["train", "model", "evaluate", "report"]
    assert "another command was at work here; waiting" in said
    assert "train: going on" in said
    for table in ("metrics.parquet", "comparison.parquet"):
        assert pl.read_parquet((bucket / table).read_bytes()).equals(pl.read_parquet(finished.root / table)), table
    for name in ("cross-entropy-seed0", "csm-seed0"):
        assert (bucket / "runs" / name / "model.safetensors").read_bytes() == (
            finished.root / "runs" / name / "model.safetensors"
        ).read_bytes()
    fetch(bucket / "mixed", tmp_path / "mixed")
    for part in (finished.root / "mixed").iterdir():
        assert pl.read_parquet(tmp_path / "mixed" / part.name).equals(pl.read_parquet(part))
    page = (bucket / "report.html").read_text()
    assert f"csm run --config {bucket}/config.yaml" in page
    runs = MlflowClient(address).search_runs(["1"])
    assert {run.info.status for run in runs} == {"FINISHED"}

    before = listing(bucket)
    stages, _ = run()
    assert all(stage["reused"] for stage in stages.values())
    after = listing(bucket)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert {re.sub(r"-\w{8}\.", ".", name) for name in changed} <= {"tracking.json"}


@pytest.mark.parametrize("verb", ["run", "tune", "ui"])
def test_runs_need_a_place_outside_of_the_workspace(bucket, verb):
    config = load_config("digits")
    calls = {
        "run": lambda: run_verb("run", config, bucket),
        "tune": lambda: tune(config, bucket),
        "ui": lambda: ui.serve(bucket, "127.0.0.1", 5000, "", "csm"),
    }
    with pytest.raises(InputError, match=r"^--workspace s3://.*: MLflow keeps no runs there; give --tracking-uri"):
        calls[verb]()
    assert listing(bucket) == {}


def test_tracking_goes_on_from_another_machine(bucket, tmp_path, monkeypatch):
    """Records wait on the driver's machine; which runs there are lies in the workspace."""
    address = Address(f"sqlite:///{tmp_path / 'mlflow.db'}")
    storage.write_text(bucket / "runs" / "a" / "history.json", "[1]")
    for machine in ("one", "two"):
        monkeypatch.setenv("CSM_CACHE", str(tmp_path / machine))
        tracker = Tracker(bucket, address)
        tracker.open_run("work", "work", {}, {})
        tracker.log_steps("work", [(0, {"loss": 1.0}), (1, {"loss": 0.5})])
        tracker.log_file("work", bucket / "runs" / "a" / "history.json")
        tracker.close_run("work")
        tracker.close()
    assert set(listing(bucket)) == {"runs/a/history.json", "tracking.id", f"{address.name}.json"}
    client = MlflowClient(address.uri)
    runs = client.search_runs([client.get_experiment_by_name("csm").experiment_id])
    assert len(runs) == 1
    assert [point.step for point in client.get_metric_history(runs[0].info.run_id, "loss")] == [0, 1]
    assert [file.path for file in client.list_artifacts(runs[0].info.run_id)] == ["history.json"]


def test_a_long_command_writes_the_index_at_most_every_few_seconds(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("flows.tracking_sender.SAVE_SECONDS", 3600.0)
    address = Address(f"sqlite:///{tmp_path / 'mlflow.db'}")
    tracker = Tracker(bucket, address)
    for number in range(3):
        tracker.open_run(f"run {number}", "run", {}, {})
        assert tracker.flush()
    assert f"{address.name}.json" not in listing(bucket)
    tracker.close()
    assert set(storage.read_json(bucket / f"{address.name}.json")) == {"run 0", "run 1", "run 2"}


def test_inputs_of_a_sweep_are_copied_by_the_store(bucket, monkeypatch):
    for name in ("mixed/part-0", "mixed/part-1"):
        storage.write_text(bucket / name, name)
    target = bucket / "tune" / "inputs" / "x"
    storage.write_text(target / "mixed" / "part-0", "is there")
    with monkeypatch.context() as patch:
        patch.setattr(type(store(bucket)), "_get_file", None)  # nothing comes here
        sweep_inputs._link(bucket / "mixed", target / "mixed")
        sweep_inputs._link(bucket / "none", target / "none")
        sweep_inputs._link(bucket / "mixed" / "part-1", target / "alone")
    assert set(listing(target)) == {"mixed/part-0", "mixed/part-1", "alone"}
    assert (target / "mixed" / "part-0").read_text() == "is there"
    assert (target / "alone").read_text() == "mixed/part-1"


def test_a_sweep_is_recorded_and_dropped(bucket, tmp_path):
    folder, record = SweepFolder(bucket), TrialRecord(3, {"method": "cross-entropy"}, status="done")
    folder.open(load_config("digits"))
    folder.write_trial(record)
    load_dataset("digits").save(bucket)
    context = replace(context_of(tmp_path), workspace=Workspace(bucket))
    specs = [replace(spec, directory=folder.trial(3) / f"seed{spec.seed}") for spec in run_specs(context)]
    folder.write_specs(record, specs)
    assert list(folder.records()) == [record]
    assert ReadSpecs(folder.trials)(3, record.values) == tuple(specs)
    folder.drop()
    assert not any(name.startswith("tune") for name in listing(bucket))


def test_a_configuration_is_read_from_a_store(bucket):
    storage.write_text(bucket / "best.yaml", "train: {seeds: 7}\n")
    assert load_config(f"{bucket}/best.yaml").train.seeds == 7
    with pytest.raises(InputError, match=r"--config s3://.*none\.yaml: the file does not exist"):
        load_config(f"{bucket}/none.yaml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{bucket}/none", "--model {bucket}/none: does not exist"),
        ("nope://a/b", "--model nope://a/b: there is no way to a store of nope://"),
        ("s3://nobody-made-this-bucket/w", "--model s3://nobody-made-this-bucket/w: does not exist"),
    ],
)
def test_a_model_that_is_not_on_the_store(bucket, text, reason):
    with pytest.raises(InputError) as refused:
        open_model(text.format(bucket=bucket))
    assert str(refused.value).startswith(reason.format(bucket=bucket))


def test_a_model_on_a_store_that_does_not_answer(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    with pytest.raises(InputError, match=r"^--model s3://bucket/w: cannot be read \(.*127\.0\.0\.1:9"):
        open_model("s3://bucket/w")


def test_records_of_stages_are_read_once(bucket, monkeypatch):
    from flows.artifacts import StageRecord, open_workspace

    record = StageRecord("prepare", "f", {}, 1, {}, done=True, digest="d")
    with open_workspace(bucket) as workspace:
        assert workspace.record("prepare") is None
        workspace.write_record(record)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "read_record", None)
            assert workspace.record("prepare") == record
        workspace.drop("prepare", [])
        assert workspace.record("prepare") is None
        workspace.write_record(record)
    assert Workspace(bucket).record("prepare") == record


def test_doctor_looks_at_a_store(bucket, monkeypatch):
    monkeypatch.setattr("flows.doctor._check_ray", lambda address, *others: {"address": address, "state": "ok"})
    findings = diagnose(bucket, "local")
    assert (findings["problems"], findings["workspace"]["state"]) == ([], "written and read, not made yet")
    away = location("s3://nobody-made-this-bucket/w")
    assert "workspace s3://nobody-made-this-bucket/w: cannot be written and read" in diagnose(away, "local")["problems"][0]
