import json
from pathlib import Path

import pytest
import torch
from torch import nn

from csm.classifiers import Classifier, ClassifierSpec, build_classifier, in_batches, load_classifier
from csm.errors import InputError

SPEC = ClassifierSpec("small-cnn", {"width": 4}, 3, ("x", "y", "z", "w"), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def classifier(spec: ClassifierSpec = SPEC, seed: int = 0) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_classifier(spec).eval()


def images(rows: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (rows, 3, 6, 6), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def test_pixels_are_normalised_by_the_statistics_of_the_spec() -> None:
    seen = Classifier(nn.Identity(), SPEC)(images())
    for channel in range(3):
        expected = (images()[:, channel].double() / 255 - SPEC.mean[channel]) / SPEC.std[channel]
        assert torch.allclose(seen[:, channel].double(), expected, atol=1e-5)


def test_uint8_and_float_images_are_the_same() -> None:
    model = classifier()
    assert torch.equal(model(images()), model(images().float()))
    assert torch.equal(model.features(images()), model.features(images().float()))


def test_the_head_on_the_features_is_the_output() -> None:
    model = classifier()
    assert torch.equal(model.network.head(model.features(images())), model(images()))


@pytest.mark.parametrize("shape", [(5, 1, 6, 6), (5, 4, 6, 6), (3, 6, 6), (5, 6, 6, 3)])
def test_wrong_channels_are_refused(shape: tuple[int, ...]) -> None:
    model = classifier()
    for function in (model, model.features):
        with pytest.raises(ValueError, match=r"images must be \(N, 3, H, W\), got \(" + str(shape[0])):
            function(torch.zeros(shape, dtype=torch.uint8))


def test_a_saved_classifier_is_the_same(tmp_path: Path) -> None:
    model = classifier()
    model.train()(images())  # moves the running statistics of BatchNorm
    model.eval().save(tmp_path)
    again = load_classifier(tmp_path)
    assert again.spec == SPEC
    assert not again.training
    assert torch.equal(again(images()), model(images()))
    assert not torch.equal(again(images()), classifier()(images()))


def test_weights_are_drawn_from_the_global_generator() -> None:
    first, same, other = (classifier(seed=seed).network.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize(
    "foreign",
    [
        ClassifierSpec("small-cnn", {"width": 8}, 3, SPEC.class_names, SPEC.mean, SPEC.std),
        ClassifierSpec("small-cnn", {"width": 4}, 3, ("x", "y"), SPEC.mean, SPEC.std),
        ClassifierSpec("small-cnn", {"width": 4}, 1, SPEC.class_names, (0.5,), (0.2,)),
    ],
    ids=["width", "classes", "channels"],
)
def test_weights_of_another_network_are_named(tmp_path: Path, foreign: ClassifierSpec) -> None:
    classifier(foreign).save(tmp_path / "foreign")
    classifier().save(tmp_path)
    (tmp_path / "foreign" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors holds the weights of another network: .*size mismatch") as caught:
        load_classifier(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["model.safetensors", "model.json"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    classifier().save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(InputError, match=f"{missing} does not exist"):
        load_classifier(tmp_path)


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    classifier().save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"model.safetensors is not a whole safetensors file"):
        load_classifier(tmp_path)


def test_an_unknown_network_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown 'resnet-9000'; one of .*small-cnn"):
        build_classifier(ClassifierSpec("resnet-9000", {}, 3, ("a", "b"), (0.5,) * 3, (0.2,) * 3))
    classifier().save(tmp_path)
    record = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**record, "network": "lost"}))
    with pytest.raises(InputError, match="unknown 'lost'"):
        load_classifier(tmp_path)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7])
def test_in_batches_is_the_function_on_all(batch_size: int) -> None:
    sizes: list[int] = []

    def double(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return batch.float().requires_grad_() * 2

    result = in_batches(double, images(), batch_size)
    assert torch.equal(result, images().float() * 2)
    assert max(sizes) <= batch_size
    assert sum(sizes) == 5


def test_in_batches_keeps_no_gradient() -> None:
    assert not in_batches(classifier(), images(), 2).requires_grad
