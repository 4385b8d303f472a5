"""What a user sees of data that cannot be used: exit code 2, one line on stderr that names it, and nothing written."""

import json

import numpy as np
import pytest
from PIL import Image


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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.val=0.9",), "data.val, data.test: expected fractions whose sum is below 1"),
        (("data.source=image-folder", "data.path=none"), "data.path: image folder none does not exist"),
        (("data.source=image-folder", f"data.path={__file__}"), f"data.path: image folder {__file__} is no folder"),
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


@pytest.mark.parametrize("verb", ["annotate", "run"])
def test_more_classes_than_the_data_have_cannot_be_stored(call, refused, folder, verb):
    """`annotate` says so before annotators are fitted, and `run` before the generator is trained, as soon as there are data."""
    options = (*use(folder(cat=8, dog=8)), "--workspace", "w")
    message = "annotate.top: expected at most the 2 classes of the data, got 3"
    if verb == "run":
        assert message in call(verb, *options, "--set", "annotate.top=3")[2].splitlines()[-1]
    assert call("prepare", *options)[0] == 0
    assert refused(verb, *options, "--set", "annotate.top=3") == message
