"""plan: one row for every image to mix."""

from dataclasses import asdict

from csm import tables
from csm.datasets import RealDataset
from csm.planning import check_pairs, make_plan, plan_digest
from flows.artifacts import StageRecord
from flows.progress import say
from flows.stages import Context, Made, Stage


def _run(context: Context, record: StageRecord) -> Made:
    info = RealDataset.load(context.workspace.root).info
    plan = make_plan(info.n_classes, info.digest, record.inputs["generator"], context.config.plan)
    tables.write(plan, context.workspace.plan, tables.PLAN)
    pairs = plan.select("class_a", "class_b").n_unique()
    sets, ratios = context.config.plan.sets_per_pair, context.config.plan.ratios
    say(f"  {pairs} pairs x {sets} sets x {ratios} ratios, shards: {plan['shard'].n_unique()}")
    return Made(len(plan), plan_digest(plan))


def _check(context: Context) -> None:
    """The pairs must be classes of the data, which are known once it is prepared."""
    if context.workspace.dataset.is_file():
        check_pairs(context.config.plan.pairs, RealDataset.load_info(context.workspace.root).n_classes)


STAGE = Stage(
    name="plan",
    code_version=1,
    inputs=("prepare", "generator"),
    settings=lambda config: {"plan": asdict(config.plan)},
    outputs=lambda workspace, config: [workspace.plan],
    check=_check,
    run=_run,
)
