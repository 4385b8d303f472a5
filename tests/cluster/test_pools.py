"""Pools whose workers die, are slow, or wait: on a real Ray, with work that takes no time."""

import os
import sys
import threading
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle
from ray.exceptions import ActorDiedError

from cluster.attempts import PoisonError
from cluster.pools import IN_FLIGHT, ShardWorker, Step, block_lengths, make_receipt, run_steps
from cluster.resources import Pool
from cluster.shards import Written
from csm.errors import InputError

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
ONE = Pool(max_actors=1, cpus=0.5)


class Deadly(ShardWorker):
    """Leaves a file for every attempt; its process dies in the ``fatal`` shards, once each in the ``frail`` ones."""

    def __init__(self, threads, watch, folder, fatal=(), frail=(), seconds=0.0):
        super().__init__(threads, watch)
        self.folder, self.fatal, self.frail, self.seconds = folder, fatal, frail, seconds

    def work(self, shard):
        tries = sum(name.startswith(f"{shard}-") for name in os.listdir(self.folder))
        (self.folder / f"{shard}-{tries}").touch()
        time.sleep(self.seconds)
        if shard in self.fatal or (shard in self.frail and tries == 0):
            os._exit(1)
        return [make_receipt("made", shard, 1, Written("", 0), "", 0.0)]


class Follower(ShardWorker):
    def work(self, shard):
        return [make_receipt("followed", shard, 1, Written("", 0), "", 0.0)]


def attempts_in(folder):
    """Shard -> how often it was begun."""
    return Counter(int(path.name.split("-")[0]) for path in folder.iterdir())


@pytest.mark.ray
def test_a_shard_on_which_workers_die_is_set_aside_and_the_rest_is_finished(ray_session, tmp_path):
    receipts, standings = [], []
    deadly = Step("mix", Deadly, {"folder": tmp_path, "fatal": (3,), "frail": (1,)}, ONE, calls=2)
    with pytest.raises(PoisonError, match=r"1 shard\(s\) set aside, all others are finished: 3 workers died") as caught:
        run_steps([deadly, Step("annotate", Follower, {}, ONE)], range(8), receipts.append, standings.append)
    assert [(poison.step, poison.shard, len(poison.hosts)) for poison in caught.value.poisons] == [("mix", 3, 3)]
    healthy = set(range(8)) - {3}
    assert sorted((r.part, r.shard) for r in receipts) == sorted((p, s) for p in ("made", "followed") for s in healthy)
    begun = attempts_in(tmp_path)
    assert begun[3] == 3
    assert begun[1] == 2  # once more, alone
    # What was beside a shard when its process died was tried again and not blamed; what was finished was not made again.
    assert all(begun[shard] <= 2 for shard in healthy)
    assert standings[-1].lost == 4
    assert standings[-1].working == 0


@pytest.mark.ray
@pytest.mark.parametrize("lost", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_workers_that_fail_while_they_start_are_replaced_but_not_for_ever(ray_session, tmp_path, lost):
    class Fragile(ShardWorker):
        def __init__(self, threads, watch, folder):
            starts = len(list(folder.iterdir()))
            (folder / str(starts)).touch()
            if starts < lost:
                raise OSError("the file system is away")
            super().__init__(threads, watch)

        def work(self, shard):
            return [make_receipt("made", shard, 1, Written("", 0), "", 0.0)]

    receipts = []
    steps = [Step("mix", Fragile, {"folder": tmp_path}, ONE)]
    if lost == 2:
        run_steps(steps, range(4), receipts.append)
    else:
        with pytest.raises(ActorDiedError, match="the file system is away"):
            run_steps(steps, range(4), receipts.append)
    assert sorted(receipt.shard for receipt in receipts) == (list(range(4)) if lost == 2 else [])
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.ray
def test_an_error_is_no_death(ray_session, tmp_path):
    class Refusing(ShardWorker):
        def work(self, shard):
            raise InputError(f"shard {shard} cannot be used")

    with pytest.raises(InputError, match="shard 4 cannot be used"):
        run_steps([Step("mix", Refusing, {}, ONE)], [4], pytest.fail)


@pytest.mark.ray
def test_a_slow_shard_is_told_while_it_runs(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.standing.TICK_SECONDS", 0.1)
    standings = []

    class Slow(ShardWorker):
        def work(self, shard):
            time.sleep(3.0 if shard == 2 else 0.02)
            return []

    run_steps([Step("mix", Slow, {}, ONE)], range(4), pytest.fail, standings.append)
    lags = [standing.slowest for standing in standings if standing.slowest]
    assert {(lag.step, lag.shard) for lag in lags} == {("mix", 2)}
    assert 1.0 < max(lag.seconds for lag in lags) < 10
    assert standings[-1].slowest is None
    assert not [thread.name for thread in threading.enumerate() if "usage" in thread.name]  # one would call Ray after its end


@given(st.integers(1, 200_000), st.integers(1, 200))
def test_blocks_hold_all_shards_and_shrink_to_one(shards, actors):
    lengths = block_lengths(shards, actors)
    assert sum(lengths) == shards
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 1
    assert lengths[0] <= -(-shards // 256)


@pytest.mark.parametrize(("shards", "actors"), [(100_000, 1), (100_000, 16), (1_000_000, 100)])
def test_blocks_are_few(shards, actors):
    assert len(block_lengths(shards, actors)) < max(600, 120 * actors)


@pytest.mark.parametrize("actors", [2, 3, 8, 50])
@pytest.mark.parametrize("shards", [200, 3000, 50_000])
def test_one_slow_actor_does_not_hold_the_others(shards, actors):
    """Simulated: whoever has fewest blocks takes the next one, up to two; one is five times slower."""
    seconds = [5.0] + [1.0] * (actors - 1)
    taken: list[list[float]] = [[] for _ in range(actors)]  # when each block that an actor took will be done
    now = 0.0
    for length in block_lengths(shards, actors):
        while all(len(ends) == IN_FLIGHT for ends in taken):
            now = min(ends[0] for ends in taken)
            for ends in taken:
                ends[:] = [end for end in ends if end > now]
        actor = min(range(actors), key=lambda number: len(taken[number]))
        begin = taken[actor][-1] if taken[actor] else now
        taken[actor].append(begin + length * seconds[actor])
    ideal = shards / (actors - 1 + 1 / 5)
    assert max(end for ends in taken for end in ends) <= 1.1 * ideal + 2 * 5.0  # it may have taken two of the last ones
