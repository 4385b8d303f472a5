"""What "auto" takes, and what it leaves out."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from csm import storage
from csm.errors import InputError
from flows.annotate import annotate_jobs
from flows.artifacts import Workspace
from flows.config import load_config
from flows.fit_annotators import STAGE, annotators, calibration_of
from flows.run import STAGES
from flows.stages import Context
from flows.train import run_specs
from tests.flows.fit_annotators.conftest import COMPARE, Fit, changed, files, keys

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_auto_without_a_candidate_that_can_be_fitted_is_refused(fit: Fit) -> None:
    with pytest.raises(
        InputError, match=r"annotate\.candidates: none of them can be chosen \(bad: posterior: the encoder gives 36"
    ):
        fit(
            "annotate.annotator=auto", "annotate.candidates=[bad]",
            "annotate.annotators.bad={head: posterior, encoder: pixels}",
        )  # fmt: skip


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


def test_a_candidate_that_cannot_be_had_is_no_reason_to_refuse(root: Path) -> None:
    settings = ["annotate.annotator=auto", "annotate.candidates=[teacher, truth]"]
    STAGE.check(Context(load_config("demo", settings), Workspace(root), STAGES))
