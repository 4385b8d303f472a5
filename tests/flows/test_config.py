"""What a configuration holds: the bundled ones, files of one's own, and what is written of them."""

import pytest
import yaml

from csm.losses import HARD
from csm.pixel_mixing import PIXEL_MIXING
from flows.config import load_config, plain
from flows.config_layers import config_names
from flows.evaluate import compared
from tests.flows.config_errors import refused

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


@pytest.mark.parametrize(
    "text", ["train: [1", "a: b: c", "\t- x", "train: {seeds: 1", "\x00", "data: {source: digits}\ndata: {seed: 1}"]
)
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


def test_ratios_are_a_number_or_a_list():
    assert load_config("demo", ["plan.ratios=5"]).plan.ratios == 5
    assert load_config("demo", ["plan.ratios=[0, 0.3, 1]"]).plan.ratios == (0.0, 0.3, 1.0)


def test_pairs_are_indices_or_names():
    assert load_config("demo", ["plan.pairs=[[0, 1], [cat, '3']]"]).plan.pairs == ((0, 1), ("cat", "3"))


def test_a_method_that_is_not_compared_may_lack_its_annotator():
    overrides = ["train.methods.csm.mixed.annotator=nope", "train.compare=[cross-entropy, paper]"]
    config = load_config("demo", overrides)
    assert list(config.train.chosen) == ["cross-entropy", "paper"]


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


def test_only_methods_with_mixed_images_need_the_generator():
    assert load_config("demo").mixes
    assert not load_config("demo", ["train.compare=[cross-entropy, mixup]"]).mixes


def test_what_mixing_is_compared_with_can_be_trained_beside_it():
    names = ["csm-unmixed", "csm-endpoints", "csm-pixel", "csm-noised", "csm-unmixed-noised", "distillation", "one-hot-synthetic"]
    kinds = "plan.kinds=[semantic, unmixed, pixel, noised, real]"
    config = load_config("digits", [kinds, f"train.compare=[csm, {', '.join(names)}]"])
    assert [method.is_ours for method in compared(config)] == [True] + [False] * 7
    assert {name: config.train.methods[name].mixed.images for name in names} == dict(
        zip(names, ["unmixed", "semantic", "pixel", "noised", ("unmixed", "noised"), "real", "unmixed"], strict=True)
    )
