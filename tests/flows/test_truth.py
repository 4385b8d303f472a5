"""Data whose law is known, from its source to the generator that is this law, by the verbs that a user types."""

import json
import shutil

from csm.datasets import RealDataset
from csm.generators import load_generator
from csm.storage import file_digest

DATA = ("components=1", "base=synthetic", "classes=3", "height=2", "width=2", "mean_scale=2", "train=40", "val=10", "test=20")
SETTINGS = tuple(part for setting in DATA for part in ("--set", f"data.{setting}"))


def test_the_oracle_is_the_law_and_the_fit_is_of_the_training_images(call, tmp_path):
    options = ("--config", "gaussians", *SETTINGS, "--workspace", "w")
    assert call("prepare", *options)[0] == 0
    record = json.loads((tmp_path / "w" / "stages" / "prepare.json").read_text())
    assert record["digest"] == RealDataset.load_info(tmp_path / "w").digest  # which covers the law
    shutil.rmtree(tmp_path / "w" / "truth")
    assert "prepare, which lacks" in call("fit-generator", *options)[2]
    for verb in ("prepare", "fit-generator"):
        code, _, said = call(verb, *options)
        assert code == 0, said
    fitted = load_generator(tmp_path / "w" / "generator")
    law = RealDataset.load(tmp_path / "w").truth
    assert not fitted.means.allclose(law.means, atol=1e-3)
    assert fitted.means.allclose(law.means, atol=0.5)
    code, _, said = call("fit-generator", *options, "--set", "generator.kind=truth", "--force", "generator")
    assert code == 0, said
    assert json.loads((tmp_path / "w" / "generator" / "generator.json").read_text())["kind"] == "gaussians"
    one, other = (file_digest(tmp_path / "w" / name / "model.safetensors") for name in ("truth", "generator"))
    assert one == other


def test_data_without_a_law_have_no_oracle(call, tmp_path):
    options = ("--config", "digits", "--workspace", "w", "--set", "generator.kind=truth")
    assert call("prepare", *options)[0] == 0
    code, _, said = call("fit-generator", *options)
    assert code == 2
    assert said.splitlines()[-1].startswith("csm: generator.kind: truth needs data whose law is known: set data.source=gaussians")
    assert not (tmp_path / "w" / "generator").exists()


def test_a_law_is_not_imported(call, tmp_path):
    (tmp_path / "model.pkl").touch()
    code, _, said = call(
        "import-generator", "model.pkl", "--config", "gaussians", "--set", "generator.kind=truth", "--workspace", "w"
    )
    assert code == 2
    assert "generator.kind: truth is made here, not imported from " in said.splitlines()[-1]
