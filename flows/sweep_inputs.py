"""What trials train on: the images and labels of the workspace, or of a workspace for each way to make them that a sweep tries."""

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from csm import storage
from csm.errors import InputError
from csm.locations import copy, is_remote
from csm.methods import MixedTerm
from csm.search.domains import Range
from csm.search.space import SearchSpace
from flows.artifacts import Workspace
from flows.config import Config, plain
from flows.progress import say
from flows.reuse import refuse_replacing, run_stages, stale
from flows.run import STAGES, verb_stages
from flows.stages import Context
from flows.sweep_records import SweepFolder
from flows.sweeps import trial_config

FOLDERS = {  # what each stage leaves for trials, and for the stages after it
    "prepare": ("dataset.json", "real", "truth"),
    "generator": ("generator",),
    "fit-teacher": ("annotators",),
    "fit-annotators": ("annotators",),
    "plan": ("plan.parquet",),
    "mix": ("mixed",),
    "annotate": ("annotations",),
}
IMAGES = tuple(name for name in FOLDERS if "annotat" not in name)  # the stages that make no labels
MAKING = ("data", "generator", "plan", "mix", "annotate")  # sections that say what images and labels there are
CHOOSING = ("annotate.annotator",)  # this one only says whose


def input_part(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a trial's values by which its images or their labels differ."""
    return {key: value for key, value in sorted(values.items()) if _is_input(key)}


def input_choices(space: SearchSpace) -> list[dict[str, Any]]:
    """Every ``input_part`` that trials may have; only the empty one if they all train on the same.

    Raises:
        InputError: one is a range: each value of it would need images of its own.
    """
    found: list[dict[str, Any]] = [{}]
    for key, domain in space.entries:
        if isinstance(domain, Range):
            if _is_input(key):
                raise InputError(
                    f"tune.space.{key}: every value needs images or labels of its own; give a list of choices, not a range"
                )
            continue
        options = [
            ({key: value} if _is_input(key) else {}) | below
            for value, branch in zip(domain.values, domain.branches, strict=True)
            for below in input_choices(branch)
        ]
        found = [before | option for before in found for option in _unique(options)]
    return _unique(input_part(values) for values in found)


def input_config(config: Config, values: Mapping[str, Any]) -> Config:
    """A configuration whose stages before ``train`` make what all trials with the input part ``values`` need, and nothing for others."""
    corners = [trial_config(config, corner) for _, corner in config.tune.search_space.corners()] or [trial_config(config, {})]
    base = trial_config(config, values)
    if not any(corner.mixes for corner in corners):
        return base
    names = dict.fromkeys(name for corner in corners for name in corner.annotators)
    terms = [MixedTerm(annotator=name, images=base.plan.kinds[0], schedule="uniform") for name in names]
    methods = {f"sweep-{number}": {"mixed": asdict(term)} for number, term in enumerate(terms)}
    more = {f"train.methods.{name}": plain(method) for name, method in methods.items()}
    # One that a trial asks for in place of the base's own, which need not be among them.
    return base.with_values({**more, "train.compare": list(methods), "annotate.annotator": next(iter(names))})


def make_inputs(context: Context, folder: SweepFolder) -> dict[str, Workspace]:
    """Bring up to date what trials train on: digest of an ``input_part`` -> the workspace that holds it, below the folder of the sweep.

    Each is filled with links to what the workspace of ``context``, or another of them, already holds and that is the same. If trials do not
    differ in their images, these are made in the workspace itself, for `csm run` to find. Labels are not: the annotators that a sweep asks
    are others than those of a comparison, which would then be out of date.
    """
    parts = input_choices(context.config.tune.search_space)
    made: dict[str, Workspace] = {}
    for number, part in enumerate(parts):
        digest = storage.digest(part)
        workspace = Workspace(folder.inputs / digest, {})
        if part:
            values = ", ".join(f"{key} {value}" for key, value in part.items())
            say(f"tune: images and labels {number + 1} of {len(parts)}: {values}")
        config = input_config(context.config, part)
        if not part:
            _run(context, config, IMAGES)
        below = replace(context, workspace=workspace)
        link_inputs(replace(below, config=config), [context.workspace, *made.values()])
        _run(below, config)
        context._connected = below._connected  # Ray is started once
        made[digest] = workspace
    return made


def _run(context: Context, config: Config, stages: Collection[str] = FOLDERS) -> None:
    """Run those of ``stages`` that come before training under ``config``."""
    inner = replace(context, config=config)
    names = [name for name in verb_stages("run", config) if name in stages]
    refuse_replacing(inner, names)
    run_stages(inner, names)
    context._connected = inner._connected


def link_inputs(context: Context, sources: Sequence[Workspace]) -> None:
    """Link into the workspace of ``context`` what its configuration would make again, or in part, as one of ``sources`` holds it."""
    target = context.workspace
    for name in [name for name in verb_stages("run", context.config) if name in FOLDERS]:
        if stale(context, name) is None:
            continue
        is_new = target.record(name) is None
        fresh = next((source for source in sources if stale(replace(context, workspace=source), name) is None), None)
        if fresh is None and STAGES[name].incremental and is_new:  # it knows itself what of it is still good
            fresh = next((source for source in sources if source.record(name) is not None), None)
        if fresh is None:
            continue
        if not is_new:
            target.drop(name, STAGES[name].outputs(target, context.config))
        for place in FOLDERS[name]:
            _link(fresh.root / place, target.root / place)
        record = fresh.record(name)
        assert record is not None
        target.write_record(record)


def _link(source: Path, target: Path) -> None:
    """Give the file, or all files below the folder, at ``source`` a second name below ``target``; files are only ever replaced whole.

    A store, which has no second names, copies them itself.
    """
    if is_remote(source):
        copy(source, target)
        return
    files = [path for path in source.rglob("*") if path.is_file()] if source.is_dir() else [source] if source.is_file() else []
    for path in files:
        name = target / path.relative_to(source) if path != source else target
        if name.exists() or path.name.endswith(".tmp"):
            continue
        name.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, name)
        except OSError:  # a file system without links
            shutil.copy2(path, name)


def _is_input(key: str) -> bool:
    return key.partition(".")[0] in MAKING and key not in CHOOSING


def _unique(values: Any) -> list[dict[str, Any]]:
    return list({storage.digest(value): value for value in values}.values())
