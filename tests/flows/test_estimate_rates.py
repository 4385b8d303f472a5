"""How fast a workspace says that a stage is, by what was done there before."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from csm import storage
from csm.classifiers import ClassifierSpec
from csm.errors import InputError
from csm.methods import Method
from flows.artifacts import StageRecord, Workspace
from flows.config import Config, load_config, plain
from flows.estimate import estimate
from flows.estimate_loads import training_images
from flows.estimate_rates import measured, recorded
from flows.run import STAGES
from tests.flows.estimating import INFO, RATES, by_stage, configuration, prepared


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A workspace in which only `prepare` was run."""
    return prepared(tmp_path)


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
