"""Configurations: YAML over the defaults, checked as a whole before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from cluster.resources import ResourcesConfig
from csm.datasets import DATASETS
from csm.datasets.shifts import ShiftConfig, check_shift
from csm.errors import InputError
from csm.generators.conditioning import OPERATORS
from csm.generators.config import GeneratorConfig
from csm.generators.importing import IMPORTERS
from csm.locations import is_remote
from csm.methods import Method
from csm.mixing import NOISED
from csm.parameters import STRICT, check_name, check_parameters
from csm.planning import PlanConfig, check_kinds, ratio_grid
from csm.posthoc import POSTHOC
from csm.precision import Precision
from csm.sampling import SamplerConfig
from csm.tables import KINDS
from flows.annotators import AnnotateConfig, check_annotators, check_asked, check_folder_name
from flows.config_errors import checked
from flows.config_layers import merge, nested, parse_override, read, read_bundled, without_defaults, without_null, without_space
from flows.masking import has_secret, masked
from flows.methods import TrainConfig, check_teacher, check_train
from flows.sweeps import TuneConfig, check_tune

REGISTRY_FORBIDS = "/:%'\""  # in the name of a model


@dataclass(frozen=True, config=STRICT)
class MixConfig:
    """How mixed images are made.

    Attributes:
        sampler: the solver.
        batch_size: rows that go through the generator together.
        operator: that mixes two classes, see ``OPERATORS``.
        precision, compile: of the generator's network, see ``accelerate``.
        strength: noise level from which images of the kind "noised" are denoised again.
        guidance: scale of classifier-free guidance, of a generator that can be guided; 1 is none, None what the generator was imported
            with.
    """

    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    batch_size: int = Field(default=256, ge=1)
    operator: str = "embedding"
    precision: Precision = "auto"
    compile: bool = False
    strength: float = Field(default=1.0, gt=0)
    guidance: float | None = Field(default=None, ge=0, allow_inf_nan=False)


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
    def own_guidance(self) -> float:
        """Scale of guidance of the generator as it is: that with which it was imported."""
        return self.generator.guidance if self.generator.path else 1.0

    @property
    def guidance(self) -> float:
        """Scale of guidance under which images are made; 1 is none."""
        return self.own_guidance if self.mix.guidance is None else self.mix.guidance

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
            values = merge(values, nested(key, value))
        return _validate(without_null(values))

    def to_yaml(self) -> str:
        """The resolved configuration; loading it gives an equal one."""
        values = plain(asdict(self))
        return yaml.safe_dump(without_defaults(read_bundled("default"), values), sort_keys=False, allow_unicode=True)


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Return configuration ``name``, laid over ``default.yaml``, with ``overrides`` of the form ``dotted.key=value`` (YAML values).

    A ``tune.space`` of the configuration replaces the default's whole; overrides change, add or (null) remove keys of it.

    Args:
        name: of a bundled configuration, or a path that ends in .yaml or .yml.

    Raises:
        InputError: unknown name, unreadable YAML, unknown key, wrong type or value out of range; the message names the dotted key.
    """
    given = read(name)
    given.setdefault("name", Path(name).stem)
    values = merge(without_space(read_bundled("default"), given), given)
    for override in overrides:
        values = merge(values, parse_override(override))
    _refuse_secrets(values, "")
    config = _validate(without_null(values))
    # Of a sweep that stands in a file, only csm tune asks whether it fits the other settings: it must not stand in their way.
    if any(override.startswith("tune") for override in overrides):
        check_tune(config)
    return config


def plain(value: Any) -> Any:
    """``value`` with tuples as lists and paths as strings, all the way down: what JSON and YAML can hold."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) or is_remote(value) else value


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
    return _check_names(checked(Config, values))


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
    check_kinds(config.plan.kinds)
    if NOISED in config.plan.kinds and not sampler.sigma_min < config.mix.strength <= sampler.sigma_max:
        raise InputError(
            f"mix.strength: expected more than sigma_min {sampler.sigma_min:g} and no more than sigma_max {sampler.sigma_max:g} of "
            f"mix.sampler, got {config.mix.strength:g}"
        )
    _check_guidance(config)
    if sampler.churn > 0 and sampler.solver != "heun":
        raise InputError(f"mix.sampler.churn: only solver heun adds noise, not {sampler.solver}; choose heun, or churn 0")
    annotate = check_annotators(config.annotate)
    check_asked(annotate, "annotate.annotator", annotate.annotator)
    for name in config.evaluate.posthoc:
        check_name("evaluate.posthoc", name, POSTHOC)
    if any(letter in (config.register.name or "") for letter in REGISTRY_FORBIDS):
        raise InputError(f"register.name: expected a name without {' '.join(REGISTRY_FORBIDS)}, got {config.register.name!r}")
    train = check_train(config.train, annotate)
    check_sets(train, config.plan)
    _check_images(train, config.plan)
    annotate = check_teacher(train, annotate)
    shifts = {name: _check_shift(f"evaluate.shifts.{name}", name, shift) for name, shift in config.evaluate.shifts.items()}
    evaluate = replace(config.evaluate, shifts=shifts)
    return replace(config, data={"source": source, **data}, train=train, annotate=annotate, evaluate=evaluate)


def _check_guidance(config: Config) -> None:
    """Of a generator that is made here; of an imported one the stage `generator` sees to it."""
    generator, guidance = config.generator, config.guidance
    if generator.path or generator.kind in IMPORTERS:
        return
    if generator.guidance != 1:
        raise InputError("generator.guidance: is of an imported model, and this one is made here; set mix.guidance")
    trained = generator.kind in ("auto", "unet")
    if guidance == 1 or (trained and generator.label_dropout):
        return
    remedy = (
        "set generator.label_dropout=0.1, which trains it anew" if trained else "only trained and imported networks can be guided"
    )
    raise InputError(f"mix.guidance: expected 1, got {guidance:g}: this generator knows no images without a class; {remedy}")


def check_sets(train: TrainConfig, plan: PlanConfig) -> None:
    """``InputError`` if a method asks for more sets of a pair than are planned; of a plan that is not resolved nothing is known yet."""
    if isinstance(plan.sets_per_pair, str):
        return
    for name, method in train.chosen.items():
        sets = method.mixed.sets if method.mixed else None
        if sets is not None and sets > plan.sets_per_pair:
            raise InputError(
                f"train.methods.{name}.mixed.sets: expected no more than the {plan.sets_per_pair} of plan.sets_per_pair, got {sets}"
            )


def _check_images(train: TrainConfig, plan: PlanConfig) -> None:
    """The images that chosen methods train on must be planned."""
    asked = [(name, kind) for name, method in train.chosen.items() if method.mixed for kind in method.mixed.kinds]
    needed = ", ".join(kind for kind in KINDS if kind in (*plan.kinds, *(kind for _, kind in asked)))
    for name, kind in asked:
        if kind not in plan.kinds:
            raise InputError(f"train.methods.{name}.mixed.images: {kind} images are not planned: --set 'plan.kinds=[{needed}]'")


def _check_shift(where: str, name: str, shift: ShiftConfig) -> ShiftConfig:
    check_folder_name(where, name)
    return check_shift(shift, where)
