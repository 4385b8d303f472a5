"""What a user sees of bad settings: exit code 2, one line on stderr that says what to do, and nothing written."""

import pytest

from flows.config import load_config
from flows.run import STAGES, verb_stages
from tests.flows.cli.conftest import RUN_VERBS


@pytest.mark.parametrize("verb", RUN_VERBS)
def test_an_unknown_configuration(refused, verb, tmp_path):
    assert refused(verb, "--config", "nope").startswith(
        "--config nope: unknown configuration; give a .yaml file or one of annotators,"
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nope=1", "nope: no such setting; allowed: name, data, train,"),
        ("mix.sampler.nope=1", "mix.sampler.nope: no such setting; allowed: solver, spacing, steps, sigma_min, sigma_max, rho"),
        ("generator.steps=many", "generator.steps: expected a whole number"),
        ("train.seeds=0", "train.seeds: expected a number greater than or equal to 1, got 0"),
        ("seeds", "--set seeds: expected dotted.key=value"),
    ],
)
def test_a_bad_setting(refused, override, message, tmp_path):
    assert refused("run", "--set", override).startswith(message)
    assert not any(tmp_path.iterdir())


def test_an_unknown_stage_to_force(refused, tmp_path):
    assert refused("run", "--force", "nope") == f"--force nope: unknown stage; one of {', '.join(STAGES)}"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mix.operator=mean", "mix.operator: unknown 'mean'; one of embedding, slerp, score"),
        ("plan.ratios=[0.5, 0.2]", "plan.ratios: expected 1 to 255 different ratios that rise, got [0.5, 0.2]"),
        ("plan.grid=even", "plan.grid: expected 'uniform', 'cosine' or 'beta', got 'even'"),
        ("plan.pairs=some", "plan.pairs: expected 'auto', 'all', 'confusion' or 'prototypes' or a list, got 'some'"),
    ],
)
def test_settings_of_plan_and_operator(refused, override, message, tmp_path):
    assert refused("mix", "--set", override) == message
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("import-generator",), "import-generator: say which model, as `csm import-generator PATH` or with generator.path"),
        (("import-generator", "nowhere"), "nowhere does not exist"),
        (("run", "--set", "generator.path=nowhere"), "nowhere does not exist"),
        (("import-generator", "."), "is no folder with model_index.json or config.json; expected "),
        (
            ("fit-generator", "--set", "generator.path=x"),
            "fit-generator: generator.path is x, a model to import: use `csm import-",
        ),
        (("fit-generator", "--set", "generator.kind=dit"), "generator.path: missing; a generator of kind dit is imported"),
        (
            ("run", "--set", "generator.kind=unet", "--set", "generator.path=."),
            "generator.kind: unet is made here, not imported from",
        ),
        (("run", "--set", "generator.kind=gan"), "generator.kind: expected 'auto', 'unet', "),
    ],
)
def test_generators_that_cannot_be_had(refused, arguments, message, tmp_path):
    assert message in refused(*arguments, "--workspace", "w")
    assert not any(tmp_path.iterdir())


def test_stages_of_shift_sets_are_left_out_where_there_is_none(refused, tmp_path):
    demo = load_config("demo")
    assert verb_stages("run", demo) == tuple(name for name in STAGES if name not in ("shift", "evaluate-shift"))
    assert verb_stages("evaluate", demo) == ("evaluate",)
    photographs = ("--config", "digits", "--workspace", "w", "--set", "evaluate.shifts.photographs.kind=photographs")
    for verb in ("shift", "evaluate"):
        assert refused(verb, *photographs).startswith(
            f"{verb} needs prepare, which was not run in this workspace: run `csm prepare`"
        )
    assert refused("shift", "--config", "digits").startswith("evaluate.shifts: no set is configured; for example --set")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "evaluate.shifts.noise.kind=nope",
            "evaluate.shifts.noise.kind: unknown 'nope'; one of cifar-c, tiny-imagenet-c, corrupted",
        ),
        ("evaluate.shifts.fog={kind: cifar-c}", "evaluate.shifts.fog.parameters.path: missing"),
        ("evaluate.shifts.fog.nope=1", "evaluate.shifts.fog."),
        ("evaluate.shifts={../x: {kind: photographs}}", "evaluate.shifts.../x: '../x' cannot name a folder"),
        (
            "evaluate.shifts.x={kind: dataset, parameters: {source: digits, noise: 1}}",
            "evaluate.shifts.x.parameters.noise: no such",
        ),
    ],
)
def test_shift_sets_that_cannot_be_used(refused, override, message, tmp_path):
    assert refused("run", "--config", "digits", "--set", override).startswith(message)
    assert not any(tmp_path.iterdir())
