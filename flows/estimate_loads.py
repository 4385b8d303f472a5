"""What each stage of a configuration has to compute, in images that go through its network."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.resources import Group, Pool
from csm.datasets import DatasetInfo
from csm.methods import Method
from csm.mixing import evaluations_per_image
from csm.optimization import OptimizerConfig
from csm.pixel_mixing import PIXEL_MIXING
from csm.planning import MEASURED, planned_images, ratio_grid
from csm.sampling import SamplerConfig
from flows.annotators import AUTO
from flows.config import Config
from flows.run import verb_stages
from flows.stages import resolve

FORWARD = 1 / 3  # of the arithmetic of a training step: forward, and backward to weights and to activations


@dataclass(frozen=True)
class Load:
    """The work of a stage.

    Attributes:
        stage: its name.
        images: that go through the network; of trainings, an image that is only measured counts a third.
        longest: of ``images``, those of the largest piece that is not shared by all workers; 0: there is none.
        together: workers that share a piece.
        cpus, gpus: of a worker.
        workers: most of them at once; 0: as many as there is room for.
        what: the work in words.
    """

    stage: str
    images: float
    longest: float
    cpus: float
    gpus: float
    workers: int
    what: str
    together: int = 1

    @property
    def kind(self) -> str:
        """Of device: "gpu", or "core"."""
        return "gpu" if self.gpus else "core"

    @property
    def devices(self) -> float:
        """That a worker takes: of 0.8 a whole one, as no second worker fits beside it; of 0.2 a fifth."""
        share = self.gpus or self.cpus
        return share if share >= 1 else 1 / math.floor(1 / share + 1e-6)


def loads(config: Config, info: DatasetInfo) -> list[Load]:
    """Loads of the stages of `csm run` that have a network to compute, from the configuration alone: as if nothing were done yet."""
    config = resolve(config, info)
    stages, found = verb_stages("run", config), [_train(config, info)]
    if "generator" in stages and not config.generator.path and config.generator.kind in ("auto", "unet"):
        found.append(_fit_generator(config))
    if "fit-teacher" in stages and not config.annotate.teacher.models:
        found.append(_teacher(config, info))
    if "mix" in stages:
        found += [_fit_annotators(config, info), *_mixing(config, info)]
    return sorted((load for load in found if load.images), key=lambda load: stages.index(load.stage))


def training_images(method: Method, optimizer: OptimizerConfig, counts: Mapping[str, int]) -> float:
    """Images of one training, or of one member's: those of every step, and a third of what is measured after every epoch and at the end."""
    per_epoch = max(1, counts["train"] // optimizer.batch_size) * optimizer.batch_size
    real = 2 if method.mixing and not PIXEL_MIXING[method.mixing.kind].replaces else 1
    seen, term = 0, method.mixed
    for epoch in range(optimizer.epochs):
        alone = term is not None and epoch < term.warm_start
        mixed = term is not None and (alone or term.weight_at(epoch + 0.5, optimizer.epochs) > 0)
        seen += per_epoch * ((0 if alone else real) + (term.per_real if term is not None and mixed else 0))
    return seen + FORWARD * ((optimizer.epochs + 1) * counts["val"] + counts["test"])


def _train(config: Config, info: DatasetInfo) -> Load:
    train, methods = config.train, config.train.chosen.values()
    optimizers = [train.optimizer_of(method) for method in methods]
    each = [training_images(method, optimizer, info.counts) for method, optimizer in zip(methods, optimizers, strict=True)]
    all_members = sum(method.members * images for method, images in zip(methods, each, strict=True))
    epochs = sorted({optimizer.epochs for optimizer in optimizers})
    count = train.seeds * sum(method.members for method in methods)
    what = f"{count:,} classifiers, {' or '.join(f'{number:,}' for number in epochs)} epochs"
    return _of_group("train", config.resources.train, train.seeds * all_members, max(each), what, train.workers)


def _teacher(config: Config, info: DatasetInfo) -> Load:
    from flows.fit_teacher import TEACHER
    from flows.methods import teacher_training

    optimizer, members = teacher_training(config.train, config.annotate).optimizer, config.annotate.members
    images = training_images(TEACHER, optimizer, info.counts)
    what = f"{members:,} classifiers, {optimizer.epochs:,} epochs"
    return _of_group("fit-teacher", config.resources.train, members * images, images, what, config.train.workers)


def _fit_generator(config: Config) -> Load:
    settings, group = config.generator, config.resources.fit
    images = settings.steps * settings.batch_size
    what = f"{settings.steps:,} steps of {settings.batch_size:,} images"
    return _of_group("generator", group, images, 0, what)  # all workers share every step


def _fit_annotators(config: Config, info: DatasetInfo) -> Load:
    encoders, images = config.annotate.encoders_of(config.annotators), info.counts["train"] + info.counts["val"]
    what = f"{images:,} images through {', '.join(encoders)}"
    return _of_pool("fit-annotators", config.resources.annotate, images if encoders else 0, images, what)


def _mixing(config: Config, info: DatasetInfo) -> list[Load]:
    """Mixing, where an image of another kind counts by its network evaluations next to a semantic mixture, and annotation."""
    plan, n = config.plan, info.n_classes
    ratios, possible = ratio_grid(config.plan), n * (n - 1) // 2
    chosen = plan.pairs in MEASURED
    pairs = min(possible, n * int(plan.pairs_per_class)) if chosen else possible if plan.pairs == "all" else len(plan.pairs)
    of_sets = pairs * plan.sets * len(ratios)
    shard = min(of_sets, max(1, plan.shard_rows // len(ratios)) * len(ratios))
    each = evaluations_per_image(config.mix.sampler, config.mix.operator, ratios.tolist(), guidance=config.guidance)
    weights = mixing_weights(plan.kinds, config.mix.sampler, config.mix.operator, ratios.tolist())
    most = "at most " if chosen else ""
    images = of_sets * sum(weights.values())
    what = f"{most}{images:,.0f} images x {each:g} evaluations"
    found = [_of_pool("mix", config.resources.mix, images, shard if images else 0, what)]
    encoders = config.annotate.encoders_of(config.annotators)
    if encoders:
        auto = ", as if auto were all its candidates" if AUTO in config.annotators else ""
        images = sum(planned_images(plan, pairs, info.counts["train"]).values())
        what = f"{most}{images:,} images through {', '.join(encoders)}{auto}"
        found.append(_of_pool("annotate", config.resources.annotate, images, shard, what))
    return found


def mixing_weights(kinds: Sequence[str], sampler: SamplerConfig, operator: str, ratios: Sequence[float]) -> dict[str, float]:
    """Kind -> network evaluations of one of its images, in those of a semantic mixture."""
    each = evaluations_per_image(sampler, operator, ratios)
    return {kind: evaluations_per_image(sampler, operator, ratios, kind) / each for kind in kinds}


def _of_pool(stage: str, pool: Pool, images: float, longest: float, what: str) -> Load:
    return Load(stage, images, longest, pool.cpus, pool.gpus, pool.max_actors, what)


def _of_group(stage: str, group: Group, images: float, longest: float, what: str, together: int = 1) -> Load:
    return Load(stage, images, longest, group.cpus, group.gpus, group.workers, what, together)
