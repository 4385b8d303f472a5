import pytest

from cluster.attempts import Attempts, Lag, Poison, PoisonError, Worker

A, B = Worker("n1", "h1", 11), Worker("n2", "h2", 22)


class World:
    """Nodes that live, and seconds that pass, as the test says."""

    def __init__(self):
        self.nodes, self.now = {"n1", "n2"}, 0.0
        self.attempts = Attempts(lambda: self.nodes, lambda: self.now)

    def begin(self, shard, worker=A, alone=False):
        return self.attempts.begin("mix", shard, worker, alone)

    def end(self, shard, result=b"result"):
        self.attempts.end("mix", shard, result)

    def standing(self):
        return self.attempts.standing(self.nodes)


@pytest.fixture
def world():
    return World()


def test_what_is_finished_is_not_begun_again(world):
    assert world.begin(1) is True
    world.end(1, b"receipts")
    assert world.begin(1, B) == b"receipts"
    assert world.attempts.begin("annotate", 1, B, False) is True  # another pool's own work


def test_after_a_death_a_shard_is_tried_alone_and_given_up_after_the_third(world):
    world.begin(1)
    assert world.begin(1, B) is False
    assert world.begin(1, B, alone=True) is True
    assert world.begin(1, A) is False
    assert world.begin(1, A, alone=True) is True
    assert world.begin(1, A) == Poison("mix", 1, ("h1", "h2", "h1"))
    assert world.begin(2) is True


def test_the_loss_of_a_node_does_not_count(world):
    for number in range(5):
        world.nodes = {f"n{number}"}
        assert world.begin(1, Worker(f"n{number}", f"h{number}", 1)) is True
        assert world.standing()[:4] == (1, None, number, 0.0)


def test_a_process_that_died_just_before_its_node_does_not_count_either(world):
    world.begin(1)
    assert world.begin(1, B) is False  # the node is not known to be lost yet
    world.nodes = {"n2"}
    assert world.begin(1, B) is True


def test_one_that_was_beside_a_deadly_shard_is_finished_alone(world):
    world.begin(1)
    world.begin(2)
    for _ in range(2):
        assert world.begin(1, B) is False
        assert world.begin(1, B, alone=True) is True
    assert world.begin(2, B) is False
    assert world.begin(2, B, alone=True) is True
    world.end(2)
    assert isinstance(world.begin(1, B), Poison)


def test_time_lost_is_what_the_dead_had_worked(world):
    world.begin(1)
    world.begin(2, B)
    world.now = 30.0
    world.nodes = {"n2"}
    assert world.standing()[2:4] == (1, 30.0)
    world.now = 50.0  # waiting for another worker is no work
    assert world.standing()[2:4] == (1, 30.0)
    assert world.begin(1, B) is True
    world.now = 61.0
    world.begin(1, B)
    assert world.standing()[2:4] == (2, 41.0)


def test_a_worker_thought_lost_may_still_end(world):
    world.begin(1)
    world.nodes = set()
    world.standing()
    world.end(1, b"receipts")
    assert world.begin(1, B) == b"receipts"


def test_the_slowest_is_told_when_it_takes_much_longer_than_usual(world):
    world.begin(1)
    world.now = 100.0
    assert world.standing().slowest is None  # nobody knows what is usual
    world.end(1)
    world.begin(2, B)
    world.begin(3)
    world.now = 350.0
    assert world.standing().slowest is None
    world.end(3)
    world.begin(4)
    world.now = 600.0
    assert world.standing().slowest == Lag("mix", 2, "h2", 500.0)
    assert world.standing().working == 2


def test_the_error_names_some_shards_and_counts_the_rest():
    poisons = [Poison("mix", shard, ("h1", "h2", "h1")) for shard in range(6)]
    assert str(PoisonError(poisons[:1])) == (
        "1 shard(s) set aside, all others are finished: 3 workers died (mix of shard 0, on h1, h2, h1)"
    )
    assert str(PoisonError(poisons)).endswith("mix of shard 3, on h1, h2, h1; and 2 more)")
