"""What a user is told when a training loses workers."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from cluster.training import RunEvent
from csm.methods import Method
from csm.optimization import OptimizerConfig
from csm.runs import RunSpec
from flows import training
from flows.stages import Losses


@pytest.fixture
def context(tmp_path):
    config = SimpleNamespace(resources=SimpleNamespace(train=None), train=SimpleNamespace(workers=2))
    workspace = SimpleNamespace(root=tmp_path)
    return SimpleNamespace(
        losses={}, forced=frozenset(), tracker=MagicMock(), connect=lambda: None, config=config, workspace=workspace
    )


def spec(name, tmp_path):
    return RunSpec(
        run=name, method="ce", seed=0, directory=tmp_path / name, data=tmp_path, network="small-cnn", parameters={}, settings=Method(),
        optimizer=OptimizerConfig(epochs=3), mixed=None, fingerprint=name,
    )  # fmt: skip


def test_a_loss_is_told_when_it_happens_and_its_cost_when_work_goes_on(context, tmp_path, monkeypatch, capsys):
    def epoch(number):
        return RunEvent("ce-seed0", "epoch", number, {"loss": 1.0}, "")

    heard = [
        *(epoch(number) for number in (1, 2)),
        RunEvent("", "lost", 0, {"workers": 2.0}, "2 workers on 10.77.0.2 lost with the node"),
        RunEvent("", "lost", 0, {"workers": 0.0}, "waiting for nodes (no room)"),
        RunEvent("ce-seed0", "resumed", 1, {"repeated": 8.4, "late": 31.0}, ""),
        *(epoch(number) for number in (2, 3)),
        RunEvent("ce-seed0", "done", 0, {}, ""),
    ]
    monkeypatch.setattr(training, "fit_many", lambda specs, group, directory, name, on_event, together: [*map(on_event, heard)])
    monkeypatch.setattr(training, "_open_run", lambda *arguments: None)
    monkeypatch.setattr(training, "_log_finished", lambda *arguments: None)
    training.fit_runs(context, [spec("ce-seed0", tmp_path)], "train", "classifier")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "train: 2 workers on 10.77.0.2 lost with the node; classifiers start again from their last states",
        "train: waiting for nodes (no room); classifiers start again from their last states",
        "train: ce-seed0 goes on from epoch 1, about 8 s of work repeated, 31 s later than without the loss",
    ]
    assert lines[3].startswith("train: 3/3  1/1 classifiers")  # an epoch that is trained twice counts once
    assert context.losses == {"train": Losses(2, 8.4)}
