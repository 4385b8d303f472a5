"""What a user sees where the workspace or the cluster does not do: one line, and every file there as it was."""

import pytest

from flows.config import load_config
from flows.run import verb_stages
from tests.flows.cli.conftest import RUN_VERBS


@pytest.mark.parametrize("workspace", ["file", "file/w", "file/a/b"])
def test_a_workspace_that_cannot_be_written(refused, workspace, tmp_path):
    (tmp_path / "file").touch()
    message = refused("run", "--workspace", workspace)
    assert message.startswith(f"--workspace {workspace}: cannot be written (")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_workspace_of_no_name_is_not_the_folder_where_one_stands(call, tmp_path):
    code, out, err = call("prepare", "--workspace", "")
    assert (code, out) == (2, "")
    assert "'--workspace': it is empty" in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense", "127.0.0.1"])
@pytest.mark.parametrize("verb", ["run", "mix", "prepare"])
def test_an_address_that_does_not_answer(refused, verb, address, tmp_path):
    assert refused(verb, "--address", address).startswith(f"--address {address}: ")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("verb", [verb for verb in RUN_VERBS if verb not in ("prepare", "shift", "run")])
def test_a_verb_without_what_it_needs_says_what_to_run(refused, verb, tmp_path):
    message = refused(verb, "--workspace", "w")
    first = verb if verb == "plan" else verb_stages(verb, load_config("demo"))[0]  # the teacher is for plans of many classes
    reason = f"{first} needs prepare, which was not run in this workspace"
    assert message == f"{reason}: run `csm prepare` with the same options first, or `csm run`"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("pattern", ["nope*", "memory://nowhere/seed*"])
@pytest.mark.parametrize("verb", ["run", "tune"])
def test_classifiers_that_are_not_there_are_missed_before_the_data_are_read(refused, monkeypatch, verb, pattern, tmp_path):
    monkeypatch.setattr("flows.prepare.load_dataset", lambda **settings: pytest.fail("the data are read"))
    settings = ("annotate.teacher.models=[" + pattern + "]", "tune.space.method.mixed.weight=[1, 2]", "register.enabled=false")
    message = refused(verb, "--workspace", "w", *(word for setting in settings for word in ("--set", setting)))
    assert message.startswith(
        f"annotate.teacher.models: {pattern} matches no folder; name folders of classifiers, such as first/"
    )
    assert verb == "tune" or not any(tmp_path.iterdir())


def test_ui_without_a_store(refused, tmp_path):
    assert refused("ui", "--workspace", "w") == "--workspace w: has no mlflow.db yet; run `csm run --workspace w` first"
    assert not any(tmp_path.iterdir())


# In a workspace that is finished: a refused command leaves every file as it was.


@pytest.mark.ray
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "data.val=0.25"), "prepare was made by another configuration there (data.val (not set) -> 0.25)"),
        (("--set", "generator.steps=4"), "generator was made by another configuration there (generator.steps 3 -> 4)"),
        (("--set", "plan.sets_per_pair=5"), "mix was made by another configuration there (plan.sets_per_pair 4 -> 5)"),
        (("--set", "mix.sampler.steps=3"), "mix was made by another configuration there (mix.sampler.steps 2 -> 3)"),
        (("--set", "plan.seed=1", "--force", "plan"), "mix was made by another configuration there (plan.seed 0 -> 1)"),
        (("--address", "127.0.0.1:1", "--force", "mix"), "nothing answers at 127.0.0.1 port 1"),
        (("--address", "127.0.0.1:1"), "nothing answers at 127.0.0.1 port 1"),
        (("--set", "nope=1", "--force", "mix"), "nope: no such setting"),
    ],
)
def test_a_refused_run_leaves_a_finished_workspace_as_it_was(refused, finished, snapshot, arguments, message):
    before = snapshot(finished.root)
    said = refused("run", "--config", finished.config, "--workspace", finished.root, *arguments)
    assert message in said
    if "another configuration" in message:
        stage = message.partition(" ")[0]
        assert said.endswith(f"; set that back (--set), choose another --workspace, or replace it with --force {stage}")
    assert snapshot(finished.root) == before


@pytest.mark.ray
@pytest.mark.parametrize(
    ("verb", "override", "message"),
    [
        ("mix", "plan.sets_per_pair=5", "mix was made by another configuration there"),
        (
            "train",
            "annotate.annotators.projection.scale=3",
            "train needs annotate, which depends on fit-annotators, which was run with other settings",
        ),
        (
            "evaluate",
            "train.optimizer.epochs=3",
            "evaluate needs train, which depends on annotate, which depends on fit-annotators",
        ),
        (
            "report",
            "evaluate.bins=9",
            "report needs evaluate, which was run with other settings (evaluate.bins 15 -> 9): run `csm evaluate`",
        ),
    ],
)
def test_a_refused_verb_leaves_a_finished_workspace_as_it_was(refused, finished, snapshot, verb, override, message):
    before = snapshot(finished.root)
    assert message in refused(verb, "--config", finished.config, "--workspace", finished.root, "--set", override)
    assert snapshot(finished.root) == before


@pytest.mark.ray
def test_another_configuration_in_a_finished_workspace(refused, finished, snapshot):
    before = snapshot(finished.root)
    message = refused("run", "--config", "demo", "--workspace", finished.root)
    assert message.startswith(
        f"--workspace {finished.root}: prepare was made by another configuration there (data.source digits -> digits-hard)"
    )
    assert snapshot(finished.root) == before
