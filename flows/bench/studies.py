"""Studies: controlled experiments on one question each, as YAML files (configs/research), and the workspaces that they share."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from csm import storage
from csm.errors import InputError
from csm.parameters import STRICT, check_name
from flows.bench.recipe_plan import image_kinds, settings, with_methods
from flows.config import Config, load_config
from flows.config_errors import checked
from flows.config_layers import load_yaml, merge
from flows.progress import say

OF_METHOD = "method."
BASE = "{base}"  # in a value: the folder of the workspace in which nothing but methods differ
SETTINGS = ("evaluate.posthoc=[temperature]", "evaluate.shifts=null", "register.enabled=false", "train.loss=null")


@dataclass(frozen=True, config=STRICT)
class Study:
    """A question, and the trainings that answer it.

    Attributes:
        question, hope: what is asked, and what one hopes to see; sentences.
        configs: configurations on whose data it is asked, or paths of files.
        reference: the method that the others are compared with.
        methods: name -> in what each differs from the reference: ``method.X`` are keys of the method, ``like`` is another method that it
            differs from instead, all other keys are of the configuration, and give it images or labels of its own.
        annotators, encoders: that the methods name and the configurations do not have.
    """

    question: str
    hope: str
    configs: tuple[str, ...] = Field(min_length=1)
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    reference: str = "csm"
    annotators: dict[str, Any] = Field(default_factory=dict)
    encoders: dict[str, Any] = Field(default_factory=dict)


@plain_dataclass(frozen=True)
class Arm:
    """A method of a study on the data of one configuration.

    Attributes:
        study, name, config: which; the reference has its own name.
        place: name of the workspace that trains it.
        run: its name there, which other studies share if it is the same method.
        like: the method that ``changes`` are laid over.
        world: what else of the configuration is changed.
    """

    study: str
    name: str
    config: str
    place: str
    run: str
    like: str
    changes: dict[str, Any]
    world: dict[str, Any]

    @property
    def data(self) -> str:
        """Short name of the configuration, and of the workspace with its own images and labels."""
        return dataset(self.config)


def study_names() -> list[str]:
    """Names of the bundled studies."""
    return sorted(entry.name.removesuffix(".yaml") for entry in files("flows.configs").joinpath("research").iterdir())


def read_studies() -> dict[str, Study]:
    """The bundled studies by name."""
    return {name: parse_study(name, _read(name)) for name in study_names()}


def parse_study(name: str, values: Any) -> Study:
    """The study called ``name`` of what stands in its file.

    Raises:
        InputError: a key is unknown, or lacks.
    """
    try:
        return checked(Study, values)
    except InputError as error:
        raise InputError(f"study {name}: {error}") from None


def choose_studies(asked: Sequence[str], studies: Mapping[str, Study], datasets: Sequence[str] = ()) -> dict[str, Study]:
    """Those that were ``asked`` for, each once, on the data of ``datasets``; all if none were.

    A study is left out, and that is said of one that was asked for, if it asks nothing about any of the ``datasets``.

    Raises:
        InputError: an unknown study, or a data set that none of these studies has.
    """
    for name in asked:
        check_name("STUDY", name, studies)
    chosen = {name: studies[name] for name in dict.fromkeys(asked or studies)}
    known = sorted({dataset(config) for study in chosen.values() for config in study.configs})
    for name in datasets:
        check_name("--datasets", name, known)
    kept = {name: [one for one in study.configs if not datasets or dataset(one) in datasets] for name, study in chosen.items()}
    for name in asked:
        if not kept[name]:
            say(f"research: {name} is not asked about {', '.join(datasets)}: left out")
    return {name: replace(chosen[name], configs=tuple(configs)) for name, configs in kept.items() if configs}


def dataset(config: str) -> str:
    """Short name of a configuration, or of its file."""
    return Path(config).stem


def arms(name: str, study: Study) -> list[Arm]:
    """The methods of a study, its reference first, configuration by configuration."""
    found = []
    for config in study.configs:
        for arm, changed in ({study.reference: {}} | study.methods).items():
            changes = {key.removeprefix(OF_METHOD): value for key, value in changed.items() if key.startswith(OF_METHOD)}
            world = {key: value for key, value in changed.items() if not key.startswith(OF_METHOD) and key != "like"}
            like = changed.get("like", study.reference)
            place = dataset(config) + (f"-{storage.digest(world)[:8]}" if world else "")
            run = f"{name}.{arm}" if changes else like
            found.append(Arm(name, arm, config, place, run, like, changes, world))
    return found


def place_config(
    place: str,
    chosen: Mapping[str, Study],
    studies: Mapping[str, Study],
    base: str,
    seeds: int,
    given: Sequence[str] = (),
) -> Config:
    """The configuration of the workspace ``place`` with the methods of the ``chosen`` studies that are trained there.

    Annotators, encoders and kinds of images are those of all ``studies`` there, so that the next study finds what it needs.

    Args:
        base: folder of the workspace with the images and labels of the configuration itself.
        given: overrides of the user, KEY=VALUE.

    Raises:
        InputError: the settings of a study do not fit the configuration.
    """
    everyone = [arm for name, study in studies.items() for arm in arms(name, study) if arm.place == place]
    here = [arm for arm in everyone if arm.study in chosen]
    world = json.loads(json.dumps(here[0].world).replace(BASE, base))
    more = [f"annotate.{key}={json.dumps(_merged(studies, everyone, key))}" for key in ("encoders", "annotators")]
    overrides = [
        *SETTINGS,
        *given,
        *more,
        *(f"{key}={json.dumps(value)}" for key, value in world.items()),
        f"train.seeds={seeds}",
    ]
    config = load_config(here[0].config, overrides)
    known, optimizer = config.train.methods, config.train.optimizer
    methods = {}
    for arm in everyone:
        check_name(f"study {arm.study}: methods.{arm.name}.like", arm.like, known)
        methods[arm.run] = settings(known[arm.like], arm.changes, f"study {arm.study}: methods.{arm.name}.method", optimizer)
    compared = list(dict.fromkeys(arm.run for arm in here))
    return with_methods(config, methods, {"plan.kinds": image_kinds(methods), "train.compare": compared})


def _merged(studies: Mapping[str, Study], everyone: Sequence[Arm], key: str) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(arm.study for arm in everyone):
        merged = merge(merged, getattr(studies[name], key))
    return merged


def _read(name: str) -> Any:
    text = files("flows.configs").joinpath("research", f"{name}.yaml").read_text(encoding="utf-8")
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"study {name}: not valid YAML: {' '.join(str(error).split())}") from None
