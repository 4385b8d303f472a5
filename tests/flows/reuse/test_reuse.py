"""What is reused, done again or gone on with."""

from dataclasses import replace

import polars as pl
import pytest

from flows.artifacts import Workspace
from flows.reuse import run_stage, stale
from flows.stages import Losses
from tests.flows.reuse.pipeline import FakeTracker, Pipeline, state


def test_outcomes_are_what_json_promises(made):
    context = made.context()
    run_stage(context, "source")
    assert context.outcomes == {"source": {"seconds": 0.0, "reused": True, "rows": 7}}
    run_stage(made.context(forced=["source"]), "source")


def test_what_was_lost_is_told_in_a_line_in_json_and_in_mlflow(pipeline, capsys):
    context = pipeline.context()
    context.losses["source"] = Losses(2, 41.23456)
    context.losses["table"] = Losses()
    for name in ("source", "table", "end"):
        run_stage(context, name)
    lost = [{key: value for key, value in outcome.items() if "lost" in key} for outcome in context.outcomes.values()]
    assert lost == [{"workers_lost": 2, "seconds_lost": 41.235}, {"workers_lost": 0, "seconds_lost": 0.0}, {}]
    assert [line for line in capsys.readouterr().err.splitlines() if "lost" in line] == [
        "source: 2 workers lost, about 41 s of work repeated"
    ]
    (metrics,) = [values for key, values in pipeline.tracker.metrics.items() if key.startswith("stage source")]
    assert (metrics["workers_lost"], metrics["seconds_lost"]) == (2, 41.235)


def test_nothing_changed_nothing_is_done(made, tmp_path):
    before, runs = state(tmp_path), dict(made.tracker.status)
    assert made.run() == []
    assert state(tmp_path) == before
    assert made.tracker.status == runs


def test_records_are_done_and_runs_finished(made, tmp_path):
    for name in ("source", "table", "end"):
        record = Workspace(tmp_path).record(name)
        assert record.done
        assert record.rows == 7
    assert set(made.tracker.status.values()) == {"FINISHED"}
    assert sorted(made.tracker.names.values()) == ["end", "source", "table"]
    assert all(set(metrics) == {"seconds", "rows"} for metrics in made.tracker.metrics.values())


def test_a_changed_setting_redoes_its_stage_and_those_after_it(made):
    assert made.run("plan.ratios=5") == ["table", "end"]
    assert made.run("plan.ratios=5") == []
    assert made.run("plan.ratios=5", "evaluate.bins=3") == ["end"]


def test_a_setting_that_no_stage_depends_on_redoes_nothing(made):
    assert made.run("train.seeds=9") == []


def test_the_same_result_from_newer_code_spares_the_stages_after_it(made):
    made.version = 2
    assert made.run() == ["table"]


def test_newer_code_is_named_as_the_reason(made):
    made.version = 2
    assert stale(made.context(), "table") == "was run with other settings (a newer version of csm)"


def test_what_a_stage_made_is_removed_before_it_is_done_anew(made):
    made.run("plan.ratios=5", names=("table",))
    assert not made.found


def test_an_incremental_stage_keeps_its_files(made):
    made.run("evaluate.bins=3", names=("end",))
    assert made.found


def test_costly_results_that_are_gone_may_be_made_anew(made, tmp_path):
    (tmp_path / "source.txt").unlink()
    assert made.run("plan.seed=1") == ["source", "table", "end"]


def test_force_replaces_costly_results(made, tmp_path):
    assert made.run("plan.seed=1", forced=["source"]) == ["source", "table", "end"]
    assert (tmp_path / "source.txt").read_text() == "{'seed': 1}"


def test_force_redoes_one_stage_though_nothing_changed(made):
    assert made.run(forced=["table"]) == ["table"]
    assert not made.found
    assert made.run(forced=["end"]) == ["end"]
    assert not made.found


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), "KILLED"), (RuntimeError("broke"), "FAILED")])
def test_an_interrupted_stage_goes_on(pipeline, tmp_path, error, status, capsys):
    pipeline.fail["table"] = error
    with pytest.raises(type(error)):
        pipeline.run()
    record = Workspace(tmp_path).record("table")
    assert not record.done
    key = f"stage table {record.fingerprint}"
    assert pipeline.tracker.status[key] == status
    assert stale(pipeline.context(), "end") == "was not run in this workspace"
    assert stale(pipeline.context(), "table") == "was interrupted"
    assert pipeline.run() == ["table", "end"]
    assert pipeline.tracker.status[key] == "FINISHED"
    assert "table: going on" in capsys.readouterr().err
    assert len(pipeline.tracker.status) == 3  # no second run for it


def test_an_interrupted_stage_finds_its_files_and_adds_up_its_seconds(pipeline, tmp_path):
    pipeline.fail["table"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        pipeline.run()
    workspace = Workspace(tmp_path)
    workspace.write_record(replace(workspace.record("table"), seconds=100.0))
    pipeline.run(names=("table",))
    assert pipeline.found
    assert 100 <= workspace.record("table").seconds < 160


@pytest.mark.parametrize("name", ["source.txt", "table.parquet", "end.txt"])
def test_a_deleted_output_is_made_again_and_nothing_else(made, tmp_path, name):
    (tmp_path / name).unlink()
    assert stale(made.context(), name.partition(".")[0]) == f"lacks {tmp_path / name}"
    assert made.run() == [name.partition(".")[0]]
    assert made.run() == []


@pytest.mark.parametrize("kept", [0, 10, -1])
def test_a_table_cut_short_is_made_again(made, tmp_path, kept):
    path = tmp_path / "table.parquet"
    path.write_bytes(path.read_bytes()[:kept])
    assert made.run() == ["table"]
    assert pl.read_parquet(path)["ratios"].to_list() == [8]


def test_an_error_of_the_store_is_not_hidden_by_the_end(tmp_path, monkeypatch):
    """Whoever ends a run that could not be opened must not see a KeyError in place of the store's error."""

    class Broken(FakeTracker):
        def __init__(self, root, address, command):
            super().__init__()

        def open_run(self, *arguments):
            raise OSError("the store is read-only")

        def close_run(self, key, status="FINISHED"):
            raise KeyError(key)

        def close(self):
            """Nothing waits."""

    monkeypatch.setattr("flows.stages.Tracker", Broken)
    context = replace(Pipeline(tmp_path).context(), _tracker=None)
    with pytest.raises(OSError, match="read-only"):
        context.tracker  # noqa: B018
    context.close("FAILED")
