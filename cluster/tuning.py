"""Sweeps over trainings on Ray Tune: trials are asked for one by one, raced against each other, and heard of in the driver."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ray
import ray.util.client
from ray import tune
from ray.tune.search import Searcher

from cluster.groups import RETRIES, Pace, describe_loss
from cluster.resources import Group, group_size
from cluster.session import records_in, share
from cluster.tuning_schedulers import build_scheduler
from cluster.tuning_trials import Build, Race, Standing, Work, note_stop, train_trial
from csm.errors import InputError


class TrialEvent(NamedTuple):
    """What the driver hears of a trial: that it started, an epoch of one of its seeds, and how it ended.

    In between its process may be "lost", because of ``error``, and "resumed" from ``epoch``, with what that cost in ``values``: see
    ``cluster.training.RunEvent``.
    """

    trial: int
    kind: Literal["started", "epoch", "lost", "resumed", "done", "stopped", "failed"]
    seed: int
    epoch: int
    values: dict[str, float]
    error: str


def run_trials(
    ask: Callable[[], tuple[int, dict[str, Any]] | None],
    build: Build,
    scheduler: Race,
    group: Group,
    together: int,
    directory: Path,
    name: str,
    on_event: Callable[[TrialEvent], None],
    concurrent: int = 0,
) -> None:
    """Train the trials that ``ask`` gives, several at once, until it gives None.

    A trial trains its specs one after the other with ``csm.runs.fit_run``, in a process that goes on with the next trial; with
    ``together`` above 1, each by a Ray Train group of that many workers. A trial that fails leaves the others alone; one whose process is
    lost goes on from its last state, in another process: as often as there was something new in between, but at most three times
    without. One that was trained before, or in part, is asked again by the caller: it only
    repeats what it has behind it, so ``on_event`` hears all of it again and the scheduler compares with it, and it is not trained twice.

    Args:
        ask: gives a number, never twice the same, and values. Called in the driver when there is room, after ``on_event`` had the ends of
            all earlier trials that ended.
        build: (number, values) -> a ``RunSpec`` for each seed, with absolute paths on storage that every node sees; picklable, as it is
            called in the process of the trial.
        scheduler: who trains on.
        group: what each trial takes or, with ``together`` above 1, each of its workers; ``workers``: all at once, 0 for as many as fit.
        together: workers that train each run.
        directory: where Ray keeps its own records.
        name: of the sweep, for those records.
        on_event: called in the driver: "started", then the epochs of each seed in order, each once (and "lost" and "resumed" between
            them), then one of "done", "stopped" (by the scheduler) and "failed" with a line of error (``cluster.training.BY_USER``
            begins it if the user can mend it).
        concurrent: trials at once at most; 0: as many as fit.

    Raises:
        InputError: a trial does not fit the cluster, or this process is joined to it by ``ray://`` only.
        Exception: what ``ask`` or ``on_event`` raised; trials that run are ended and go on when they are asked again.
    """
    if ray.util.client.ray.is_connected():
        raise InputError(
            "--address ray://: a sweep is driven from a node of the cluster; take HOST:PORT there, or ray job submit"
        )
    room = _room(group, together, concurrent)
    heard = _Hearing(on_event)
    work = Work(build, scheduler, group, together, directory.absolute(), name)
    # Of `together` workers, the trial itself only waits for them; Tune wants it to take something.
    resources = {"memory": 1} if together > 1 else {"cpu": group.cpus, "gpu": group.gpus}
    try:
        tune.run(
            tune.with_resources(tune.with_parameters(train_trial, work=work), resources),
            name=name,
            **records_in(directory),
            num_samples=-1,
            search_alg=_Asking(ask, room),
            scheduler=build_scheduler(scheduler),
            callbacks=[heard],
            max_failures=RETRIES,
            raise_on_failed_trial=False,  # `heard` has told of it
            reuse_actors=together == 1,  # the group of a trial that is stopped ends with its process
            trial_dirname_creator=lambda trial: f"{trial.config['number']:04d}-{trial.trial_id}",
            verbose=0,
        )
    except BaseException:
        heard.end_processes()
        raise
    if heard.open:
        raise RuntimeError(f"{len(heard.open)} trials have no end, among them trial {min(heard.open)}: run again")


def _room(group: Group, together: int, concurrent: int) -> int:
    """Trials that fit at once."""
    if together > 1 and 0 < group.gpus < 1:
        raise InputError(f"resources.train.gpus: expected 0 or at least 1 for each of {together} workers, got {group.gpus:g}")
    least = replace(group, workers=max(group.workers, together) if group.workers else 0)
    room = group_size(least, 10**9, share()) // together
    if room == 0:
        group_size(replace(group, workers=together), together, share())  # says what does not fit
    return min(room, concurrent) if concurrent else room


class _Asking(Searcher):
    """Tune's way of asking for trials."""

    def __init__(self, ask: Callable[[], tuple[int, dict[str, Any]] | None], room: int) -> None:
        super().__init__()
        self.ask, self.room = ask, room
        self.running: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        if len(self.running) >= self.room:
            return None
        asked = self.ask()
        if asked is None:
            return Searcher.FINISHED
        self.running.add(trial_id)
        return {"number": asked[0], "values": asked[1]}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.running.discard(trial_id)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Who asks remembers, not Tune."""

    def save(self, checkpoint_path: str) -> None: ...

    def restore(self, checkpoint_path: str) -> None: ...


class _Hearing(tune.Callback):
    """Turns Tune's results into events, and gives them to ``on_event`` at the end of a step, where Tune lets its errors through."""

    def __init__(self, on_event: Callable[[TrialEvent], None]) -> None:
        self.on_event = on_event
        self.waiting: list[TrialEvent] = []
        self.open: set[int] = set()  # numbers of trials that have started and not ended
        self.paces: dict[int, dict[int, Pace]] = defaultdict(
            lambda: defaultdict(Pace)
        )  # number -> seed -> epochs that were heard
        self.known: dict[int, int] = {}  # number -> epochs that were heard before it was last lost
        self.stops: dict[int, Standing] = {}  # number -> where it stood when the scheduler ended it
        self.trials: Sequence[Any] = ()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.trials = trials

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        while self.waiting:
            event = self.waiting.pop(0)
            if event.trial in self.stops:
                note_stop(self.stops.pop(event.trial))
            self.on_event(event)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = trial.config["number"]
        if number not in self.open:
            self.open.add(number)
            self.waiting.append(TrialEvent(number, "started", 0, 0, {}, ""))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        number = trial.config["number"]
        for event in result.pop("losses"):
            self.waiting.append(TrialEvent(number, event.kind, 0, event.epoch, event.values, event.error))
        for seed, epoch, values, replayed in result.pop("events"):
            pace = self.paces[number][seed]
            new = epoch not in pace.times
            if (new or not replayed) and (delay := pace.hear(epoch)) is not None:
                cost = {"repeated": delay.repeated, "late": delay.late}
                self.waiting.append(TrialEvent(number, "resumed", seed, delay.step, cost, ""))
            if new:
                self.waiting.append(TrialEvent(number, "epoch", seed, epoch, values, ""))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = trial.config["number"]
        heard = sum(len(pace.times) for pace in self.paces[number].values())
        if heard > self.known.get(number, 0):
            trial.run_metadata.num_failures = 1  # what Tune counts up to ``RETRIES`` are losses without anything new in between
        self.known[number] = heard
        for pace in self.paces[number].values():
            pace.interrupt()
        why = Path(trial.error_file).read_text().rpartition("Failure #")[2]  # Tune keeps what it says of all losses in one file
        self.waiting.append(TrialEvent(number, "lost", 0, 0, {"workers": 1.0}, describe_loss([why])))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result
        if "end" not in last:
            self.stops[trial.config["number"]] = last["standing"]
        self._end(trial, last.get("end", "stopped"), last.get("error", ""))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, "failed", f"its process was lost {RETRIES + 1} times: killed, or out of memory")

    def _end(self, trial: Any, kind: Any, error: str) -> None:
        number = trial.config["number"]
        self.open.discard(number)
        self.waiting.append(TrialEvent(number, kind, 0, 0, {}, error))

    def end_processes(self) -> None:
        """Kill those that still train."""
        for trial in self.trials:
            if trial.temporary_state.ray_actor is not None:
                with suppress(Exception):
                    ray.kill(trial.temporary_state.ray_actor)
