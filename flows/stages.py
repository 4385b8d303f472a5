"""Stages: what a verb does, and what the stages of one command share."""

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from cluster.session import session
from cluster.sharing import ahead, await_turn, present
from csm import storage
from csm.datasets import DatasetInfo, RealDataset
from csm.plan_rules import resolve_plan
from flows.artifacts import StageRecord, Workspace
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
        changed: why the result is out of date though settings and inputs are the same, as in "depends on it, which ..."; None if it is
            not. Asked once a command, of what is there.
        check: look at what the user gave before anything is written or removed; raises ``InputError``.
        check_early: as ``check``, of what can be told before the first stage of a command is run: the data may not be there yet, or be
            others.
        run: do the work; called with the stage's record and again after an interruption.
        costly: what it made is never replaced without --force.
        unit: what its rows are, for the user.
        also_reads: files that it shows if they are there; other ones make its result stale.
        incremental: it knows itself which of its files are still good, so nothing is removed when its settings change.
        grows: whether settings that it had and others that it has now differ only by what is added, so that no result is replaced.
        keeps: whether all that it made is part of what a record asks for, so that nothing is removed for that; None: never.
    """

    name: str
    code_version: int
    inputs: tuple[str, ...]
    settings: Callable[[Config], dict[str, Any]]
    outputs: Callable[[Workspace, Config], list[Path]]
    run: Callable[["Context", StageRecord], Made]
    check: Callable[["Context"], object] = lambda context: None
    check_early: Callable[["Context"], object] = lambda context: None
    costly: bool = False
    incremental: bool = False
    unit: str = "images"
    more_inputs: Callable[[Config], tuple[str, ...]] = lambda config: ()
    also_reads: Callable[[Workspace], list[Path]] = lambda workspace: []
    missing: Callable[["Context", StageRecord], Path | None] | None = None
    changed: Callable[["Context"], str | None] = lambda context: None
    grows: Callable[[Mapping[str, Any], Mapping[str, Any]], bool] = lambda before, after: False
    keeps: Callable[["Context", StageRecord], bool] | None = None

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
    whole: set[tuple[str, str, str]] = field(default_factory=set)  # results that were looked at, file by file, and are there
    _resources: ExitStack = field(default_factory=ExitStack)
    _tracker: Tracker | None = None
    _sender: Tracker | None = None  # the same, before the parent run is open
    _connected: bool = False
    _resolved: tuple[str, Config, Config] | None = None  # digest of the data, ``config``, and ``resolved`` of the two

    @property
    def resolved(self) -> Config:
        """``config`` with what it leaves to the data as these settle it; before there are any, as it stands."""
        record = self.workspace.record("prepare")
        digest = record.digest if record else ""
        if self._resolved is None or self._resolved[0] != digest or self._resolved[1] is not self.config:
            info = self.data
            if info is None:
                return self.config
            self._resolved = digest, self.config, resolve(self.config, info)
        return self._resolved[2]

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


def resolve(config: Config, info: DatasetInfo) -> Config:
    """``config`` with what it leaves to the data as ``info`` of them settles it."""
    return replace(config, plan=resolve_plan(config.plan, info.n_classes, info.counts["train"]))


def plain_settings(config: Config) -> dict[str, Any]:
    """The whole configuration as plain values, but for what only a sweep asks."""
    return {key: value for key, value in plain(asdict(config)).items() if key != "tune"}
