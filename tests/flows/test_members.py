"""Methods with members and with an optimizer of their own, from the configuration to the finished model, but for Ray."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from mlflow.tracking import MlflowClient
from sklearn.metrics import log_loss

from cluster.training import RunEvent, TrainingError
from csm import storage, tables
from csm.calibrated import load_calibrated
from csm.datasets import RealDataset
from csm.errors import InputError
from csm.methods import Method, MixedTerm, identity
from csm.runs import RunSpec, fit_run, is_finished
from flows import training
from flows.config import load_config
from flows.evaluate import training_cost, training_spent
from flows.run import STAGES
from flows.run_names import find
from flows.tracking import store_uri
from flows.train import MEMBER_SEEDS, run_specs
from tests.flows.finished_model import context_of, run_stages

pytestmark = pytest.mark.usefixtures("one_thread")
DEEP = ("train.compare=[cross-entropy, deep-ensemble]", "train.methods.deep-ensemble.members=2")
ALONE = ("train.compare=[deep-ensemble]", "train.methods.deep-ensemble.members=2", "train.seeds=1", "evaluate.draws=200")


class Directly:
    """In place of ``fit_many``: trains here, in order; ``end`` runs end as it says, and ``trained`` are those that did not."""

    def __init__(self, **end: BaseException) -> None:
        self.end, self.trained = end, list[str]()

    def __call__(
        self, specs: Sequence[RunSpec], group: Any, directory: Path, name: str, on_event: Callable[..., None], workers: int
    ) -> None:
        errors = {}
        for spec in specs:
            ending = self.end.get(spec.run.replace("-", "_"))
            if isinstance(ending, KeyboardInterrupt):
                raise ending
            if ending:
                errors[spec.run] = f"FloatingPointError: {ending}"
                on_event(RunEvent(spec.run, "failed", 0, {}, errors[spec.run]))
                continue
            fit_run(spec, lambda epoch, values, run=spec.run: on_event(RunEvent(run, "epoch", epoch, values, "")))
            on_event(RunEvent(spec.run, "done", 0, {}, ""))
            self.trained.append(spec.run)
        if errors:
            raise TrainingError(errors, len(specs))


@pytest.fixture
def prepared(modelled: Path, tmp_path: Path) -> Path:
    """A workspace with images alone."""
    root = tmp_path / "workspace"
    for name in ("stages/prepare.json", "dataset.json", "real"):
        source = modelled / name
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, root / name)
    return root


def train(root: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, **end: BaseException) -> list[str]:
    """Train as `csm train` does, but for Ray; gives the names of the runs that were."""
    directly = Directly(**end)
    context = replace(context_of(root, *overrides), stages=STAGES)
    context.connect = lambda: None  # type: ignore[method-assign]
    monkeypatch.setattr(training, "fit_many", directly)
    try:
        training.fit_runs(context, run_specs(context), "train", "classifier")
    finally:
        context.close("FINISHED")
    return directly.trained


def probabilities(spec: RunSpec, split: str) -> np.ndarray:
    rows = tables.read(spec.directory / "predictions.parquet", tables.predictions(10)).filter(split=split)
    return torch.from_numpy(rows["logits"].to_numpy().copy()).double().softmax(dim=1).numpy()


# Runs -----------------------------------------------------------------------------------------------------------------


def test_the_first_member_is_the_classifier_alone_and_no_two_are_the_same(prepared: Path) -> None:
    specs = run_specs(context_of(prepared, *DEEP))
    alone, deep = specs[:2]
    assert [spec.run for spec in specs] == [f"{name}-seed{s}" for s in (0, 1) for name in ("cross-entropy", "deep-ensemble")]
    assert (alone.members, len(deep.members)) == ((), 2)
    assert deep.members[0].fingerprint == alone.fingerprint != deep.fingerprint
    assert deep.members[0].settings.members == 1
    assert [one.directory.relative_to(deep.directory).name for one in deep.members] == ["member-0", "member-1"]
    seeds = [one.seed for spec in specs if spec.members for one in spec.members]
    assert seeds == [0, MEMBER_SEEDS, 1, MEMBER_SEEDS + 1]
    assert len({one.fingerprint for spec in specs for one in spec.singles}) == 4


def test_what_was_trained_before_there_were_members_is_known_again() -> None:
    method = Method(description="x", mixed=MixedTerm("teacher"))
    known = {name: value for name, value in asdict(method).items() if name not in ("members", "optimizer")}
    del known["mixed"]["images"]
    assert identity(method) == {**known, "description": ""}
    assert identity(replace(method, mixed=MixedTerm("teacher", images=("semantic",)))) == identity(method)
    assert identity(replace(method, members=2, optimizer={"epochs": 3})) == {
        **known, "description": "", "members": 2, "optimizer": {"epochs": 3},
    }  # fmt: skip


def test_a_classifier_that_two_methods_share_is_trained_once(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(prepared, monkeypatch, *DEEP, "train.seeds=1") == ["cross-entropy-seed0", "deep-ensemble-seed0-member-1"]
    context = context_of(prepared, *DEEP, "train.seeds=1")
    alone, deep = run_specs(context)
    assert all(is_finished(one) for one in (alone, deep, *deep.members))
    record, first = (storage.read_json(one.directory / "run.json") for one in (deep, deep.members[0]))
    assert (first["run"], first["method"]) == ("deep-ensemble-seed0-member-0", "deep-ensemble")
    assert np.array_equal(probabilities(alone, "test"), probabilities(deep.members[0], "test"))
    seconds = [member["seconds"] for member in record["members"]]
    assert training_cost(context.workspace, context.config) == pytest.approx(
        {"cross-entropy": seconds[0], "deep-ensemble": sum(seconds)}, abs=2e-3
    )
    assert training_spent(context.workspace, context.config) == pytest.approx(sum(seconds))
    # With other members, or none, what is there is taken; a method under another name is the same classifier too.
    more = (*ALONE, "train.methods.deep-ensemble.members=3")
    assert train(prepared, monkeypatch, *more) == ["deep-ensemble-seed0-member-2"]
    assert train(prepared, monkeypatch, *ALONE, "train.methods.deep-ensemble.members=1") == []
    assert train(prepared, monkeypatch, "train.seeds=1", "train.methods.mine.loss=cross-entropy", "train.compare=[mine]") == []
    assert find("mine", prepared).settings["members"] == 1


def test_training_goes_on_between_members_and_mlflow_has_one_run_with_theirs_below(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(prepared, monkeypatch, *ALONE, deep_ensemble_seed0_member_1=KeyboardInterrupt())
    (spec,) = run_specs(context_of(prepared, *ALONE))
    assert [is_finished(one) for one in (*spec.members, spec)] == [True, False, False]
    assert train(prepared, monkeypatch, *ALONE) == ["deep-ensemble-seed0-member-1"]
    assert is_finished(spec)
    assert train(prepared, monkeypatch, *ALONE) == []
    client = MlflowClient(store_uri(prepared))
    runs = client.search_runs([client.get_experiment_by_name("csm").experiment_id])
    named = {run.info.run_name: run for run in runs}
    whole, members = named["deep-ensemble-seed0"], [named[f"deep-ensemble-seed0-member-{number}"] for number in (0, 1)]
    assert whole.data.tags["csm.kind"] == "classifier"
    assert whole.data.params["members"] == "2"
    assert [run.info.status for run in (whole, *members)] == ["FINISHED"] * 3
    assert {run.data.tags["csm.kind"] for run in members} == {"member"}
    assert {run.data.tags["mlflow.parentRunId"] for run in members} == {whole.info.run_id}
    assert "loss" in members[1].data.metrics
    assert len(runs) == 4  # and the parent


def test_a_member_that_fails_fails_its_ensemble_alone(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match=r"1 of 2 trainings failed; deep-ensemble-seed0: .*loss is") as caught:
        train(prepared, monkeypatch, *DEEP, "train.seeds=1", deep_ensemble_seed0_member_1=FloatingPointError("loss is infinite"))
    assert list(caught.value.errors) == ["deep-ensemble-seed0"]
    alone, deep = run_specs(context_of(prepared, *DEEP, "train.seeds=1"))
    assert is_finished(alone)
    assert not is_finished(deep)


# What reads runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A workspace in which an ensemble of two was trained, measured and made the finished model."""
    root = tmp_path_factory.mktemp("deep") / "workspace"
    run_stages(context_of(root, *ALONE), "prepare", "train", "model", "evaluate")
    (spec,) = run_specs(context_of(root, *ALONE))
    return SimpleNamespace(root=root, spec=spec)


@pytest.mark.parametrize("split", ["val", "test"])
def test_what_is_measured_is_the_log_loss_of_averaged_probabilities(deep: SimpleNamespace, split: str) -> None:
    _, labels = RealDataset.load(deep.root).split(split)
    mean = sum(probabilities(member, split) for member in deep.spec.members) / 2
    metrics = pl.read_parquet(deep.root / "metrics.parquet").filter(
        pl.col("split").cast(pl.String) == split, posthoc="none", run="deep-ensemble-seed0"
    )
    found = dict(metrics.select("metric", "value").iter_rows())
    assert found["nll"] == pytest.approx(log_loss(labels.numpy(), mean, labels=range(10)), rel=1e-5)
    assert found["accuracy"] == (mean.argmax(axis=1) == labels.numpy()).mean()
    one = log_loss(labels.numpy(), probabilities(deep.spec.members[0], split), labels=range(10))
    assert abs(found["nll"] - one) > 1e-3  # it is not the first member


def test_the_finished_model_averages_its_members_and_is_calibrated_as_a_whole(deep: SimpleNamespace) -> None:
    model = load_calibrated(deep.root / "model")
    assert (model.spec.members, model.spec.origin["run"]) == (2, "deep-ensemble-seed0")
    images, _ = RealDataset.load(deep.root).split("test")
    mean = torch.from_numpy(sum(probabilities(member, "test") for member in deep.spec.members) / 2)
    expected = (mean.log() / model.spec.posthoc.values["temperature"]).softmax(dim=1)
    torch.testing.assert_close(model.predict(images.permute(0, 2, 3, 1)).double(), expected, atol=1e-5, rtol=0)


def test_an_ensemble_is_compared_like_any_classifier(deep: SimpleNamespace) -> None:
    trained = find("deep-ensemble", deep.root)
    assert list(trained.folders) == [0]
    assert trained.settings["members"] == 2


# Settings -------------------------------------------------------------------------------------------------------------


def test_a_method_trains_with_its_own_optimizer(prepared: Path) -> None:
    own = ("train.methods.label-smoothing.optimizer={epochs: 3, learning_rate: 0.02}",)
    before, after = run_specs(context_of(prepared)), run_specs(context_of(prepared, *own))
    for one, other in zip(before, after, strict=True):
        changed = one.method == "label-smoothing"
        assert (one.fingerprint != other.fingerprint) == changed
        assert asdict(other.optimizer) == {**asdict(one.optimizer), **({"epochs": 3, "learning_rate": 0.02} if changed else {})}
    same = run_specs(context_of(prepared, "train.methods.label-smoothing.optimizer={epochs: 1}"))
    assert [spec.fingerprint for spec in same] == [spec.fingerprint for spec in before]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.epochs=0"], "train.methods.csm.optimizer.epochs: expected a number greater than or equal to 1, got 0"),
        (["optimizer.epochs=many"], "train.methods.csm.optimizer.epochs: expected a whole number, got 'many'"),
        (["optimizer.nope=1"], "train.methods.csm.optimizer.nope: no such setting; allowed: kind, epochs"),
        (["optimizer.epoch=1"], "no such setting; did you mean train.methods.csm.optimizer.epochs?"),
        (
            ["optimizer.warmup=60"],
            "train.methods.csm.optimizer.warmup: expected fewer than the 60 epochs of the training, got 60",
        ),
        (
            ["optimizer.epochs=3", "mixed.warm_start=3"],
            "mixed.warm_start: expected fewer than the 3 epochs of the training, got 3",
        ),
        (["optimizer=3"], "train.methods.csm.optimizer: expected a section with keys, got 3"),
        (["members=0"], "train.methods.csm.members: expected a number greater than or equal to 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused_at_its_place(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config("demo", [f"train.methods.csm.{override}" for override in overrides])
    assert message in str(caught.value)


def test_a_method_may_train_longer_than_the_others() -> None:
    config = load_config("demo", ["train.methods.csm.optimizer.epochs=90", "train.methods.csm.mixed.warm_start=70"])
    assert config.train.optimizer_of(config.train.methods["csm"]).epochs == 90
    assert config.with_values({"train.optimizer.learning_rate": 0.05}).train.methods["csm"].optimizer == {"epochs": 90}


def test_the_default_ensembles() -> None:
    train_ = load_config("demo").train
    assert {name: method.members for name, method in train_.methods.items() if method.members > 1} == {
        "deep-ensemble": 5, "csm-members": 5,
    }  # fmt: skip
    assert not {"deep-ensemble", "csm-members"} & set(train_.compare)
