"""The plan stage: which pairs it takes, what it asks for them, and what its fingerprint says."""

import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from csm import storage, tables
from csm.classifiers import Classifier, ClassifierSpec, build_classifier
from csm.datasets.real import build
from csm.errors import InputError
from csm.generators import load_generator
from csm.mixing import mix
from csm.sampling import SamplerConfig
from flows.artifacts import StageRecord, Workspace
from flows.config import load_config
from flows.plan import STAGE
from flows.reuse import run_stages
from flows.run import STAGES, verb_stages
from flows.stages import Context

CLASSES, IMAGES = 5, 12  # of each class in each split
RECORD = StageRecord("plan", "f", {}, 1, {"generator": "net"})


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with noisy images of five classes and a teacher of two classifiers that were never trained."""
    root, draw = tmp_path_factory.mktemp("fitted"), np.random.default_rng(0)
    labels = np.tile(np.arange(CLASSES), 3 * IMAGES)
    images = draw.integers(0, 120, (len(labels), 8, 8, 1)) + 25 * labels[:, None, None, None]
    splits = np.repeat(tables.SPLITS, CLASSES * IMAGES)
    data = build("toy", images.astype(np.uint8), labels, splits, ["ant", "bee", "cat", "dog", "elk"])
    data.save(root)
    for number in range(2):
        torch.manual_seed(number)
        spec = ClassifierSpec("small-cnn", {"width": 4}, 1, data.info.class_names, data.info.mean, data.info.std)
        build_classifier(spec).save(Workspace(root).teacher_member(number))
    return root


def context(root: Path, *overrides: str) -> Context:
    return Context(load_config("digits", ["annotate.members=2", "plan.ratios=3", *overrides]), Workspace(root), STAGES)


def planned(root: Path, *overrides: str) -> set[tuple[int, int]]:
    made = STAGE.run(context(root, *overrides), RECORD)
    frame = tables.read(root / "plan.parquet", tables.PLAN)
    assert made.rows == len(frame)
    return set(frame.select("class_a", "class_b").iter_rows())


def members(root: Path) -> list[Classifier]:
    from csm.classifiers import load_classifier

    return [load_classifier(Workspace(root).teacher_member(number)) for number in range(2)]


def split(root: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    frame = pl.read_parquet(root / "real" / "*.parquet").filter(pl.col("split").cast(pl.String) == name)
    pixels = np.stack([np.frombuffer(image, np.uint8).reshape(1, 8, 8) for image in frame["image"].to_list()])
    return torch.from_numpy(pixels), torch.tensor(frame["label"].to_list())


def nearest(score: dict[tuple[int, int], float], per_class: int) -> set[tuple[int, int]]:
    """Pairs of the lowest score, class by class."""
    chosen = set()
    for one in range(CLASSES):
        holding = sorted((pair for pair in score if one in pair), key=lambda pair: score[pair])
        chosen |= set(holding[:per_class])
    return chosen


@pytest.mark.parametrize("per_class", [1, 2, 4])
def test_confusion_is_that_of_the_whole_teacher_on_the_validation_split(fitted: Path, per_class: int) -> None:
    images, labels = split(fitted, "val")
    with torch.no_grad():
        posterior = torch.stack([member(images).softmax(dim=1) for member in members(fitted)]).mean(dim=0)
    mean = torch.stack([posterior[labels == k].mean(dim=0) for k in range(CLASSES)])
    score = {(a, b): -float(mean[a, b] + mean[b, a]) for a, b in combinations(range(CLASSES), 2)}
    wanted = nearest(score, per_class)
    assert planned(fitted, "plan.pairs=confusion", f"plan.pairs_per_class={per_class}") == wanted
    assert (len(wanted) == 10) == (per_class == 4)


@pytest.mark.parametrize("per_class", [1, 2])
def test_prototypes_are_the_encoders_class_means_on_the_train_split(fitted: Path, per_class: int) -> None:
    images, labels = split(fitted, "train")
    with torch.no_grad():
        features = members(fitted)[0].features(images)
    means = [features[labels == k].mean(dim=0) for k in range(CLASSES)]
    score = {(a, b): float((means[a] - means[b]).norm()) for a, b in combinations(range(CLASSES), 2)}
    assert planned(fitted, "plan.pairs=prototypes", f"plan.pairs_per_class={per_class}") == nearest(score, per_class)


def test_classes_have_names(fitted: Path) -> None:
    assert planned(fitted, "plan.pairs=[[cat, ant], [bee, 4]]") == {(0, 2), (1, 4)}


def test_the_stage_says_how_much_it_planned(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned(fitted, "plan.pairs=[[0, 1], [2, 3], [0, 4]]", "plan.sets_per_pair=7", "plan.shard_rows=9")
    assert "  63 images: 3 of 10 pairs x 7 sets x 3 ratios, in 7 shards" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.pairs=[[cat, cow]]", "plan.pairs: no class is named 'cow'; the classes are ant, bee, cat, dog, elk"),
        ("plan.pairs=[[0, 5]]", "plan.pairs: [0, 5] is not a pair of two different classes of 0..4"),
        ("plan.pairs=[[cat, 2]]", "plan.pairs: ['cat', 2] is not a pair of two different classes of 0..4"),
        ("plan.pairs_per_class=5", "plan.pairs_per_class: expected 1 to 4 for 5 classes, got 5"),
    ],
)
def test_what_the_data_does_not_have_is_refused_before_anything_is_planned(fitted: Path, override: str, message: str) -> None:
    overrides = ["plan.pairs=confusion", override] if "per_class" in override else [override]
    with pytest.raises(InputError) as caught:
        STAGE.check(context(fitted, *overrides))
    assert str(caught.value) == message


def test_before_the_data_is_prepared_there_is_nothing_to_check(tmp_path: Path) -> None:
    STAGE.check(context(tmp_path, "plan.pairs=[[cat, cow]]"))


def test_only_policies_that_are_measured_read_the_teacher() -> None:
    for policy, needed in [
        ("all", ()),
        ("auto", ("fit-teacher",)),  # before the data are known
        ("[[0, 1]]", ()),
        ("confusion", ("fit-teacher",)),
        ("prototypes", ("fit-teacher",)),
    ]:
        config = load_config("digits", [f"plan.pairs={policy}"])
        assert STAGE.reads(config) == ("prepare", "generator", *needed)
        assert verb_stages("plan", config) == (*needed, "plan")
        assert verb_stages("mix", config) == ("mix",)
        assert verb_stages("run", config) == tuple(name for name in STAGES if name not in ("shift", "evaluate-shift"))
        ratio = load_config("digits", [f"plan.pairs={policy}", "annotate.annotator=ratio", "train.compare=[csm]"])
        assert ("fit-teacher" in verb_stages("run", ratio)) == bool(needed)
        assert verb_stages("annotate", ratio) == ("fit-annotators", "annotate")


@pytest.mark.parametrize(
    ("overrides", "more"),
    [
        (("plan.noise=image",), {"noise"}),
        (("plan.alpha=3", "plan.pairs_per_class=9"), set()),  # no part of this plan
        (("plan.grid=cosine", "plan.alpha=3"), {"grid"}),
        (("plan.grid=beta",), {"grid", "alpha"}),
        (("plan.pairs=prototypes",), {"pairs_per_class"}),
        (("plan.kinds=[semantic]",), set()),
        (("plan.kinds=[pixel, semantic]",), {"kinds"}),
    ],
)
def test_settings_without_a_part_in_the_plan_do_not_call_it_out_of_date(overrides: tuple[str, ...], more: set[str]) -> None:
    settings = STAGE.settings(load_config("digits", ("plan.noise=set", *overrides)))["plan"]
    assert set(settings) == {"pairs", "ratios", "sets_per_pair", "shard_rows", "seed"} | more


@pytest.mark.slow
@pytest.mark.ray
def test_the_command_trains_the_teacher_first_and_mixes_with_the_operator(finished, csm, tmp_path, one_thread) -> None:
    root = Path(shutil.copytree(finished.root, tmp_path / "workspace"))
    shutil.rmtree(root / "mixed")
    settings = [
        "plan.pairs=confusion",
        "plan.pairs_per_class=1",
        "plan.grid=cosine",
        "mix.operator=score",
        "plan.sets_per_pair=1",
    ]
    options = ["--config", finished.config, "--workspace", root, *(word for one in settings for word in ("--set", one))]
    done = csm("plan", *options)
    assert done.returncode == 0, done.stderr
    assert "fit-teacher: reused" in done.stderr
    plan = tables.read(root / "plan.parquet", tables.PLAN)
    assert set(plan["class_a"]) | set(plan["class_b"]) == set(range(10))
    done = csm("mix", *options)
    assert done.returncode == 0, done.stderr
    mixed = pl.read_parquet(root / "mixed" / "*.parquet")
    generator, sampler = load_generator(root / "generator"), SamplerConfig(steps=2)
    direct = [mix(shard, generator, (8, 8, 1), sampler, 4, "score") for shard in plan.partition_by("shard", maintain_order=True)]
    assert mixed.equals(pl.concat(direct))
    linear = mix(plan, generator, (8, 8, 1), sampler, 4)
    assert not linear.equals(mixed)


def test_a_run_without_mixed_images_makes_none() -> None:
    config = load_config("digits", ["train.compare=[cross-entropy, cutmix]", "plan.pairs=confusion"])
    assert verb_stages("run", config) == ("prepare", "train", "model", "evaluate", "report")
    assert STAGES["train"].reads(config) == ("prepare",)
    assert STAGES["report"].reads(config) == ("prepare", "train", "evaluate")


# auto ------------------------------------------------------------------------------------------------------------------


def prepared(root: Path, fitted: Path, classes: int = CLASSES) -> Path:
    """The images of ``fitted`` and no teacher, as a data set of ``classes``."""
    shutil.copytree(fitted / "real", root / "real")
    info = storage.read_json(fitted / "dataset.json")
    storage.write_json(root / "dataset.json", {**info, "class_names": [f"c{k}" for k in range(classes)]})
    return root


def test_the_rules_are_resolved_and_told(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = STAGE.run(context(fitted, "plan.sets_per_pair=auto"), RECORD)
    assert made.rows == 10 * 64 * 3  # 60 real images x 32 = 1,920
    said = capsys.readouterr().err
    assert "  1,920 images: 10 of 10 pairs x 64 sets x 3 ratios" in said
    assert "  auto: pairs: all 10 of 5 classes, which are no more than 16" in said
    assert "  auto: 64 sets for each of 10 pairs: 1,920 mixed images; the rule asks for 32 for each of 60 real ones" in said


def test_what_is_set_to_what_the_rules_say_is_the_same_plan(fitted: Path) -> None:
    """So a stage is not made again when a number is written out, or left to the rules."""
    rules, out = context(fitted, "plan.sets_per_pair=auto"), context(fitted, "plan.pairs=all", "plan.sets_per_pair=64")
    assert STAGE.settings(rules.resolved) == STAGE.settings(out.resolved) == STAGE.settings(out.config)
    assert STAGE.settings(rules.resolved)["plan"]["sets_per_pair"] == 64
    assert rules.resolved.to_yaml().count("sets_per_pair: 64") == 1
    assert rules.config.plan.sets_per_pair == "auto", "what the user said stays what the run is known by"


def test_other_data_resolve_to_another_plan(fitted: Path, tmp_path: Path) -> None:
    before = context(tmp_path)
    assert before.resolved.plan.pairs == "auto"
    prepared(tmp_path, fitted, 40)
    plan = before.resolved.plan
    assert (plan.pairs, plan.pairs_per_class, plan.sets) == ("confusion", 6, 12)
    info = storage.read_json(tmp_path / "dataset.json")
    storage.write_json(tmp_path / "dataset.json", {**info, "class_names": ["a", "b"]})
    Workspace(tmp_path).write_record(StageRecord("prepare", "f", {}, 1, {}, True, "other data"))
    assert before.resolved.plan.pairs == "all"


def test_the_teacher_is_asked_only_by_many_classes(fitted: Path, tmp_path: Path) -> None:
    few, many = (context(prepared(tmp_path / str(classes), fitted, classes)) for classes in (16, 17))
    assert STAGE.reads(few.resolved) == ("prepare", "generator")
    assert STAGE.reads(many.resolved) == ("prepare", "generator", "fit-teacher")
    assert verb_stages("plan", few.resolved) == ("plan",)


def test_a_run_leaves_out_the_teacher_that_nobody_asks(monkeypatch: pytest.MonkeyPatch, fitted: Path, tmp_path: Path) -> None:
    ran: list[str] = []
    monkeypatch.setattr("flows.reuse.run_stage", lambda context, name: ran.append(name))
    for classes, expected in ((16, ["plan", "mix"]), (17, ["fit-teacher", "plan", "mix"])):
        ran.clear()
        inner = context(prepared(tmp_path / str(classes), fitted, classes))
        inner.outcomes.update({name: {"reused": True} for name in STAGES})
        run_stages(inner, ("fit-teacher", "plan", "mix"))
        assert ran == expected


def test_methods_that_want_more_sets_than_the_rules_give_are_refused(fitted: Path) -> None:
    wanting = ("plan.sets_per_pair=auto", "train.methods.csm.mixed.sets=65", "train.compare=[csm]")
    with pytest.raises(InputError, match=r"mixed\.sets: expected no more than the 64 of plan\.sets_per_pair, got 65"):
        STAGE.check(context(fitted, *wanting))
    STAGE.check(context(fitted, wanting[0], wanting[1].replace("65", "64"), wanting[2]))


@pytest.mark.parametrize(
    ("kinds", "rows", "words"),
    [
        ("[semantic, pixel]", 126, "126 images: 3 of 10 pairs x 7 sets x 3 ratios, each semantic, pixel, in 14 shards"),
        ("[unmixed, real]", 123, "123 images: 3 of 10 pairs x 7 sets x 3 ratios, each unmixed and 60 real ones, in 14 shards"),
        ("[real]", 60, "60 images: 60 real ones, in 7 shards"),
    ],
)
def test_the_stage_plans_the_kinds_that_are_asked_for(
    fitted: Path, capsys: pytest.CaptureFixture[str], kinds: str, rows: int, words: str
) -> None:
    settings = ("plan.pairs=[[0, 1], [2, 3], [0, 4]]", "plan.sets_per_pair=7", "plan.shard_rows=9", f"plan.kinds={kinds}")
    made = STAGE.run(context(fitted, *settings, "train.compare=[cross-entropy]"), RECORD)
    assert made.rows == rows
    assert f"  {words}" in capsys.readouterr().err
    real = tables.read_plan(fitted / "plan.parquet", "real")
    if "real" in kinds:
        assert real["class_a"].to_list() == split(fitted, "train")[1].tolist()


@pytest.mark.slow
@pytest.mark.ray
def test_images_outlive_a_plan_of_other_noises(finished, csm, tmp_path) -> None:
    root = Path(shutil.copytree(finished.root, tmp_path / "workspace"))
    options = ["--config", str(finished.config), "--workspace", str(root)]
    refused = csm("run", *options, "--set", "plan.noise=set")
    assert refused.returncode == 2
    assert "mix was made by another configuration there (plan.noise image -> set); set that back (--set)" in refused.stderr
    assert csm("plan", *options, "--set", "plan.noise=set").returncode == 0
    again = csm("mix", *options, "--set", "plan.noise=set")
    assert again.returncode == 2
    assert "mix was made by another configuration there (another result of plan)" in again.stderr
    back = csm("run", *options)
    assert back.returncode == 0, back.stderr
    assert "mix: reused" in back.stderr
