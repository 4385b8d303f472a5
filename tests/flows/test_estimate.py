"""plan --estimate: the work against what is really computed, rates by where they come from, and the arithmetic of hours and money."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

from csm import storage, tables
from csm.classifiers import ClassifierSpec, build_classifier
from csm.datasets.real import build
from csm.errors import InputError
from csm.methods import Method, MixedTerm, PixelTerm
from csm.optimization import OptimizerConfig
from csm.plan_rules import resolve_plan
from csm.planning import make_plan
from csm.schedules import MixedSet
from csm.training import fit
from flows.cli import cli
from flows.config import load_config
from flows.estimate import ASSUMED, estimate
from flows.estimate_loads import Load, training_images
from tests.flows.estimating import INFO, RATES, by_stage, configuration, prepared


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A workspace in which only `prepare` was run."""
    return prepared(tmp_path)


# Work -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        Method(),
        Method(mixing=PixelTerm("mixup", {"alpha": 0.2})),
        Method(mixing=PixelTerm("regmixup", {"alpha": 1.0, "weight": 1.0})),
        Method(mixed=MixedTerm(per_real=3, schedule="uniform")),
        Method(mixed=MixedTerm(warm_start=2, off_after=3, schedule="uniform")),
        Method(mixed=MixedTerm(weight=0.0, schedule="uniform")),
        Method(mixed=MixedTerm(ramp="linear-down", ramp_epochs=2, schedule="uniform")),
    ],
)
def test_images_of_a_training_are_those_that_go_through_the_network(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    labels = np.arange(61) % 3
    splits = np.array(["train"] * 40 + ["val"] * 12 + ["test"] * 9)
    data = build("toy", draw.integers(0, 256, (61, 8, 8, 1)).astype(np.uint8), labels, splits, ["a", "b", "c"])
    optimizer = OptimizerConfig(epochs=4, batch_size=16)  # 40 images: two batches, and eight that wait
    spec = ClassifierSpec("small-cnn", {"width": 4}, 1, data.info.class_names, data.info.mean, data.info.std)
    torch.manual_seed(0)
    classifier = build_classifier(spec)
    seen = {True: 0, False: 0}
    forward = type(classifier).forward

    def counting(self: Any, images: torch.Tensor) -> torch.Tensor:
        seen[self.training] += len(images)
        return forward(self, images)

    monkeypatch.setattr(type(classifier), "forward", counting)
    rows = torch.arange(6).view(3, 2)
    pairs = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
    mixed = MixedSet(
        torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.full((6, 3), 1 / 3), rows, *pairs, torch.tensor([0.0, 1.0])
    )
    arguments = {"mixed": mixed} if method.mixed else {}
    fit(classifier, data.split("train"), data.split("val"), method, optimizer, 0, on_epoch=lambda *_: None, **arguments)
    seen[False] += 12 + 9  # predictions of the finished classifier
    assert training_images(method, optimizer, data.info.counts) == pytest.approx(seen[True] + seen[False] / 3)


@pytest.mark.parametrize(
    ("overrides", "images"),
    [
        ((), 3 * 12 * 8),
        (("plan.pairs=[[0, 2]]", "plan.ratios=[0.25, 0.5]"), 12 * 2),
        (("plan.sets_per_pair=auto",), 3 * 54 * 8),  # 32 for each of 40 real ones, in whole sets
        (("plan.pairs=confusion", "plan.pairs_per_class=1"), 3 * 12 * 8),
    ],
)
def test_images_to_mix_are_rows_of_the_plan(overrides: tuple[str, ...], images: int) -> None:
    config = configuration(*overrides)
    load = by_stage(config)["mix"]
    assert load.images == images
    if config.plan.pairs not in ("confusion",):
        plan = make_plan(3, "d", "g", resolve_plan(config.plan, 3, 40))
        assert len(plan) == images
        assert load.longest == plan.group_by("shard").len()["len"].max()
    assert load.what.startswith("at most") == (config.plan.pairs == "confusion")


@pytest.mark.parametrize("operator", ["embedding", "score"])
@pytest.mark.parametrize("kinds", [("semantic", "unmixed"), ("pixel", "noised", "real"), tables.KINDS, ("pixel", "real")])
def test_images_of_other_kinds_count_by_their_evaluations(kinds: tuple[str, ...], operator: str) -> None:
    method = "csm" if "semantic" in kinds else f"csm-{kinds[0]}"
    config = configuration(f"plan.kinds=[{', '.join(kinds)}]", f"mix.operator={operator}", f"train.compare=[{method}]")
    found = by_stage(config)
    plan = make_plan(3, "d", "g", config.plan, labels=np.arange(40) % 3)
    assert found["annotate"].images == len(plan)
    twice = 6 / 8  # of the ratios of a set, where score mixing asks the network twice
    each = {"semantic": 1.0, "noised": 1.0, "unmixed": 1 / (1 + twice) if operator == "score" else 1.0, "pixel": 0.0, "real": 0.0}
    expected = sum(each[kind] for kind in plan["kind"])
    assert (found["mix"].images if "mix" in found else 0) == pytest.approx(expected)


def test_only_stages_that_are_run_have_work() -> None:
    assert list(by_stage(configuration())) == ["generator", "fit-teacher", "fit-annotators", "mix", "annotate", "train"]
    assert list(by_stage(configuration("train.compare=[cross-entropy]"))) == ["train"]
    assert "generator" not in by_stage(configuration("generator.path=model.pkl"))
    assert "generator" not in by_stage(configuration("generator.kind=gaussians"))
    assert "fit-teacher" not in by_stage(configuration("annotate.annotator=lda-clip"))


@pytest.mark.parametrize(
    ("gpus", "cpus", "kind", "devices"),
    [
        (0.8, 2, "gpu", 1.0),
        (0.2, 2, "gpu", 0.2),
        (0.5, 2, "gpu", 0.5),
        (2, 2, "gpu", 2.0),
        (0, 0.8, "core", 1.0),
        (0, 4, "core", 4.0),
    ],
)
def test_a_worker_takes_of_a_device_what_leaves_no_room_for_another(gpus: float, cpus: float, kind: str, devices: float) -> None:
    load = Load("mix", 1, 1, cpus, gpus, 0, "")
    assert load.kind == kind
    assert load.devices == pytest.approx(devices)


# Hours and money ------------------------------------------------------------------------------------------------------


def test_hours_and_money_by_hand(root: Path) -> None:
    config = configuration(
        "resources.mix={gpus: 0.8, cpus: 2}", "resources.train={gpus: 1, cpus: 4}", "plan.shard_rows=8", "train.seeds=2"
    )
    found = estimate(config, root, rates=RATES, prices={"gpu": 2.0}, devices=4)
    rows = {row["stage"]: row for row in found["stages"]}
    assert rows["mix"]["device_hours"] == pytest.approx(288 / 5 / 3600)
    assert rows["mix"]["hours"] == pytest.approx(288 / 5 / 3600 / 4)
    assert rows["mix"]["cost"] == pytest.approx(2 * 288 / 5 / 3600)
    assert rows["mix"]["source"] == "given"
    sizes = [training_images(method, config.train.optimizer, INFO.counts) for method in config.train.chosen.values()]
    assert rows["train"]["device_hours"] == pytest.approx(2 * sum(sizes) / 20 / 3600)
    assert rows["train"]["hours"] == pytest.approx(max(sizes) / 20 / 3600)  # four trainings, of which csm's are longer
    assert rows["annotate"]["device"] == "core"
    assert rows["annotate"]["cost"] is None
    assert found["without_price"] == ["core"]
    assert found["cost"] == pytest.approx(rows["mix"]["cost"] + rows["train"]["cost"] + (rows["fit-teacher"]["cost"]))
    assert found["device_hours"]["gpu"] == pytest.approx(
        sum(row["device_hours"] for row in rows.values() if row["device"] == "gpu")
    )
    assert found["assumed"] == list(ASSUMED)


def test_a_training_of_several_workers_is_as_many_times_faster(root: Path) -> None:
    config = configuration("train.compare=[cross-entropy]", "train.workers=2", "train.seeds=1")
    alone = estimate(replace(config, train=replace(config.train, workers=1)), root, rates={"train": 1.0}, devices=4)
    found = estimate(config, root, rates={"train": 1.0}, devices=4)
    assert found["hours"] == pytest.approx(alone["hours"] / 2)
    assert found["device_hours"] == alone["device_hours"]


def test_what_does_not_fit_and_what_has_no_work_is_refused(root: Path, tmp_path: Path) -> None:
    config = configuration("train.compare=[cross-entropy]", "resources.train.cpus=4")
    with pytest.raises(InputError, match="--devices 2: train needs 1 x 4 cores at least"):
        estimate(config, root, rates={"train": 1.0}, devices=2)
    with pytest.raises(InputError, match="--rate mix: no such work here; one of train"):
        estimate(config, root, rates={"mix": 1.0})
    with pytest.raises(InputError, match="run `csm prepare`"):
        estimate(config, tmp_path / "empty")


def test_what_is_not_measured_is_named(root: Path) -> None:
    found = estimate(configuration(), root, rates={"mix": 5.0}, seconds=0)
    assert found["not_counted"] == ["generator", "fit-teacher", "fit-annotators", "annotate", "train"]
    assert found["device_hours"] == {"core": pytest.approx(288 / 5 / 3600)}
    assert found["cost"] is None
    assert found["hours"] is None


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--estimate", "--rate", "mix"), "--rate mix: expected NAME=NUMBER"),
        (("--estimate", "--rate", "mix=nan"), "--rate mix=nan: expected NAME=NUMBER"),
        (("--estimate", "--rate", "mix=-1"), "--rate mix=-1: expected NAME=NUMBER"),
        (("--estimate", "--price", "tpu=1"), "--price tpu: expected one of gpu, core"),
        (("--devices", "3"), "belong to --estimate"),
        (("--measure", "0"), "belong to --estimate"),
    ],
)
def test_wrong_options_are_named(root: Path, options: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(cli, ["plan", "--workspace", str(root), *options])
    assert result.exit_code == 2
    assert message in result.output


def test_the_command_writes_nothing_and_prints_json(root: Path, snapshot: Callable[[Path], Any]) -> None:
    before = snapshot(root)
    given = [text for stage, rate in RATES.items() for text in ("--rate", f"{stage}={rate}")]
    result = CliRunner().invoke(
        cli, ["plan", "--estimate", "--workspace", str(root), *given, "--price", "core=0.05", "--devices", "2", "--json"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.output.splitlines()[-1])
    assert found["cost"] == pytest.approx(0.05 * found["device_hours"]["core"])
    assert "hours on" in result.output
    assert "Assumed:" in result.output
    assert snapshot(root) == before


def test_a_finished_workspace_tells_every_rate(finished: Any) -> None:
    config = load_config(str(finished.config))
    found = estimate(config, finished.root, seconds=0)
    assert found["not_counted"] == []
    assert {row["source"] for row in found["stages"]} == {"recorded"}
    plan = pl.read_parquet(finished.root / "plan.parquet")
    rows = {row["stage"]: row for row in found["stages"]}
    assert rows["mix"]["images"] == len(plan)
    receipts = [json.loads(line) for line in (finished.root / "receipts.jsonl").read_text().splitlines()]
    spent = sum(receipt["seconds"] for receipt in receipts if receipt["part"] == "mixed")
    assert rows["mix"]["device_hours"] == pytest.approx(spent / 3600)
    runs = [storage.read_json(file)["seconds"] for file in finished.root.glob("runs/*/run.json")]
    assert rows["train"]["device_hours"] == pytest.approx(sum(runs) / 3600)
    assert len(tables.read(finished.root / "plan.parquet", tables.PLAN)) == rows["annotate"]["images"]
