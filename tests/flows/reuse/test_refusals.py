"""What is refused, in which words, and that it leaves everything as it was."""

from dataclasses import replace

import pytest

from csm.errors import InputError
from flows.reuse import refuse_replacing, run_stage, stale
from tests.flows.reuse.pipeline import Pipeline, state


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


def test_an_interrupted_costly_stage_of_other_settings_is_not_replaced_either(pipeline):
    pipeline.fail["source"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        pipeline.run()
    with pytest.raises(InputError, match="another configuration"):
        pipeline.run("plan.seed=1")
    assert pipeline.run() == ["source", "table", "end"]


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
