"""Pools that take every CPU of a cluster that loses nodes: they go on with what is left, wait, or stop."""

import signal
import sys
import threading
import time

import pytest
import ray
from ray import cloudpickle

from cluster import standing
from cluster.attempts import start_attempts
from cluster.pools import ShardWorker, Step, make_receipt, run_steps
from cluster.resources import Pool
from cluster.session import session
from cluster.shards import Written
from tests.nodes import STORE, lose_with_workers, start_head

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # nodes come and go

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file


class Slow(ShardWorker):
    """Takes ``seconds`` for a shard, and begins only once workers of this step are at work on ``nodes`` nodes, by files in ``begun``."""

    def __init__(self, threads, watch, seconds, begun=None, nodes=0):
        super().__init__(threads, watch)
        self.seconds, self.begun, self.nodes = seconds, begun, nodes

    def work(self, shard):
        if self.begun:
            (self.begun / ray.get_runtime_context().get_node_id()).touch()
            wait_until(lambda: len(list(self.begun.iterdir())) >= self.nodes)
        time.sleep(self.seconds)
        return [make_receipt(self._watch.step, shard, 1, Written("", 0), "", self.seconds)]


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs for work; each test adds its nodes."""
    made = start_head()
    yield made
    made.shutdown()


@pytest.fixture
def add(cluster):
    """``add()``: a new node of one CPU, perhaps with GPUs that are not there; it stays until the test ends or loses it."""
    added = []

    def one(gpus=0):
        added.append(cluster.add_node(num_cpus=1, num_gpus=gpus, **STORE))
        cluster.wait_for_nodes()
        return added[-1]

    yield one
    for node in set(added) & set(cluster.list_all_nodes()):
        cluster.remove_node(node, allow_graceful=False)


@pytest.fixture
def joined(cluster):
    with session(cluster.address):
        yield cluster


@pytest.fixture
def lose(joined, processes):
    """``lose(node)``, with its workers."""
    return lambda node: lose_with_workers(joined, node, processes)


def test_attempts_are_known_on_the_node_of_the_driver(joined, add):
    """Those of another node would be lost with it, and the run too."""
    add(), add()
    started = [start_attempts() for _ in range(6)]
    ray.get([attempts.standing.remote(set()) for attempts in started])
    where = {ray.get(attempts.__ray_call__.remote(lambda actor: ray.get_runtime_context().get_node_id())) for attempts in started}
    assert where == {joined.head_node.node_id}


def test_pools_with_gpus_get_their_shares_of_them(joined, add, tmp_path):
    add(gpus=1)

    class Told(ShardWorker):
        def work(self, shard):
            (tmp_path / f"{self._watch.step}-{shard}").write_text(str(ray.get_runtime_context().get_accelerator_ids()["GPU"]))
            return [make_receipt(self._watch.step, shard, 1, Written("", 0), "", 0.0)]

    receipts = []
    steps = [
        Step("mix", Told, {}, Pool(cpus=0.3, gpus=0.5), calls=2),
        Step("annotate", Told, {}, Pool(max_actors=1, cpus=0.3, gpus=0.25)),
    ]
    run_steps(steps, range(9), receipts.append)
    assert sorted((r.part, r.shard) for r in receipts) == sorted((name, n) for name in ("mix", "annotate") for n in range(9))
    assert {path.read_text() for path in tmp_path.iterdir()} == {"['0']"}


def test_a_pool_of_fixed_size_that_takes_every_cpu_goes_on_after_a_loss(add, lose, tmp_path):
    lost, _ = add(), add()
    receipts, standings = [], []
    steps = [
        Step("mix", Slow, {"seconds": 1.5, "begun": tmp_path, "nodes": 2}, Pool(min_actors=3, max_actors=3, cpus=0.5), calls=2),
        Step("annotate", Slow, {"seconds": 0.05}, Pool(max_actors=1, cpus=0.5)),
    ]
    work = threading.Thread(target=run_steps, args=(steps, range(20), receipts.append, standings.append), daemon=True)
    work.start()
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    lose(lost)  # in the middle of its shards
    wait_until(lambda: not work.is_alive())
    assert sorted((r.part, r.shard) for r in receipts) == sorted((p, s) for p in ("mix", "annotate") for s in range(20))
    assert 1 <= standings[-1].lost <= 3
    assert 0 < standings[-1].seconds < 60
    assert standings[-1].wanting == ""


WANTING = "the 1 node(s) left, with 0 CPU and 0 GPU, have no room for mix (1 CPU, 0 GPU)"


def test_pools_without_a_node_say_what_they_wait_for_and_go_on_with_the_next_one(add, lose, monkeypatch):
    monkeypatch.setattr(standing, "TICK_SECONDS", 0.5)
    node, receipts, told = add(), [], []
    step = Step("mix", Slow, {"seconds": 0.3}, Pool())
    work = threading.Thread(target=run_steps, args=([step], range(15), receipts.append, told.append), daemon=True)
    work.start()  # not here: nodes are added from the main thread alone
    wait_until(lambda: len(receipts) >= 3)
    lose(node)
    wait_until(lambda: told[-1].wanting)
    assert told[-1].wanting == WANTING
    assert told[-1].working == 0
    assert len(receipts) < 15
    joins = add()
    wait_until(lambda: not work.is_alive())
    assert sorted(receipt.shard for receipt in receipts) == list(range(15))
    assert {receipt.node for receipt in receipts} == {node.node_id, joins.node_id}
    assert told[-1].wanting == ""


def test_pools_for_which_no_node_comes_back_stop(add, lose, monkeypatch):
    """Also where SIGINT does nothing: it is blocked in what a Ray job starts. The session can be used, and left, after it."""
    monkeypatch.setattr(standing, "TICK_SECONDS", 0.5)
    monkeypatch.setattr(standing, "PATIENCE_SECONDS", 2.0)
    before = signal.getsignal(standing.STOP)  # Ray Tune's, if a sweep was run in this process
    node, receipts, lost = add(), [], []
    step = Step("mix", Slow, {"seconds": 0.3}, Pool())

    def on_receipt(receipt):
        receipts.append(receipt)
        if len(receipts) == 3:
            lose(node)
            lost.append(time.monotonic())

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with pytest.raises(RuntimeError, match="nodes were lost, ") as stopped:
            run_steps([step], range(15), on_receipt)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    assert str(stopped.value) == f"nodes were lost, {WANTING}; add nodes, then run the same command again to go on"
    assert time.monotonic() - lost[0] > 2.0
    assert signal.getsignal(standing.STOP) == before
    add()
    left = sorted(set(range(15)) - {receipt.shard for receipt in receipts})
    run_steps([step], left, on_receipt)
    assert sorted(receipt.shard for receipt in receipts) == list(range(15))


def wait_until(what, seconds=120.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)
