"""Runs of several users: who waits for whom, and what becomes of the shards of one that has to."""

import sys
import threading

import pytest
import ray
from ray import cloudpickle

from cluster import sharing
from cluster.pools import ShardWorker, Step, make_receipt, run_steps
from cluster.resources import Pool
from cluster.shards import Written
from cluster.sharing import LOST_SECONDS, Runs, ahead, present

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file


@pytest.fixture
def runs():
    """A registry whose seconds pass as the test says."""
    now = [0.0]
    return Runs(lambda: now[0]), now


def test_a_higher_priority_goes_first_and_equal_ones_together(runs):
    registry, _ = runs
    assert registry.report("a", 0) is None
    assert registry.report("b", 0) is None
    assert registry.report("c", 2) is None
    assert registry.report("d", 1) == 2
    assert registry.report("a", 0) == 2
    registry.leave("c")
    assert registry.report("a", 0) == 1
    registry.leave("d")
    assert registry.report("a", 0) is None
    registry.leave("never there")


def test_a_run_that_is_not_heard_of_is_gone(runs):
    registry, now = runs
    registry.report("dead", 5)
    now[0] = LOST_SECONDS
    assert registry.report("a", -1) == 5
    now[0] = LOST_SECONDS + 0.1
    assert registry.report("a", -1) is None


class Quick(ShardWorker):
    def work(self, shard):
        return [make_receipt("made", shard, 1, Written("", 0), "", 0.0)]


@pytest.mark.ray
def test_a_run_hears_of_one_that_goes_first_until_that_ends(ray_session, monkeypatch):
    monkeypatch.setattr(sharing, "BEAT_SECONDS", 0.1)
    with present(0):
        registry = ray.get_actor(sharing.NAME, sharing.NAMESPACE)
        assert ahead() is None
        ray.get(registry.report.remote("other", 3))
        assert wait_until(lambda: ahead() == 3)
        ray.get(registry.leave.remote("other"))
        assert wait_until(lambda: ahead() is None)
        ray.get(registry.report.remote("other", -1))
    assert ahead() is None
    assert ray.get(registry.report.remote("other", -1)) is None  # it has left
    ray.get(registry.leave.remote("other"))


@pytest.mark.slow
@pytest.mark.ray
def test_pools_give_way_and_go_on_where_they_were(ray_session, monkeypatch):
    monkeypatch.setattr(sharing, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr("cluster.standing.TICK_SECONDS", 0.1)
    receipts, free, waits = [], [], []

    def on_receipt(receipt):
        receipts.append(receipt)
        if len(receipts) == 3:
            monkeypatch.setattr(sharing, "_ahead", [2])

    def on_standing(standing):
        if standing.wanting:
            waits.append(standing)
            free.append(ray.available_resources().get("CPU", 0.0))
            if free[-1] == 2.0:
                sharing._ahead[-1] = None

    run_steps([Step("mix", Quick, {}, Pool(cpus=0.5))], range(20), on_receipt, on_standing)
    assert sorted(receipt.shard for receipt in receipts) == list(range(20))
    assert {standing.wanting for standing in waits} == {"a run of priority 2 goes first"}
    assert free[-1] == 2.0  # its workers had given back what they took
    assert waits[-1].lost == 0


def wait_until(what, seconds=20.0):
    done = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if what():
            return True
        done.wait(0.05)
    return False
