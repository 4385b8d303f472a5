"""What every head that is fitted on features has in common."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from csm.errors import InputError
from csm.reannotation.heads import FitInputs
from csm.reannotation.registry import HEADS

Clouds = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Inputs = Callable[..., FitInputs]

FITTED = ("lda", "qda", "knn", "linear")


@pytest.mark.parametrize("name", FITTED)
def test_a_head_knows_the_classes(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, name: str) -> None:
    HEADS[name].fit(tmp_path, fit_inputs(clouds(300), clouds(100, seed=1)))
    x, labels = clouds(300, seed=2)
    with torch.no_grad():
        found = HEADS[name].load(tmp_path)(x)
    assert found.dtype == torch.float32
    assert found.shape == (300, 3)
    assert found.isfinite().all()
    assert torch.allclose(found.exp().sum(dim=1), torch.ones(300), atol=1e-4)
    said = -found[torch.arange(300), labels].mean()
    assert said < 0.9  # who knows only the priors 1/2, 1/4, 1/4 has 1.04


@pytest.mark.parametrize("name", FITTED)
def test_a_row_does_not_depend_on_the_others(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, name: str) -> None:
    HEADS[name].fit(tmp_path, fit_inputs(clouds(300), clouds(100, seed=1)))
    head, (x, _) = HEADS[name].load(tmp_path), clouds(40, seed=2)
    assert torch.allclose(head(x), torch.cat([head(row) for row in x.split(1)]), atol=1e-4)


@pytest.mark.parametrize("name", FITTED)
def test_a_fit_is_the_same_every_time(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, name: str) -> None:
    inputs = fit_inputs(clouds(80), clouds(40, seed=1))
    for folder in ("one", "two"):
        HEADS[name].fit(tmp_path / folder, inputs)
    one, two = ((tmp_path / folder / f"{name}.safetensors").read_bytes() for folder in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("name", [*FITTED, "projection"])
def test_a_class_without_training_image_is_named(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, name: str) -> None:
    x, labels = clouds(80)
    with pytest.raises(InputError, match=r"class 1 has no training image"):
        HEADS[name].fit(tmp_path, fit_inputs((x[labels != 1], labels[labels != 1]), clouds(40)))


@pytest.mark.parametrize("name", [*FITTED, "projection"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_is_refused(
    tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, name: str, bad: float
) -> None:
    x, labels = clouds(80)
    x[7, 2] = bad
    with pytest.raises(InputError, match="a feature of a real image is not finite"):
        HEADS[name].fit(tmp_path, fit_inputs((x, labels), clouds(40)))


@pytest.mark.parametrize("name", [*FITTED, "projection"])
def test_what_was_not_fitted_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"\.safetensors does not exist"):
        HEADS[name].load(tmp_path)
