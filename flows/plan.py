"""plan: one row for every image to mix."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from cluster.shards import plan_shards
from csm.datasets import DatasetInfo, RealDataset
from csm.encoders import ENCODERS, Sources, encode
from csm.pairs import (
    Pairs,
    all_pairs,
    check_per_class,
    confusion_distances,
    listed_pairs,
    nearest_pairs,
    prototype_distances,
)
from csm.plan_rules import AUTO, explain
from csm.planning import MEASURED, REAL, SEMANTIC, PlanConfig, ratio_grid, write_plan
from csm.reannotation.prototypes import class_prototypes
from csm.training_images import TrainingImages
from flows.artifacts import LEFT_OUT, StageRecord
from flows.config import Config, check_sets
from flows.fit_teacher import members
from flows.progress import say
from flows.stages import Context, Made, Stage


def _run(context: Context, record: StageRecord) -> Made:
    config, path = context.resolved.plan, context.workspace.plan
    info = RealDataset.load_info(context.workspace.root)
    pairs = _pairs(context)
    labels = TrainingImages(context.workspace.real, info.shape).labels if REAL in config.kinds else None
    rows, digest = write_plan(path, pairs, info.digest, record.inputs["generator"], config, labels)
    say(f"  {rows:,} images: {_words(config, len(pairs), info)}, in {len(plan_shards(path)):,} shards")
    for line in explain(context.config.plan, info.n_classes, info.counts["train"], len(pairs)):
        say(f"  auto: {line}")
    return Made(rows, digest)


def _words(config: PlanConfig, pairs: int, info: DatasetInfo) -> str:
    """What is planned, for the user."""
    of_all = f"{pairs:,} of {info.n_classes * (info.n_classes - 1) // 2:,} pairs"
    sets = f"{of_all} x {config.sets} sets x {len(ratio_grid(config))} ratios"
    if config.kinds == (SEMANTIC,):
        return sets
    of_sets = [kind for kind in config.kinds if kind != REAL]
    parts = [f"{sets}, each {', '.join(of_sets)}"] if of_sets else []
    return " and ".join([*parts, *([f"{info.counts['train']:,} real ones"] if REAL in config.kinds else [])])


def _pairs(context: Context) -> Pairs:
    """The pairs of ``plan.pairs``."""
    config, info = context.resolved.plan, RealDataset.load_info(context.workspace.root)
    if config.pairs in MEASURED:
        return nearest_pairs(_distances(context), int(config.pairs_per_class))
    return (
        all_pairs(info.n_classes)
        if isinstance(config.pairs, str)
        else listed_pairs(config.pairs, info.n_classes, info.class_names)
    )


def _distances(context: Context) -> torch.Tensor:
    """Distances (K, K) of the classes: what the teacher confuses on validation images, or class means of its first member's features."""
    config, workspace = context.resolved, context.workspace
    data = RealDataset.load(workspace.root)
    kind, split = ("classifier", "train") if config.plan.pairs == "prototypes" else ("teacher", "val")
    images, labels = data.split(split)
    said = encode(ENCODERS[kind].load(Sources(workspace.root, members(workspace, config))), images)
    if config.plan.pairs == "prototypes":
        return prototype_distances(class_prototypes([(said, labels)], data.info.n_classes))
    return confusion_distances(said, labels, data.info.n_classes)


def _check(context: Context) -> None:
    """The pairs must be classes of the data, and sets enough for the methods: both are known once it is prepared."""
    if not context.workspace.dataset.is_file():
        return
    plan = context.resolved.plan
    if plan.pairs in MEASURED:
        check_per_class(int(plan.pairs_per_class), RealDataset.load_info(context.workspace.root).n_classes)
    else:
        _pairs(context)
    check_sets(context.config.train, plan)


def _settings(config: Config) -> dict[str, Any]:
    """Those that the rows depend on; what other policies and grids need would only call a good plan out of date."""
    plan = config.plan
    needed = {
        "pairs_per_class": plan.pairs in MEASURED,
        "grid": plan.grid != LEFT_OUT["plan.grid"],
        "alpha": plan.grid == "beta",
        "kinds": plan.kinds != (SEMANTIC,),
        "noise": plan.noise != LEFT_OUT["plan.noise"],
    }
    return {"plan": {name: value for name, value in asdict(plan).items() if needed.get(name, True)}}


def _grows(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether only kinds of images were added, which leaves the rows of the others as they are."""
    plans = [dict(settings["plan"]) for settings in (before, after)]
    kinds = [set(plan.pop("kinds", (SEMANTIC,))) for plan in plans]
    return plans[0] == plans[1] and kinds[0] <= kinds[1]


STAGE = Stage(
    name="plan",
    code_version=1,
    inputs=("prepare", "generator"),
    # auto: before the data are known
    more_inputs=lambda config: ("fit-teacher",) if config.plan.pairs in (*MEASURED, AUTO) else (),
    settings=_settings,
    outputs=lambda workspace, config: [workspace.plan],
    check=_check,
    run=_run,
    grows=_grows,
)


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
