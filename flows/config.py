"""Configurations: YAML over the defaults, checked as a whole before anything runs."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cluster.resources import ResourcesConfig
from csm.datasets import DATASETS
from csm.datasets.shifts import ShiftConfig, check_shift
from csm.errors import InputError
from csm.generators.conditioning import OPERATORS
from csm.generators.config import GeneratorConfig
from csm.locations import is_remote, location
from csm.methods import Method
from csm.parameters import check_name, check_parameters, expected
from csm.planning import PlanConfig, ratio_grid
from csm.posthoc import POSTHOC
from csm.precision import Precision
from csm.sampling import SamplerConfig
from csm.search.sections import merge_spaces
from flows.annotators import AnnotateConfig, check_annotators, check_asked, check_folder_name
from flows.masking import has_secret, masked
from flows.methods import TrainConfig, check_teacher, check_train
from flows.sweeps import TuneConfig, check_tune

STRICT = ConfigDict(extra="forbid")
SPACE = "space"  # of the section tune: its keys are dotted keys of the configuration
REGISTRY_FORBIDS = "/:%'\""  # in the name of a model


@dataclass(frozen=True, config=STRICT)
class MixConfig:
    """How mixed images are made.

    Attributes:
        sampler: the solver.
        batch_size: rows that go through the generator together.
        operator: that mixes two classes, see ``OPERATORS``.
        precision, compile: of the generator's network, see ``accelerate``.
    """

    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    batch_size: int = Field(default=256, ge=1)
    operator: str = "embedding"
    precision: Precision = "auto"
    compile: bool = False


@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """What is measured.

    Attributes:
        bins: of ECE and AECE.
        posthoc: methods of ``csm.posthoc.POSTHOC`` that are fitted on validation, beside "none".
        draws: bootstrap resamples of the comparison; no p-value is below 2 / (draws + 1).
        shifts: corruption sets and sets of images from elsewhere, by name.
    """

    bins: int = Field(default=15, ge=1, le=1000)
    posthoc: tuple[str, ...] = ("temperature",)
    draws: int = Field(default=5000, ge=100)
    shifts: dict[str, ShiftConfig] = Field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class RegisterConfig:
    """The finished model in MLflow's registry.

    Attributes:
        name: there; None: "csm-" and the name of the configuration.
        enabled: register it at all.
    """

    name: str | None = None
    enabled: bool = True


@dataclass(frozen=True, config=STRICT)
class Config:
    """A whole run. ``data`` is ``source`` and the parameters of that source."""

    name: str
    data: dict[str, Any]
    train: TrainConfig
    annotate: AnnotateConfig
    description: str = ""
    generator: GeneratorConfig = Field(default_factory=GeneratorConfig)
    plan: PlanConfig = Field(default_factory=PlanConfig)
    mix: MixConfig = Field(default_factory=MixConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    register: RegisterConfig = Field(default_factory=RegisterConfig)
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)
    tune: TuneConfig = Field(default_factory=TuneConfig)

    @property
    def annotators(self) -> tuple[str, ...]:
        """Annotators that are run, among them "auto" if it is asked for: ``annotate.annotator`` and those of the chosen methods."""
        named = (self.annotator_of(method) for method in self.train.chosen.values() if method.mixed)
        return tuple(dict.fromkeys((*named, self.annotate.annotator)))

    @property
    def mixes(self) -> bool:
        """Whether a chosen method trains on mixed images."""
        return any(method.mixed for method in self.train.chosen.values())

    def annotator_of(self, method: Method) -> str:
        """Name of the annotator of a method with a mixed term."""
        assert method.mixed is not None
        return method.mixed.annotator or self.annotate.annotator

    def value(self, key: str) -> Any:
        """What stands at a dotted key; None where nothing does."""
        value: Any = asdict(self)
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def with_values(self, *changes: Mapping[str, Any]) -> "Config":
        """This configuration, checked, after ``changes`` of dotted key -> value, one after the other; null is the default."""
        values = plain(asdict(self))
        for key, value in (item for change in changes for item in change.items()):
            values = _merge(values, _nested(key, value))
        return _validate(_without_null(values))

    def to_yaml(self) -> str:
        """The resolved configuration; loading it gives an equal one."""
        values = plain(asdict(self))
        return yaml.safe_dump(_without_defaults(_read_bundled("default"), values), sort_keys=False, allow_unicode=True)


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Return configuration ``name``, laid over ``default.yaml``, with ``overrides`` of the form ``dotted.key=value`` (YAML values).

    A ``tune.space`` of the configuration replaces the default's whole; overrides change, add or (null) remove keys of it.

    Args:
        name: of a bundled configuration, or a path that ends in .yaml or .yml.

    Raises:
        InputError: unknown name, unreadable YAML, unknown key, wrong type or value out of range; the message names the dotted key.
    """
    given = _read(name)
    given.setdefault("name", Path(name).stem)
    values = _merge(_without_space(_read_bundled("default"), given), given)
    for override in overrides:
        values = _merge(values, _parse_override(override))
    _refuse_secrets(values, "")
    config = _validate(_without_null(values))
    # Of a sweep that stands in a file, only csm tune asks whether it fits the other settings: it must not stand in their way.
    if any(override.startswith("tune") for override in overrides):
        check_tune(config)
    return config


def config_names() -> list[str]:
    """Names of the bundled configurations."""
    return sorted(entry.name.removesuffix(".yaml") for entry in files("flows.configs").iterdir() if entry.name.endswith(".yaml"))


def plain(value: Any) -> Any:
    """``value`` with tuples as lists and paths as strings, all the way down: what JSON and YAML can hold."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) or is_remote(value) else value


def _read(name: str) -> dict[str, Any]:
    path = location(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(f"--config {name}: {'is a folder, not a file' if path.is_dir() else 'the file does not exist'}")
        return _parse(path.read_text(encoding="utf-8", errors="replace"), name)
    if name == "default" or name not in config_names():
        if path.is_file():
            raise InputError(f"--config {name}: expected a file that ends in .yaml or .yml")
        names = ", ".join(known for known in config_names() if known != "default")
        raise InputError(f"--config {name}: unknown configuration; give a .yaml file or one of {names}")
    return _read_bundled(name)


def _read_bundled(name: str) -> dict[str, Any]:
    return _parse(files("flows.configs").joinpath(f"{name}.yaml").read_text(encoding="utf-8"), name)


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--config {name}: not valid YAML: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"--config {name}: expected a mapping of sections, got {type(value).__name__}")
    return value


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key or not all(key.split(".")):
        raise InputError(f"--set {override}: expected dotted.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {override}: the value is not valid YAML") from None
    return _nested(key, value)


def _nested(key: str, value: Any) -> dict[str, Any]:
    """``value`` below the sections of a dotted key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``, mapping by mapping; null removes a key. ``data`` with another source replaces it whole."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif key == SPACE and isinstance(value, Mapping):
            merged[key] = merge_spaces(below or {}, value)
        elif isinstance(below, Mapping) and isinstance(value, Mapping) and not _other_source(key, below, value):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _without_space(default: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``default`` without its search space if ``given`` has one."""
    tune = given.get("tune")
    return _merge(default, {"tune": {SPACE: None}}) if isinstance(tune, Mapping) and SPACE in tune else dict(default)


def _without_null(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without the keys that are null because there was nothing below them to remove; in a search space null is a choice."""
    kept = {key: value for key, value in values.items() if value is not None}
    return {key: _without_null(value) if isinstance(value, Mapping) and key != SPACE else value for key, value in kept.items()}


def _without_defaults(default: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What ``_merge`` has to lay on ``default`` to get ``values``: keys of ``default`` that ``values`` lacks are null."""
    over = {**values, **{key: None for key in default if key not in values}}
    for key, below in default.items():
        value = over[key]
        if isinstance(below, Mapping) and isinstance(value, Mapping) and key != SPACE and not _other_source(key, below, value):
            over[key] = _without_defaults(below, value)
    return over


def _other_source(key: str, below: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return key == "data" and "source" in value and value["source"] != below.get("source")


def _refuse_secrets(value: Any, key: str) -> None:
    """``InputError`` if a text below ``key`` holds a password or token: all settings are kept in the workspace and in MLflow."""
    if isinstance(value, Mapping):
        for name, below in value.items():
            _refuse_secrets(below, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            _refuse_secrets(item, key)
    elif isinstance(value, str) and has_secret(value):
        raise InputError(f"{key}: holds a password or token ({masked(value)}), and settings are kept in the clear: leave it out")


def _validate(values: dict[str, Any]) -> Config:
    try:
        config = TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        raise InputError(_explain(error.errors())) from None
    return _check_names(config)


def _check_names(config: Config) -> Config:
    """Names and parameters that a registry knows, checked before hours of work rather than after; parameters get their types."""
    source = config.data.get("source")
    if source not in DATASETS:
        raise InputError(f"data.source: unknown {source!r}; one of {', '.join(DATASETS)}")
    data = check_parameters(DATASETS[source], {key: value for key, value in config.data.items() if key != "source"}, "data")
    sampler = config.mix.sampler
    if sampler.sigma_min >= sampler.sigma_max:
        raise InputError(f"mix.sampler.sigma_min: expected less than sigma_max {sampler.sigma_max:g}, got {sampler.sigma_min:g}")
    check_name("mix.operator", config.mix.operator, OPERATORS)
    ratio_grid(config.plan)
    if sampler.churn > 0 and sampler.solver != "heun":
        raise InputError(f"mix.sampler.churn: only solver heun adds noise, not {sampler.solver}; choose heun, or churn 0")
    annotate = check_annotators(config.annotate)
    check_asked(annotate, "annotate.annotator", annotate.annotator)
    for name in config.evaluate.posthoc:
        check_name("evaluate.posthoc", name, POSTHOC)
    if any(letter in (config.register.name or "") for letter in REGISTRY_FORBIDS):
        raise InputError(f"register.name: expected a name without {' '.join(REGISTRY_FORBIDS)}, got {config.register.name!r}")
    train = check_train(config.train, annotate)
    _check_sets(train, config.plan)
    annotate = check_teacher(train, annotate)
    shifts = {name: _check_shift(f"evaluate.shifts.{name}", name, shift) for name, shift in config.evaluate.shifts.items()}
    evaluate = replace(config.evaluate, shifts=shifts)
    return replace(config, data={"source": source, **data}, train=train, annotate=annotate, evaluate=evaluate)


def _check_sets(train: TrainConfig, plan: PlanConfig) -> None:
    for name, method in train.chosen.items():
        sets = method.mixed.sets if method.mixed else None
        if sets is not None and sets > plan.sets_per_pair:
            raise InputError(
                f"train.methods.{name}.mixed.sets: expected no more than the {plan.sets_per_pair} of plan.sets_per_pair, got {sets}"
            )


def _check_shift(where: str, name: str, shift: ShiftConfig) -> ShiftConfig:
    check_folder_name(where, name)
    return check_shift(shift, where)


def _explain(errors: Sequence[Any]) -> str:
    """One line for pydantic's first error, with the dotted key and, for an unknown one, the keys that are allowed."""
    error = errors[0]
    path = [str(part) for part in error["loc"]]
    if error["type"] == "unexpected_keyword_argument":
        allowed = ", ".join(_keys(path[:-1]))
        return f"{'.'.join(path)}: no such setting; allowed: {allowed}"
    if error["type"] == "missing":
        return f"{'.'.join(path)}: missing; it must be set"
    # pydantic has an error for each alternative of a union, and ends its path with the alternative; the user knows only the key.
    while path and not _keys(path[:-1], path[-1]) and len(path) > 1:
        path.pop()
    alternatives = [expected(other) for other in errors if [str(part) for part in other["loc"][: len(path)]] == path]
    reason = " or ".join(dict.fromkeys(alternatives)).replace(" or expected ", " or ")
    return f"{'.'.join(path)}: {reason}, got {error['input']!r}"


def _keys(path: Sequence[str], last: str | None = None) -> list[str]:
    """Setting names of the section at ``path``; with ``last``, only that one if it is a setting there."""
    kind: Any = Config
    for part in path:
        hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        kind = _section(hints[part]) if part in hints else (_section(get_args(kind)[1]) if get_origin(kind) is dict else None)
    if not dataclasses.is_dataclass(kind):
        return [last] if last is not None and get_origin(kind) is dict else []
    names = [field.name for field in dataclasses.fields(kind)]
    return names if last is None else [name for name in names if name == last]


def _section(hint: Any) -> Any:
    """The dataclass in ``X | None``, or the hint itself."""
    if get_origin(hint) in (Union, UnionType):
        return next((item for item in get_args(hint) if dataclasses.is_dataclass(item)), hint)
    return hint
