"""What a user sees of bad input: exit code 2, one line on stderr that says what to do, and nothing written."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows import cli
from flows.config import load_config
from flows.run import STAGES, VERBS, verb_stages

RUN_VERBS = ("prepare", "shift", "fit-generator", "plan", "mix", "annotate", "train", "evaluate", "report", "run")
ALL_VERBS = (*RUN_VERBS, "tune", "export", "predict", "check", "calibrate", "serve", "compare", "ui", "doctor")


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """``call(*arguments)`` runs the command line in this process; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, **named):
        monkeypatch.setattr(sys, "argv", ["csm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture
def refused(call):
    """``refused(*arguments)`` runs a command that must be refused and gives its one line, without ``csm: ``."""

    def run(*arguments, **named):
        code, out, err = call(*arguments)
        assert code == 2, err
        assert out == ""
        said = [line for line in err.splitlines() if not line.endswith(": reused") and ": reused (" not in line]
        assert len(said) == 1, err
        assert said[0].startswith("csm: ")
        return said[0].removeprefix("csm: ")

    return run


@pytest.fixture
def folder(tmp_path):
    """``folder(cat=6, dog=6)`` makes an image folder with so many images of each class."""

    def make(**classes):
        draw = np.random.default_rng(0)
        for name, count in classes.items():
            (tmp_path / "images" / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "images" / name / f"{number}.png")
        return tmp_path / "images"

    return make


def use(path):
    return ("--config", "image-folder", "--set", f"data.path={path}", "--set", "data.size=8")


# The installed console script, as a user starts it.


def test_help_is_fast_and_names_every_verb(csm, call):
    done = csm("--help", timeout=20)  # in 0.2 s when nothing else runs: neither torch nor ray is imported
    assert done.returncode == 0
    assert all(f"  {verb} " in done.stdout for verb in ALL_VERBS)
    assert done.stderr == ""


def test_help_imports_nothing_heavy(processes):
    code = "import sys, flows.cli; assert not {'torch', 'ray', 'mlflow', 'polars'} & set(sys.modules), sorted(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--config", "nope"), "csm: --config nope: unknown configuration; give a .yaml file or one of "),
        (
            ("mix", "--set", "plan.nope=1"),
            "csm: plan.nope: no such setting; allowed: pairs, pairs_per_class, ratios, grid, alpha, sets_per_pair, shard_rows, seed",
        ),
    ],
)
def test_the_script_refuses_in_one_line(csm, tmp_path, arguments, message):
    done = csm(*arguments, "--workspace", tmp_path / "w", "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


# The same command line in this process, which has paid for the imports already.


@pytest.mark.parametrize("verb", ALL_VERBS)
def test_every_verb_explains_itself(call, verb):
    code, out, _ = call(verb, "--help")
    assert code == 0
    assert out.startswith(f"Usage: csm {verb} [OPTIONS]")


def test_version(call):
    assert call("--version")[:2] == (0, "csm, version 0.1.0\n")


@pytest.mark.parametrize("arguments", [("nope",), ("run", "--nope"), ("run", "--set"), ("ui", "--port", "0")])
def test_wrong_usage_is_exit_2(call, arguments):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


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
    ("overrides", "message"),
    [
        (("data.val=0.9",), "data.val, data.test: expected fractions whose sum is below 1"),
        (("data.source=image-folder", "data.path=none"), "data.path: image folder none does not exist"),
        (("data.source=image-folder", "data.path=.", "data.channels=2"), "data.channels: expected 1 (grey) or 3 (RGB), got 2"),
        (("data.source=image-folder", "data.path=.", "data.size=-1"), "data.size: expected pixels"),
    ],
)
def test_data_settings_that_only_the_source_can_judge(refused, overrides, message, tmp_path):
    settings = [word for override in overrides for word in ("--set", override)]
    assert refused("prepare", "--config", "digits", *settings).startswith(message)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["prepare", "run"])
def test_an_image_folder_with_one_class(refused, folder, verb, tmp_path):
    path = folder(cat=5)
    assert refused(verb, *use(path)) == f"data.path: {path} has 1 class folder(s) with images ['cat']: at least 2 are needed"
    assert [entry.name for entry in tmp_path.iterdir()] == ["images"]


def test_an_empty_image_folder(refused, tmp_path):
    (tmp_path / "images").mkdir()
    assert "has 0 class folder(s)" in refused("prepare", *use(tmp_path / "images"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_an_image_that_cannot_be_read_is_named(refused, folder, damage, tmp_path):
    path = folder(cat=6, dog=6)
    image = path / "dog" / "3.png"
    image.write_bytes({"truncated": image.read_bytes()[:-40], "empty": b"", "text": b"not an image"}[damage])
    message = refused("prepare", *use(path))
    assert message.startswith(f"cannot read image {image} (")
    assert message.endswith("): repair or remove it and run again")
    assert [entry.name for entry in tmp_path.iterdir()] == ["images"]


def test_a_good_image_folder_is_read(call, folder, tmp_path):
    code, out, err = call("prepare", *use(folder(cat=8, dog=8)), "--workspace", "w", "--json")
    assert code == 0, err
    assert list(json.loads(out.splitlines()[-1])["stages"]) == ["prepare"]
    assert json.loads((tmp_path / "w" / "dataset.json").read_text())["class_names"] == ["cat", "dog"]
    assert (tmp_path / "w" / "config.yaml").is_file()


@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("plan.pairs=[[cat, cow]]",), "plan.pairs: no class is named 'cow'; the classes are cat, dog"),
        (("plan.pairs=[[cat, cat]]",), "plan.pairs: ['cat', 'cat'] is not a pair of two different classes of 0..1"),
        (
            ("plan.pairs=confusion", "plan.pairs_per_class=2"),
            "plan.pairs_per_class: expected 1 to 1 for 2 classes, got 2",
        ),
    ],
)
def test_pairs_that_the_data_does_not_have(call, refused, folder, verb, overrides, message):
    options = (*use(folder(cat=8, dog=8)), "--workspace", "w")
    assert call("prepare", *options)[0] == 0
    settings = [word for override in overrides for word in ("--set", override)]
    said = refused(verb, *options, *settings)
    # `run` says so before the generator is trained, and `plan` what it lacks before it trains the teacher
    assert said.startswith("plan needs generator, which was not run" if verb == "plan" else message)


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


@pytest.mark.parametrize("workspace", ["file", "file/w", "file/a/b"])
def test_a_workspace_that_cannot_be_written(refused, workspace, tmp_path):
    (tmp_path / "file").touch()
    message = refused("run", "--workspace", workspace)
    assert message.startswith(f"--workspace {workspace}: cannot be written (")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense", "127.0.0.1"])
@pytest.mark.parametrize("verb", ["run", "mix", "prepare"])
def test_an_address_that_does_not_answer(refused, verb, address, tmp_path):
    assert refused(verb, "--address", address).startswith(f"--address {address}: ")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("verb", [verb for verb in RUN_VERBS if verb not in ("prepare", "shift", "run")])
def test_a_verb_without_what_it_needs_says_what_to_run(refused, verb, tmp_path):
    message = refused(verb, "--workspace", "w")
    first = verb if verb == "plan" else verb_stages(verb, load_config("demo"))[0]  # the teacher is for plans of many classes
    reason = f"{first} needs prepare, which was not run in this workspace"
    assert message == f"{reason}: run `csm prepare` with the same options first, or `csm run`"
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


def test_ui_without_a_store(refused, tmp_path):
    assert refused("ui", "--workspace", "w") == "--workspace w: has no mlflow.db yet; run `csm run --workspace w` first"
    assert not any(tmp_path.iterdir())


# In a workspace that is finished: a refused command leaves every file as it was.


@pytest.mark.ray
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "data.val=0.25"), "prepare was made by another configuration there (data.val (default) -> 0.25)"),
        (("--set", "generator.steps=4"), "generator was made by another configuration there (generator.steps 3 -> 4)"),
        (("--set", "plan.sets_per_pair=5"), "mix was made by another configuration there (plan.sets_per_pair 4 -> 5)"),
        (("--set", "mix.sampler.steps=3"), "mix was made by another configuration there (mix.sampler.steps 2 -> 3)"),
        (("--set", "plan.seed=1", "--force", "plan"), "mix was made by another configuration there (plan.seed 0 -> 1)"),
        (("--address", "127.0.0.1:1", "--force", "mix"), "nothing answers at 127.0.0.1 port 1"),
        (("--address", "127.0.0.1:1"), "nothing answers at 127.0.0.1 port 1"),
        (("--set", "nope=1", "--force", "mix"), "nope: no such setting"),
    ],
)
def test_a_refused_run_leaves_a_finished_workspace_as_it_was(refused, finished, snapshot, arguments, message):
    before = snapshot(finished.root)
    said = refused("run", "--config", finished.config, "--workspace", finished.root, *arguments)
    assert message in said
    if "another configuration" in message:
        stage = message.partition(" ")[0]
        assert said.endswith(f"; set that back (--set), choose another --workspace, or replace it with --force {stage}")
    assert snapshot(finished.root) == before


@pytest.mark.ray
@pytest.mark.parametrize(
    ("verb", "override", "message"),
    [
        ("mix", "plan.sets_per_pair=5", "mix was made by another configuration there"),
        (
            "train",
            "annotate.annotators.projection.scale=3",
            "train needs annotate, which depends on fit-annotators, which was run with other settings",
        ),
        (
            "evaluate",
            "train.optimizer.epochs=3",
            "evaluate needs train, which depends on annotate, which depends on fit-annotators",
        ),
        (
            "report",
            "evaluate.bins=9",
            "report needs evaluate, which was run with other settings (evaluate.bins 15 -> 9): run `csm evaluate`",
        ),
    ],
)
def test_a_refused_verb_leaves_a_finished_workspace_as_it_was(refused, finished, snapshot, verb, override, message):
    before = snapshot(finished.root)
    assert message in refused(verb, "--config", finished.config, "--workspace", finished.root, "--set", override)
    assert snapshot(finished.root) == before


@pytest.mark.ray
def test_another_configuration_in_a_finished_workspace(refused, finished, snapshot):
    before = snapshot(finished.root)
    message = refused("run", "--config", "demo", "--workspace", finished.root)
    assert message.startswith(
        f"--workspace {finished.root}: prepare was made by another configuration there (data.source digits -> digits-hard)"
    )
    assert snapshot(finished.root) == before


# Failures that are nobody's input.


def test_a_failure_is_exit_1_in_one_line_and_debug_shows_where(call, monkeypatch):
    def broken(*arguments, **named):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("flows.run.run_verb", broken)
    code, out, err = call("plan")
    assert (code, out) == (1, "")
    assert err == "csm: failed: RuntimeError: first line second line (--debug shows where; the same command goes on)\n"
    code, _, err = call("plan", "--debug")
    assert code == 1
    assert "Traceback" in err
    assert "in broken" in err


def test_an_interrupt_is_exit_130_in_one_line(call, monkeypatch):
    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.run.run_verb", interrupted)
    assert call("plan") == (130, "", "csm: interrupted; run the same command again to go on\n")


def test_a_full_disk_says_so(call, monkeypatch):
    def full(*arguments, **named):
        raise OSError(28, "No space left on device", "/w/mixed/part")

    monkeypatch.setattr("flows.run.run_verb", full)
    code, _, err = call("mix")
    assert code == 2
    assert err.startswith("csm: /w/mixed/part: No space left on device; free space")


def test_verbs_cover_every_stage():
    assert set(VERBS) == {*RUN_VERBS, "import-generator"}
    shifted = load_config("demo", ["evaluate.shifts.photographs.kind=photographs"])
    assert verb_stages("run", shifted) == tuple(STAGES)
    assert {stage for verb in set(RUN_VERBS) - {"run"} for stage in verb_stages(verb, shifted)} == set(STAGES)


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


def test_the_module_is_a_script_too():
    assert Path(cli.__file__).read_text().endswith('if __name__ == "__main__":\n    main()\n')
