from pathlib import Path

import pytest
import torch

from csm.classifiers import ClassifierSpec, build_classifier
from csm.encoders import ENCODERS
from csm.errors import InputError


def test_a_classifier_encodes_by_its_penultimate_layer(tmp_path: Path) -> None:
    classifier = build_classifier(ClassifierSpec("small-cnn", {"width": 4}, 1, ("a", "b"), (0.5,), (0.2,))).eval()
    classifier.save(tmp_path)
    images = torch.randint(0, 256, (5, 1, 6, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    features = ENCODERS["classifier"](tmp_path)(images)
    assert features.shape == (5, 8)
    network = classifier.network
    assert torch.allclose(network.head(features), classifier(images), atol=1e-6)


def test_a_missing_classifier_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model.json does not exist"):
        ENCODERS["classifier"](tmp_path)
