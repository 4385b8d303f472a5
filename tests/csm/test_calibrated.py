"""A finished model: what it gives, and what its folder holds."""

import json
import math

import pytest
import torch

from csm.calibrated import calibrated, load_calibrated
from csm.classifiers import ClassifierSpec, build_classifier, build_ensemble
from csm.errors import InputError
from csm.posthoc import Posthoc

SPEC = ClassifierSpec("small-cnn", {"width": 4}, 3, ("cat", "dog", "owl"), (0.4, 0.5, 0.6), (0.2, 0.2, 0.3))
COOLED = Posthoc("temperature", {"temperature": 0.5})


def make(posthoc=COOLED):
    torch.manual_seed(0)
    return calibrated(build_classifier(SPEC), (8, 6, 3), posthoc, {"run": "a-seed0"})


def images(number, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 8, 6, 3), generator=draw, dtype=torch.uint8)


def test_probabilities_are_the_softmax_of_scaled_logits_of_pixels_in_the_order_of_a_file():
    model, batch = make(), images(5)
    logits = model.classifier(batch.permute(0, 3, 1, 2))
    probs = model.predict(batch)
    assert (probs.dtype, probs.shape) == (torch.float32, (5, 3))
    for row, got in zip(logits.tolist(), probs.tolist(), strict=True):
        weights = [math.exp(value / 0.5) for value in row]
        assert got == pytest.approx([weight / sum(weights) for weight in weights], abs=1e-6)
    assert probs.sum(dim=1).tolist() == pytest.approx([1.0] * 5)


def test_batches_change_nothing_and_none_is_none():
    model, batch = make(), images(7)
    torch.testing.assert_close(model.predict(batch, batch_size=3), model.predict(batch))
    assert model.predict(images(0)).shape == (0, 3)


def test_what_is_saved_comes_back(tmp_path):
    model = make(Posthoc("vector", {"weights": [1.0, 2.0, 0.5], "biases": [0.0, 0.1, -0.2]}, "a note"))
    model.save(tmp_path)
    again = load_calibrated(tmp_path)
    assert again.spec == model.spec
    assert not again.training
    assert torch.equal(again.predict(images(4)), model.predict(images(4)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_a_finished_model_is_calibrated_anew():
    first = make()
    second = calibrated(first.classifier, (8, 6, 3), Posthoc("none", {}), {"run": "b"})
    third = calibrated(make().classifier, (8, 6, 3), COOLED, first.spec.origin)
    assert second.spec.posthoc.name == "none"
    assert torch.equal(third.predict(images(2)), first.predict(images(2)))


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (images(2).float(), "float32 (2, 8, 6, 3)"),
        (images(2)[:, :, :, :1], "uint8 (2, 8, 6, 1)"),
        (images(2)[0], "uint8 (8, 6, 3)"),
        (images(2).permute(0, 3, 1, 2), "uint8 (2, 3, 8, 6)"),
    ],
)
def test_other_images_are_refused(wrong, got):
    with pytest.raises(InputError) as refused:
        make().predict(wrong)
    assert str(refused.value) == f"images: expected uint8 (N, 8, 6, 3), got {got}"


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(InputError, match=r"model\.json does not exist"):
        load_calibrated(tmp_path)
    make().classifier.save(tmp_path)
    with pytest.raises(InputError, match="as it was trained, which nothing calibrates; give the folder `model`"):
        load_calibrated(tmp_path)
    make().save(tmp_path)
    record = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**record, "class_names": ["cat", "dog"]}))
    with pytest.raises(InputError, match="holds the weights of another network"):
        load_calibrated(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({**record, "posthoc": {"values": {}}}))
    with pytest.raises(InputError, match=r"is not a CalibratedSpec \(posthoc\.name"):
        load_calibrated(tmp_path)


def test_an_ensemble_is_pooled_and_then_calibrated(tmp_path):
    torch.manual_seed(3)
    members, batch = [build_classifier(SPEC).eval() for _ in range(3)], images(5)
    model = calibrated(build_ensemble(members), (8, 6, 3), COOLED, {})
    with torch.no_grad():
        mean = sum(member(batch.permute(0, 3, 1, 2)).double().softmax(dim=1) for member in members) / 3
    expected = mean**2 / (mean**2).sum(dim=1, keepdim=True)  # T = 0.5
    torch.testing.assert_close(model.predict(batch).double(), expected, atol=1e-6, rtol=0)
    model.save(tmp_path)
    assert torch.equal(load_calibrated(tmp_path).predict(batch), model.predict(batch))
