"""The section `tune` of a configuration: what a sweep tries, and the configuration of each trial."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from csm.errors import InputError
from csm.methods import Method
from csm.metrics import METRICS
from csm.parameters import STRICT, check_name
from csm.posthoc import POSTHOC
from csm.search.space import SearchSpace, parse_space
from csm.search.study import check_search
from flows.methods import teacher_training

if TYPE_CHECKING:  # a Config has a TuneConfig
    from flows.config import Config

EPOCH_METRICS = ("nll", "accuracy", "ece")  # what a training measures on validation after each epoch
BASELINE = "cross-entropy"
TRIED = ("method", "data", "generator", "plan", "mix", "annotate", "train")  # sections whose settings change a classifier
FIXED = ("train.compare", "train.loss", "train.seeds", "train.workers")  # a trial is one method with tune.seeds seeds
SELECTORS = ("loss", "kind", "network", "head")  # what `parameters` beside them are of


@dataclass(frozen=True, config=STRICT)
class SchedulerConfig:
    """Which trials may train on.

    Attributes:
        kind: all of them ("none"); the better ones at each rung ("asha"); or all, the worse ones going on from the weights of better
            ones with settings near theirs ("pbt").
        metric: on validation, after each epoch; None: the first of ``tune.objectives`` if a training measures it, else nll.
        grace: epochs that every trial gets.
        reduction: one in so many trials goes on at a rung of asha; the next rung has so many times the epochs.
        interval: epochs between two exchanges of pbt.
    """

    kind: Literal["none", "asha", "pbt"] = "none"
    metric: Literal["nll", "accuracy", "ece"] | None = None
    grace: int = Field(default=10, ge=1)
    reduction: int = Field(default=3, ge=2)
    interval: int = Field(default=10, ge=1)


@dataclass(frozen=True, config=STRICT)
class TuneConfig:
    """A sweep: trials, each of them one configuration trained with ``seeds`` seeds.

    Attributes:
        method: of ``train.methods``, whose settings are the keys ``method.X`` of the space.
        space: dotted key -> what it may be, see ``csm.search.space.parse_space``.
        trials: how many; fewer if the space has no more configurations.
        search: of ``csm.search.study.SEARCHES``.
        objectives: metrics on the validation split, means over the seeds; the first one ranks.
        posthoc: after what they are measured: "none" or a method of ``csm.posthoc.POSTHOC``.
        seeds: 0..seeds-1, of every trial.
        seed: of the search.
        concurrent: trials at a time; 0: as many as fit.
        scheduler: which of them may train on.
    """

    method: str = "csm"
    space: dict[str, Any] = Field(default_factory=dict)
    trials: int = Field(default=20, ge=1)
    search: Literal["random", "grid", "tpe"] = "tpe"
    objectives: tuple[str, ...] = ("nll",)
    posthoc: str = "none"
    seeds: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)
    concurrent: int = Field(default=0, ge=0)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)

    @property
    def scheduler_metric(self) -> str:
        """What the scheduler looks at."""
        return self.scheduler.metric or (self.objectives[0] if self.objectives[0] in EPOCH_METRICS else "nll")

    @property
    def search_space(self) -> SearchSpace:
        return parse_space(self.space)


def check_tune(config: "Config") -> None:
    """``InputError`` names what of the section cannot be used; each choice and each end of a range is tried on the whole configuration."""
    tune = config.tune
    check_name("tune.method", tune.method, config.train.methods)
    if "method" not in tune.search_space.keys:
        _check_single("tune.method", tune.method, config.train.methods[tune.method])
    if not tune.objectives:
        raise InputError("tune.objectives: empty; name what is to be good, for example [nll]")
    for name in tune.objectives:
        check_name("tune.objectives", name, METRICS)
        if tune.objectives.count(name) > 1:
            raise InputError(f"tune.objectives: {name!r} is named more than once")
    check_name("tune.posthoc", tune.posthoc, POSTHOC)
    space = tune.search_space
    check_search(space, tune.search)
    for key in space.keys:
        _check_key(key)
    for key, values in space.corners():
        try:
            trial_config(config, values)
        except InputError as error:
            # The rest of a corner may be what is wrong: the message knows.
            names = {_key(config, values, name): name for name in values if name != "method"}
            wrong = next((name for name in names if str(error).startswith((f"{name}:", f"{name}.", f"{name} "))), None)
            message = f"{key}: {error}" if wrong is None else f"{names[wrong]}{str(error).removeprefix(wrong)}"
            raise InputError(f"tune.space.{message}") from None


def _check_key(key: str) -> None:
    """``InputError`` if no trial can have ``key`` of its own."""
    where, section = f"tune.space.{key}", ".".join(key.split(".")[:2])
    if section == "train.methods":
        setting = key.split(".", 3)[-1]
        raise InputError(f"{where}: a trial has one method, whose settings are method.X: write method.{setting}")
    if section in FIXED:
        raise InputError(f"{where}: a trial cannot have {section} of its own; leave it out")
    if key.partition(".")[0] not in TRIED:
        raise InputError(f"{where}: cannot be tried; expected a key that starts with one of {', '.join(TRIED)}")


def trial_config(config: "Config", values: Mapping[str, Any]) -> "Config":
    """The whole configuration of a trial that tries ``values``: one method, ``tune.seeds`` seeds, and the teacher of ``config``.

    Raises:
        InputError: the values do not fit together, or the rest of the configuration.
    """
    trial = _with(config, values, {"train.compare": [_method(config, values)], "train.seeds": config.tune.seeds})
    for name, method in trial.train.chosen.items():
        _check_single(f"train.methods.{name}.members", name, method)
    return trial


def _check_single(where: str, name: str, method: Method) -> None:
    if method.members > 1:
        raise InputError(
            f"{where}: a trial trains one classifier for each seed, {name} an ensemble of {method.members}: tune with "
            f"train.methods.{name}.members=1, and give the best of the trials its members"
        )


def best_config(config: "Config", values: Mapping[str, Any]) -> "Config":
    """``trial_config`` to be run again: with the seeds of ``config``, beside the baseline if there is one."""
    method = _method(config, values)
    compare = [BASELINE] if BASELINE in config.train.methods and method != BASELINE else []
    tried = ", ".join(f"{key} {value}" for key, value in values.items())
    description = f"Best of csm tune on {config.name}: {tried}" if tried else f"From csm tune on {config.name}"
    return _with(config, values, {"train.compare": [*compare, method], "description": description})


def _with(config: "Config", values: Mapping[str, Any], more: Mapping[str, Any]) -> "Config":
    """``config`` with ``values``, whose keys ``method.X`` are those of the tried method, and ``more``."""
    check_name("tune.method", _method(config, values), config.train.methods)
    settings = {_key(config, values, name): value for name, value in values.items() if name != "method"}
    mixed = next((_key(config, values, name) for name in values if name.startswith("method.mixed.")), None)
    if mixed and config.train.methods[_method(config, values)].mixed is None:
        raise InputError(
            f"{mixed}: {_method(config, values)} trains on no mixed images; leave it out, or take a method that does"
        )
    own = config.train.methods[_method(config, values)].optimizer
    for name in own:
        if f"train.optimizer.{name}" in settings:
            raise InputError(f"train.optimizer.{name}: {_method(config, values)} has its own; write method.optimizer.{name}")
    teacher, before = teacher_training(config.train, config.annotate), dict[str, Any]()
    if not config.annotate.teacher.models:
        pinned = {"network": teacher.network, "parameters": teacher.parameters, "optimizer": asdict(teacher.optimizer)}
        before = {f"annotate.teacher.{name}": value for name, value in pinned.items()}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        if name in SELECTORS and value != config.value(key):
            before[f"{section}.parameters"] = None  # they were of what is replaced
    return config.with_values(before, {**settings, **more, "train.loss": None})


def _method(config: "Config", values: Mapping[str, Any]) -> str:
    """The method that is tried."""
    method: str = values.get("method", config.tune.method)
    return method


def _key(config: "Config", values: Mapping[str, Any], name: str) -> str:
    """The dotted key of the configuration that ``name`` stands for."""
    return f"train.methods.{_method(config, values)}.{name.removeprefix('method.')}" if name.startswith("method.") else name
