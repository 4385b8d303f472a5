"""What a user is told of annotators: what was fitted, and which of them cannot be had."""

from pathlib import Path

import pytest

from csm import storage
from csm.errors import InputError
from flows.artifacts import Workspace
from flows.config import load_config
from flows.fit_annotators import STAGE, calibration_of
from flows.run import STAGES
from flows.stages import Context
from tests.flows.fit_annotators.conftest import Fit

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_a_head_chose_is_said_and_kept(fit: Fit, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit("annotate.annotator=ppca-pixels", "train.compare=[csm]")
    chosen = storage.read_json(root / "annotators/ppca-pixels/annotator.json")["chosen"]
    assert set(chosen) == {"rank", "pooling"}
    line = f"  ppca-pixels: rank {chosen['rank']}, pooling {chosen['pooling']:g}, by NLL on validation images"
    assert line in capsys.readouterr().err


def test_a_named_annotator_that_cannot_be_fitted_is_refused(fit: Fit) -> None:
    with pytest.raises(InputError, match=r"^annotate\.annotators\.bad: posterior: the encoder gives 36 values"):
        fit("annotate.annotator=bad", "annotate.annotators.bad={head: posterior, encoder: pixels}")


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
