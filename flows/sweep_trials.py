"""The driver of a sweep: asks for trials, hears of them, measures and records each once."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.tuning import TrialEvent, run_trials
from cluster.tuning_population import population_history
from cluster.tuning_trials import Race
from csm import storage
from csm.datasets import RealDataset
from csm.errors import InputError
from csm.metrics import METRICS
from csm.runs import RunSpec
from csm.search.study import Study
from flows.artifacts import Workspace
from flows.losses import tell_delay, tell_loss
from flows.networks import check_train
from flows.progress import Task, task
from flows.stages import Context
from flows.sweep_inputs import input_part
from flows.sweep_records import SweepFolder, SweepRecord, TrialRecord
from flows.sweep_results import measure, ranking
from flows.sweep_specs import ReadSpecs
from flows.sweeps import trial_config
from flows.train import run_specs
from flows.training import TRACKED_SECONDS

Steps = list[tuple[int, dict[str, float]]]
ENDS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}  # in MLflow


def trial_specs(
    context: Context, folder: SweepFolder, inputs: Mapping[str, Workspace], record: TrialRecord
) -> tuple[RunSpec, ...]:
    """The trainings of a trial, a seed each, which lie in its folder.

    Raises:
        InputError: its values do not fit together, or the images.
    """
    workspace = inputs[storage.digest(input_part(record.values))]
    inner = replace(context, config=trial_config(context.config, record.values), workspace=workspace)
    check_train(inner)
    place = folder.trial(record.number)
    return tuple(
        replace(spec, run=f"trial-{record.number}-seed{spec.seed}", directory=place / f"seed{spec.seed}")
        for spec in run_specs(inner)
    )


@dataclass
class Trials:
    """The trials of a sweep, as its driver knows them.

    Attributes:
        context: of the command; its configuration is the sweep's.
        folder, sweep: where it lies, and which one it is.
        inputs: digest of an ``input_part`` -> where its images and labels are.
        study: says what to try next.
        records: of all trials by number, running ones too.
        specs: their trainings; missing for one that cannot be built.
        again: numbers that the scheduler hears of again before new ones are asked.
        heard: epochs of the first seed of running trials, which MLflow does not have yet.
    """

    context: Context
    folder: SweepFolder
    sweep: SweepRecord
    inputs: Mapping[str, Workspace]
    study: Study
    records: dict[int, TrialRecord] = field(default_factory=dict)
    specs: dict[int, tuple[RunSpec, ...]] = field(default_factory=dict)
    again: list[int] = field(default_factory=list)
    heard: dict[int, Steps] = field(default_factory=dict)
    began: dict[int, float] = field(default_factory=dict)
    told: float = 0.0

    def resume(self) -> None:
        """Take over what an earlier command left: what ended and is of the same data stays, the rest goes on."""
        for record in self.folder.records():
            self.study.resume(record.number, record.values)
            now, current = self._build(record)
            if record.status in ENDS and record.fingerprint == current:
                self.records[record.number] = record
                self._tell_study(record)
            elif now:
                self._start(TrialRecord(record.number, record.values, fingerprint=current), now)
        for number, record in self.records.items():
            if record.status in ENDS and not self._is_logged(number):  # to another store, or not sent at all
                self.log(record)

    def run(self) -> None:
        """Train what is left of the trials, and record how each ends."""
        tune, resources = self.context.config.tune, self.context.config.resources.train
        open_ones = [number for number, record in self.records.items() if record.status == "running"]
        if not open_ones and len(self.records) >= tune.trials:
            return
        done = [number for number, record in self.records.items() if record.status in ("done", "stopped")]
        self.again = sorted([*open_ones, *(done if tune.scheduler.kind != "none" else [])])
        if not self.again:
            first = self._draw()  # Ray is not started for nothing
            if first is None:
                return
            self.again = [first]
        self.context.connect()
        with task("tune", max(tune.trials, len(self.records)), self._ended()) as progress:

            def on_event(event: TrialEvent) -> None:
                self._hear(event, progress)

            try:
                run_trials(
                    self.ask,
                    ReadSpecs(self.folder.trials),
                    self._race(),
                    resources,
                    self.context.config.train.workers,
                    (self.context.workspace.root / "ray").absolute(),
                    f"tune-{self.sweep.began}",
                    on_event,
                    tune.concurrent,
                )
            finally:
                self._log_heard()
                for number in self.heard:  # interrupted
                    self.context.tracker.close_run(self.key(number), "KILLED")

    def ask(self) -> tuple[int, dict[str, Any]] | None:
        """The next trial to train; None if there are as many as were wanted, or no other configurations."""
        number = self.again.pop(0) if self.again else self._draw()
        return None if number is None else (number, dict(self.records[number].values))

    def key(self, number: int) -> str:
        """Key of a trial's MLflow run."""
        return f"trial {self.sweep.key} {number}"

    def open(self, number: int) -> str:
        """Open a trial's MLflow run."""
        record, tags = self.records[number], {"csm.kind": "trial", "csm.trial": str(number)}
        if number in self.specs:
            settings = self.specs[number][0].settings
            tags |= {"csm.method": self.specs[number][0].method, "csm.loss": settings.loss}
            if settings.mixed:
                tags["csm.annotator"] = settings.mixed.annotator or ""
        return self.context.child(self.key(number), f"trial-{number}", tags, record.values)

    def log(self, record: TrialRecord) -> None:
        """Bring a trial that ended into MLflow: its epochs, what it came to, and how it ended."""
        tracker, key = self.context.tracker, self.open(record.number)
        if record.status == "done":
            rows = storage.read_json(self.specs[record.number][0].directory / "history.json")
            tracker.log_steps(key, [(int(row["epoch"]), {k: v for k, v in row.items() if k != "epoch"}) for row in rows])
        else:
            tracker.log_steps(key, self.heard.get(record.number, []))
        values = {f"val_{name}": estimate[0] for name, estimate in record.val.items()}
        tracker.log_metrics(key, values | {"seconds": record.seconds}, record.epochs)
        tracker.set_tags(key, {"csm.status": record.status, **({"csm.error": record.error} if record.error else {})})
        tracker.close_run(key, ENDS[record.status])

    def _draw(self) -> int | None:
        """Number of a new trial, recorded as running; those that cannot be built are recorded as failed on the way."""
        while len(self.records) < self.context.config.tune.trials:
            asked = self.study.ask()
            if asked is None:
                return None
            record = TrialRecord(*asked)
            try:
                specs = trial_specs(self.context, self.folder, self.inputs, record)
            except InputError as error:
                self._end(replace(record, status="failed", error=str(error)))
                continue
            self._start(replace(record, fingerprint=_fingerprint(specs)), specs)
            return record.number
        return None

    def _build(self, record: TrialRecord) -> tuple[tuple[RunSpec, ...], str]:
        try:
            specs = trial_specs(self.context, self.folder, self.inputs, record)
        except InputError:
            return (), ""
        self.specs[record.number] = specs
        return specs, _fingerprint(specs)

    def _start(self, record: TrialRecord, specs: tuple[RunSpec, ...]) -> None:
        self.records[record.number], self.specs[record.number] = record, specs
        self.folder.write_specs(record, specs)
        self.folder.write_trial(record)

    def _hear(self, event: TrialEvent, progress: Task) -> None:
        number, record = event.trial, self.records[event.trial]
        if event.kind == "lost":
            reason = f"trial {number}: {event.error}; it starts again from its last state"
            tell_loss(self.context, "tune", reason, int(event.values["workers"]))
            return
        if event.kind == "resumed":
            tell_delay(self.context, "tune", f"trial {number} goes on from epoch {event.epoch}", **event.values)
            return
        if record.status in ENDS:  # repeated for the scheduler alone
            return
        if event.kind == "started":
            self.began[number] = time.monotonic()
            self.heard[number] = []
            self.open(number)
        elif event.kind == "epoch":
            if event.seed == self.specs[number][0].seed:
                self.heard[number].append((event.epoch, event.values))
                self.records[number] = replace(record, epochs=event.epoch)
            if time.monotonic() - self.told > TRACKED_SECONDS:
                self._log_heard()
                progress.advance(0, self._state())
        else:
            self._end(self._ending(event))
            progress.advance(1, self._state())

    def _ending(self, event: TrialEvent) -> TrialRecord:
        """The record of a trial that has just ended."""
        record, specs = self.records[event.trial], self.specs[event.trial]
        spent = time.monotonic() - self.began[event.trial]
        if event.kind == "done":
            config = self.context.config
            seconds = sum(storage.read_json(spec.directory / "run.json")["seconds"] for spec in specs)
            n_classes = RealDataset.load_info(specs[0].data).n_classes
            try:
                val = measure(specs, "val", config.tune, config.evaluate.bins, n_classes)
            except ValueError as error:  # InputError is one: logits that are not finite, too few images to calibrate
                return replace(record, status="failed", error=" ".join(str(error).split()), seconds=round(seconds, 3))
            taken = population_history(specs[0].directory)
            return replace(record, status="done", val=val, seconds=round(seconds, 3), last=taken[-1]["values"] if taken else {})
        status = "stopped" if event.kind == "stopped" else "failed"
        return replace(record, status=status, error=event.error, seconds=round(spent, 3))

    def _end(self, record: TrialRecord) -> None:
        """Record how a trial ended: in MLflow, then on disk, so that a kill in between says it again and not never."""
        self.records[record.number] = record
        self.log(record)
        self.heard.pop(record.number, None)
        self._tell_study(record)
        self.folder.write_trial(record)

    def _tell_study(self, record: TrialRecord) -> None:
        objectives = self.context.config.tune.objectives
        self.study.tell(record.number, [record.val[name][0] for name in objectives] if record.status == "done" else None)

    def _log_heard(self) -> None:
        """Send the epochs that were heard since the last time."""
        self.told = time.monotonic()
        for number, steps in self.heard.items():
            self.context.tracker.log_steps(self.key(number), steps)

    def _is_logged(self, number: int) -> bool:
        try:
            self.context.tracker.set_tags(self.key(number), {})
        except KeyError:
            return False
        return True

    def _ended(self) -> int:
        return sum(record.status in ENDS for record in self.records.values())

    def _state(self) -> str:
        """What is worth knowing while trials run."""
        tune, ranked = self.context.config.tune, ranking(self.records.values(), self.context.config.tune)
        failed = sum(record.status == "failed" for record in self.records.values())
        best = (
            f"best {tune.objectives[0]} {ranked[0].val[tune.objectives[0]][0]:.4f} (trial {ranked[0].number})" if ranked else ""
        )
        return ", ".join(part for part in (best, f"{failed} failed" if failed else "") if part)

    def _race(self) -> Race:
        config, scheduler = self.context.config, self.context.config.tune.scheduler
        corners = config.tune.search_space.corners() if scheduler.kind != "none" else ()
        trains = [trial_config(config, values).train for _, values in corners]
        epochs = [train.optimizer_of(method).epochs for train in trains for method in train.chosen.values()]
        metric = config.tune.scheduler_metric
        return Race(
            kind=scheduler.kind,
            metric=f"val_{metric}",
            mode="max" if METRICS[metric].higher_is_better else "min",
            grace=scheduler.grace,
            reduction=scheduler.reduction,
            interval=scheduler.interval,
            epochs=max(epochs, default=config.train.optimizer.epochs),
        )


def _fingerprint(specs: tuple[RunSpec, ...]) -> str:
    return storage.digest(*(spec.fingerprint for spec in specs))
