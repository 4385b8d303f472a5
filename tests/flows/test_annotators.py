"""The section `annotate`: what is refused when a configuration is loaded, and which annotators and encoders a run needs."""

import pytest

from csm.errors import InputError
from flows.annotators import encoder_files
from flows.config import load_config
from flows.fit_annotators import STAGE as FIT
from flows.run import verb_stages


def refused(*overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config("demo", overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def define(name: str, text: str) -> str:
    return f"annotate.annotators.{name}={{{text}}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("head: lda", "a.encoder: unknown ''; one of pixels, pca, classifier,"),
        ("head: ratio, encoder: pixels", "a.encoder: head ratio reads no features; leave it out"),
        ("head: ratio, calibrator: scale", "a.calibrator: expected none for head ratio, got 'scale'"),
        ("head: ratio, pair: true", "a.pair: head ratio knows only the pair as it is; leave it out"),
        ("head: projection, encoder: pixels, calibrator: vector", "a.calibrator: expected scale or none or isotonic for head"),
        ("head: projection, encoder: pixels, calibrator: none, scale: 3", "a.scale: goes with calibrator scale, not none;"),
        ("head: lda, encoder: pixels, calibrator: scale", "a.calibrator: expected temperature or none or vector or isotonic for"),
        ("head: lda, encoder: pixels, scale: 4", "a.scale: goes with calibrator scale, not temperature; leave it out"),
        ("head: lda, encoder: pixels, parameters: {shrinkage: much}", "a.parameters.shrinkage: expected a number, got 'much'"),
        ("head: lda, encoder: pixels, members: [teacher]", "a.members: only an ensemble has members, not head lda"),
        ("head: ensemble", "a.members: expected at least two different annotators, got []"),
        ("head: ensemble, members: [teacher]", "a.members: expected at least two different annotators, got ['teacher']"),
        ("head: ensemble, members: [teacher, teacher]", "a.members: expected at least two different annotators, got"),
        ("head: ensemble, members: [teacher, nope]", "a.members: unknown 'nope'; one of ratio, projection,"),
        ("head: ensemble, members: [teacher, lda], encoder: pixels", "a.encoder: an ensemble has none of its own,"),
        ("head: ensemble, members: [teacher, lda], parameters: {c: 1}", "a.parameters.c: no such setting; allowed: pool"),
        ("head: ensemble, members: [teacher, lda], parameters: {pool: 3}", "a.parameters.pool: expected text, got 3"),
        (
            "head: ensemble, members: [teacher, lda], parameters: {pool: mean}",
            "a.parameters.pool: unknown 'mean'; one of linear, log",
        ),
        (
            "head: qda, encoder: pixels, parameters: {rank: -2}",
            "a.parameters.rank: expected a number greater than or equal to -1,",
        ),
        ("head: qda, encoder: pixels, parameters: {rank: 1.5}", "a.parameters.rank: expected a whole number, got 1.5"),
        ("head: ensemble, members: [teacher, a]", "a.members: goes round in a circle (a -> a)"),
    ],
)
def test_a_definition_that_cannot_be_used_is_refused_by_its_key(text: str, message: str) -> None:
    assert refused(define("a", text)).startswith(f"annotate.annotators.{message}")


@pytest.mark.parametrize("member", ["projection", "teacher-pair"])
def test_members_must_know_all_classes_where_the_ensemble_is_run(member: str) -> None:
    a = define("a", f"head: ensemble, members: [lda, {member}]")
    message = f"annotate.annotators.a.members: {member} gives nothing outside the pair and cannot be pooled; leave it out"
    assert refused(a, "annotate.annotator=a") == message
    assert refused(a, "annotate.annotator=auto", "annotate.candidates=[a]") == message
    load_config("demo", [a])


def test_a_circle_of_several_ensembles_is_shown() -> None:
    a, b = define("a", "head: ensemble, members: [teacher, b]"), define("b", "head: ensemble, members: [lda, a]")
    assert refused(a, b) == "annotate.annotators.a.members: goes round in a circle (a -> b -> a)"


@pytest.mark.parametrize("name", ["auto", "none", "mixed", "members", "encoders"])
def test_a_name_that_means_something_else_is_refused(name: str) -> None:
    assert refused(define(name, "head: ratio")) == f"annotate.annotators.{name}: the name {name} is taken; choose another one"


@pytest.mark.parametrize("section", ["annotators", "encoders"])
def test_a_name_that_cannot_be_a_folder_is_refused(section: str) -> None:
    given = (
        f"annotate.{section}={{../a: {{kind: pixels}}}}" if section == "encoders" else "annotate.annotators={../a: {head: ratio}}"
    )
    assert refused(given).startswith(f"annotate.{section}.../a: '../a' cannot name a folder; use letters, digits,")


def test_the_calibrator_has_a_default_that_suits_the_head() -> None:
    defined = load_config("demo").annotate.annotators
    found = {name: defined[name].calibrator for name in ("ratio", "projection", "teacher", "lda", "ensemble")}
    expected = {"ratio": "none", "projection": "scale", "teacher": "temperature", "lda": "temperature", "ensemble": "temperature"}
    assert found == expected


def test_auto_needs_candidates_that_know_all_classes() -> None:
    load_config("demo", ["annotate.annotator=lda", "annotate.candidates=[projection, nope]"])  # nobody asks for auto
    auto = "annotate.annotator=auto"
    assert refused(auto, "annotate.candidates=[]").startswith(
        "annotate.candidates: empty; name annotators for annotate.annotator"
    )
    assert refused(auto, "annotate.candidates=[nope]").startswith("annotate.candidates: unknown 'nope'; one of ratio,")
    for name in ("ratio", "projection", "teacher-pair"):
        message = refused(auto, f"annotate.candidates=[teacher, {name}]")
        assert message.startswith(f"annotate.candidates: {name} knows only the pair, so it has no NLL over all classes")
    assert "annotate.candidates: empty" in refused("train.methods.csm.mixed.annotator=auto", "annotate.candidates=[]")


def test_a_run_needs_the_annotators_of_its_methods_and_the_default_one() -> None:
    assert load_config("demo").annotators == ("projection", "auto")
    assert load_config("demo", ["annotate.annotator=lda"]).annotators == ("projection", "lda")  # csm names none
    assert load_config("demo", ["annotate.annotator=ratio", "train.compare=[cross-entropy]"]).annotators == ("ratio",)
    config = load_config("demo", ["annotate.annotator=auto", "train.methods.csm.mixed.annotator=teacher"])
    assert config.annotators == ("projection", "teacher", "auto")


def test_members_are_fitted_before_their_ensemble_and_candidates_in_place_of_auto() -> None:
    inner = define("inner", "head: ensemble, members: [teacher, qda-pixels]")
    outer = define("outer", "head: ensemble, members: [inner, lda]")
    annotate = load_config("demo", [inner, outer, "annotate.candidates=[outer, knn, teacher]"]).annotate
    assert annotate.to_fit(["outer"]) == ("teacher", "qda-pixels", "inner", "lda", "outer")
    assert annotate.to_fit(["lda", "auto"]) == ("lda", "teacher", "qda-pixels", "inner", "outer", "knn")
    assert annotate.encoders_of(["outer"]) == ("teacher", "pixels", "classifier")


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("ratio", ("prepare",)),
        ("qda-pixels", ("prepare",)),
        ("projection", ("prepare", "fit-teacher")),
        ("ensemble", ("prepare", "fit-teacher")),
        ("generator", ("prepare", "generator")),
        ("experts", ("prepare", "generator", "fit-teacher")),
        ("truth", ("prepare",)),
    ],
)
def test_only_the_stages_that_an_encoder_needs_are_read(name: str, stages: tuple[str, ...]) -> None:
    config = load_config("demo", [f"annotate.annotator={name}", "train.compare=[csm]"])
    assert FIT.reads(config) == stages
    assert verb_stages("annotate", config) == (
        *(stage for stage in stages if stage == "fit-teacher"),
        "fit-annotators",
        "annotate",
    )


def test_the_files_of_a_local_model_are_listed(tmp_path) -> None:
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "deep" / "weights").write_bytes(b"123")
    overrides = [f"annotate.encoders.clip.parameters.path={tmp_path / 'model'}"]
    encoders = load_config("demo", overrides).annotate.encoders
    assert encoder_files(encoders["clip"]) == [("path", "config.json", 2), ("path", "deep/weights", 3)]
    assert encoder_files(load_config("demo").annotate.encoders["clip"]) == []  # of the hub
    assert encoder_files(encoders["pixels"]) == []
