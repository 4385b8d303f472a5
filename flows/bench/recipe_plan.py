"""What `csm bench recipe` compares: the methods, what each is to the recipe, and what is searched for it (configs/bench/recipe.yaml)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from csm.errors import InputError
from csm.methods import Method
from csm.optimization import OptimizerConfig
from csm.parameters import STRICT, check_name
from csm.search.space import SearchSpace, parse_space
from csm.tables import KINDS
from flows.config import Config, plain
from flows.config_errors import checked
from flows.config_layers import config_names, load_yaml, merge, nested

BUNDLED = "bench/recipe.yaml"
KNOWN_TRUTH = "gaussians"  # the data source whose true posterior is known
BASELINES = ("loss", "pixel-mixing")
MILESTONES = "optimizer.milestones"
EPOCHS = "optimizer.epochs"  # a value such as 3x is as many times the epochs of the data set's configuration


@dataclass(frozen=True, config=STRICT)
class Entry:
    """A method of the plan.

    Attributes:
        kind: what it is to the recipe. The best of the losses and pixel mixings is what the recipe must beat; a ceiling knows the true
            posterior, and is left out where nobody does; an ensemble of the recipe costs more and is only shown.
        space: key of the method's settings -> what it may be, beside the ``common`` ones of the plan; null removes one of those.
        like: another method of the plan, whose chosen settings it has: nothing is searched for it.
        change: key of the method's settings -> value, laid over those.
    """

    kind: Literal["recipe", "paper", "loss", "pixel-mixing", "ablation", "ceiling", "ensemble"]
    space: dict[str, Any] = Field(default_factory=dict)
    like: str | None = None
    change: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Size:
    """How much is done.

    Attributes:
        datasets: names of configurations, or paths of files.
        methods: of the plan; empty: all of it.
        trials: settings tried for each method, those that it has among them.
        doublings: how many times the epochs of a method's best trial are doubled, as long as that makes it better.
        trial_seeds: classifiers of each trial.
        seeds: of each method with the settings that were chosen.
        settings: laid over those of the plan.
    """

    datasets: tuple[str, ...] = Field(min_length=1)
    methods: tuple[str, ...] = ()
    trials: int = Field(default=6, ge=1)
    doublings: int = Field(default=0, ge=0)
    trial_seeds: int = Field(default=1, ge=1)
    seeds: int = Field(default=5, ge=1)
    settings: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class RecipePlan:
    """The whole comparison.

    Attributes:
        full, quick: two sizes of it, of which a plan of one's own may leave the second out.
        methods: by name; one that the configurations do not know needs ``like``.
        common: what is searched for every method that has a search of its own.
        settings: dotted key -> value, laid over the configuration of every data set.
    """

    full: Size
    quick: Size | None = None
    methods: dict[str, Entry] = Field(default_factory=dict)
    common: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def recipe(self) -> str:
        """Name of the method that is to win."""
        return next(name for name, entry in self.methods.items() if entry.kind == "recipe")

    def of_kind(self, *kinds: str) -> list[str]:
        """Names of the methods of ``kinds``."""
        return [name for name, entry in self.methods.items() if entry.kind in kinds]

    def space(self, name: str) -> SearchSpace:
        """What is searched for the method ``name``."""
        return parse_space(merge(self.common, self.methods[name].space), f"methods.{name}.space")

    def with_needed(self, names: Sequence[str]) -> tuple[str, ...]:
        """``names``, each once, in the plan's order, and what those that are ``like`` another need."""
        asked = {*names, *(like for name in names if (like := self.methods[name].like))}
        return tuple(name for name in self.methods if name in asked)


def read_plan(path: Path | None = None) -> RecipePlan:
    """The plan in the file ``path``, or the bundled one.

    Raises:
        InputError: it cannot be read, a key is unknown, or a name or space in it cannot be used.
    """
    where = f"--plan {path}: " if path else ""
    if path and not path.is_file():
        raise InputError(f"{where}{'is a folder, not a file' if path.is_dir() else 'the file does not exist'}")
    try:
        text = (path or files("flows.configs").joinpath(BUNDLED)).read_text(encoding="utf-8")
        read = load_yaml(text)
        plan = checked(RecipePlan, {} if read is None else read)
    except yaml.YAMLError as error:
        raise InputError(f"{where}not valid YAML: {' '.join(str(error).split())}") from None
    except InputError as error:
        raise InputError(f"{where}{error}") from None
    if len(plan.of_kind("recipe")) != 1:
        raise InputError(f"{where}methods: expected one of kind recipe, got {len(plan.of_kind('recipe'))}")
    for size in filter(None, (plan.full, plan.quick)):
        for name in size.methods:
            check_name(f"{where}methods", name, plan.methods)
    for name, entry in plan.methods.items():
        if entry.like:
            check_name(
                f"{where}methods.{name}.like", entry.like, [other for other in plan.methods if not plan.methods[other].like]
            )
        if entry.like and entry.space:
            raise InputError(f"{where}methods.{name}.space: it has the settings of {entry.like}, so there is nothing to search")
        if plan.space(name).size is None:
            raise InputError(f"{where}methods.{name}.space: {plan.space(name).endless()[0]} has no end; give a list of choices")
    return plan


def check_datasets(names: Sequence[str], where: str) -> None:
    """``InputError`` unless each of ``names``, which stand at ``where``, is a configuration, or a path of one."""
    for name in names:
        if Path(name).suffix not in (".yaml", ".yml") and (name == "default" or name not in config_names()):
            known = ", ".join(known for known in config_names() if known != "default")
            raise InputError(f"{where}: unknown {name!r}; give a .yaml file or one of {known}")


def settings(method: Method, values: Mapping[str, Any], where: str, optimizer: OptimizerConfig) -> dict[str, Any]:
    """The settings of ``method`` with ``values`` of keys such as ``parameters.gamma`` laid over, as plain values; not checked.

    Args:
        where: who asks, for messages.
        optimizer: of all methods. ``optimizer.epochs`` may be ``3x``, times its epochs; milestones of the learning rate move with them.

    Raises:
        InputError: a key of a section that the method does not have.
    """
    merged = plain(asdict(method))
    for key, value in values.items():
        section = key.partition(".")[0]
        if section in ("mixed", "mixing") and merged[section] is None:
            raise InputError(f"{where}.{key}: the method has no {section}; leave it out")
        if key == EPOCHS and isinstance(value, str):
            times = re.fullmatch(r"([1-9]\d*)x", value)
            if not times:
                raise InputError(
                    f"{where}.{key}: expected a number of epochs, or times those of the data set such as 3x, got {value!r}"
                )
            value = int(times[1]) * optimizer.epochs
        merged = merge(merged, nested(key, value))
    before = asdict(optimizer) | method.optimizer
    if EPOCHS in values and MILESTONES not in values and before["milestones"]:
        longer = merged["optimizer"]["epochs"] / before["epochs"]
        merged = merge(merged, nested(MILESTONES, [round(longer * epoch) for epoch in before["milestones"]]))
    return merged


def base_settings(plan: RecipePlan, config: Config, name: str, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of the method ``name`` before a search: those of the configuration, or what its entry makes of another's.

    Args:
        chosen: method -> values that were chosen for it.

    Raises:
        InputError: no configuration knows the method.
    """
    entry = plan.methods[name]
    known, origin = config.train.methods, entry.like or name
    check_name(f"methods.{name}", origin, known)
    values = {**chosen.get(origin, {}), **entry.change}
    made = settings(known[origin], values, f"methods.{name}", config.train.optimizer)
    return {**made, "description": known[name].description} if name in known else made


def image_kinds(methods: Mapping[str, Mapping[str, Any]], spaces: Sequence[SearchSpace] = ()) -> list[str]:
    """Kinds of images that a plan must have for ``methods``, name -> settings, and for ``spaces``, of keys such as ``mixed.images``.

    Semantic mixtures are among them in any case.
    """
    asked = ["semantic", *(method["mixed"]["images"] for method in methods.values() if method.get("mixed"))]
    asked += [value for space in spaces for value in space.choices("mixed.images")]
    needed = {kind for images in asked for kind in ([images] if isinstance(images, str) else images)}
    return [kind for kind in KINDS if kind in needed]


def with_methods(config: Config, methods: Mapping[str, Mapping[str, Any]], changes: Mapping[str, Any]) -> Config:
    """``config`` with ``methods``, name -> whole settings, in place of those of these names, and ``changes`` of dotted keys."""
    return config.with_values({"train.methods": dict.fromkeys(methods)}, {"train.methods": methods, **changes})
