import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from csm.errors import InputError
from csm.generators import is_exact, load_generator
from csm.generators.conditioning import mix_embeddings
from csm.generators.gaussian_mixtures import GaussianMixtureGenerator, MixturesSpec
from csm.generators.gaussians import GaussianGenerator, GaussiansSpec

SHAPE, K, M, D = (1, 2, 1), 2, 3, 2  # images of two pixels: integrals over them can be done by brute force
PRIORS = np.array([0.7, 0.3])
WEIGHTS = np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])


def law(classes: int = K, components: int = M, size: int = D) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(4)
    factors = draw.normal(0, 0.4, (classes, components, size, size))
    means = draw.uniform(-0.8, 0.8, (classes, components, size))
    return means, factors @ factors.swapaxes(2, 3) + 0.01 * np.eye(size)


def generator() -> GaussianMixtureGenerator:
    means, covariances = law()
    return GaussianMixtureGenerator(MixturesSpec(SHAPE, K, M), *map(torch.from_numpy, (means, covariances, WEIGHTS, PRIORS)))


def density(x: np.ndarray, weights: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> np.ndarray:
    """Of one class, of points (N, D)."""
    parts = zip(weights, means, covariances, strict=True)
    return np.sum([weight * multivariate_normal(mean, covariance).pdf(x) for weight, mean, covariance in parts], axis=0)


def conditional_mean(
    noisy: np.ndarray, sigma: float, weights: np.ndarray, means: np.ndarray, covariances: np.ndarray
) -> np.ndarray:
    """E[clean | noisy] of one class, (D,): the integral over a fine grid of clean images."""
    axis = np.linspace(-5, 5, 401)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    mass = density(grid, weights, means, covariances) * np.exp(-((noisy - grid) ** 2).sum(axis=1) / (2 * sigma**2))
    return (mass[:, None] * grid).sum(axis=0) / mass.sum()


def batch(rows: int = 4) -> torch.Tensor:
    return torch.randn((rows, 1, 1, 2), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("sigma", [0.1, 0.6, 3.0])
def test_the_denoised_image_is_the_mean_over_a_grid_of_clean_images(sigma: float) -> None:
    model, (means, covariances) = generator(), law()
    labels = [1, 0, 1, 0]
    denoised = model.denoise(batch(), torch.full((4,), sigma), model.embed(torch.tensor(labels)))
    assert denoised.dtype == torch.float32
    assert denoised.shape == (4, 1, 1, 2)
    for row, label in enumerate(labels):
        noisy = batch()[row].double().numpy().ravel()
        expected = conditional_mean(noisy, float(np.float32(sigma)), WEIGHTS[label], means[label], covariances[label])
        np.testing.assert_allclose(denoised[row].numpy().ravel(), expected, atol=2e-5)


def test_the_denoised_image_is_that_of_tweedie() -> None:
    """E[clean | x] = x + sigma^2 grad log p(x; sigma) (Efron 2011), the gradient by torch from densities of its own."""
    means, covariances = map(torch.from_numpy, law(K, M, 12))
    model = GaussianMixtureGenerator(
        MixturesSpec((2, 2, 3), K, M), means, covariances, torch.tensor(WEIGHTS), torch.tensor(PRIORS)
    )
    sigma, x = 0.5, torch.randn((5, 12), generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    noisy = torch.distributions.MultivariateNormal(means[1], covariances[1] + sigma**2 * torch.eye(12))
    joint = (torch.tensor(WEIGHTS[1]).log() + noisy.log_prob(x[:, None])).logsumexp(dim=1)
    (gradient,) = torch.autograd.grad(joint.sum(), x)
    condition = model.embed(torch.ones(5, dtype=torch.int64))
    denoised = model.denoise(x.detach().float().view(5, 3, 2, 2), torch.full((5,), sigma), condition)
    np.testing.assert_allclose(denoised.flatten(1).numpy(), (x + sigma**2 * gradient).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_classes_are_mixed_component_by_component(lam: float) -> None:
    model, (means, covariances) = generator(), law()
    first, second = (model.embed(torch.full((4,), label)) for label in (0, 1))
    condition = mix_embeddings(first, second, torch.full((4,), lam))
    denoised = model.denoise(batch(), torch.full((4,), 0.5), condition)
    mixed = [lam * values[0] + (1 - lam) * values[1] for values in (WEIGHTS, means, covariances)]
    for row in range(4):
        expected = conditional_mean(batch()[row].double().numpy().ravel(), 0.5, *mixed)
        np.testing.assert_allclose(denoised[row].numpy().ravel(), expected, atol=2e-5)


def test_the_posterior_is_that_of_scipys_densities() -> None:
    model, (means, covariances) = generator(), law()
    x = np.random.default_rng(0).normal(0, 0.7, (20, D))
    joint = np.log(PRIORS) + np.log(np.stack([density(x, WEIGHTS[k], means[k], covariances[k]) for k in range(K)], axis=1))
    found = model.log_posterior(torch.from_numpy(x).view(-1, 1, 1, 2))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), joint - np.logaddexp.reduce(joint, axis=1, keepdims=True), atol=1e-9)


def test_draws_are_of_the_components_in_their_shares() -> None:
    means, covariances = law()
    narrow = GaussianMixtureGenerator(
        MixturesSpec(SHAPE, K, M), *map(torch.from_numpy, (means, covariances * 1e-6, WEIGHTS, PRIORS))
    )
    rows = 3000
    images = narrow.sample([0] * rows + [1] * rows, list(range(2 * rows))).flatten(1).double().numpy().reshape(K, rows, D)
    for label in range(K):
        nearest = ((images[label][:, None] - means[label]) ** 2).sum(axis=2).argmin(axis=1)
        shares = np.bincount(nearest, minlength=M) / rows
        np.testing.assert_allclose(shares, WEIGHTS[label], atol=4.5 * 0.5 / np.sqrt(rows))


def test_draws_have_the_moments_of_their_class() -> None:
    model, (means, covariances) = generator(), law()
    rows = 4000
    images = model.sample([1] * rows, list(range(rows))).flatten(1).double().numpy()
    mean = WEIGHTS[1] @ means[1]
    offsets = means[1] - mean
    covariance = np.einsum("m,mde->de", WEIGHTS[1], covariances[1] + offsets[:, :, None] * offsets[:, None])
    np.testing.assert_allclose(images.mean(axis=0), mean, atol=4.5 * np.sqrt(covariance.max() / rows))
    np.testing.assert_allclose(np.cov(images.T), covariance, atol=4.5 * 2 * covariance.max() / np.sqrt(rows))


def test_a_draw_belongs_to_its_seed_and_class() -> None:
    model = generator()
    images = model.sample([0, 1, 0, 0], [7, 7, 8, 7])
    assert torch.equal(images[0], images[3])
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    assert torch.allclose(model.sample([1], [7])[0], images[1])


def test_one_component_is_the_gaussian() -> None:
    means, covariances = (torch.from_numpy(array) for array in law(K, 1, 6))
    priors = torch.tensor(PRIORS)
    one = GaussianMixtureGenerator(MixturesSpec((2, 3, 1), K, 1), means, covariances, torch.ones(K, 1), priors)
    plain = GaussianGenerator(GaussiansSpec((2, 3, 1), K), means[:, 0], covariances[:, 0], priors)
    x, condition = torch.randn(3, 1, 2, 3), plain.embed(torch.tensor([0, 1, 1]))
    sigma = torch.tensor([0.1, 1.0, 20.0])
    assert torch.equal(one.denoise(x, sigma, condition), plain.denoise(x, sigma, condition))
    assert torch.allclose(one.log_posterior(x), plain.log_posterior(x))
    assert torch.equal(one.sample([0, 1], [3, 4]), plain.sample([0, 1], [3, 4]))


def test_a_component_of_weight_zero_is_not_there() -> None:
    means, covariances = law()
    weights = np.array([[0.4, 0.6, 0.0], [0.6, 0.4, 0.0]])
    model = GaussianMixtureGenerator(MixturesSpec(SHAPE, K, M), *map(torch.from_numpy, (means, covariances, weights, PRIORS)))
    two = (torch.from_numpy(array[:, :2].copy()) for array in (means, covariances, weights))
    without = GaussianMixtureGenerator(MixturesSpec(SHAPE, K, 2), *two, torch.tensor(PRIORS))
    condition, sigma = model.embed(torch.tensor([0, 1, 1, 0])), torch.ones(4)
    assert torch.allclose(model.denoise(batch(), sigma, condition), without.denoise(batch(), sigma, condition))
    assert torch.allclose(model.log_posterior(batch()), without.log_posterior(batch()))
    assert torch.equal(model.sample([0] * 50, list(range(50))), without.sample([0] * 50, list(range(50))))


def test_what_solvers_need_to_know() -> None:
    model = generator()
    assert (model.noise_shape, model.n_classes, model.sigma_range) == ((1, 1, 2), K, (0.002, 80.0))
    assert (model.network, model.spherical, model.device) == (None, False, torch.device("cpu"))
    x = batch()
    assert model.decode(x) is x
    assert is_exact(model)


def test_a_saved_generator_is_the_same(tmp_path: Path) -> None:
    model = generator()
    model.save(tmp_path)
    again = load_generator(tmp_path)
    assert isinstance(again, GaussianMixtureGenerator)
    assert again.spec == model.spec
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert json.loads((tmp_path / "generator.json").read_text())["kind"] == "gaussian-mixtures"


def test_foreign_parameters_are_named(tmp_path: Path) -> None:
    generator().save(tmp_path)
    description = json.loads((tmp_path / "generator.json").read_text())
    (tmp_path / "generator.json").write_text(json.dumps({**description, "components": 2}))
    with pytest.raises(InputError, match=r"model.safetensors holds the parameters of other classes or images"):
        load_generator(tmp_path)
