import pytest
import yaml

from csm.errors import InputError
from csm.losses import HARD
from csm.pixel_mixing import PIXEL_MIXING
from flows.config import load_config, plain
from flows.config_layers import config_names
from flows.evaluate import compared

# The bundled configuration for images of one's own says nothing of where they are.
NEEDED = {"image-folder": ("data.path=somewhere",)}
BUNDLED = sorted(set(config_names()) - {"default"})
METHODS = {name: ["cross-entropy", "label-smoothing", "focal", "mixup", "paper", "csm"] for name in BUNDLED}
METHODS |= {name: ["cross-entropy", "paper", "csm"] for name in ("cifar10", "cifar100", "tiny-imagenet")}
METHODS["annotators"] = ["cross-entropy", *(f"csm-{name}" for name in load_config("annotators").annotators)]
METHODS["digits-hard"] = [  # every one of the defaults that trains one classifier, but what mixing is compared with
    name
    for name, method in load_config("digits-hard").train.methods.items()
    if method.members == 1 and (method.mixed is None or (method.mixed.is_semantic))
]
METHODS["gaussians"] = [
    "cross-entropy",
    "paper",
    *(
        f"csm-{name}"
        for name in (
            "ratio",
            "projection",
            "projection-fitted",
            "teacher",
            "lda",
            "knn",
            "linear",
            "lda-pixels",
            "qda-pixels",
            "ppca-pixels",
            "generator",
            "ensemble",
            "experts",
            "truth",
        )
    ),
]


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def refused(name, *overrides):
    """The message with which a configuration is refused; always one line."""
    with pytest.raises(InputError) as caught:
        load_config(name, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", BUNDLED)
def test_every_bundled_configuration_loads(name):
    config = load_config(name, NEEDED.get(name, ()))
    assert config.name == name
    assert config.description
    assert sorted(config.train.chosen) == sorted(METHODS[name])


def test_the_demo_is_among_them():
    assert "demo" in BUNDLED


def test_an_image_folder_without_a_path_is_refused():
    assert refused("image-folder") == "data.path: missing; set it, for example --set data.path=VALUE"


@pytest.mark.parametrize("name", ["nope", "default", "", "Demo", "demo.yml.bak"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    assert refused(name) == f"--config {name}: unknown configuration; give a .yaml file or one of {', '.join(BUNDLED)}"


def test_a_missing_file_is_named(tmp_path):
    assert refused(f"{tmp_path}/mine.yaml") == f"--config {tmp_path}/mine.yaml: the file does not exist"


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "mine.yaml").mkdir()
    assert "is a folder, not a file" in refused(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("text", ["train: [1", "a: b: c", "\t- x", "train: {seeds: 1", "\x00"])
def test_bad_yaml_is_refused_in_one_line(text, config_file):
    assert ": not valid YAML: " in refused(config_file(text))


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b", "list"), ("just words", "str"), ("3", "int")])
def test_what_is_no_mapping_is_refused(text, kind, config_file):
    assert refused(config_file(text)).endswith(f": expected a mapping of sections, got {kind}")


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_file_is_the_defaults_under_its_name(text, config_file):
    config = load_config(config_file(text))
    assert config.name == "mine"
    assert config.data == {"source": "digits-hard"}


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("nope=1", "name, data, train, annotate, description, generator, plan, mix, evaluate, register, resources"),
        (
            "generator.nope=1",
            "path, kind, classes, guidance, prompt, block_channels, layers_per_block, attention_levels, dropout,",
        ),
        ("plan.nope=1", "pairs, pairs_per_class, ratios, grid, alpha, sets_per_pair, shard_rows, seed"),
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


def test_ratios_are_a_number_or_a_list():
    assert load_config("demo", ["plan.ratios=5"]).plan.ratios == 5
    assert load_config("demo", ["plan.ratios=[0, 0.3, 1]"]).plan.ratios == (0.0, 0.3, 1.0)


def test_pairs_are_indices_or_names():
    assert load_config("demo", ["plan.pairs=[[0, 1], [cat, '3']]"]).plan.pairs == ((0, 1), ("cat", "3"))


def test_a_method_that_is_not_compared_may_lack_its_annotator():
    overrides = ["train.methods.csm.mixed.annotator=nope", "train.compare=[cross-entropy, paper]"]
    config = load_config("demo", overrides)
    assert list(config.train.chosen) == ["cross-entropy", "paper"]


@pytest.mark.parametrize("override", ["x", "=3", "a..b=3", ".a=1", "a.=1", ""])
def test_a_malformed_override_is_refused(override):
    assert refused("demo", override) == f"--set {override}: expected dotted.key=value"


def test_an_override_with_bad_yaml_is_refused():
    assert refused("demo", "plan.pairs=[[0, 1]") == "--set plan.pairs=[[0, 1]: the value is not valid YAML"


def test_overrides_are_yaml_and_the_last_one_wins():
    overrides = [
        "plan.pairs=[[0, 1], [4, 2]]",
        "generator.block_channels=[4, 8]",
        "train.seeds=1",
        "train.seeds=7",
        "description=a=b",
    ]
    config = load_config("demo", overrides)
    assert config.plan.pairs == ((0, 1), (4, 2))
    assert config.generator.block_channels == (4, 8)
    assert config.train.seeds == 7
    assert config.description == "a=b"
    assert config.generator.steps == load_config("demo").generator.steps


@pytest.mark.parametrize("text", ["1e-1", "0.1", "'0.1'", ".1"])
def test_parameters_of_a_source_get_their_types(text):
    assert load_config("digits", [f"data.val={text}"]).data == {"source": "digits", "val": 0.1}  # YAML reads 1e-1 as a string


def test_parameters_of_a_network_get_their_types():
    assert load_config("digits", ["train.parameters.width='16'"]).train.parameters == {"width": 16}


@pytest.mark.parametrize("override", ["train.methods.mixup=null", "train.methods.mixup="])
def test_null_removes_what_the_defaults_have(override):
    assert "mixup" not in load_config("demo", [override, "train.compare=[csm]"]).train.methods
    assert refused("demo", override).startswith("train.compare: unknown 'mixup'; one of ")


def test_every_loss_and_every_pixel_mixing_has_a_method_of_its_name():
    methods = load_config("demo").train.methods
    assert {name: methods[name].loss for name in HARD} == {name: name for name in HARD}
    assert {name: methods[name].mixing.kind for name in PIXEL_MIXING} == {name: name for name in PIXEL_MIXING}


def test_loss_trains_one_method_alone():
    config = load_config("demo", ["train.loss=csm"])
    assert config.train.chosen == {"csm": config.train.methods["csm"]}
    assert (
        load_config("demo", ["train.loss=focal", "train.methods.focal=null", "train.compare=[csm]"]).train.chosen["focal"].loss
        == "focal"
    )
    assert refused("demo", "train.loss=hinge").startswith("train.loss: unknown 'hinge'; one of ")


def test_what_does_not_fit_together_is_refused():
    assert refused("demo", "train.optimizer.schedule=multi-step").startswith("train.optimizer.milestones: missing")
    assert refused("demo", "train.workers=3").startswith("train.workers: 3 workers cannot share batches of 64 images evenly")
    wrong = refused("demo", "train.methods.mixup.mixing.parameters.alpha=-1")
    assert wrong.startswith("train.methods.mixup.mixing.parameters.alpha: expected a number greater than 0")
    assert refused("demo", "train.methods.mixup.mixing.kind=blend").startswith("train.methods.mixup.mixing.kind: unknown 'blend'")


def test_null_brings_back_the_default_of_a_setting():
    demo, digits = (load_config(name, ["generator.steps=null", "evaluate.bins=null"]) for name in ("demo", "digits"))
    assert demo.generator.steps == digits.generator.steps == 1000
    assert demo.evaluate.bins == 15  # nothing stood there to remove


def test_null_removes_the_same_whether_the_file_has_the_section_or_not(config_file):
    path = config_file("train: {methods: {csm: {loss: focal}}}")
    for name in ("demo", path):
        assert load_config(name, ["train.methods.csm.mixed=null"]).train.methods["csm"].mixed is None


@pytest.mark.parametrize("key", ["name", "data", "train"])
def test_null_of_a_whole_needed_section_is_refused(key):
    assert refused("demo", f"{key}=null") == f"{key}: missing; it must be set"


def test_null_of_a_needed_key_is_refused():
    assert refused("demo", "train.methods=null") == "train.methods: missing; it must be set"
    assert refused("demo", "data.source=null").startswith("data.source: unknown None; one of ")


def test_another_source_replaces_the_parameters_of_the_first(tmp_path):
    config = load_config("image-folder", ["data.path=p", "data.source=digits"])
    assert config.data == {"source": "digits"}
    config = load_config("demo", ["data.noise=0.2", "data.source=image-folder", f"data.path={tmp_path}"])
    assert config.data == {"source": "image-folder", "path": str(tmp_path)}


def test_the_same_source_keeps_its_parameters(config_file):
    path = config_file("data: {source: digits-hard, noise: 0.3}")
    assert load_config(path, ["data.source=digits-hard", "data.blur=0.1"]).data == {
        "source": "digits-hard",
        "noise": 0.3,
        "blur": 0.1,
    }


@pytest.mark.parametrize(
    "name", sorted(set(BUNDLED) - {"annotators", "gaussians"})
)  # which lacks the methods that are changed here
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.methods.mixup=null", "train.compare=[csm]"),  # a default method that is dropped must not come back
        ("train.methods.label-smoothing.parameters.alpha=null",),
        ("train.methods.csm.mixed=null",),
        ("train.methods.focal={loss: cross-entropy, parameters: null}",),
        ("train.methods.new={mixing: {kind: mixup}}", "train.compare=[new, csm]"),
        ("plan.pairs=[[0, 1]]", "generator.learning_rate=1e-5", "description='a: \"b\" é\n#'"),
        ("data.source=digits", "data.val=1e-1"),
        ("plan.pairs=[[0, '1'], [2, cat]]", "plan.ratios=[0, 0.3]", "mix.operator=score"),
        ("plan.pairs=prototypes", "plan.grid=beta"),
        ("annotate.annotators.projection.scale=null", "annotate.annotators.qda=null", "annotate.candidates=[lda]"),
        ("annotate.annotator=auto", "annotate.annotators.new={head: lda, encoder: pixels, parameters: {shrinkage: '0.5'}}"),
    ],
)
def test_the_resolved_configuration_loads_to_an_equal_one(name, overrides, config_file):
    loads_again(load_config(name, [*NEEDED.get(name, ()), *overrides]), config_file)


@pytest.mark.parametrize(
    "overrides", [(), ("annotate.annotator=auto",), ("train.methods.csm-knn=null", "train.compare=[csm-lda]")]
)
def test_so_does_one_without_the_default_methods(overrides, config_file):
    loads_again(load_config("annotators", overrides), config_file)


def loads_again(config, config_file):
    text = config.to_yaml()
    again = load_config(config_file(text))
    assert again == config
    assert again.to_yaml() == text


def test_plain_values_hold_neither_tuples_nor_paths(tmp_path):
    value = {"a": (1, (2, 3)), "b": [tmp_path], "c": {"d": None}}
    assert plain(value) == {"a": [1, [2, 3]], "b": [str(tmp_path)], "c": {"d": None}}
    assert yaml.safe_load(yaml.safe_dump(plain(value))) == plain(value)


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
    ],
)
def test_schedules_that_cannot_be_are_refused(overrides, said):
    assert refused("demo", *overrides).startswith(said)


def test_only_methods_with_mixed_images_need_the_generator():
    assert load_config("demo").mixes
    assert not load_config("demo", ["train.compare=[cross-entropy, mixup]"]).mixes


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
            ["plan.kinds=[semantic, noised]", "mix.strength=90"],
            "mix.strength: expected more than sigma_min 0.02 and no more than sigma_max 80 of mix.sampler, got 90",
        ),
        (["mix.strength=0"], "mix.strength: expected a number greater than 0, got 0"),
    ],
)
def test_kinds_of_images_that_cannot_be_are_refused(overrides, message):
    with pytest.raises(InputError) as caught:
        load_config("digits", overrides)
    assert str(caught.value).startswith(message)


def test_what_mixing_is_compared_with_can_be_trained_beside_it():
    names = ["csm-unmixed", "csm-endpoints", "csm-pixel", "csm-noised", "distillation", "one-hot-synthetic"]
    kinds = "plan.kinds=[semantic, unmixed, pixel, noised, real]"
    config = load_config("digits", [kinds, f"train.compare=[csm, {', '.join(names)}]"])
    assert [method.is_ours for method in compared(config)] == [True] + [False] * 6
    assert {name: config.train.methods[name].mixed.images for name in names} == dict(
        zip(names, ["unmixed", "semantic", "pixel", "noised", "real", "unmixed"], strict=True)
    )
