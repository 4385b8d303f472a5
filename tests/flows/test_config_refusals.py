"""Settings that are refused before anything runs: unknown, of the wrong type, out of range, or at odds."""

import pytest

from csm.errors import InputError
from flows.config import load_config
from tests.flows.config_errors import refused


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("nope=1", "name, data, train, annotate, description, generator, plan, mix, evaluate, register, resources"),
        (
            "generator.nope=1",
            "path, kind, classes, guidance, prompt, block_channels, layers_per_block, attention_levels, dropout,",
        ),
        ("plan.nope=1", "pairs, pairs_per_class, ratios, grid, alpha, sets_per_pair, noise, shard_rows, seed"),
        ("mix.sampler.nope=1", "solver, spacing, steps, sigma_min, sigma_max, rho"),
        ("train.nope=1", "methods, compare, loss, workers, seeds, network, parameters, optimizer"),
        ("train.optimizer.nope=1", "kind, epochs, batch_size, learning_rate,"),
        ("train.methods.csm.nope=1", "description, loss, parameters, mixing, mixed"),
        ("train.methods.csm.mixed.nope=1", "annotator, loss, weight, schedule, per_real, images"),
        ("annotate.nope=1", "annotators, encoders, annotator, candidates, members"),
        ("annotate.annotators.lda.nope=1", "head, encoder, parameters, calibrator, scale, pair, members, description"),
        ("annotate.annotators.lda.parameters.nope=1", "shrinkage"),
        ("annotate.encoders.pixels.nope=1", "kind, parameters"),
        ("annotate.encoders.pixels.parameters.nope=1", "none"),
        ("resources.annotate.nope=1", "min_actors, max_actors, cpus, gpus"),
        ("resources.train.nope=1", "workers, cpus, gpus"),
        # these are the arguments of registered functions
        ("data.nope=1", "val, test, seed, max_shift, blur, noise"),
        ("train.parameters.nope=1", "width"),
        ("train.methods.focal.parameters.nope=1", "gamma"),
        ("train.methods.cross-entropy.parameters.nope=1", "none"),
    ],
)
def test_an_unknown_key_is_refused_with_those_that_are_allowed(override, allowed):
    message = refused("demo", override)
    assert message.startswith(f"{override.partition('=')[0]}: no such setting; allowed: {allowed}")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.epoch", "train.optimizer.epochs"),
        ("train.epochs", "train.optimizer.epochs"),
        ("epochs", "train.optimizer.epochs"),
        ("optimizer", "train.optimizer"),
        ("train.networks", "train.network"),
        ("train.methods.csm.weight", "train.methods.csm.mixed.weight"),
        ("train.methods.csm.mixed.wieght", "train.methods.csm.mixed.weight"),
        ("mix.step", "mix.sampler.steps"),
        ("annotate.teacher.epochs", "annotate.teacher.optimizer.epochs"),
    ],
)
def test_an_unknown_key_is_met_with_the_one_that_was_meant_wherever_it_stands_below(key, meant):
    message = refused("demo", f"{key}=3")
    assert message.startswith(f"{key}: no such setting; did you mean {meant}? Allowed in its place: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generator.steps=many", "generator.steps: expected a whole number"),
        ("generator.steps=1.5", "generator.steps: expected a whole number"),
        ("generator.steps=1e3", "generator.steps: expected a whole number (YAML reads 1e9 as text: write 1.0e+9), got '1e3'"),
        ("train.seeds=nan", "train.seeds: expected a whole number, got 'nan'"),
        ("train.seeds=true", "train.seeds: expected a whole number, got True"),
        ("train.optimizer.learning_rate=yes", "train.optimizer.learning_rate: expected a number, got True"),
        ("train.methods.csm.mixed.weight=false", "train.methods.csm.mixed.weight: expected a number, got False"),
        ("train.methods.focal.parameters.gamma=true", "train.methods.focal.parameters.gamma: expected a number, got True"),
        ("train.methods.csm.optimizer={epochs: true}", "train.methods.csm.optimizer.epochs: expected a whole number, got True"),
        ("plan.ratios=[0, true]", "plan.ratios: expected a number, got True"),
        ("data.noise=false", "data.noise: expected a number, got False"),
        ("generator=5", "generator: expected a section with keys"),
        ("generator.block_channels=8", "generator.block_channels: expected a list, got 8"),
        ("train.compare=csm", "train.compare: expected a list, got 'csm'"),
        ("train.methods.csm=3", "train.methods.csm: expected a section with keys"),
        ("train.methods.csm.mixed=3", "train.methods.csm.mixed: expected a section with keys"),
        ("train.methods.csm.mixed.weight=heavy", "train.methods.csm.mixed.weight: expected a number"),
        ("train.optimizer.learning_rate=[1]", "train.optimizer.learning_rate: expected a number"),
        ("data=5", "data: expected a section with keys"),
        ("data.noise=much", "data.noise: expected a number"),
        ("train.parameters.width=wide", "train.parameters.width: expected a whole number"),
        ("train.methods.focal.parameters.gamma=x", "train.methods.focal.parameters.gamma: expected a number"),
        ("name=3", "name: expected text, got 3"),
        ("plan.pairs=some", "plan.pairs: expected 'auto', 'all', 'confusion' or 'prototypes' or a list, got 'some'"),
        ("plan.pairs=[[0, 1.5]]", "plan.pairs: expected 'auto', 'all', 'confusion' or 'prototypes' or a whole number"),
        ("plan.pairs=[[0, 1, 2]]", "plan.pairs: expected 'auto', 'all', 'confusion' or 'prototypes' or "),
        ("plan.ratios=many", "plan.ratios: expected a whole number or a list, got 'many'"),
        ("plan.ratios=[0, half]", "plan.ratios: expected a whole number or a number, got [0, 'half']"),
        ("plan.grid=even", "plan.grid: expected 'uniform', 'cosine' or 'beta', got 'even'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(override, message):
    assert refused("demo", override).startswith(message)


@pytest.mark.parametrize(
    "override",
    [
        "generator.steps=0",
        "generator.dropout=1",
        "plan.ratios=1",
        "plan.ratios=256",
        "plan.sets_per_pair=0",
        "plan.pairs_per_class=0",
        "plan.alpha=0",
        "mix.batch_size=0",
        "mix.sampler.sigma_min=0",
        "mix.sampler.sigma_min=80",  # sigma_max
        "mix.sampler.churn=-1",
        "annotate.members=0",
        "annotate.annotators.projection.scale=0",
        "train.seeds=0",
        "train.optimizer.epochs=0",
        "train.optimizer.momentum=1",
        "train.methods.csm.mixed.weight=-1",
        "train.methods.csm.mixed.temperature=0",
        "evaluate.bins=0",
        "resources.mix.cpus=0",
        "resources.mix.min_actors=0",
        "resources.train.gpus=-1",
    ],
)
def test_a_value_out_of_range_is_refused(override):
    key, _, value = override.partition("=")
    message = refused("demo", override)
    assert message.startswith(f"{key}: ")
    assert message.endswith(f"got {value}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.source=mnist", "data.source: unknown 'mnist'; one of digits, digits-hard, digits-degraded, image-folder"),
        ("mix.operator=mean", "mix.operator: unknown 'mean'; one of embedding, slerp, score"),
        ("train.network=resnet", "train.network: unknown 'resnet'; one of small-cnn"),
        ("train.compare=[csm, nope]", "train.compare: unknown 'nope'; one of cross-entropy, label-smoothing,"),
        ("annotate.annotator=nope", "annotate.annotator: unknown 'nope'; one of auto, ratio, projection,"),
        ("annotate.annotators.lda.head=nope", "annotate.annotators.lda.head: unknown 'nope'; one of ratio, projection,"),
        ("annotate.annotators.lda.encoder=nope", "annotate.annotators.lda.encoder: unknown 'nope'; one of pixels, pca,"),
        ("annotate.encoders.new={kind: nope}", "annotate.encoders.new.kind: unknown 'nope'; one of pixels,"),
        ("train.methods.csm.mixed.loss=nope", "train.methods.csm.mixed.loss: unknown 'nope'; one of "),
        (
            "train.methods.csm.mixed.schedule=nope",
            "train.methods.csm.mixed.schedule: unknown 'nope'; one of pair, uniform, interior",
        ),
        (
            "train.methods.focal.loss=nope",
            "train.methods.focal.loss: unknown loss 'nope'; one of cross-entropy, label-smoothing, focal",
        ),
        ("train.methods.csm.mixed.annotator=nope", "train.methods.csm.mixed.annotator: unknown 'nope'; one of auto, ratio,"),
    ],
)
def test_an_unknown_name_of_a_registry_is_refused_before_anything_runs(override, message):
    assert refused("demo", override).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("plan.ratios=[0, 1.5]",), "plan.ratios: expected a whole number or a number less than or equal to 1, got [0, 1.5]"),
        (("plan.ratios=[]",), "plan.ratios: expected 1 to 255 different ratios that rise, got []"),
        (("plan.ratios=[0, 0.5, 0.3]",), "plan.ratios: expected 1 to 255 different ratios that rise, got [0.0, 0.5, 0.3]"),
        (("plan.ratios=[0.5, 0.5]",), "plan.ratios: expected 1 to 255 different ratios that rise, got [0.5, 0.5]"),
        (
            ("plan.ratios=[0, 1]", "plan.grid=cosine"),
            "plan.grid: plan.ratios is a list, which leaves nothing to space: expected 'uniform', got 'cosine'",
        ),
        (
            ("plan.ratios=9", "plan.grid=beta", "plan.alpha=0.01"),
            "plan.alpha: 9 quantiles of Beta(0.01, 0.01) are not different numbers; bring alpha nearer to 1 or take fewer plan.ratios",
        ),
    ],
)
def test_ratios_that_make_no_grid_are_refused(overrides, message):
    assert refused("demo", *overrides) == message


def test_what_does_not_fit_together_is_refused():
    assert refused("demo", "train.optimizer.schedule=multi-step").startswith("train.optimizer.milestones: missing")
    assert refused("demo", "train.workers=3").startswith("train.workers: 3 workers cannot share batches of 64 images evenly")
    wrong = refused("demo", "train.methods.mixup.mixing.parameters.alpha=-1")
    assert wrong.startswith("train.methods.mixup.mixing.parameters.alpha: expected a number greater than 0")
    assert refused("demo", "train.methods.mixup.mixing.kind=blend").startswith("train.methods.mixup.mixing.kind: unknown 'blend'")


def test_churn_with_a_solver_that_adds_no_noise_is_refused():
    assert load_config("demo", ["mix.sampler.churn=30", "mix.sampler.solver=heun"]).mix.sampler.churn == 30
    message = refused("demo", "mix.sampler.churn=30", "mix.sampler.solver=euler")
    assert message == "mix.sampler.churn: only solver heun adds noise, not euler; choose heun, or churn 0"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.optimizer.warmup=60"], "train.optimizer.warmup: expected fewer than the 60 epochs of the training, got 60"),
        (
            ["train.optimizer.schedule=multi-step", "train.optimizer.milestones=[30, 20]"],
            "train.optimizer.milestones: expected rising",
        ),
        (
            ["train.optimizer.schedule=multi-step", "train.optimizer.milestones=[60]"],
            "train.optimizer.milestones: expected rising",
        ),
        (["train.methods.csm.mixed.warm_start=60"], "train.methods.csm.mixed.warm_start: expected fewer than the 60 epochs"),
        (
            ["train.methods.csm.mixed.warm_start=5", "train.methods.csm.mixed.off_after=3"],
            "train.methods.csm.mixed.off_after: expected more than the 5 epochs of warm_start, got 3",
        ),
        (["train.compare=[focal, focal]"], "train.compare: 'focal' is named more than once"),
        (["data.noise=.nan"], "data.noise: expected a finite number, got nan"),
        (["data.noise=.inf"], "data.noise: expected a finite number, got inf"),
        (["annotate.candidates=[lda, teacher, lda]"], "annotate.candidates: 'lda' is named more than once"),
        (["data.blur=-1"], "data.blur: expected a number greater than or equal to 0, got -1"),
        (["data.seed=-1"], "data.seed: expected a number greater than or equal to 0, got -1"),
        (["train.methods.csm.mixed.weight=.inf"], "train.methods.csm.mixed.weight: expected a finite number, got inf"),
    ],
)
def test_schedules_that_cannot_be_are_refused(overrides, said):
    assert refused("demo", *overrides).startswith(said)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.compare=[cross-entropy, csm-unmixed]"],
            "train.methods.csm-unmixed.mixed.images: unmixed images are not planned: --set 'plan.kinds=[semantic, unmixed]'",
        ),
        (
            ["train.compare=[csm-noised, distillation]", "plan.kinds=[pixel]"],
            "train.methods.csm-noised.mixed.images: noised images are not planned: --set 'plan.kinds=[pixel, noised, real]'",
        ),
        (
            ["train.compare=[csm]", "plan.kinds=[pixel]"],
            "train.methods.csm.mixed.images: semantic images are not planned: --set 'plan.kinds=[semantic, pixel]'",
        ),
        (["plan.kinds=[mixed]"], "plan.kinds: unknown 'mixed'; one of semantic, unmixed, pixel, noised, real"),
        (["plan.kinds=[]"], "plan.kinds: expected different kinds of images, at least one, got []"),
        (["plan.kinds=[semantic, semantic]"], "plan.kinds: expected different kinds"),
        (
            ["train.methods.csm.mixed.images=blended"],
            "train.methods.csm.mixed.images: unknown 'blended'; one of semantic, unmixed, pixel, noised, real",
        ),
        (
            ["train.methods.distillation.mixed.schedule=pair"],
            "train.methods.distillation.mixed.schedule: real images are no mixtures of pairs: take uniform or ambiguity, not pair",
        ),
        (
            ["train.methods.csm-unmixed.mixed.schedule=interior"],
            "train.methods.csm-unmixed.mixed.schedule: unmixed images are no mixtures of pairs: take uniform or ambiguity",
        ),
        (
            ["train.methods.csm.mixed.images=[semantic, unmixed]"],
            "train.methods.csm.mixed.schedule: unmixed images are no mixtures of pairs: take uniform or ambiguity, not interior",
        ),
        (
            ["train.compare=[csm]", "train.methods.csm.mixed.images=[semantic, noised]"],
            "train.methods.csm.mixed.images: noised images are not planned: --set 'plan.kinds=[semantic, noised]'",
        ),
        (
            ["train.methods.csm.mixed.images=[semantic, semantic]"],
            "train.methods.csm.mixed.images: expected different kinds of images, at least one, got ['semantic', 'semantic']",
        ),
        (
            ["train.methods.csm.mixed.images=[]"],
            "train.methods.csm.mixed.images: expected different kinds of images, at least one",
        ),
        (
            ["train.methods.csm.mixed={images: [semantic, real], schedule: uniform}"],
            "train.methods.csm.mixed.images: real images have no ratios, so no other kind can be drawn with them; leave real out",
        ),
        (
            ["plan.kinds=[semantic, noised]", "mix.strength=90"],
            "mix.strength: expected more than sigma_min 0.02 and no more than sigma_max 80 of mix.sampler, got 90",
        ),
        (["mix.strength=0"], "mix.strength: expected a number greater than 0, got 0"),
        (
            ["mix.guidance=2"],
            "mix.guidance: expected 1, got 2: this generator knows no images without a class; set generator.label_dr",
        ),
        (
            ["mix.guidance=2", "generator.kind=gaussians"],
            "mix.guidance: expected 1, got 2: this generator knows no images without a cl",
        ),
        (
            ["generator.guidance=2", "generator.label_dropout=0.1"],
            "generator.guidance: is of an imported model, and this one is made",
        ),
        (
            ["train.methods.csm.mixed={images: [semantic, unmixed, noised], schedule: uniform}"],
            "train.methods.csm.mixed.images: unmixed images are not planned: --set 'plan.kinds=[semantic, unmixed, noised]'",
        ),
        (["mix.guidance=-1"], "mix.guidance: expected a number greater than or equal to 0, got -1"),
    ],
)
def test_kinds_of_images_that_cannot_be_are_refused(overrides, message):
    with pytest.raises(InputError) as caught:
        load_config("digits", overrides)
    assert str(caught.value).startswith(message)
