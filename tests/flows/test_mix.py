import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from cluster.attempts import Lag, Standing
from cluster.shards import Receipt
from flows import mix
from flows.artifacts import StageRecord, Workspace
from flows.stages import Losses

RECORD = StageRecord("mix", "f1", {}, 1, {})


def receipt(shard, seconds=1.0, part="mixed", rows=10):
    return Receipt(part, shard, rows, "c", seconds, "n")


def write(path, *receipts):
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in receipts))


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


def test_progress_goes_to_the_terminal_and_to_mlflow_while_it_runs(context, clock, capsys):
    made = work(
        clock,
        (4, receipt(1, 3.0)),
        (0, receipt(1, 9.0, "teacher")),  # follows: neither counted nor paid
        (4, receipt(2, 3.5)),
        (4, receipt(3, 3.5)),
        (8, receipt(4, 5.0)),
    )
    mix.process(context, RECORD, made, {"mixed"}, "images", total=60, done=20, seconds=7.0)
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
    mix.process(context, RECORD, made, {"projection", "teacher"}, "annotations", total=20, done=0)
    assert capsys.readouterr().err.splitlines() == ["mix: 20/20  10.0 annotations/s  1.0 device-s  2 s"]


def test_spent_is_the_last_receipt_of_each_shard(tmp_path):
    log = tmp_path / "receipts.jsonl"
    assert mix.spent(log, "mixed", {1}) == 0
    write(log, receipt(1, 5.0), receipt(1, 2.0), receipt(2, 3.0), receipt(3, 100.0), receipt(2, 50.0, "teacher"))
    assert mix.spent(log, "mixed", {1, 2, 7}) == 5.0


def test_half_a_line_is_cut_off_and_the_next_one_is_whole(context, clock):
    log = context.workspace.root / "receipts.jsonl"
    write(log, receipt(1, 2.0))
    log.write_text(log.read_text() + '{"part": "mixed", "sha')
    assert mix.spent(log, "mixed", {1}) == 2.0
    mix.process(context, RECORD, work(clock, (1, receipt(2, 3.0))), {"mixed"}, "images", 20, 10)
    assert [json.loads(line)["shard"] for line in log.read_text().splitlines()] == [1, 2]


def test_a_log_of_half_a_line_is_emptied(context, clock):
    (context.workspace.root / "receipts.jsonl").write_text('{"part"')
    mix.process(context, RECORD, work(clock, (1, receipt(2, 3.0))), {"mixed"}, "images", 10, 0)
    assert mix.spent(context.workspace.root / "receipts.jsonl", "mixed", {2}) == 3.0


def test_stragglers_and_losses_are_told(context, clock, capsys):
    def lossy(on_receipt, on_standing):
        on_standing(Standing(2, Lag("mix", 17, "h2", 43.2), 1, 30.0))
        clock[0] += 12
        on_receipt(receipt(1))
        on_standing(Standing(2, None, 2, 41.0, "the 1 node(s) left have no room for mix"))
        on_standing(Standing(0, None, 2, 41.0))

    mix.process(context, RECORD, lossy, {"mixed"}, "images", 20, 0)
    assert "  1.0 device-s  slowest: shard 17 on h2, 43 s  12 s" in capsys.readouterr().err
    assert context.losses == {"mix": Losses(2, 41.0)}
    mix.process(context, RECORD, lossy, {"mixed"}, "images", 20, 0)  # a stage may have several parts
    assert context.losses == {"mix": Losses(4, 82.0)}
    assert str(Losses(2, 41.4)) == "2 workers lost, about 41 s of work repeated"
    assert str(Losses(1, 0.2)) == "1 worker lost, about 0 s of work repeated"


def test_what_is_wanting_comes_before_what_is_slow():
    lag = Lag("mix", 17, "h2", 43.2)
    assert mix.trouble(Standing(1, lag, 0, 0.0, "no room for mix")) == "waiting: no room for mix"
    assert mix.trouble(Standing(1, None, 0, 0.0)) == ""
