"""plan: one row for every image to mix."""

from dataclasses import asdict
from typing import Any

import torch

from cluster.shards import plan_shards
from csm.datasets import RealDataset
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
from csm.planning import MEASURED, ratio_grid, write_plan
from csm.reannotation.prototypes import class_prototypes
from flows.artifacts import StageRecord
from flows.config import Config, check_sets
from flows.fit_teacher import members
from flows.progress import say
from flows.stages import Context, Made, Stage


def _run(context: Context, record: StageRecord) -> Made:
    config, path = context.resolved.plan, context.workspace.plan
    info = RealDataset.load_info(context.workspace.root)
    pairs = _pairs(context)
    rows, digest = write_plan(path, pairs, info.digest, record.inputs["generator"], config)
    of_all = f"{len(pairs):,} of {info.n_classes * (info.n_classes - 1) // 2:,} pairs"
    ratios, shards = len(ratio_grid(config)), len(plan_shards(path))
    say(f"  {rows:,} images: {of_all} x {config.sets} sets x {ratios} ratios, in {shards:,} shards")
    for line in explain(context.config.plan, info.n_classes, info.counts["train"], len(pairs)):
        say(f"  auto: {line}")
    return Made(rows, digest)


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
    needed = {"pairs_per_class": plan.pairs in MEASURED, "grid": plan.grid != "uniform", "alpha": plan.grid == "beta"}
    return {"plan": {name: value for name, value in asdict(plan).items() if needed.get(name, True)}}


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
)


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
