"""plan --estimate: the work against what is really computed, rates by where they come from, and the arithmetic of hours and money."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

from csm import storage, tables
from csm.classifiers import ClassifierSpec, build_classifier
from csm.datasets import DatasetInfo
from csm.datasets.real import build
from csm.errors import InputError
from csm.methods import Method, MixedTerm, PixelTerm
from csm.optimization import OptimizerConfig
from csm.plan_rules import resolve_plan
from csm.planning import make_plan
from csm.schedules import MixedSet
from csm.training import fit
from flows.artifacts import StageRecord, Workspace
from flows.cli import cli
from flows.config import Config, load_config, plain
from flows.estimate import ASSUMED, estimate
from flows.estimate_loads import Load, loads, training_images
from flows.estimate_rates import measured, recorded
from flows.run import STAGES

INFO = DatasetInfo("toy", (8, 8, 1), ("a", "b", "c"), (0.5,), (0.2,), {"train": 40, "val": 12, "test": 9}, "d")
RATES = {"generator": 10.0, "fit-teacher": 10.0, "fit-annotators": 10.0, "mix": 5.0, "annotate": 10.0, "train": 20.0}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A workspace in which only `prepare` was run."""
    storage.write_json(tmp_path / "dataset.json", asdict(INFO))
    return tmp_path


def configuration(*overrides: str) -> Config:
    return load_config(
        "demo", ["annotate.annotator=teacher", "train.compare=[cross-entropy, csm]", "train.optimizer.epochs=3", *overrides]
    )


def by_stage(config: Config) -> dict[str, Load]:
    return {load.stage: load for load in loads(config, INFO)}


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


# Rates ----------------------------------------------------------------------------------------------------------------


def write_receipts(root: Path, *receipts: tuple[str, int, int, float]) -> None:
    lines = [
        {"part": part, "shard": shard, "rows": rows, "checksum": "c", "seconds": seconds, "node": "n"}
        for part, shard, rows, seconds in receipts
    ]
    (root / "receipts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def done(root: Path, config: Config, stage: str, **inputs: str) -> None:
    """The record of ``stage`` as a finished one, and the configuration of the workspace."""
    settings = plain(STAGES[stage].settings(config))
    Workspace(root).write_record(
        StageRecord(stage, "f", settings, 1, inputs, done=True, digest=f"digest of {stage}", seconds=40.0)
    )
    (root / "config.yaml").write_text(config.to_yaml())


def test_mixing_here_before_gives_the_rate_scaled_by_evaluations(root: Path) -> None:
    config = configuration()
    write_receipts(root, ("mixed", 0, 90, 1e9), ("mixed", 0, 90, 20.0), ("mixed", 1, 10, 5.0), ("mixed", 2, 500, 0.0))
    done(root, config, "generator")
    done(root, config, "mix", generator="digest of generator")
    load, workspace = by_stage(config)["mix"], Workspace(root)
    rate = recorded(workspace, config, load)
    assert rate is not None
    assert rate.images_per_s == pytest.approx(100 / 25)
    other = configuration("mix.sampler.solver=heun", "mix.sampler.steps=20")
    rate = recorded(workspace, other, load)
    assert rate is not None
    assert rate.images_per_s == pytest.approx(4 * 13 / 39)
    assert "from 13 to 39 evaluations" in rate.note


def test_guidance_doubles_the_evaluations(root: Path) -> None:
    plain, guided = (configuration("generator.label_dropout=0.1", *more) for more in ([], ["mix.guidance=2"]))
    write_receipts(root, ("mixed", 0, 90, 20.0))
    done(root, plain, "generator")
    done(root, plain, "mix", generator="digest of generator")
    rates = [recorded(Workspace(root), config, by_stage(config)["mix"]) for config in (plain, guided)]
    assert [rate and rate.images_per_s for rate in rates] == pytest.approx([4.5, 2.25])
    assert rates[1] is not None
    assert "from 13 to 26 evaluations" in rates[1].note
    assert "x 26 evaluations" in by_stage(guided)["mix"].what


@pytest.mark.parametrize("override", ["generator.block_channels=[8, 8]", "resources.mix.cpus=2", "resources.mix.gpus=1"])
def test_mixing_by_another_network_or_on_other_workers_says_nothing(root: Path, override: str) -> None:
    config = configuration()
    write_receipts(root, ("mixed", 0, 90, 20.0))
    done(root, config, "generator")
    done(root, config, "mix", generator="digest of generator")
    other = configuration(override)
    assert recorded(Workspace(root), other, by_stage(other)["mix"]) is None


@pytest.mark.parametrize("text", ["resources: {mix: [", "- a list", "", "resources: none", "resources: {mix: 3}"])
def test_a_damaged_configuration_of_the_workspace_is_named(root: Path, text: str) -> None:
    (root / "config.yaml").write_text(text)
    config = load_config("digits")
    with pytest.raises(InputError, match=r"config\.yaml: damaged, not a configuration: remove it") as refused:
        recorded(Workspace(root), config, by_stage(config)["mix"])
    assert "\n" not in str(refused.value)


def test_mixing_by_a_generator_that_was_replaced_says_nothing(root: Path) -> None:
    config = configuration()
    write_receipts(root, ("mixed", 0, 90, 20.0))
    done(root, config, "generator")
    done(root, config, "mix", generator="digest of the one before")
    assert recorded(Workspace(root), config, by_stage(config)["mix"]) is None


def test_a_longer_training_of_the_same_generator_is_as_fast(root: Path) -> None:
    config = configuration()
    done(root, config, "generator")
    longer = configuration("generator.steps=5000")
    rate = recorded(Workspace(root), longer, by_stage(longer)["generator"])
    assert rate is not None
    assert rate.images_per_s == pytest.approx(600 * 128 / 40)


def test_mixing_of_several_kinds_gives_the_rate_of_those_that_the_network_makes(root: Path) -> None:
    config = configuration("plan.kinds=[semantic, pixel, real]")
    done(root, config, "generator")
    done(root, config, "mix", generator="digest of generator")
    receipts = [
        ("mixed", 0, 96, 20.0),
        ("mixed", 1, 96, 5.0),
        ("mixed/pixel", 20_000_000, 96, 1.0),
        ("mixed/real", 40_000_000, 40, 1.0),
    ]
    write_receipts(root, *receipts)
    rate = recorded(Workspace(root), config, by_stage(config)["mix"])
    assert rate is not None
    assert rate.images_per_s == pytest.approx(192 / 25.0)


def test_encoders_add_up(root: Path) -> None:
    config = configuration("train.compare=[csm, paper]")  # the teacher, and its first member for the projection
    write_receipts(root, ("encoders/classifier", 0, 50, 1.0), ("encoders/teacher", 0, 50, 4.0))
    (root / "config.yaml").write_text(config.to_yaml())
    rate = recorded(Workspace(root), config, by_stage(config)["fit-annotators"])
    assert rate is not None
    assert rate.images_per_s == pytest.approx(10)
    more = configuration("annotate.annotator=lda-clip", "train.compare=[csm, paper]")
    assert recorded(Workspace(root), more, by_stage(more)["fit-annotators"]) is None, "of clip nothing is known"


def test_trainings_here_before_give_the_rate_of_theirs_that_have_the_network(root: Path) -> None:
    config = configuration()
    for name, network, seconds in (("one", "small-cnn", 10.0), ("two", "resnet18", 1e6)):
        spec = ClassifierSpec(network, config.train.parameters, 1, INFO.class_names, INFO.mean, INFO.std)
        storage.write_json(root / "runs" / name / "model.json", asdict(spec))
        run = {"settings": asdict(Method()), "optimizer": asdict(config.train.optimizer), "seconds": seconds, "devices": 2}
        storage.write_json(root / "runs" / name / "run.json", run)
    (root / "config.yaml").write_text(config.to_yaml())
    rate = recorded(Workspace(root), config, by_stage(config)["train"])
    images = training_images(Method(), config.train.optimizer, INFO.counts)
    assert rate is not None
    assert rate.images_per_s == pytest.approx(images / 20)


def test_without_a_gpu_what_needs_one_is_unknown_and_says_what_to_do(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = configuration("resources.mix.gpus=1")
    rate = measured(Workspace(root), config, by_stage(config)["mix"], False, 1.0)
    assert rate.images_per_s is None
    assert "--rate mix=N" in rate.note


def test_what_cannot_be_loaded_is_unknown(root: Path) -> None:
    config = configuration("generator.path=missing.pkl", "generator.kind=edm")
    rate = measured(Workspace(root), config, by_stage(config)["mix"], False, 1.0)
    assert rate.source == "unknown"
    assert "missing.pkl" in rate.note


def test_a_workspace_on_a_store_is_read_as_a_folder_is(bucket: Path) -> None:
    config = configuration()
    storage.write_json(bucket / "dataset.json", asdict(INFO))
    storage.write_text(
        bucket / "receipts" / "1.jsonl", json.dumps({"part": "encoders/teacher", "shard": 0, "rows": 50, "seconds": 5.0}) + "\n"
    )
    storage.write_text(bucket / "config.yaml", config.to_yaml())
    found = estimate(config, bucket, rates={name: rate for name, rate in RATES.items() if name != "fit-annotators"}, seconds=0)
    rows = {row["stage"]: row for row in found["stages"]}
    assert rows["fit-annotators"]["source"] == "recorded"
    assert rows["fit-annotators"]["images_per_s"] == pytest.approx(10)


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
