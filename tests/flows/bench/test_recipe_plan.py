import pytest
import yaml

from csm.errors import InputError
from csm.methods import Method, MixedTerm
from csm.optimization import OptimizerConfig
from csm.search.space import parse_space
from flows.bench.recipe_plan import base_settings, check_datasets, image_kinds, read_plan, settings
from flows.config import load_config

SIZE = {"datasets": ["digits-hard"]}
SMALL = {"full": SIZE, "quick": SIZE, "methods": {"csm": {"kind": "recipe"}}}


@pytest.fixture
def written(tmp_path):
    """``written(key=value, ...)`` writes the small plan with these sections and gives the path."""

    def write(**sections):
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump({**SMALL, **sections}))
        return path

    return write


def test_the_bundled_plan_has_every_baseline_and_a_search_for_each():
    plan = read_plan()
    known = load_config("digits-hard").train.methods
    plain = {name for name, method in known.items() if method.mixed is None and method.members == 1}
    assert set(plan.of_kind("loss", "pixel-mixing")) == plain
    assert plan.recipe == "csm"
    assert plan.of_kind("paper") == ["paper"]
    assert {
        "csm-unmixed",
        "csm-endpoints",
        "csm-pixel",
        "csm-noised",
        "csm-unmixed-noised",
        "distillation",
        "one-hot-synthetic",
        "deep-ensemble",
    } == set(plan.of_kind("ablation"))
    for name, entry in plan.methods.items():
        assert entry.like or name == plan.recipe or plan.space(name).size >= plan.full.trials  # the recipe has fewer choices
        for key in plan.space(name).keys if not entry.like else ():
            settings(known[name], {key: 1}, name, OptimizerConfig())  # its section is there


def test_what_a_method_needs_comes_along():
    plan = read_plan()
    assert plan.with_needed(["csm-truth"]) == ("csm", "csm-truth")
    assert plan.with_needed(["deep-ensemble", "focal"]) == ("cross-entropy", "focal", "deep-ensemble")


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"methods": {"csm": {"kind": "loss"}}}, "methods: expected one of kind recipe, got 0"),
        ({"methods": {"csm": {"kind": "best"}}}, "methods.csm.kind: expected 'recipe'"),
        ({"common": {"optimizer.learning_rate": {"low": 0.1, "high": 0.2}}}, "optimizer.learning_rate has no end"),
        ({"methods": {**SMALL["methods"], "a": {"kind": "loss", "like": "b"}}}, "methods.a.like: unknown 'b'; one of csm"),
        ({"full": {**SIZE, "methods": ["nope"]}}, "methods: unknown 'nope'; one of csm"),
        ({"full": {**SIZE, "seeds": True}}, "full.seeds: expected a whole number, got True"),
        ({"full": {**SIZE, "epochs": 3}}, "full.epochs: no such setting; allowed: datasets, methods"),
        (
            {"methods": {**SMALL["methods"], "a": {"kind": "loss", "like": "csm", "space": {"loss": ["focal"]}}}},
            "methods.a.space: it has the settings of csm, so there is nothing to search",
        ),
    ],
)
def test_a_plan_that_cannot_be_used_is_refused(written, sections, told):
    path = written(**sections)
    with pytest.raises(InputError) as refused:
        read_plan(path)
    assert str(refused.value).startswith(f"--plan {path}: ")
    assert told in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="the file does not exist"):
        read_plan(tmp_path / "nope.yaml")
    with pytest.raises(InputError, match="is a folder, not a file"):
        read_plan(tmp_path)
    (tmp_path / "empty.yaml").touch()
    with pytest.raises(InputError, match="full: missing; it must be set"):
        read_plan(tmp_path / "empty.yaml")


def test_data_sets_are_configurations():
    check_datasets(["digits-hard", "cifar10", "mine/data.yaml"], "here")
    for name in ("nosuch", "default"):
        with pytest.raises(InputError, match=f"here: unknown '{name}'; give a .yaml file or one of .*, digits-hard, "):
            check_datasets([name], "here")


def test_settings_are_laid_over_a_method():
    method = Method(loss="focal", parameters={"gamma": 3.0})
    values = {"parameters.gamma": 1, "optimizer.epochs": "3x", "optimizer.shift": 1}
    made = settings(method, values, "here", OptimizerConfig(epochs=40))
    assert made["parameters"] == {"gamma": 1}
    assert made["optimizer"] == {"epochs": 120, "shift": 1}
    assert made["loss"] == "focal"
    optimizer = OptimizerConfig()
    assert settings(method, {}, "here", optimizer) == settings(method, {"parameters.gamma": 3.0}, "here", optimizer)


def test_milestones_move_with_the_epochs():
    steps = OptimizerConfig(epochs=40, schedule="multi-step", milestones=(20, 30))
    own = Method(optimizer={"epochs": 80, "milestones": [50]})

    def made(method, values):
        return settings(method, values, "here", steps)["optimizer"]

    assert made(Method(), {"optimizer.epochs": "3x"}) == {"epochs": 120, "milestones": [60, 90]}
    assert made(Method(), {"optimizer.epochs": 30}) == {"epochs": 30, "milestones": [15, 22]}
    assert made(own, {"optimizer.epochs": "4x"}) == {"epochs": 160, "milestones": [100]}
    assert made(own, {"optimizer.shift": 1}) == own.optimizer | {"shift": 1}
    assert made(Method(), {"optimizer.epochs": "3x", "optimizer.milestones": [100]}) == {"epochs": 120, "milestones": [100]}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"mixed.weight": 4}, "here.mixed.weight: the method has no mixed; leave it out"),
        ({"mixing.parameters.alpha": 1}, "here.mixing.parameters.alpha: the method has no mixing; leave it out"),
        ({"optimizer.epochs": "long"}, "here.optimizer.epochs: expected a number of epochs, or times those of the data set"),
    ],
)
def test_settings_that_a_method_cannot_have_are_refused(values, told):
    with pytest.raises(InputError, match=told):
        settings(Method(), values, "here", OptimizerConfig())


def test_a_method_like_another_has_what_was_chosen_for_that():
    plan, config = read_plan(), load_config("gaussians")
    made = base_settings(plan, config, "csm-truth", {"csm": {"mixed.weight": 32, "optimizer.epochs": "3x"}})
    assert (made["mixed"]["annotator"], made["mixed"]["weight"]) == ("truth", 32)
    assert made["optimizer"] == {"epochs": 3 * config.train.optimizer.epochs}
    assert made["mixed"]["schedule"] == config.train.methods["csm"].mixed.schedule
    assert base_settings(plan, config, "deep-ensemble", {})["members"] == 5


def test_kinds_of_images_that_methods_need():
    terms = [MixedTerm(images="pixel"), MixedTerm(), MixedTerm(images="unmixed", schedule="uniform")]
    made = {str(number): settings(Method(mixed=term), {}, "", OptimizerConfig()) for number, term in enumerate(terms)}
    assert image_kinds(made) == ["semantic", "unmixed", "pixel"]
    several = MixedTerm(images=("noised", "semantic"))
    assert image_kinds({"several": settings(Method(mixed=several), {}, "", OptimizerConfig())}) == ["semantic", "noised"]
    nested = {"mixed.weight": {"values": {4: {"mixed.images": ["noised"]}, 16: {}}}}
    spaces = [{"mixed": {"images": ["pixel", ["real", "semantic"]]}}, {"mixed.weight": [1]}, nested]
    assert image_kinds({}, [parse_space(space) for space in spaces]) == ["semantic", "pixel", "noised", "real"]
    assert image_kinds({"plain": settings(Method(), {}, "", OptimizerConfig())}) == ["semantic"]
