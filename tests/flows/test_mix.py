import json
from types import SimpleNamespace

import pytest

from cluster.shards import Receipt
from csm.errors import InputError
from csm.generators.unet import UNetGenerator, UNetSpec
from flows import mix
from flows.artifacts import StageRecord, Workspace
from flows.config import load_config

RECORD = StageRecord("mix", "f1", {}, 1, {})


def receipt(shard, seconds=1.0, part="mixed", rows=10):
    return Receipt(part, shard, rows, "c", seconds, "n", 99, "key")


class Tracker:
    def __init__(self):
        self.points = []

    def log_steps(self, key, rows):
        assert key == "stage mix f1"
        self.points += rows


@pytest.fixture
def context(tmp_path):
    return SimpleNamespace(workspace=Workspace(tmp_path), tracker=Tracker(), connect=lambda: None, losses={})


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("flows.progress.time.monotonic", lambda: now[0])
    return now


def work(clock, *made):
    """Work that hands on receipts, each some seconds after the one before."""

    def hand_on(on_receipt, on_standing):
        for seconds, one in made:
            clock[0] += seconds
            on_receipt(one)

    return hand_on


def test_guidance_is_a_setting_of_the_images_and_of_no_image_that_was_made_without_it():
    plain, guided = (
        mix.STAGE.settings(load_config("digits", ["generator.label_dropout=0.1", *more])) for more in ([], ["mix.guidance=2"])
    )
    assert "guidance" not in plain["mix"]
    assert mix.STAGE.settings(load_config("digits", ["mix.guidance=1"]))["mix"] == plain["mix"]
    assert guided["mix"] == plain["mix"] | {"guidance": 2.0}
    assert not mix.STAGE.grows(plain, guided)
    assert mix.STAGE.grows(plain, {"mix": plain["mix"] | {"strength": 1.0}})
    assert not mix.STAGE.grows({"mix": plain["mix"] | {"strength": 1.0}}, {"mix": plain["mix"] | {"strength": 2.0}})


@pytest.mark.parametrize(
    ("forced", "made", "refused"), [((), (), True), (("generator",), (), False), (("generator",), ("generator",), True)]
)
def test_a_generator_that_is_about_to_be_replaced_is_not_asked_for_guidance(forced, made, refused, tmp_path, monkeypatch):
    """What the refusal advises, label dropout and another generator, must not meet the same refusal."""
    monkeypatch.setattr(mix, "stale", lambda context, name: None)
    UNetGenerator(UNetSpec((8, 8, 1), 10, 0.5, (8, 16), 1, 0.0)).save(tmp_path / "generator")
    config = load_config("digits", ["generator.label_dropout=0.1", "mix.guidance=2"])
    context = SimpleNamespace(config=config, workspace=Workspace(tmp_path), forced=forced, outcomes=dict.fromkeys(made))
    if not refused:
        mix.STAGE.check(context)
        return
    with pytest.raises(InputError, match=r"mix\.guidance: this generator has no condition of no class"):
        mix.STAGE.check(context)


def test_progress_goes_to_the_terminal_and_to_mlflow_while_it_runs(context, clock, capsys):
    made = work(
        clock,
        (4, receipt(1, 3.0)),
        (0, receipt(1, 9.0, "teacher")),  # follows: neither counted nor paid
        (4, receipt(2, 3.5)),
        (4, receipt(3, 3.5)),
        (8, receipt(4, 5.0)),
    )
    mix.process(context, RECORD, made, {"mixed": "key", "teacher": "key"}, {"mixed"}, "images", total=60, done=20, seconds=7.0)
    assert capsys.readouterr().err.splitlines() == [
        "mix: 50/60  2.5 images/s  17.0 device-s  0:04 left  12 s",
        "mix: 60/60  2.0 images/s  22.0 device-s  20 s",
    ]
    assert context.tracker.points == [
        (50, {"images": 50.0, "images_per_s": 2.5, "device_seconds": 17.0}),
        (60, {"images": 60.0, "images_per_s": 2.0, "device_seconds": 22.0}),
    ]
    kept = [json.loads(line) for line in (context.workspace.root / "receipts.jsonl").read_text().splitlines()]
    assert [(one["part"], one["shard"]) for one in kept] == [
        ("mixed", 1),
        ("teacher", 1),
        ("mixed", 2),
        ("mixed", 3),
        ("mixed", 4),
    ]


def test_annotations_of_every_annotator_count(context, clock, capsys):
    made = work(clock, (1, receipt(1, 0.5, "projection")), (1, receipt(1, 0.5, "teacher")))
    mix.process(
        context, RECORD, made, {"projection": "key", "teacher": "key"}, {"projection", "teacher"}, "annotations", total=20, done=0
    )
    assert capsys.readouterr().err.splitlines() == ["mix: 20/20  10.0 annotations/s  1.0 device-s  2 s"]
