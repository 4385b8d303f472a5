"""Stages: what a verb does, when its result is reused, and what is refused so that nothing is lost."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from cluster.session import session
from cluster.sharing import ahead, await_turn, present
from csm import storage, tables
from csm.datasets import DatasetInfo, RealDataset
from csm.errors import InputError
from flows.artifacts import StageRecord, Workspace, differences
from flows.config import Config, plain
from flows.progress import say
from flows.tracking import Tracker
from flows.tracking_address import OWN, Address
from flows.tracking_inputs import real_input
from flows.tracking_spool import waits


class Made(NamedTuple):
    """What a stage made: rows, and a digest that identifies it."""

    rows: int
    digest: str


class Losses(NamedTuple):
    """What a stage lost: workers, and the seconds that these had worked for nothing. Known of stages that say so in ``Context.losses``."""

    workers: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.workers} worker{'s' * (self.workers > 1)} lost, about {self.seconds:.0f} s of work repeated"


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        name: as on the command line.
        code_version: raise it when the stage's code gives other results for the same settings and inputs.
        inputs: names of the stages whose results it reads.
        more_inputs: those that it reads under some configurations only.
        settings: the part of the configuration that its result depends on.
        outputs: files and folders that it writes; all of it exists when the stage is done.
        missing: the first file of its result, made under a record, that is not there as it was made; None if all are. Default: looks
            at ``outputs``. Asked once a command.
        check: look at what the user gave before anything is written or removed; raises ``InputError``.
        run: do the work; called with the stage's record and again after an interruption.
        costly: what it made is never replaced without --force.
        unit: what its rows are, for the user.
        also_reads: files that it shows if they are there; other ones make its result stale.
        incremental: it knows itself which of its files are still good, so nothing is removed when its settings change.
    """

    name: str
    code_version: int
    inputs: tuple[str, ...]
    settings: Callable[[Config], dict[str, Any]]
    outputs: Callable[[Workspace, Config], list[Path]]
    run: Callable[["Context", StageRecord], Made]
    check: Callable[["Context"], object] = lambda context: None
    costly: bool = False
    incremental: bool = False
    unit: str = "images"
    more_inputs: Callable[[Config], tuple[str, ...]] = lambda config: ()
    also_reads: Callable[[Workspace], list[Path]] = lambda workspace: []
    missing: Callable[["Context", StageRecord], Path | None] | None = None

    def reads(self, config: Config) -> tuple[str, ...]:
        """Names of the stages whose results it reads under ``config``."""
        return (*self.inputs, *self.more_inputs(config))


@dataclass
class Context:
    """Everything that the stages of one command share. ``kind`` and ``key`` are of the parent run, "" for a key of the configuration."""

    config: Config
    workspace: Workspace
    stages: Mapping[str, Stage]
    address: str = "local"
    command: str = ""
    forced: frozenset[str] = frozenset()
    tracking: Address = OWN
    kind: str = "pipeline"
    key: str = ""
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    losses: dict[str, Losses] = field(default_factory=dict)
    _whole: set[tuple[str, str, str]] = field(default_factory=set)  # results that were looked at, file by file, and are there
    _resources: ExitStack = field(default_factory=ExitStack)
    _tracker: Tracker | None = None
    _sender: Tracker | None = None  # the same, before the parent run is open
    _connected: bool = False

    @property
    def tracker(self) -> Tracker:
        """The tracking store, with the parent run open; made when first needed."""
        if self._tracker is None:
            tracker = self._open_tracker()
            tags = {"csm.config": self.config.name, "csm.kind": self.kind, "mlflow.note.content": self.config.description}
            settings = plain_settings(self.config)
            if self.kind == "sweep":  # the space as text: its keys may be any value
                tune = plain(asdict(self.config.tune))
                settings["tune"] = {**tune, "space": json.dumps(tune["space"])}
            tracker.open_run(self.parent_key, self.config.name, tags, settings)
            tracker.watch(self.parent_key)
            self._tracker = tracker
            self.name_data()
        return self._tracker

    def send_waiting(self) -> None:
        """Begin to send what an earlier command could not, if there is any."""
        if waits(self.workspace.own, self.tracking.name):
            self._open_tracker()

    def name_data(self) -> None:
        """Name the data set, once it is there, in the parent run."""
        if (info := self.data) is not None:
            self.tracker.set_tags(self.parent_key, {"csm.dataset": info.name})
            self.tracker.log_inputs(self.parent_key, [real_input(info, self.workspace.root)])

    @property
    def data(self) -> DatasetInfo | None:
        """The data set of the workspace, if it is prepared."""
        return RealDataset.load_info(self.workspace.root) if self.workspace.dataset.is_file() else None

    def _open_tracker(self) -> Tracker:
        if self._sender is None:
            self._sender = Tracker(self.workspace.root, self.tracking, self.command)
        return self._sender

    @property
    def parent_key(self) -> str:
        return self.key or f"pipeline {storage.digest(plain_settings(self.config))}"

    def child(self, key: str, name: str, tags: Mapping[str, str], params: Mapping[str, Any], parent: str | None = None) -> str:
        """Open the child run ``key`` of the run under key ``parent`` (none: the parent run) and return its key."""
        data = {"csm.dataset": info.name} if (info := self.data) else {}
        self.tracker.open_run(key, name, {**data, **tags}, params, parent or self.parent_key)
        return key

    def connect(self) -> None:
        """Join or start Ray, once for all stages of the command, and wait while a run of higher priority is there."""
        if not self._connected:
            say(f"ray: {'starting on this machine' if self.address == 'local' else 'joining ' + self.address}")
            self._resources.enter_context(redirect_stdout(sys.stderr))  # where Ray prints what it says of lost workers
            name = f"csm-{storage.digest(str(self.workspace.root.absolute()))[:12]}"
            resources = self.config.resources
            self._resources.enter_context(session(self.address, None, resources.cap, name))
            if self.address != "local":
                self._resources.enter_context(present(resources.priority))
            self._connected = True
        if (priority := ahead()) is not None:
            say(f"waiting: a run of priority {priority} goes first")
            await_turn()

    def close(self, status: str) -> None:
        """End the parent run with ``status``, if there is one, and leave Ray."""
        try:
            if self._tracker is not None:
                self._tracker.close_run(self.parent_key, status)
        finally:
            try:
                if self._sender is not None:
                    self._sender.close()
            finally:
                self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close, with the status that the block's end says."""
        self.close("FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")


def run_stages(context: Context, names: Sequence[str]) -> None:
    """Bring the stages ``names`` up to date, one after the other: see ``run_stage``."""
    for name in names:
        run_stage(context, name)
        if not context.outcomes[name]["reused"]:  # now something in the workspace is of this configuration
            storage.write_text(context.workspace.config, context.config.to_yaml())
        if name == "prepare":  # what the others need of the user can be checked against the data, before hours of work
            for later in names:
                context.stages[later].check(context)


def run_stage(context: Context, name: str) -> None:
    """Bring stage ``name`` up to date: reuse what it made, go on with what was interrupted, or do it.

    Raises:
        InputError: an input stage was not run or is out of date, or costly results of other settings would be replaced.
    """
    stage, workspace = context.stages[name], context.workspace
    require(context, name, stage.reads(context.config))
    forced = name in context.forced
    record, wanted = workspace.record(name), _wanted(context, stage)
    if not forced and stale(context, name) is None and record is not None:
        context.outcomes[name] = {"seconds": 0.0, "reused": True, "rows": record.rows}
        say(f"{name}: reused ({record.rows:,} {stage.unit})")
        return
    outputs = stage.outputs(workspace, context.config)
    stage.check(context)
    if record is not None and (forced or record.fingerprint != wanted.fingerprint):
        if stage.costly and not forced and any(_holds(path) for path in outputs):
            raise _replaces(context, name, _changes(record, wanted))
        context._whole -= {looked_at for looked_at in context._whole if looked_at[1] == name}
        if forced or not stage.incremental:
            workspace.drop(name, outputs)
        record = None
    spent = record.seconds if record else 0.0
    workspace.write_record(replace(wanted, seconds=spent))
    say(f"{name}: {'going on' if record else 'started'}")
    tags = {"csm.kind": "stage", "csm.stage": name, "csm.fingerprint": wanted.fingerprint}
    params = {**wanted.settings, "input": wanted.inputs, "code_version": wanted.code_version}
    key = context.child(f"stage {name} {wanted.fingerprint}", name, tags, params)
    started = time.monotonic()
    try:
        made = stage.run(context, wanted)
    except BaseException as error:
        workspace.write_record(replace(wanted, seconds=round(spent + time.monotonic() - started, 3)))
        context.tracker.close_run(key, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    seconds = round(time.monotonic() - started, 3)
    lost = context.losses.get(name)
    lost_values = {"workers_lost": lost.workers, "seconds_lost": round(lost.seconds, 3)} if lost else {}
    context.tracker.log_metrics(key, {"seconds": spent + seconds, "rows": float(made.rows), **lost_values})
    context.tracker.close_run(key)
    if name == "prepare":
        context.name_data()
    workspace.write_record(replace(wanted, done=True, digest=made.digest, rows=made.rows, seconds=round(spent + seconds, 3)))
    context.outcomes[name] = {"seconds": seconds, "reused": False, "rows": made.rows, **lost_values}
    if lost and lost.workers:
        say(f"{name}: {lost}")
    say(f"{name}: done, {made.rows:,} {stage.unit} in {seconds:.1f} s")


def require(context: Context, name: str, needs: Sequence[str]) -> None:
    """``InputError`` if the result of one of the stages ``needs`` is not what the configuration asks for; ``name`` is who needs it."""
    for needed in needs:
        reason = stale(context, needed)
        if reason:
            raise InputError(
                f"{name} needs {needed}, which {reason}: run `csm {_verb(context, needed)}` with the same options first, or `csm run`"
            )


def stale(context: Context, name: str) -> str | None:
    """Why the result of stage ``name`` is not what the configuration asks for, or None if it is."""
    stage, record = context.stages[name], context.workspace.record(name)
    if record is None:
        return "was not run in this workspace"
    for needed in stage.reads(context.config):
        reason = stale(context, needed)
        if reason:
            return f"depends on {needed}, which {reason}"
    wanted = _wanted(context, stage)
    if record.fingerprint != wanted.fingerprint:
        return f"was run with other settings ({_changes(record, wanted)})"
    if not record.done:
        return "was interrupted"
    looked_at = (str(context.workspace.root), name, record.fingerprint)
    if looked_at in context._whole:
        return None
    if stage.missing:
        missing = stage.missing(context, record)
    else:
        missing = next((path for path in stage.outputs(context.workspace, context.config) if not _is_whole(path)), None)
    if missing is None:
        context._whole.add(looked_at)
        return None
    return f"{'has a damaged' if missing.exists() else 'lacks'} {missing}"


def refuse_replacing(context: Context, names: Sequence[str]) -> None:
    """Refuse, before anything is written, the stages of which ``run_stage`` would refuse to replace costly results.

    What a stage will be made from is not known yet, but its settings and those of the stages before it are.
    """
    for name in names:
        stage, record = context.stages[name], context.workspace.record(name)
        if not stage.costly or name in context.forced or record is None:
            continue
        changed = [change for source in _sources(context, name) for change in _own_changes(context, source)]
        if changed and any(_holds(path) for path in stage.outputs(context.workspace, context.config)):
            raise _replaces(context, name, _some(changed))


def _sources(context: Context, name: str) -> list[str]:
    """``name`` and the stages that its result comes from, each once."""
    inputs = [source for needed in context.stages[name].reads(context.config) for source in _sources(context, needed)]
    return list(dict.fromkeys([*inputs, name]))


def _own_changes(context: Context, name: str) -> list[str]:
    """What has changed in the settings and the code of stage ``name`` since it was run; nothing if it was not."""
    record, wanted = context.workspace.record(name), _wanted(context, context.stages[name])
    if record is None:
        return []
    changed = differences(record.settings, wanted.settings)
    return changed if record.code_version == wanted.code_version else [*changed, f"a newer {name}"]


def _replaces(context: Context, name: str, changed: str) -> InputError:
    return InputError(
        f"--workspace {context.workspace.root}: {name} was made by another configuration there ({changed}); "
        f"choose another --workspace, or replace it with --force {name}"
    )


def _is_whole(path: Path) -> bool:
    """Whether ``path`` exists and, if it is a table, was not cut short."""
    return path.exists() if path.suffix != ".parquet" else tables.metadata(path) is not None


def _holds(path: Path) -> bool:
    """Whether ``path`` is a file, or a folder that is not empty."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def plain_settings(config: Config) -> dict[str, Any]:
    """The whole configuration as plain values, but for what only a sweep asks."""
    return {key: value for key, value in plain(asdict(config)).items() if key != "tune"}


def _wanted(context: Context, stage: Stage) -> StageRecord:
    """The record that ``stage`` should have, before it is run."""
    settings = plain(stage.settings(context.config))
    inputs = {name: record.digest if (record := context.workspace.record(name)) else "" for name in stage.reads(context.config)}
    inputs |= {path.name: storage.file_digest(path) for path in stage.also_reads(context.workspace) if path.is_file()}
    fingerprint = storage.digest(stage.name, stage.code_version, settings, inputs)
    return StageRecord(stage.name, fingerprint, settings, stage.code_version, inputs)


def _changes(record: StageRecord, wanted: StageRecord) -> str:
    changed = differences(record.settings, wanted.settings)
    changed += [f"another result of {name}" for name, digest in wanted.inputs.items() if record.inputs.get(name) != digest]
    if record.code_version != wanted.code_version:
        changed.append("a newer version of csm")
    return _some(changed)


def _some(changed: list[str]) -> str:
    return "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")


def _verb(context: Context, stage: str) -> str:
    """The verb that runs ``stage``."""
    if stage == "generator":
        return "import-generator" if context.config.generator.path else "fit-generator"
    if stage in ("model", "evaluate-shift"):
        return "train" if stage == "model" else "evaluate"
    return "annotate" if stage in ("fit-teacher", "fit-annotators") else stage
