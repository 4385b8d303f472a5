from dataclasses import replace
from fnmatch import fnmatch

import pytest
import yaml

from csm.export import FORMATS
from csm.export_card import CARD, Card, write_readme
from csm.reannotation import Calibration

FITTED = Calibration("temperature", images=30, nll_before=1.0, nll_after=0.9, temperature=2.0)
ABOUT = Card("9.9", "webdataset", 18, 8, "tiny", "pets", (5, 4, 1), ("cat", "dog", "cow"), "unet", {}, {}, "teacher", FITTED, {})


@pytest.mark.parametrize("form", list(FORMATS))
def test_it_says_how_the_images_were_made(form, tmp_path):
    write_readme(tmp_path, replace(ABOUT, format=form))
    _, _, text = (tmp_path / "README.md").read_text().split("---\n")
    assert text.lstrip("\n").startswith("# Mixed images of pets\n\n")
    for words in ("pets", "18 grey images of 4 x 5 pixels", "3 classes", "csm 9.9", "`tiny`", "`unet`", "`teacher`", CARD):
        assert words in text
    assert "of all classes, at temperature 2, fitted on 30 real images" in text


@pytest.mark.parametrize(("form", "path"), [("huggingface", "data/train-*.parquet"), ("webdataset", "mixed-*.tar")])
def test_the_hub_finds_the_split(form, path, tmp_path):
    write_readme(tmp_path, replace(ABOUT, format=form))
    assert fnmatch(FORMATS[form].piece(0, 1), path)
    _, front, _ = (tmp_path / "README.md").read_text().split("---\n")
    assert yaml.safe_load(front)["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": path}]}]


@pytest.mark.parametrize(
    ("calibration", "words"), [(Calibration("scale", pair=True, scale=4.0), "with scale s = 4, by annotator `x`"), (None, "")]
)
def test_without_a_posterior(calibration, words, tmp_path):
    write_readme(tmp_path, replace(ABOUT, annotator="x" if calibration else None, calibration=calibration))
    text = (tmp_path / "README.md").read_text()
    assert words in text
    assert ("soft_label" in text) == (calibration is not None)


@pytest.mark.parametrize(
    ("kind", "plan", "shared"),
    [("semantic", {}, "one noise"), ("semantic", {"noise": "image"}, ""), ("pixel", {}, "the same two"), ("real", {}, "")],
)
def test_it_says_what_images_share(kind, plan, shared, tmp_path):
    write_readme(tmp_path, replace(ABOUT, kind=kind, plan=plan))
    text = (tmp_path / "README.md").read_text()
    assert ("the images were made from" in text) == bool(shared)
    assert shared in text
