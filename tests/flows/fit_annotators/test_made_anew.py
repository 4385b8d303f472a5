"""The stage fit-annotators and the keys that hang on it: what is made anew when a setting changes."""

from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest

from cluster.shards import KEY, part_path
from csm import storage, tables
from csm.encoders import FeatureTable
from csm.reannotation import Annotator, fit_calibration, held_out_shares
from flows.annotate import annotate_jobs, annotated
from flows.artifacts import StageRecord
from flows.config import load_config
from flows.fit_annotators import STAGE, annotator_spec, annotators, calibration_of
from flows.label_digests import present_labels
from flows.train import run_specs
from tests.flows.fit_annotators.conftest import CLASSES, IMAGES, RECORD, Fit, changed, files, keys

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_an_ensemble_that_has_all_its_members_again_is_fitted_again(fit: Fit, root: Path) -> None:
    pool = "annotate.annotators.pool={head: ensemble, members: [teacher, member, lda]}"
    auto = ("annotate.annotator=auto", "annotate.candidates=[pool]", pool)
    before = keys(fit(*auto, "annotate.annotators.member={head: posterior, encoder: pixels}"))
    after = keys(fit(*auto, "annotate.annotators.member={head: lda, encoder: pixels}"))
    assert list(storage.read_json(root / "annotators/pool/annotator.json")["chosen"]) == ["teacher", "member", "lda"]
    assert after["pool"] != before["pool"]


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


def test_labels_are_known_by_the_files_alone(fit: Fit) -> None:
    """They are those of ``annotated`` once they lie there, and what a classifier keeps of them."""
    found = []
    for overrides in ((), ("annotate.annotators.teacher.calibrator=none",), ("annotate.top=2",)):
        context = fit(*overrides)
        (job,) = annotate_jobs(context, frozenset({0}))[1:]
        schema = tables.annotations(CLASSES, job.top)
        if overrides:
            found.append(present_labels(context.workspace, "teacher", ("semantic",)))
        else:
            assert present_labels(context.workspace, "teacher", ("semantic",)) is None
        tables.write(pl.DataFrame(schema=dict(schema)), part_path(job.annotations, 0), schema, {KEY: job.key})
        found.append(present_labels(context.workspace, "teacher", ("semantic",)))
        assert found[-1] == annotated(context.workspace, context.config, "teacher")
        spec = next(spec for spec in run_specs(context) if spec.method == "csm")
        assert spec.mixed is not None
        assert spec.mixed.labels == found[-1]
    assert [one == other for one, other in pairwise(found)] == [False, True, False, False]
    assert present_labels(context.workspace, "teacher", ("semantic", "pixel")) is None
