"""Workers' hosts that are switched off in the middle of the work, one that is slow, and a shard that kills its workers."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from csm import storage
from tests.hosts.machines import CODE, CTL, Running
from tests.hosts.small_run import SmallRun, hosts_of, read_receipts, result, usual_seconds, wait_for

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900, func_only=True)]

SHARDS = 40
# One worker on each host; a training long enough to have a state, which is kept after ten seconds.
ONE_EACH = "--set resources.train.cpus=1.5 --set resources.train.workers=0"
LONG = "--set train.optimizer.epochs=100"


def stage_of(running: Running, name: str) -> dict[str, Any]:
    """What the command printed of a stage, after its good end."""
    assert running.wait(600) == 0, running.err.read_text()[-4000:]
    return result(running.out.read_text())["stages"][name]


def line_with(running: Running, words: str) -> str:
    """The first line of progress that has these words, "" if none has."""
    return next((line for line in running.err.read_text().splitlines() if words in line), "")


def test_a_host_is_lost_during_mixing(run, whole, cluster, hosts, tell):
    running = run.begin("mix")
    run.wait_for_mixed(6, running)
    known = hosts_of(cluster, run.mixed())
    hosts.kill(cluster.workers[0])
    told = stage_of(running, "mix")
    run.check(whole.workspace)
    made = run.mixed()
    assert sorted(receipt["shard"] for receipt in made) == list(range(SHARDS))
    assert told["workers_lost"] >= 1
    assert line_with(running, "of work repeated").startswith("mix: ")
    happened = (
        f"mixing ended: no shard twice, each image as without the loss ({known[cluster.workers[0]]} shards of that host stayed)"
    )
    late = told["seconds"] - usual_seconds(whole)
    measured = (
        f"mixing of {SHARDS} shards took {told['seconds']:.0f} s instead of {usual_seconds(whole):.0f} s, with half of the workers "
        f"for most of it; {told['seconds_lost']:.0f} s of work repeated"
    )
    tell("a worker's host lost during mixing", happened, late, measured)


def test_a_host_is_lost_during_annotation(run, cluster, hosts, tell):
    # More shards, which cost little to make and a tenth of a second to label: eight classifiers look at nine views of each image.
    many = "--set plan.sets_per_pair=100 --set mix.sampler.steps=2 --set annotate.annotator=teacher --set annotate.members=8"
    many += " --set annotate.encoders.teacher.parameters.views=9 --set annotate.teacher.optimizer.epochs=1"
    both = "--set resources.annotate.cpus=1.5 --set resources.annotate.min_actors=2 --set resources.annotate.max_actors=2"
    run.finish("plan", many)
    run.finish("mix", many)

    def labelled() -> list[dict[str, Any]]:
        return [receipt for receipt in read_receipts(run.workspace) if receipt["part"] == "teacher"]

    running = run.begin("annotate", many, both)
    wait_for(lambda: len(labelled()) > 20, running)
    before = len(labelled())
    hosts.kill(cluster.workers[0])
    told = stage_of(running, "annotate")
    run.check(steps=2)
    assert before < 70
    assert sorted(receipt["shard"] for receipt in labelled()) == list(range(100))
    happened = f"annotation ended: each of 100 shards labelled once ({before} of them before the loss)"
    lost = told.get("seconds_lost", 0.0)
    tell(
        "a worker's host lost during annotation",
        happened,
        lost,
        f"seconds of work repeated; annotation took {told['seconds']:.0f} s",
    )


def history_of(run: SmallRun, name: str) -> list[int]:
    return [row["epoch"] for row in storage.read_json(run.workspace / "runs" / name / "history.json")]


def test_a_host_is_lost_during_a_training_of_two_workers(whole, run, cluster, hosts, tell):
    """Each batch is shared by a worker on either host. There is no room for both on one, so the host is switched on again."""
    together = f"{ONE_EACH} --set train.workers=2 --set train.compare=[cross-entropy] --set train.optimizer.epochs=60"
    state = run.workspace / "runs" / "cross-entropy-seed0" / "state.pt"
    running = run.begin("train", together)
    wait_for(state.is_file, running)
    lost = cluster.workers[0]
    hosts.kill(lost)
    killed = time.monotonic()
    wait_for(lambda: line_with(running, "waiting for nodes"), running)
    noticed = time.monotonic() - killed
    hosts.start(lost)
    hosts.run(CTL, f"cd {CODE} && ray up -y --no-restart --no-config-cache {cluster.file}", 120)  # the head goes on
    back = time.monotonic() - killed
    told = stage_of(running, "train")
    assert history_of(run, "cross-entropy-seed0") == list(range(1, 61))
    assert storage.read_json(run.workspace / "runs" / "cross-entropy-seed0" / "run.json")["devices"] == 2
    line = line_with(running, "goes on from epoch ")
    assert int(line.partition("from epoch ")[2].partition(",")[0]) > 0
    assert told["workers_lost"] >= 1
    happened = f"it waited for the host and went on: {line.partition(': ')[2]}"
    measured = f"until the next new epoch; the loss was noticed after {noticed:.0f} s, the host was back after {back:.0f} s"
    tell("a worker's host lost during a training of two workers", happened, lateness(line), measured)


def lateness(line: str) -> float:
    """The seconds that a line of ``flows.losses.tell_delay`` tells."""
    return float(line.rpartition("repeated, ")[2].partition(" s later")[0])


def test_a_host_is_lost_while_classifiers_are_trained(whole, run, cluster, hosts, tell):
    """Two classifiers, each by a worker on its own host: both go on from their states, one after the other on the host that is left."""
    apart = f"{ONE_EACH} --set train.seeds=2 --set train.compare=[cross-entropy] {LONG}"
    folders = [run.workspace / "runs" / f"cross-entropy-seed{seed}" for seed in range(2)]
    running = run.begin("train", apart)
    wait_for(lambda: all((folder / "state.pt").is_file() for folder in folders), running)
    hosts.kill(cluster.workers[0])
    told = stage_of(running, "train")
    for folder in folders:
        assert history_of(run, folder.name) == list(range(1, 101))
    lines = [line for line in running.err.read_text().splitlines() if "goes on from epoch " in line]
    assert len(lines) == 2
    assert all(int(line.partition("from epoch ")[2].partition(",")[0]) > 0 for line in lines)
    late = min(map(lateness, lines))
    happened = f"both of 2 classifiers went on from their states; {told['seconds_lost']:.0f} s of work repeated"
    tell("a worker's host lost while classifiers are trained", happened, late, "until the first one went on, on the other host")


def test_a_host_is_lost_during_a_sweep(run, cluster, hosts, tell):
    # Only what needs no teacher, and no mixed pair for each class.
    space = " ".join(f"--set tune.space.method.mixed.{key}=null" for key in ("annotator", "schedule", "per_real"))
    sweep = f"{ONE_EACH} --set train.optimizer.epochs=60 {space} --set tune.trials=3 --set mix.sampler.steps=2"
    running = run.begin("tune", sweep)
    wait_for(lambda: len(list(run.workspace.glob("tune/trials/*/seed0/state.pt"))) == 2, running)
    hosts.kill(cluster.workers[0])
    assert running.wait(600) == 0, running.err.read_text()[-4000:]
    told = result(running.out.read_text())
    assert (told["trials"], told["failed"]) == (3, 0)
    assert told["workers_lost"] >= 1
    for number in range(3):
        folder = run.workspace / "tune" / "trials" / f"{number:04d}"
        assert storage.read_json(folder / "trial.json")["status"] == "done"
        assert [row["epoch"] for row in storage.read_json(folder / "seed0" / "history.json")] == list(range(1, 61))
    line = line_with(running, "goes on from epoch ")
    assert int(line.partition("from epoch ")[2].partition(",")[0]) > 0
    tell("a worker's host lost during a sweep", f"no trial lost: {line.partition(': ')[2]}", lateness(line), "of that trial")


@contextmanager
def slowed(run: SmallRun, name: str) -> Iterator[None]:
    """The mixing workers of a host get a fifth of the time: stopped for 0.8 of each second."""
    loop = "while sleep 0.2; do pkill -STOP -f [M]ixShards; sleep 0.8; pkill -CONT -f [M]ixShards; done"
    slowing = run.hosts.begin(name, loop)
    try:
        yield
    finally:
        slowing.kill()
        run.hosts.run(name, "pkill -CONT -f [M]ixShards", check=False)


def test_a_worker_that_is_five_times_slower_does_not_hold_the_others(run, whole, cluster, hosts, tell):
    slow, quick = cluster.workers
    with slowed(run, slow):
        running = run.begin("mix")
        told = stage_of(running, "mix")
    run.check(whole.workspace)
    made = hosts_of(cluster, run.mixed())
    assert made[quick] > 2 * made[slow] > 0
    assert line_with(running, f"on {slow}, "), running.err.read_text()[-2000:]  # "slowest: shard 17 on h2, 43 s"
    usual = usual_seconds(whole)
    # Half of the shards at a fifth of the pace would take five times as long; both together have 1.2 / 2 of the pace.
    assert told["seconds"] < 3.5 * usual
    happened = f"it made {made[slow]} of {SHARDS} shards, the other one {made[quick]}; the progress names it"
    measured = (
        f"mixing took {told['seconds']:.0f} s instead of {usual:.0f} s; 1.7 times as long is the least, 5 times halves would take"
    )
    tell("a worker five times slower", happened, told["seconds"] - usual, measured)


POISON = """
_start = start_mixing


def start_mixing(rows, *arguments, **more):
    import os, signal
    if int(rows["shard"][0]) == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    return _start(rows, *arguments, **more)
"""


@contextmanager
def poisoned(run: SmallRun) -> Iterator[None]:
    """Worker processes die when they mix shard 17: csm as it is installed on the hosts, which is their own, kills them."""
    where = 'python -c "import csm.mixing; print(csm.mixing.__file__)"'
    files = {name: run.hosts.run(name, where).stdout.strip() for name in run.cluster.workers}
    (run.hosts.shared / "poison").write_text(POISON)
    try:
        for name, file in files.items():
            run.hosts.run(name, f"cp {file} {file}.good && cat {run.hosts.shared}/poison >> {file}")
        yield
    finally:
        for name, file in files.items():
            run.hosts.run(name, f"mv {file}.good {file}")


def test_a_shard_that_kills_its_workers_is_set_aside(run, whole, cluster, hosts, tell):
    with poisoned(run):
        running = run.begin("mix")
        code = running.wait(600)
    lines = running.err.read_text().splitlines()
    assert code == 1, lines[-5:]
    assert "shard 17" in lines[-1]
    assert sorted(receipt["shard"] for receipt in run.mixed()) == [shard for shard in range(SHARDS) if shard != 17]
    kept = run.parts()
    assert len(kept) == SHARDS - 1
    again = run.finish("mix")["stages"]["mix"]
    assert {name: run.parts()[name] for name in kept} == kept
    run.check(whole.workspace)
    seconds = json.loads((run.workspace / "stages" / "mix.json").read_text())["seconds"]
    late = seconds - again["seconds"] - usual_seconds(whole)
    happened = f"set aside after three tries and named, the other {SHARDS - 1} finished, exit 1; the same command made it later"
    tell("a shard that kills its workers", happened, late, "of mixing the other ones, beside the time without it")
