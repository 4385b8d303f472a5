import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from csm.classifiers import Classifier, ClassifierSpec, build_classifier, check_network, load_classifier
from csm.errors import InputError

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LAYERS: dict[str, Any] = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "initializer_range": 0.5
}  # fmt: skip
PREPROCESSORS = {
    "vit": {"size": {"height": 16, "width": 16}},
    "convnext": {"size": {"shortest_edge": 16}, "crop_pct": 0.875},
    "dinov2": {"size": {"shortest_edge": 24}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True},
    "resnet": {"size": 16},
}


def make(kind: str) -> Any:
    """A tiny model with random weights, of 7 classes where it has a head."""
    stages: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 7}
    if kind == "vit":
        return ViTForImageClassification(ViTConfig(**LAYERS, image_size=16, patch_size=4, num_labels=7))
    if kind == "convnext":
        return ConvNextForImageClassification(ConvNextConfig(**stages, num_stages=2, initializer_range=0.5))
    if kind == "resnet":
        return ResNetForImageClassification(ResNetConfig(**stages, embedding_size=8))
    return Dinov2Model(Dinov2Config(**{**LAYERS, "mlp_ratio": 2}, image_size=28, patch_size=4))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind, as it is published."""
    torch.manual_seed(2)
    root = tmp_path_factory.mktemp("models")
    for kind, steps in PREPROCESSORS.items():
        make(kind).save_pretrained(root / kind)
        values = {**steps, "do_normalize": True, "image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255, "resample": 3}
        (root / kind / "preprocessor_config.json").write_text(json.dumps(values))
    return root


@pytest.fixture
def vit(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "vit", tmp_path / "vit"))


def spec(folder: Path, n_classes: int = 5, channels: int = 3, **parameters: Any) -> ClassifierSpec:
    names = tuple(f"class {number}" for number in range(n_classes))
    return ClassifierSpec(
        "transformers", {"path": str(folder), **parameters}, channels, names, (0.3,) * channels, (0.2,) * channels
    )


def images(channels: int = 3, side: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (6, channels, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture
def build(seeded: Callable[..., Any]) -> Callable[..., Classifier]:
    return lambda *arguments, **options: seeded(build_classifier, spec(*arguments, **options)).eval()


def refused(message: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_classifier(spec(*arguments, **options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["vit", "convnext", "resnet"])
def test_logits_are_those_of_transformers(kind: str, saved: Path, build: Callable[..., Classifier]) -> None:
    """With as many classes as the model has, it is the model itself, whatever the data's own statistics."""
    pixels = (images().double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    theirs = {
        "vit": ViTForImageClassification,
        "convnext": ConvNextForImageClassification,
        "resnet": ResNetForImageClassification,
    }
    with torch.no_grad():
        expected = theirs[kind].from_pretrained(saved / kind).eval()(pixels.float()).logits
    classifier = build(saved / kind, 7)
    assert torch.allclose(classifier(images()), expected, atol=1e-4)
    assert expected.std() > 0.01
    assert classifier.spec.mean == pytest.approx(tuple(MEAN))
    assert classifier.spec.std == pytest.approx(tuple(STD))


def test_other_sizes_are_resized_as_its_image_processor_does(saved: Path, build: Callable[..., Classifier]) -> None:
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, resample=3, image_mean=MEAN, image_std=STD)
    model = ViTForImageClassification.from_pretrained(saved / "vit").eval()
    classifier = build(saved / "vit", 7)
    smooth = torch.nn.functional.interpolate(images(3, 4).float(), size=(32, 32), mode="bilinear").to(torch.uint8)
    for batch in (smooth, smooth[:, :, ::4, ::4]):  # smaller and larger than the model's
        pictures = [Image.fromarray(array) for array in batch.permute(0, 2, 3, 1).numpy()]
        with torch.no_grad():
            expected = model(torch.from_numpy(np.stack(processor(pictures).pixel_values))).logits
        # The processor rounds to levels and clips what bicubic overshoots.
        assert torch.nn.functional.cosine_similarity(classifier(batch), expected).min() > 0.995


def test_dinov2_gets_a_head_on_its_token_and_patches(saved: Path, build: Callable[..., Classifier]) -> None:
    pixels = (images().double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        tokens = Dinov2Model.from_pretrained(saved / "dinov2").eval()(pixels.float()).last_hidden_state
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
    classifier = build(saved / "dinov2")
    assert torch.allclose(classifier.features(images()), expected, atol=1e-4)
    assert classifier(images()).shape == (6, 5)


@pytest.mark.parametrize("kind", PREPROCESSORS)
def test_every_kind_is_trained_saved_and_loaded_without_its_files(
    kind: str, saved: Path, tmp_path: Path, build: Callable[..., Classifier]
) -> None:
    folder = shutil.copytree(saved / kind, tmp_path / "gone")
    classifier = build(folder, 5).train()
    frozen = [name for name, parameter in classifier.named_parameters() if not parameter.requires_grad]
    assert frozen == (["network.model.dinov2.embeddings.mask_token"] if kind == "dinov2" else [])
    sgd = torch.optim.SGD(classifier.parameters(), 0.01)
    for _ in range(2):
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(classifier(images()), torch.arange(6) % 5).backward()
        sgd.step()
    classifier.eval().save(tmp_path / "run")
    shutil.rmtree(folder)
    again = load_classifier(tmp_path / "run")
    assert torch.equal(again(images()), classifier(images()))
    assert torch.equal(again.features(images()), classifier.features(images()))
    assert torch.allclose(again.network.head(again.features(images())), again(images()))
    assert again.spec == classifier.spec
    again.save(tmp_path / "run2")
    assert (tmp_path / "run2" / "model.json").read_text() == (tmp_path / "run" / "model.json").read_text()


def test_a_new_head_and_new_weights_are_drawn_from_the_seed(saved: Path, build: Callable[..., Classifier]) -> None:
    for options in ({}, {"pretrained": False}):
        first, second = (build(saved / "vit", 5, **options).state_dict() for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        other = build_classifier(spec(saved / "vit", 5, **options)).state_dict()  # whatever the generator's state is
        assert not torch.equal(first["network.head.weight"], other["network.head.weight"])
    name = "vit.encoder.layer.0.attention.attention.query.weight"
    original = load_file(saved / "vit" / "model.safetensors")
    kept = build(saved / "vit", 5).network.model.state_dict()
    drawn = build(saved / "vit", 5, pretrained=False).network.model.state_dict()
    name = next(key for key in kept if key.endswith("weight") and kept[key].ndim == 2)
    assert any(value.shape == kept[name].shape and torch.equal(value, kept[name]) for value in original.values())
    assert not torch.equal(drawn[name], kept[name])


def test_an_architecture_alone_needs_no_weights_and_no_preprocessor(vit: Path, build: Callable[..., Classifier]) -> None:
    for file in ("model.safetensors", "preprocessor_config.json"):
        (vit / file).unlink()
    classifier = build(vit, 5, pretrained=False)
    assert (classifier.spec.mean, classifier.spec.std) == ((0.3,) * 3, (0.2,) * 3)
    assert classifier.network.side == 16
    refused("preprocessor_config.json does not exist", vit)


def test_grey_is_shown_as_rgb(saved: Path, tmp_path: Path, build: Callable[..., Classifier]) -> None:
    classifier, grey = build(saved / "vit", 7, 1), images(1)
    assert torch.allclose(classifier(grey), build(saved / "vit", 7)(grey.expand(-1, 3, -1, -1)), atol=1e-5)
    assert len(classifier.spec.mean) == len(classifier.spec.std) == 1
    assert len(classifier.spec.mean) == len(classifier.spec.std) == 1
    classifier.save(tmp_path)
    assert torch.equal(load_classifier(tmp_path)(grey), classifier(grey))
    refused("the images have 2 channels, the model takes 3", saved / "vit", 5, 2)


def test_a_model_without_a_head_is_taken(vit: Path, build: Callable[..., Classifier]) -> None:
    """ViTModel has a pooler, which the classifier does not."""
    body = ViTModel(ViTConfig(**LAYERS, image_size=16, patch_size=4))
    body.save_pretrained(vit)
    assert any(name.startswith("pooler") for name in load_file(vit / "model.safetensors"))
    token = body.eval()((images() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).last_hidden_state[
        :, 0
    ]
    assert torch.allclose(build(vit).features(images()), token, atol=1e-4)


def test_the_size_can_be_another_where_the_model_allows_it(saved: Path, build: Callable[..., Classifier]) -> None:
    classifier = build(saved / "convnext", 5, size=32)
    assert classifier.network.side == 32
    assert not torch.equal(classifier(images()), build(saved / "convnext", 5)(images()))
    refused(
        r"vit: ViTForImageClassification does not take images of 32 x 32: Input image size \(32\*32\)", saved / "vit", size=32
    )


@pytest.mark.parametrize(
    ("changes", "channels", "mean", "std"),
    [
        ({"do_normalize": False}, 3, 0.0, 1.0),
        ({"do_rescale": False}, 3, 0.485 / 255, 0.229 / 255),
        ({"rescale_factor": 1 / 127.5}, 3, 0.485 / 2, 0.229 / 2),
    ],
)
def test_the_steps_of_the_image_processor_become_one_mean_and_std(
    changes: dict[str, Any], channels: int, mean: float, std: float, vit: Path, edit: Callable[..., None]
) -> None:
    edit(vit / "preprocessor_config.json", **changes)
    found = build_classifier(spec(vit)).spec
    assert (found.mean[0], found.std[0]) == pytest.approx((mean, std))


def test_newer_files_of_image_processors_are_read(vit: Path) -> None:
    values = json.loads((vit / "preprocessor_config.json").read_text())
    (vit / "preprocessor_config.json").unlink()
    (vit / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    assert build_classifier(spec(vit)).spec.mean == pytest.approx(tuple(MEAN))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"model_type": "bert"}, "config.json: transformers knows no image classifier of model_type 'bert'"),
        ("config.json", {"model_type": "own"}, "config.json: transformers knows no image classifier of model_type 'own'"),
        ("config.json", {"model_type": None}, "config.json: transformers knows no image classifier of model_type None"),
        ("config.json", {"hidden_size": "wide"}, "config.json cannot be used"),
        ("config.json", {"hidden_size": 12}, "by config.json it is"),
        ("config.json", {"num_hidden_layers": 3}, "of the weights of ViTForImageClassification are missing"),
        ("config.json", {"num_hidden_layers": 1}, "of the weights are not of ViTForImageClassification"),
        ("preprocessor_config.json", {"image_mean": None}, "image_mean is None; expected a list of 3 numbers"),
        ("preprocessor_config.json", {"image_std": [0.2, 0.2]}, r"image_std is \[0.2, 0.2\]; expected a list of 3 numbers"),
        ("preprocessor_config.json", {"image_std": [0.2, 0.2, 0]}, "expected numbers above 0"),
        ("preprocessor_config.json", {"size": {"height": 16, "width": 8}}, "size is .*; expected a number of pixels"),
        ("preprocessor_config.json", {"size": None}, "size is None; expected a number of pixels"),
        ("preprocessor_config.json", {"do_flip_channel_order": True}, "do_flip_channel_order cannot be used here"),
    ],
)
def test_what_cannot_be_used_is_named(
    file: str, changes: dict[str, Any], message: str, vit: Path, edit: Callable[..., None]
) -> None:
    edit(vit / file, **changes)
    refused(message, vit)


def test_a_configuration_that_names_code_runs_none(
    vit: Path, edit: Callable[..., None], build: Callable[..., Classifier]
) -> None:
    expected = build(vit)(images())
    names = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
    (vit / "evil.py").write_text("raise SystemExit('it was run')")
    edit(vit / "config.json", auto_map=names, dtype="float16", id2label={"0": "cat"})
    classifier = build(vit)
    assert torch.equal(classifier(images()), expected)
    assert "auto_map" not in classifier.spec.parameters["config"]


def test_files_are_checked_without_loading_the_model(vit: Path) -> None:
    (vit / "model.safetensors").unlink()
    check_network("transformers", {"path": str(vit)})
    with pytest.raises(InputError, match=r"^train.network transformers: path: folder 'nowhere' does not exist"):
        check_network("transformers", {"path": "nowhere"})
    with pytest.raises(InputError, match=r"the images have 4 channels, the model takes 3$"):
        check_network("transformers", {"path": str(vit)}, (8, 8, 4))
    refused("model.safetensors does not exist", vit)


def test_weights_of_another_model_are_named(saved: Path, tmp_path: Path, build: Callable[..., Classifier]) -> None:
    build(saved / "vit").save(tmp_path)
    build(saved / "resnet").save(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="holds the weights of another network"):
        load_classifier(tmp_path)


@pytest.mark.parametrize("kind", PREPROCESSORS)
def test_bfloat16_and_channels_last_change_no_more_than_rounding(
    kind: str, saved: Path, build: Callable[..., Classifier]
) -> None:
    classifier = build(saved / kind)
    expected = classifier(images(3, 12))
    classifier.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        found = classifier(images(3, 12).to(memory_format=torch.channels_last))
    assert torch.nn.functional.cosine_similarity(found.float(), expected).mean() > 0.98
    found.float().sum().backward()
    gradients = [parameter.grad for parameter in classifier.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PREPROCESSORS)
def test_it_can_be_compiled(kind: str, saved: Path, build: Callable[..., Classifier]) -> None:
    classifier = build(saved / kind)
    expected = classifier(images(3, 12))
    found = torch.compile(classifier, backend="aot_eager")(images(3, 12))
    assert torch.allclose(found, expected, atol=1e-4)
    found.sum().backward()
