"""The stage fit-annotators and the keys that hang on it: what is made anew when a setting changes, and what "auto" takes."""

import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.annotation import EncodeShards
from cluster.shards import plan_shards
from csm import storage, tables
from csm.classifiers import ClassifierSpec, build_classifier
from csm.datasets.real import build
from csm.encoders import FeatureTable
from csm.errors import InputError
from csm.planning import make_plan
from csm.reannotation import Annotator, fit_calibration, held_out_shares
from flows import features
from flows.annotate import annotate_jobs, annotated
from flows.artifacts import StageRecord, Workspace
from flows.config import load_config
from flows.fit_annotators import STAGE, annotator_spec, annotators, calibration_of
from flows.run import STAGES
from flows.stages import Context
from flows.train import run_specs

CLASSES, IMAGES = 4, 12  # of each class in each split
RECORD = StageRecord("fit-annotators", "f", {}, 2, {"prepare": "data", "fit-teacher": "members"})
COMPARE = "train.compare=[paper, csm]"
Fit = Callable[..., Context]

pytestmark = pytest.mark.usefixtures("one_thread")


class NoTracker:
    """Keeps what is measured."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def log_metrics(self, key: str, values: dict[str, float]) -> None:
        self.metrics |= values

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **settings: ""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A workspace up to the mixed images: noisy pictures of four classes, a teacher that was never trained."""
    draw = np.random.default_rng(0)
    labels = np.tile(np.arange(CLASSES), 3 * IMAGES)
    images = draw.integers(0, 120, (len(labels), 6, 6, 1)) + 25 * labels[:, None, None, None]
    data = build("toy", images.astype(np.uint8), labels, np.repeat(tables.SPLITS, CLASSES * IMAGES), ["ant", "bee", "cat", "dog"])
    data.save(tmp_path)
    workspace = Workspace(tmp_path)
    for number in range(2):
        torch.manual_seed(number)
        spec = ClassifierSpec("small-cnn", {"width": 4}, 1, data.info.class_names, data.info.mean, data.info.std)
        build_classifier(spec).save(workspace.teacher_member(number))
    plan = make_plan(CLASSES, "data", "net", load_config("demo", ["plan.ratios=3", "plan.sets_per_pair=1"]).plan)
    tables.write(plan, workspace.plan, tables.PLAN)
    workspace.write_record(StageRecord("mix", "mixed", {"mix": {}}, 1, {"plan": "plan"}, True, "mixed"))
    return tmp_path


@pytest.fixture
def encoded() -> list[tuple[str, int]]:
    """(encoder, slice) of everything that was encoded."""
    return []


@pytest.fixture
def fit(root: Path, encoded: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> Fit:
    """``fit(*overrides)`` runs the stage, with the pool's work done in this process."""
    monkeypatch.setattr("cluster.pools._node", lambda: "here")

    def encode_shards(jobs: Any, pool: Any, on_receipt: Any, on_standing: Any) -> None:
        for shard in sorted(frozenset().union(*(job.shards for job in jobs))):
            block = pa.Table.from_pylist([{"shard": shard, "receipts": [], "failure": None}])
            for row in [row for table in EncodeShards(jobs, 1)(block) for row in table.to_pylist()]:
                if row["failure"] is not None:
                    raise pickle.loads(row["failure"])
                encoded.extend((receipt["part"].removeprefix("encoders/"), shard) for receipt in row["receipts"])

    monkeypatch.setattr(features, "encode_shards", encode_shards)

    def run(*overrides: str, record: StageRecord = RECORD) -> Context:
        config = load_config("demo", ["annotate.members=2", "annotate.annotator=teacher", COMPARE, *overrides])
        context = Context(config, Workspace(root), STAGES, _tracker=NoTracker(), _connected=True)  # type: ignore[arg-type]
        STAGE.run(context, record)
        return context

    return run


def files(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in (root / "annotators").rglob("*") if path.is_file()}


def changed(root: Path, before: dict[str, int]) -> set[str]:
    return {name.removeprefix("annotators/") for name, time in files(root).items() if before.get(name) != time}


def keys(context: Context) -> dict[str, str]:
    return {job.name: job.key for job in annotate_jobs(context, frozenset(plan_shards(context.workspace.plan)))}


def test_each_annotator_is_what_the_direct_calls_give(fit: Fit, root: Path, encoded: list[tuple[str, int]]) -> None:
    context = fit("annotate.annotators.projection.scale=null")
    assert annotators(context.workspace, context.config) == ("projection", "teacher")
    assert sorted(encoded) == [("classifier", 0), ("teacher", 0)]  # each image once
    features, labels = FeatureTable(root / "annotators/encoders/classifier").matrix("val")
    projection = Annotator(annotator_spec(context.workspace, context.config, "projection"))
    shares = held_out_shares(projection, {"classifier": features}, labels, CLASSES)
    assert calibration_of(context.workspace, "projection") == fit_calibration("scale", None, shares, labels)
    said, labels = FeatureTable(root / "annotators/encoders/teacher").matrix("val")
    expected = fit_calibration("temperature", said.log_softmax(dim=1), None, labels)
    assert calibration_of(context.workspace, "teacher") == expected
    assert context.tracker.metrics["teacher.temperature"] == expected.temperature  # type: ignore[attr-defined]
    assert {"projection.scale", "projection.nll", "projection.nll_after"} <= set(context.tracker.metrics)  # type: ignore[attr-defined]


def test_nothing_is_made_again_when_nothing_changed(fit: Fit, root: Path) -> None:
    fit()
    before = files(root)
    fit()
    assert changed(root, before) == set()


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("annotate.annotators.projection.scale=3", "projection"),
        ("annotate.annotators.projection.calibrator=none", "projection"),
        ("annotate.annotators.teacher.calibrator=vector", "teacher"),
        ("annotate.annotators.teacher.pair=true", "teacher"),
    ],
)
def test_another_calibrator_touches_no_image_and_no_other_annotator(
    fit: Fit, root: Path, encoded: list[tuple[str, int]], override: str, name: str
) -> None:
    first = fit()
    before, runs = files(root), {spec.run: spec.fingerprint for spec in run_specs(first)}
    stored = keys(first)
    encoded.clear()
    overrides = [override, "annotate.annotators.projection.scale=null"] if override.endswith("none") else [override]
    context = fit(*overrides)
    assert encoded == []
    assert changed(root, before) == {f"{name}/calibration.json"}
    assert keys(context) == stored  # what is annotated stays
    method = {"projection": "paper", "teacher": "csm"}[name]
    trained = {spec.run for spec in run_specs(context) if spec.fingerprint != runs[spec.run]}
    assert trained == {f"{method}-seed{seed}" for seed in range(3)}


def test_a_further_annotator_leaves_the_others_and_their_classifiers_alone(
    fit: Fit, root: Path, encoded: list[tuple[str, int]]
) -> None:
    first = fit()
    before, stored, runs = files(root), keys(first), {spec.run: spec.fingerprint for spec in run_specs(first)}
    encoded.clear()
    context = fit(
        "train.methods.new={mixed: {annotator: lda}}", "train.methods.raw={mixed: {annotator: ratio}}",
        "train.compare=[paper, csm, new, raw]",
    )  # fmt: skip
    assert encoded == []  # its features are there
    assert {name.split("/")[0] for name in changed(root, before)} == {"lda", "ratio"}
    assert not (root / "annotators/ratio/held_out.safetensors").exists()
    assert {name: key for name, key in keys(context).items() if name in stored} == stored
    assert {spec.run: spec.fingerprint for spec in run_specs(context) if spec.run in runs} == runs


def test_an_annotator_without_the_teacher_needs_no_classifier(fit: Fit, encoded: list[tuple[str, int]]) -> None:
    record = StageRecord("fit-annotators", "f", {}, 2, {"prepare": "data"})
    context = fit("annotate.annotator=qda-pixels", "train.compare=[csm]", record=record)
    assert STAGE.reads(context.config) == ("prepare",)
    assert encoded == [("pixels", 0)]
    assert keys(context).keys() == {"qda-pixels"}


def test_another_head_setting_fits_and_annotates_that_annotator_again(fit: Fit, root: Path) -> None:
    first = fit("annotate.annotator=lda")
    before, stored = files(root), keys(first)
    context = fit("annotate.annotator=lda", "annotate.annotators.lda.parameters={shrinkage: 0.5}")
    assert {name.split("/")[0] for name in changed(root, before)} == {"lda"}
    assert {name for name, key in keys(context).items() if key != stored[name]} == {"lda"}


@pytest.mark.parametrize("needed", ["prepare", "fit-teacher"])
def test_another_teacher_or_other_data_is_encoded_and_fitted_again(
    fit: Fit, root: Path, encoded: list[tuple[str, int]], needed: str
) -> None:
    stored = keys(fit())
    encoded.clear()
    other = StageRecord("fit-annotators", "f", {}, 2, {**RECORD.inputs, needed: "other"})
    context = fit(record=other)
    assert sorted(encoded) == [("classifier", 0), ("teacher", 0)]
    assert all(key != stored[name] for name, key in keys(context).items())


def test_an_encoder_that_is_fitted_comes_first_and_once(fit: Fit, root: Path, encoded: list[tuple[str, int]]) -> None:
    overrides = ("annotate.encoders.few={kind: pca, parameters: {components: 3}}", "annotate.annotator=a")
    define = "annotate.annotators.a={head: lda, encoder: few}"
    fit(*overrides, define)
    assert FeatureTable(root / "annotators/encoders/few").size == 3
    before = files(root)
    encoded.clear()
    fit(*overrides, define)
    assert encoded == []
    fit(overrides[0].replace("3", "5"), overrides[1], define)
    assert encoded == [("few", 0)]
    assert {"encoders/few/encoder.json", "encoders/few/part-00000000.parquet"} <= changed(root, before)
    assert FeatureTable(root / "annotators/encoders/few").size == 5


def test_a_members_calibrator_is_part_of_its_ensemble(fit: Fit) -> None:
    overrides = ("annotate.annotator=both", "annotate.annotators.both={head: ensemble, members: [teacher, qda-pixels]}")
    first = fit(*overrides)
    stored, calibration = keys(first), calibration_of(first.workspace, "both")
    assert calibration.images == CLASSES * IMAGES
    assert calibration.nll is not None
    again = fit(*overrides, "annotate.annotators.teacher.calibrator=none")
    assert {name for name, key in keys(again).items() if key != stored[name]} == {"both"}
    (job,) = [job for job in annotate_jobs(again, frozenset({0})) if job.name == "both"]
    assert set(job.encoders) == {"teacher", "pixels"}


def test_auto_takes_the_least_nll_and_leaves_out_what_cannot_be_fitted(
    fit: Fit, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "annotate.annotators.bad={head: posterior, encoder: pixels}"
    pool = "annotate.annotators.pool={head: ensemble, members: [lda, bad]}"
    context = fit("annotate.annotator=auto", "annotate.candidates=[teacher, bad, lda, pool]", bad, pool)
    choice = storage.read_json(root / "annotators" / "auto.json")
    scores = {name: calibration_of(context.workspace, name).nll for name in ("teacher", "lda")}
    assert choice["chosen"] == min(scores, key=lambda name: scores[name] or 0)
    assert {name: choice["candidates"][name] for name in scores} == scores
    assert choice["candidates"]["bad"].startswith("posterior: the encoder gives 36 values, the data has 4 classes")
    assert choice["candidates"]["pool"] == "its member bad was left out"
    said = capsys.readouterr().err
    assert "  bad: left out: posterior: the encoder gives 36 values" in said
    assert f"  auto: {choice['reason']}" in said
    assert context.tracker.metrics["auto.lda.nll"] == scores["lda"]  # type: ignore[attr-defined]
    # what is chosen is run under its own name, so that naming it makes nothing again
    assert annotators(context.workspace, context.config) == ("projection", choice["chosen"])
    named = fit(f"annotate.annotator={choice['chosen']}")
    assert keys(named) == keys(context)
    assert [spec.fingerprint for spec in run_specs(named)] == [spec.fingerprint for spec in run_specs(context)]
    assert {asdict(spec)["settings"]["mixed"]["annotator"] for spec in run_specs(context)} == {"projection", choice["chosen"]}


@pytest.mark.parametrize(
    "lacking", ["bad", "zero-shot"]
)  # a head that does not fit its encoder; an encoder that cannot be loaded
def test_an_ensemble_among_the_candidates_goes_on_without_a_member_that_cannot_be_had(
    fit: Fit, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lacking: str
) -> None:
    (tmp_path / "model").mkdir()
    overrides = (
        f"annotate.encoders.clip.parameters.path={tmp_path / 'model'}",
        "annotate.annotators.bad={head: posterior, encoder: pixels}",
        f"annotate.annotators.pool={{head: ensemble, members: [teacher, {lacking}, lda], parameters: {{pool: log}}}}",
        "annotate.annotators.over={head: ensemble, members: [pool, qda]}",
    )
    context = fit("annotate.annotator=auto", "annotate.candidates=[pool]", *overrides)
    said = capsys.readouterr().err
    assert f"  {lacking}: left out: " in said
    assert f"  pool: pools teacher, lda alone, without {lacking}\n" in said
    assert "  pool: log pool, " in said
    assert " pooled -> " in said
    assert "with members, weights and calibrator fitted on other images (cross-fitted)" in said
    kept = storage.read_json(root / "annotators/pool/annotator.json")["chosen"]
    assert list(kept) == ["teacher", "lda"]
    assert storage.read_json(root / "annotators" / "auto.json")["chosen"] == "pool"
    (job,) = [job for job in annotate_jobs(context, frozenset({0})) if job.name == "pool"]
    assert [member.name for member in job.spec.members] == ["teacher", "lda"]
    assert set(job.encoders) == {"teacher", "classifier"}
    assert all(path.exists() for path in STAGE.outputs(context.workspace, context.config))
    before = files(root)
    assert keys(fit("annotate.annotator=auto", "annotate.candidates=[pool]", *overrides)) == keys(context)
    assert changed(root, before) == {"auto.json"}  # the choice is made again, and is the same
    with pytest.raises(
        InputError, match=f"^annotate\\.(annotators\\.{lacking}|encoders\\.clip): "
    ):  # who names it wants all of it
        fit("annotate.annotator=pool", *overrides)


def test_an_ensemble_that_has_all_its_members_again_is_fitted_again(fit: Fit, root: Path) -> None:
    pool = "annotate.annotators.pool={head: ensemble, members: [teacher, member, lda]}"
    auto = ("annotate.annotator=auto", "annotate.candidates=[pool]", pool)
    before = keys(fit(*auto, "annotate.annotators.member={head: posterior, encoder: pixels}"))
    after = keys(fit(*auto, "annotate.annotators.member={head: lda, encoder: pixels}"))
    assert list(storage.read_json(root / "annotators/pool/annotator.json")["chosen"]) == ["teacher", "member", "lda"]
    assert after["pool"] != before["pool"]


def test_what_a_head_chose_is_said_and_kept(fit: Fit, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit("annotate.annotator=ppca-pixels", "train.compare=[csm]")
    chosen = storage.read_json(root / "annotators/ppca-pixels/annotator.json")["chosen"]
    assert set(chosen) == {"rank", "pooling"}
    line = f"  ppca-pixels: rank {chosen['rank']}, pooling {chosen['pooling']:g}, by NLL on validation images"
    assert line in capsys.readouterr().err


def test_auto_without_a_candidate_that_can_be_fitted_is_refused(fit: Fit) -> None:
    with pytest.raises(
        InputError, match=r"annotate\.candidates: none of them can be chosen \(bad: posterior: the encoder gives 36"
    ):
        fit(
            "annotate.annotator=auto", "annotate.candidates=[bad]",
            "annotate.annotators.bad={head: posterior, encoder: pixels}",
        )  # fmt: skip


def test_a_named_annotator_that_cannot_be_fitted_is_refused(fit: Fit) -> None:
    with pytest.raises(InputError, match=r"^annotate\.annotators\.bad: posterior: the encoder gives 36 values"):
        fit("annotate.annotator=bad", "annotate.annotators.bad={head: posterior, encoder: pixels}")


def test_an_encoder_that_cannot_be_loaded_leaves_out_its_candidates_only(fit: Fit, root: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    lacking = f"annotate.encoders.clip.parameters.path={tmp_path / 'model'}"
    fit("annotate.annotator=auto", "annotate.candidates=[zero-shot, teacher]", lacking)
    choice = storage.read_json(root / "annotators" / "auto.json")
    assert choice["chosen"] == "teacher"
    assert choice["candidates"]["zero-shot"].startswith("annotate.encoders.clip: ")
    with pytest.raises(InputError, match=r"^annotate\.encoders\.clip: .*model"):
        fit("annotate.annotator=zero-shot", lacking)


def test_outputs_are_those_of_what_is_run(fit: Fit, root: Path) -> None:
    context = fit("annotate.annotator=auto", "annotate.candidates=[teacher, lda]")
    paths = {str(path.relative_to(root / "annotators")) for path in STAGE.outputs(context.workspace, context.config)}
    assert {"auto.json", "teacher/calibration.json", "encoders/classifier", "lda/annotator.json"} <= paths
    (root / "annotators/lda/annotator.json").unlink()
    chosen = annotators(context.workspace, context.config)[1]
    paths = {str(path.relative_to(root / "annotators")) for path in STAGE.outputs(context.workspace, context.config)}
    assert ("lda/annotator.json" in paths) == (chosen == "lda")  # a candidate that was not chosen may lack


def test_a_choice_that_is_not_defined_any_more_is_made_anew(fit: Fit) -> None:
    new = "annotate.annotators.new={head: lda, encoder: classifier}"
    assert annotators(*both(fit("annotate.annotator=auto", "annotate.candidates=[new]", new))) == ("projection", "new")
    config = load_config("demo", [COMPARE, "annotate.annotator=auto", "annotate.candidates=[teacher]"])
    workspace = both(fit())[0]
    assert annotators(workspace, config) == ("projection",)
    assert all("new" not in path.parts for path in STAGE.outputs(workspace, config))
    assert annotators(*both(fit("annotate.annotator=auto", "annotate.candidates=[teacher]"))) == ("projection", "teacher")


def both(context: Context) -> tuple[Workspace, Any]:
    return context.workspace, context.config


def test_definitions_that_are_not_used_do_not_call_it_out_of_date() -> None:
    settings = lambda *more: STAGE.settings(load_config("demo", ["annotate.annotator=teacher", *more]))  # noqa: E731
    assert settings("annotate.annotators.knn=null", "annotate.encoders.new={kind: pixels}") == settings()
    assert settings("annotate.annotators.teacher.description=other") == settings()
    assert settings("annotate.annotators.teacher.pair=true") != settings()


def test_annotations_are_identified_by_image_fit_and_calibration(fit: Fit, root: Path) -> None:
    context = fit()
    workspace = context.workspace
    config = context.config
    digests = {annotated(workspace, config, "teacher"), annotated(workspace, config, "projection")}
    workspace.write_record(StageRecord("mix", "other", {"mix": {}}, 1, {"plan": "other"}, True, "other"))
    digests.add(annotated(workspace, config, "teacher"))
    fit("annotate.annotators.teacher.calibrator=none")
    digests.add(annotated(workspace, config, "teacher"))
    digests.add(annotated(workspace, load_config("demo", ["annotate.top=2"]), "teacher"))  # of four classes
    assert len(digests) == 5
    digests.add(annotated(workspace, load_config("demo", ["annotate.top=4"]), "teacher"))  # all of them: as by default
    assert len(digests) == 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["annotate.annotator=truth"], "annotate.encoders.truth: the law of these images is not known"),
        (
            ["annotate.annotator=linear-clip", "annotate.encoders.clip.parameters.path=/nowhere/clip"],
            "annotate.encoders.clip: path: folder '/nowhere/clip' does not exist",
        ),
        (
            ["annotate.annotator=linear-dinov2", "annotate.encoders.dinov2.parameters.path=ROOT/other"],
            "annotate.encoders.dinov2: ROOT/other/config.json: model_type is 'clip'; expected dinov2",
        ),
        (["annotate.annotator=lda-dinov2", "annotate.encoders.dinov2.parameters.path=ROOT/file"], "is a file, not a folder"),
    ],
)
def test_an_encoder_that_cannot_be_had_is_refused_before_any_work(root: Path, overrides: list[str], message: str) -> None:
    storage.write_json(root / "other" / "config.json", {"model_type": "clip"})
    (root / "file").touch()
    config = load_config("demo", [override.replace("ROOT", str(root)) for override in overrides])
    with pytest.raises(InputError) as caught:
        STAGE.check(Context(config, Workspace(root), STAGES))
    assert message.replace("ROOT", str(root)) in str(caught.value)


def test_a_candidate_that_cannot_be_had_is_no_reason_to_refuse(root: Path) -> None:
    settings = ["annotate.annotator=auto", "annotate.candidates=[teacher, truth]"]
    STAGE.check(Context(load_config("demo", settings), Workspace(root), STAGES))


def test_the_nll_that_is_said_is_of_images_that_the_calibrator_did_not_see(fit: Fit, capfd: pytest.CaptureFixture[str]) -> None:
    context = fit("annotate.annotator=lda-pixels", "annotate.annotators.lda-pixels.calibrator=isotonic")
    said = {line.split(":")[0].strip(): line for line in capfd.readouterr().err.splitlines()}
    found = calibration_of(context.workspace, "lda-pixels")
    after = f"{found.nll:.3f} calibrated on other images (cross-fitted)"
    assert f"; NLL {found.nll_before:.3f} as it is -> {after}" in said["lda-pixels"]
    assert found.nll > found.nll_after
    assert "; NLL within pairs" in said["projection"]
    assert "shares alone" not in said["lda-pixels"]


def test_an_annotator_that_knows_nothing_is_said_to(fit: Fit, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number in range(2):  # weights of zero: the same for every image
        file = Workspace(root).teacher_member(number) / "model.safetensors"
        weights = storage.read_tensors(file)
        storage.write_tensors(file, {name: weights[name] * (name in ("mean", "std")) for name in weights})
    fit("annotate.annotator=knn", "train.compare=[cross-entropy]")
    assert "no better than knowing the classes' shares alone (1.386): check its encoder" in capfd.readouterr().err
