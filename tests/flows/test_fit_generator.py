"""Where the generator is trained, and what is done with what the training tells. Real trainings are in test_pipeline.py."""

import pytest

from flows import fit_generator, generator
from flows.artifacts import StageRecord, Workspace
from flows.config import load_config
from flows.stages import Context

RECORD = StageRecord("generator", "fingerprint", {}, 1, {})


@pytest.fixture
def calls(monkeypatch):
    """What was called: "here" or "group", with its job; each tells two steps, starts again and tells three."""
    made = []

    def tell(on_step):
        for step, loss in [(1, 5.0), (2, 4.0), (1, 5.0), (2, 4.0), (3, 3.0)]:
            on_step(step, loss)

    def here(job, on_step):
        made.append(("here", job))
        tell(on_step)

    def group(job, group, directory, name, on_step, on_loss):
        made.append(("group", job))
        assert group.cpus == 0.5
        tell(on_step)

    monkeypatch.setattr("csm.generators.fitting.fit_job", here)
    monkeypatch.setattr("cluster.fitting.fit_in_group", group)
    monkeypatch.setattr(Context, "connect", lambda self: made.append("connect"))
    return made


@pytest.mark.parametrize(
    ("address", "overrides", "where"),
    [
        ("local", [], ["here"]),
        ("local", ["resources.fit.workers=2"], ["connect", "group"]),
        ("local", ["resources.fit.workers=0"], ["connect", "group"]),  # as many as fit
        ("local", ["resources.fit.gpus=1"], ["connect", "group"]),
        ("auto", [], ["connect", "group"]),
        ("10.0.0.1:6379", [], ["connect", "group"]),
    ],
)
def test_one_worker_without_a_gpu_on_this_machine_is_this_process(address, overrides, where, calls, tmp_path):
    config = load_config("digits", ["resources.fit.cpus=0.5", *overrides])
    losses = fit_generator.fit(Context(config, Workspace(tmp_path), {}, address), RECORD)
    assert [call if call == "connect" else call[0] for call in calls] == where
    job = calls[-1][1]
    assert (job.data, job.directory, job.fingerprint) == (tmp_path, tmp_path / "generator", "fingerprint")
    assert job.config == config.generator
    assert losses == [5.0, 4.0, 3.0]  # steps that were told twice count once


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("generator.precision=bfloat16", False),
        ("generator.flip=true", False),
        ("generator.attention_levels=2", False),
        ("generator.label_dropout=0.1", False),
        ("generator.micro_batch=16", True),
        ("mix.guidance=1", True),
        ("resources.fit.workers=2", True),
    ],
)
def test_what_changes_the_result_is_in_the_settings(override, same):
    plain, changed = (generator.STAGE.settings(load_config("digits", overrides)) for overrides in ([], [override]))
    assert (plain == changed) is same
