from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from csm import tables
from csm.datasets import RealDataset, load_dataset
from csm.datasets.digits import digits
from csm.datasets.gaussians import _clusters, _digits_law, best_accuracy, gaussians
from csm.errors import InputError
from csm.generators.gaussian_mixtures import GaussianMixtureGenerator
from csm.generators.gaussians import GaussianGenerator, fit_gaussians
from csm.mixing import to_uint8

SMALL = {
    "base": "synthetic",
    "mean_scale": 2.0,
    "classes": 3,
    "height": 2,
    "width": 1,
    "channels": 3,
    "train": 40,
    "val": 10,
    "test": 60,
}


@pytest.fixture(scope="session")
def made() -> Callable[..., RealDataset]:
    """``made(key=value, ...)``: ``gaussians`` with these settings, made once."""
    keep = cache(lambda settings: gaussians(**dict(settings)))
    return lambda **settings: keep(tuple(settings.items()))


def pixels(images: torch.Tensor) -> torch.Tensor:
    return images.double() / 127.5 - 1


def laws(dataset: RealDataset) -> dict[str, torch.Tensor]:
    assert dataset.truth is not None
    return dataset.truth.state_dict()


CASES: list[dict[str, Any]] = [
    {},
    {"components": 2, "bayes_accuracy": 0.7},
    {**SMALL, "test": 4000},
    {**SMALL, "test": 4000, "components": 2},
]


@pytest.mark.parametrize("settings", CASES, ids=["digits", "digits-mixtures", "synthetic", "synthetic-mixtures"])
def test_the_best_classifier_has_the_accuracy_that_was_asked_for(
    settings: dict[str, Any], made: Callable[..., RealDataset]
) -> None:
    dataset, wanted = made(**settings), settings.get("bayes_accuracy", 0.88)
    images, labels = dataset.split("test")
    assert len(labels) == 4000
    assert dataset.truth is not None
    posterior = dataset.truth.log_posterior(pixels(images)).exp()
    hits = (posterior.argmax(dim=1) == labels).double().mean().item()
    error = (wanted * (1 - wanted) / 4000) ** 0.5
    assert abs(hits - wanted) < 0.005 + 3 * error
    assert abs(posterior.amax(dim=1).mean().item() - wanted) < 0.005 + 3 * error / 2
    assert abs(best_accuracy(dataset.truth, 2000) - wanted) < 0.005 + 3 * 0.004


def test_labels_are_draws_from_the_posterior(made: Callable[..., RealDataset]) -> None:
    """The mean of log p(y | x) over the data is that over the posterior itself, and every class has the same share."""
    dataset = made()
    images, labels = dataset.split("test")
    assert dataset.truth is not None
    posterior = dataset.truth.log_posterior(pixels(images))
    told = posterior.gather(1, labels[:, None])[:, 0]
    entropy = (posterior.exp() * posterior).sum(dim=1)
    difference = told - entropy
    assert abs(difference.mean()) < 3.5 * difference.std() / len(labels) ** 0.5
    assert (abs(torch.bincount(labels) - 400) < 4 * 19).all()


def test_the_images_of_a_class_have_the_moments_of_its_gaussian(made: Callable[..., RealDataset]) -> None:
    dataset = made(**{**SMALL, "test": 4000})
    images, labels = dataset.split("test")
    law = laws(dataset)
    for label in range(3):
        part = pixels(images[labels == label]).flatten(1)
        spread = law["covariances"][label].diagonal().sqrt()
        assert ((part.mean(dim=0) - law["means"][label]).abs() < 4.5 * spread / len(part) ** 0.5).all()
        error = torch.cov(part.mT) - law["covariances"][label]
        assert (error.abs() < 4.5 * (2.0 / len(part)) ** 0.5 * torch.outer(spread, spread)).all()


@pytest.mark.parametrize("settings", CASES, ids=["digits", "digits-mixtures", "synthetic", "synthetic-mixtures"])
def test_rounding_to_8_bits_leaves_the_posterior_as_it_is(settings: dict[str, Any], made: Callable[..., RealDataset]) -> None:
    truth = made(**settings).truth
    assert truth is not None
    x = truth.sample([number % truth.n_classes for number in range(1000)], list(range(1000)))
    rounded = pixels(to_uint8(x))
    assert ((rounded - x).abs().amax(dim=(1, 2, 3)) < 1.001 / 255).double().mean() > 0.99  # the rest is clipped somewhere
    distance = (truth.log_posterior(x).exp() - truth.log_posterior(rounded).exp()).abs().sum(dim=1) / 2
    assert distance.mean() < 0.01


def test_the_truth_of_digits_is_the_fit_made_more_alike(made: Callable[..., RealDataset]) -> None:
    """Undoing the scale: covariances differ from the fitted ones by one variance in every pixel, means lie at 0.35 of their offsets."""
    data = digits()
    images, labels = (torch.cat(parts) for parts in zip(*(data.split(split) for split in tables.SPLITS), strict=True))
    fitted, law = fit_gaussians(images, labels, 10), laws(made())
    offsets, shrunk = (means - means.mean(dim=0) for means in (fitted.means, law["means"]))
    scale = (shrunk.norm() / offsets.norm() / 0.35).item()
    assert torch.allclose(shrunk, 0.35 * scale * offsets, atol=1e-9)
    added = law["covariances"] / scale**2 - fitted.covariances
    assert torch.allclose(added, added[0, 0, 0] * torch.eye(64, dtype=torch.float64), atol=1e-9)
    assert added[0, 0, 0] > 0
    reach = 4 * law["covariances"].diagonal(dim1=1, dim2=2).sqrt()
    assert (law["means"] + reach).max().item() == pytest.approx(1, abs=1e-3)
    assert (law["means"] - reach).min().item() == pytest.approx(-1, abs=1e-3)


def test_few_classes_are_the_first_digits(made: Callable[..., RealDataset]) -> None:
    data = digits()
    images, labels = (torch.cat(parts) for parts in zip(*(data.split(split) for split in tables.SPLITS), strict=True))
    fitted, dataset = fit_gaussians(images[labels < 4], labels[labels < 4], 4), made(classes=4, bayes_accuracy=0.75)
    assert dataset.info.class_names == ("0", "1", "2", "3")
    offsets, shrunk = (means - means.mean(dim=0) for means in (fitted.means, laws(dataset)["means"]))
    scale = (shrunk.norm() / offsets.norm()).item()
    assert torch.allclose(shrunk, scale * offsets, atol=1e-9)


def test_more_classes_are_clusters_of_the_digits() -> None:
    data = digits()
    images, labels = (torch.cat(parts) for parts in zip(*(data.split(split) for split in tables.SPLITS), strict=True))
    clusters = _clusters(images, labels, 3)
    assert torch.equal(clusters // 3, labels)
    assert clusters.unique().tolist() == list(range(30))
    flat = images.flatten(1).double()
    means = torch.stack([flat[clusters == cluster].mean(dim=0) for cluster in range(30)])
    own = torch.cdist(flat, means).view(len(flat), 10, 3)[torch.arange(len(flat)), labels]
    assert (own.argmin(dim=1) == clusters % 3).double().mean() > 0.99  # each lies nearest to its own cluster's mean
    law = _digits_law(30, 1)
    assert law.weights.shape == (30, 1)
    assert torch.allclose(law.means[:, 0], means / 127.5 - 1, atol=1e-9)


def test_equal_covariances_leave_a_linear_posterior(made: Callable[..., RealDataset]) -> None:
    law = laws(made(**SMALL, shared_covariance=1.0))
    assert torch.allclose(law["covariances"], law["covariances"][:1].expand_as(law["covariances"]), atol=1e-12)


def test_an_image_belongs_to_its_split_number_and_seed(made: Callable[..., RealDataset]) -> None:
    few, many = made(**SMALL), made(**{**SMALL, "train": 55, "val": 3, "test": 4000})
    for split, rows in (("train", 40), ("val", 3), ("test", 60)):
        for one, other in zip(few.split(split), many.split(split), strict=True):
            assert torch.equal(one[:rows], other[:rows])
    first = {image.numpy().tobytes() for split in tables.SPLITS for image in few.split(split)[0]}
    assert len(first) == 110  # no image of one split is in another


def test_another_seed_is_other_images_and_for_synthetic_classes_another_law(made: Callable[..., RealDataset]) -> None:
    one, other = made(), made(seed=1)
    assert not (one.split("train")[0] == other.split("train")[0]).flatten(1).all(dim=1).any()
    assert all(torch.equal(value, laws(other)[name]) for name, value in laws(one).items())
    assert one.info.digest != other.info.digest
    one, other = made(**SMALL), made(**SMALL, seed=1)
    assert not (one.split("train")[0] == other.split("train")[0]).flatten(1).all(dim=1).any()
    assert not torch.allclose(laws(one)["means"], laws(other)["means"], atol=0.05)


def test_shapes_classes_and_components_are_as_asked_for(made: Callable[..., RealDataset]) -> None:
    dataset = made(**SMALL)
    assert (dataset.info.shape, dataset.info.n_classes) == ((2, 1, 3), 3)
    assert dataset.info.counts == {"train": 40, "val": 10, "test": 60}
    assert isinstance(dataset.truth, GaussianGenerator)
    mixture = made(**{**SMALL, "test": 4000}, components=2).truth
    assert isinstance(mixture, GaussianMixtureGenerator)
    assert mixture.weights.tolist() == [[0.5, 0.5]] * 3
    digits_mixture = made(components=2, bayes_accuracy=0.7).truth
    assert isinstance(digits_mixture, GaussianMixtureGenerator)
    assert torch.allclose(digits_mixture.weights.sum(dim=1), torch.ones(10, dtype=torch.float64))
    assert digits_mixture.weights.min() > 0.05


def test_the_posterior_is_that_of_scipy(made: Callable[..., RealDataset]) -> None:
    dataset = made(**SMALL)
    images, _ = dataset.split("val")
    law = laws(dataset)
    points = pixels(images).flatten(1).numpy()
    joint = np.stack([multivariate_normal(law["means"][k], law["covariances"][k]).logpdf(points) for k in range(3)], axis=1)
    assert dataset.truth is not None
    expected = joint - np.logaddexp.reduce(joint, axis=1, keepdims=True)
    np.testing.assert_allclose(dataset.truth.log_posterior(pixels(images)).numpy(), expected, atol=1e-8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "mnist"}, r"data.base: expected digits or synthetic, got 'mnist'"),
        ({"height": 4}, r"data.base: digits are 8 x 8 x 1, got 4 x 8 x 1; set it to synthetic"),
        ({"classes": 14}, r"data.classes: base digits has 10 digits: expected 2 to 10 or a multiple of it, got 14"),
        ({"base": "synthetic", "classes": 1}, r"data.classes: expected 2 to 1,000, got 1"),
        ({"components": 0}, r"data.components: expected 1 to 8, got 0"),
        ({"shared_covariance": 1.5}, r"data.shared_covariance: expected 0 to 1, got 1.5"),
        ({"bayes_accuracy": float("nan")}, r"data.bayes_accuracy: expected 0 to 1, got nan"),
        ({"bayes_accuracy": 88.0}, r"data.bayes_accuracy: expected 0 to 1, got 88.0"),
        ({"mean_scale": float("nan")}, r"data.mean_scale: expected 0 to 100, got nan"),
        ({"test": 0}, r"data.test: expected 1 to 100,000,000, got 0"),
        ({"seed": -1}, r"data.seed: expected 0 to 2,147,483,648, got -1"),
        ({"base": "synthetic", "height": 40, "width": 40}, r"covariances of images of 1600 values are too many numbers"),
        ({"base": "synthetic", "classes": 1000, "height": 32, "width": 32}, r"1000 covariances .* too many numbers"),
    ],
)
def test_what_is_out_of_range_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        gaussians(**settings)


@pytest.mark.parametrize("accuracy", [0.3, 0.95, 1.0, 0.0])
def test_an_accuracy_out_of_reach_is_refused_with_those_within(accuracy: float) -> None:
    with pytest.raises(
        InputError, match=r"data.bayes_accuracy: .* is out of reach, pixel noise takes these classes from 0\.\d+ to 0\.3"
    ):
        gaussians(**{**SMALL, "mean_scale": 0.35, "bayes_accuracy": accuracy})


def test_the_source_is_known_by_its_name(made: Callable[..., RealDataset]) -> None:
    dataset = load_dataset("gaussians", **SMALL)
    assert dataset.frame.equals(made(**SMALL).frame)
    assert dataset.info == made(**SMALL).info
