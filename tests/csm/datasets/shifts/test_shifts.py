import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from csm.datasets import RealDataset
from csm.datasets.shifts import SHIFTS, ShiftConfig, check_shift, shift_digest, shift_parts
from csm.errors import InputError


def test_every_kind_is_there() -> None:
    assert list(SHIFTS) == ["cifar-c", "tiny-imagenet-c", "corrupted", "dataset", "photographs"]


def test_settings_get_their_types_and_reach_the_kind(real: Callable[..., RealDataset]) -> None:
    config = check_shift(ShiftConfig("photographs", {"count": 3}), "here")
    (part,) = shift_parts(config, real())
    assert len(part.images) == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ShiftConfig("nope"), "here.kind: unknown 'nope'; one of cifar-c, tiny-imagenet-c, corrupted, dataset, photographs"),
        (ShiftConfig("cifar-c"), "here.parameters.path: missing; set it"),
        (
            ShiftConfig("corrupted", {"path": "x"}),
            "here.parameters.path: no such setting; allowed: corruptions, severities, seed",
        ),
        (ShiftConfig("photographs", {"count": "many"}), "here.parameters.count: expected a whole number, got 'many'"),
        (ShiftConfig("dataset", {"source": "nope"}), "here.parameters.source: unknown 'nope'"),
    ],
)
def test_what_cannot_be_used_is_named(config: ShiftConfig, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_shift(config, "here")


def test_what_lies_outside_the_configuration_is_digested(tmp_path: Path) -> None:
    assert shift_digest(ShiftConfig("corrupted", {"seed": 1})) == shift_digest(ShiftConfig("photographs")) == ""
    assert shift_digest(ShiftConfig("dataset", {"source": "digits", "take": "all"})) == ""
    for kind, file in (("cifar-c", "fog.npy"), ("tiny-imagenet-c", "fog/1/n01/0.JPEG")):
        config = ShiftConfig(kind, {"path": str(tmp_path), "severities": "1"})
        before = shift_digest(config)
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / file, np.zeros(1))
        assert shift_digest(config) != before
    folder = ShiftConfig("dataset", {"source": "image-folder", "path": str(tmp_path)})
    before = shift_digest(folder)
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    assert shift_digest(folder) != before
