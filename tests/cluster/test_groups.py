"""What a loss cost, by hand; what Ray says of dead actors, in a few words; groups that start again, without Ray."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError

from cluster import groups
from cluster.groups import FAILED, Delay, Pace, Setback, describe_loss, run_groups, workers_now
from cluster.resources import Group
from csm.errors import InputError


def heard(*times: tuple[int, float]) -> Pace:
    pace = Pace()
    for step, now in times:
        assert pace.hear(step, now) is None
    return pace


def test_epochs_that_are_trained_again_are_lost():
    pace = heard((1, 10.0), (2, 20.0), (3, 31.0), (4, 40.0))
    pace.interrupt()
    # From the state after epoch 2: epochs 3 and 4 took from 20 to 40, and 3 comes at 75 instead of 31.
    assert pace.hear(3, 75.0) == Delay(step=2, repeated=20.0, late=44.0)
    assert pace.hear(4, 85.0) is None
    assert pace.hear(5, 95.0) is None
    pace.interrupt()
    assert pace.hear(5, 120.0) == Delay(4, pytest.approx(95.0 - 40.0), pytest.approx(25.0))


def test_a_state_of_the_last_epoch_loses_only_the_time_in_between():
    pace = heard((1, 10.0), (2, 20.0))
    pace.interrupt()
    assert pace.hear(3, 50.0) == Delay(2, 0.0, 20.0)  # it was due at 30


@pytest.mark.parametrize("first", [1, 13])
def test_what_is_first_heard_after_a_loss_or_in_another_command_lost_nothing(first):
    pace = Pace()
    pace.interrupt()
    assert pace.hear(first, 99.0) is None
    pace.interrupt()
    assert pace.hear(first, 120.0) == Delay(first - 1, 0.0, 21.0)


NODE = "The actor died unexpectedly before finishing this task.\n\tpid: 7\n\tip: 10.77.0.2\nThe actor died because its node has died."
PROCESS = "The actor died unexpectedly before finishing this task.\n\tpid: 7\n\tip: 10.77.0.3\nThe actor is dead because its worker died."


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([NODE], "a worker on 10.77.0.2 lost with the node"),
        ([NODE, NODE], "2 workers on 10.77.0.2 lost with the node"),
        ([PROCESS], "a worker on 10.77.0.3 lost (killed, or out of memory)"),
        ([NODE, PROCESS], "2 workers on 10.77.0.2, 10.77.0.3 lost with the node"),
        (["The actor died."], "a worker lost (killed, or out of memory)"),
    ],
)
def test_losses_are_described_in_a_few_words(messages, words):
    assert describe_loss(messages) == words


@pytest.mark.parametrize(
    ("group", "cpus", "again", "workers"),
    [
        (Group(workers=4), 4.0, False, 4),
        (Group(workers=4), 2.0, True, 2),
        (Group(workers=1), 4.0, True, 1),
        (Group(), 4.0, True, 3),  # as many as there is work
    ],
)
def test_a_group_that_starts_again_takes_what_is_left(monkeypatch, group, cpus, again, workers):
    monkeypatch.setattr(groups, "share", lambda: {"CPU": cpus})
    assert workers_now(group, 3 if group.workers == 0 else 9, again) == workers


def test_a_group_that_does_not_fit_at_first_is_refused(monkeypatch):
    monkeypatch.setattr(groups, "share", lambda: {"CPU": 2.0})
    with pytest.raises(InputError, match=r"resources\.train: 4 workers .* do not fit the cluster's 2 CPU"):
        workers_now(Group(workers=4), 9, again=False)


class Scripted:
    """In place of Ray: each try of a group does the next thing of ``script``: events to put, then an error to end with or None."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, script: list[tuple[list[str], BaseException | None]]) -> None:
        self.script, self.sizes = script, list[int]()
        items, changed = [], threading.Condition()

        class Queue:
            def __init__(self, actor_options):
                pass

            def put(self, item):
                with changed:
                    items.append(item)
                    changed.notify()

            def get(self, timeout):
                with changed:
                    if not changed.wait_for(lambda: items, timeout):
                        raise groups.Empty
                    return items.pop(0)

            def shutdown(self, force):
                pass

        def trainer(work, train_loop_config, scaling_config, run_config):
            self.sizes.append(scaling_config.num_workers)

            def fit():
                events, error = self.script.pop(0)
                for event in events:
                    train_loop_config["events"].put(event)
                if error is not None:
                    raise error

            return SimpleNamespace(fit=fit)

        monkeypatch.setattr(groups, "Queue", Queue)
        monkeypatch.setattr(groups, "TorchTrainer", trainer)
        monkeypatch.setattr(groups.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "0" * 56))

    def run(self, sizes: list[int | InputError], tmp_path: Path) -> tuple[list[str], list[Setback]]:
        """``sizes``: what ``prepare`` gives or raises, one after the other, the last one for ever."""
        told: list[str] = []
        setbacks: list[Setback] = []

        def prepare(number, again):
            size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
            if isinstance(size, InputError):
                raise size
            return size, {}

        def on_event(item):
            new = item not in told
            told.append(item)
            return new

        run_groups(print, 1, prepare, Group(), tmp_path, "test", on_event, lambda number, setback: setbacks.append(setback))
        return told, setbacks


def died() -> WorkerGroupError:
    return WorkerGroupError("", {0: ActorDiedError()})


def test_as_many_losses_as_there_is_something_new_between_are_borne(monkeypatch, tmp_path):
    ray = Scripted(monkeypatch, [*(([f"{number}"], died()) for number in range(9)), (["end"], None)])
    told, setbacks = ray.run([4, 2], tmp_path)
    assert told == [*"012345678", "end"]
    assert setbacks == [Setback("a worker lost (killed, or out of memory)", 1)] * 9
    assert ray.sizes == [4, *[2] * 9]


def test_the_fourth_loss_without_anything_new_ends_it(monkeypatch, tmp_path):
    ray = Scripted(monkeypatch, [(["1"], died()) for _ in range(4)] + [([], None)])
    with pytest.raises(WorkerGroupError):
        ray.run([2], tmp_path)
    assert len(ray.script) == 1


def test_waiting_for_room_is_no_try_and_another_error_is_not_tried_again(monkeypatch, tmp_path):
    late = type("WorkerGroupStartupTimeoutError", (Exception,), {})
    ray = Scripted(
        monkeypatch, [([], ControllerError(late())) for _ in range(6)] + [([], ControllerError(ValueError("storage")))]
    )
    with pytest.raises(ControllerError, match="storage"):
        ray.run([2], tmp_path)
    assert ray.script == []


def test_nodes_are_waited_for_and_said_once(monkeypatch, tmp_path):
    ray = Scripted(monkeypatch, [(["1"], died()), (["2"], None)])
    told, setbacks = ray.run([2, InputError("no room"), InputError("no room"), 1], tmp_path)
    assert told == ["1", "2"]
    assert [setback.reason for setback in setbacks[1:]] == ["waiting for nodes (no room)"]
    assert ray.sizes == [2, 1]
    monkeypatch.setattr(groups, "WAIT_SECONDS", 0.0)
    ray = Scripted(monkeypatch, [(["1"], died())])
    with pytest.raises(InputError, match="no room"):
        ray.run([2, InputError("no room")], tmp_path)


def test_a_worker_that_raises_is_tried_again_and_said_so(monkeypatch, tmp_path):
    ray = Scripted(monkeypatch, [([], WorkerGroupError("", {0: OSError("full")})), (["1"], None)])
    assert ray.run([2], tmp_path) == (["1"], [Setback(FAILED)])


def test_a_controller_that_is_lost_is_started_again(monkeypatch, tmp_path):
    ray = Scripted(monkeypatch, [(["1"], ActorDiedError()), (["2"], None)])
    assert ray.run([2], tmp_path) == (["1", "2"], [Setback("the controller lost (killed, or out of memory)")])


def test_a_group_with_nothing_left_to_do_does_not_start_again(monkeypatch, tmp_path):
    ray = Scripted(monkeypatch, [(["all"], died())])
    assert ray.run([2, 0], tmp_path)[0] == ["all"]
    assert ray.sizes == [2]
