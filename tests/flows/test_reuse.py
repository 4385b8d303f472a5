"""Three small stages, one of each kind: what is reused, done again, refused or gone on with."""

from dataclasses import dataclass, field, replace

import polars as pl
import pytest

from csm.errors import InputError
from flows.artifacts import Workspace
from flows.config import load_config
from flows.reuse import refuse_replacing, run_stage, stale
from flows.stages import Context, Losses, Made, Stage


class FakeTracker:
    """Remembers what a stage says of itself: key -> status."""

    def __init__(self):
        self.status, self.names, self.metrics = {}, {}, {}

    def open_run(self, key, name, tags, params, parent=None):
        self.status[key], self.names[key] = "RUNNING", name
        return key

    def run_id(self, key):
        return key

    def log_metrics(self, key, values):
        self.metrics[key] = values

    def close_run(self, key, status="FINISHED"):
        self.status[key] = status


@dataclass
class Pipeline:
    """source (costly) -> table -> end (incremental); ``ran`` counts, ``fail`` is raised by the named stage."""

    root: object
    ran: list = field(default_factory=list)
    fail: dict = field(default_factory=dict)
    tracker: FakeTracker = field(default_factory=FakeTracker)
    version: int = 1
    refuse: str = ""

    def context(self, *overrides, forced=()):
        stages = {
            "source": Stage(
                "source", 1, (), lambda config: {"seed": config.plan.seed}, lambda w, c: [w.root / "source.txt"],
                self.work("source"), self.check, costly=True,
            ),
            "table": Stage(
                "table", self.version, ("source",), lambda config: {"plan": {"ratios": config.plan.ratios}},
                lambda w, c: [w.root / "table.parquet"], self.work("table"),
            ),
            "end": Stage(
                "end", 1, ("table",), lambda config: {"bins": config.evaluate.bins},
                lambda w, c: [w.root / "end.txt"], self.work("end"), incremental=True,
            ),
        }  # fmt: skip
        config = load_config("digits", overrides)
        return Context(config, Workspace(self.root), stages, forced=frozenset(forced), _tracker=self.tracker)

    def check(self, config):
        if self.refuse:
            raise InputError(self.refuse)

    def work(self, name):
        def run(context, record):
            self.ran.append(name)
            path = context.stages[name].outputs(context.workspace, context.config)[0]
            self.found = path.exists()
            if path.suffix == ".parquet":
                pl.DataFrame({"ratios": [context.config.plan.ratios]}).write_parquet(path)
            else:
                path.write_text(str(record.settings))
            if name in self.fail:
                raise self.fail.pop(name)
            return Made(7, f"{name} of {record.settings} and {record.inputs}")

        return run

    def run(self, *overrides, forced=(), names=("source", "table", "end")):
        """Run the stages and return those that were really run, with what the command would report."""
        self.ran.clear()
        context = self.context(*overrides, forced=forced)
        for name in names:
            run_stage(context, name)
        assert [name for name in names if not context.outcomes[name]["reused"]] == self.ran
        return list(self.ran)


@pytest.fixture
def pipeline(tmp_path):
    return Pipeline(tmp_path)


@pytest.fixture
def made(pipeline):
    """A pipeline that was run once."""
    assert pipeline.run() == ["source", "table", "end"]
    return pipeline


def state(root):
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


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


def test_costly_results_of_other_settings_are_not_replaced(made, tmp_path):
    before = state(tmp_path)
    with pytest.raises(InputError) as caught:
        made.run("plan.seed=1")
    assert str(caught.value) == (
        f"--workspace {tmp_path}: source was made by another configuration there (seed 0 -> 1); "
        "set that back (--set), choose another --workspace, or replace it with --force source"
    )
    assert made.ran == []
    assert state(tmp_path) == before


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


def test_the_refusal_of_a_later_stage_comes_before_anything_is_written(made, tmp_path):
    """`table` could be replaced, but a costly stage made from it could not: so neither is."""
    context = made.context("plan.ratios=5")
    context.stages["end"] = replace(context.stages["end"], costly=True)
    before = state(tmp_path)
    with pytest.raises(InputError, match=r"end was made by another configuration there \(plan\.ratios 8 -> 5\); .*--force end"):
        refuse_replacing(context, ("source", "table", "end"))
    assert state(tmp_path) == before
    refuse_replacing(replace(context, forced=frozenset(["end"])), ("source", "table", "end"))
    (tmp_path / "end.txt").unlink()
    refuse_replacing(context, ("source", "table", "end"))


def test_nothing_is_refused_where_nothing_changed_or_nothing_was_made(made, pipeline, tmp_path):
    refuse_replacing(made.context("train.seeds=9"), ("source", "table", "end"))
    refuse_replacing(Pipeline(tmp_path / "new").context("plan.seed=1"), ("source", "table", "end"))


def test_refused_input_leaves_nothing(pipeline, tmp_path):
    pipeline.refuse = "no such folder"
    with pytest.raises(InputError, match="no such folder"):
        pipeline.run()
    assert not any(tmp_path.iterdir())
    assert pipeline.tracker.status == {}


def test_refused_input_does_not_cost_what_force_would_replace(made, tmp_path):
    before = state(tmp_path)
    made.refuse = "no such folder"
    with pytest.raises(InputError, match="no such folder"):
        made.run(forced=["source"])
    assert state(tmp_path) == before
    made.refuse = ""
    assert made.run() == []


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


def test_an_interrupted_costly_stage_of_other_settings_is_not_replaced_either(pipeline):
    pipeline.fail["source"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        pipeline.run()
    with pytest.raises(InputError, match="another configuration"):
        pipeline.run("plan.seed=1")
    assert pipeline.run() == ["source", "table", "end"]


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


def test_a_stage_without_its_input_says_what_to_run(pipeline, tmp_path):
    with pytest.raises(InputError) as caught:
        pipeline.run(names=("table",))
    assert str(caught.value) == (
        "table needs source, which was not run in this workspace: run `csm source` with the same options first, or `csm run`"
    )
    assert not any(tmp_path.iterdir())


def test_a_stage_with_an_old_input_says_why_it_is_old(made):
    with pytest.raises(
        InputError, match=r"end needs table, which was run with other settings \(plan\.ratios 8 -> 5\): run `csm table`"
    ):
        made.run("plan.ratios=5", names=("end",))
    with pytest.raises(
        InputError, match=r"end needs table, which depends on source, which was run with other settings \(seed 0 -> 1\)"
    ):
        made.run("plan.seed=1", names=("end",))
    made.run("plan.ratios=5", names=("table",))
    assert stale(made.context("plan.ratios=5"), "end") == "was run with other settings (another result of table)"


def test_the_stage_inside_annotate_is_named_by_its_verb(pipeline):
    context = pipeline.context()
    context.stages["fit-annotators"] = replace(context.stages["source"], name="fit-annotators")
    context.stages["table"] = replace(context.stages["table"], inputs=("fit-annotators",))
    with pytest.raises(InputError, match="run `csm annotate` with"):
        run_stage(context, "table")


def test_many_changes_are_cut_short(made):
    context = made.context("plan.ratios=5")
    before = {str(number): 0 for number in range(6)}
    record = replace(context.workspace.record("table"), settings=before)
    context.workspace.write_record(record)
    assert (
        stale(context, "table")
        == "was run with other settings (0 0 -> (not set); 1 0 -> (not set); 2 0 -> (not set); 3 0 -> (not set); and 3 more)"
    )


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
