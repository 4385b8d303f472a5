import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf

from csm.errors import InputError
from csm.generators import load_generator
from csm.generators.conditioning import mix_embeddings
from csm.generators.gaussians import GaussianGenerator, GaussiansSpec, fit_gaussians, load_gaussians
from csm.sampling import SamplerConfig, solve

SHAPE, K, D = (1, 3, 2), 3, 6
PRIORS = np.array([0.5, 0.3, 0.2])


def truth(size: int = D) -> tuple[np.ndarray, np.ndarray]:
    """Means (K, size) and covariances (K, size, size) with eigenvalues from 1e-6 to about 1."""
    draw = np.random.default_rng(3)
    means = draw.uniform(-0.8, 0.8, (K, size))
    bases = np.linalg.qr(draw.standard_normal((K, size, size))).Q
    values = 10 ** draw.uniform(-6, 0, (K, size))
    return means, np.einsum("kde,ke,kfe->kdf", bases, values, bases)


def generator(shape: tuple[int, int, int] = SHAPE) -> GaussianGenerator:
    means, covariances = truth(int(np.prod(shape)))
    return GaussianGenerator(GaussiansSpec(shape, K), *(torch.from_numpy(array) for array in (means, covariances, PRIORS)))


def batch(rows: int = 4, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn((rows, 2, 1, 3), generator=torch.Generator().manual_seed(5))


def conditional_mean(x: np.ndarray, sigma: float, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """E[clean | x] from the joint covariance of (clean, noisy), by solving a linear system."""
    joint = np.block([[covariance, covariance], [covariance, covariance + sigma**2 * np.eye(len(mean))]])
    size = len(mean)
    return mean + joint[:size, size:] @ np.linalg.solve(joint[size:, size:], x - mean)


@pytest.mark.parametrize("sigma", [0.002, 0.05, 1.0, 80.0])
def test_the_denoised_image_is_the_conditional_mean(sigma: float) -> None:
    model, (means, covariances) = generator(), truth()
    labels = [2, 0, 1, 2]
    x = batch(scale=sigma + 0.5)
    denoised = model.denoise(x, torch.full((4,), sigma), model.embed(torch.tensor(labels)))
    assert denoised.dtype == torch.float32
    assert denoised.shape == x.shape
    for row, label in enumerate(labels):
        expected = conditional_mean(x[row].double().numpy().ravel(), sigma, means[label], covariances[label])
        np.testing.assert_allclose(denoised[row].numpy().ravel(), expected, rtol=2e-6, atol=2e-7)


def test_every_row_has_its_own_noise_level() -> None:
    model, x = generator(), batch()
    sigma, condition = torch.tensor([0.002, 0.3, 2.0, 80.0]), model.embed(torch.tensor([1, 1, 0, 2]))
    together = model.denoise(x, sigma, condition)
    for row in range(4):
        assert torch.allclose(together[row], model.denoise(x[row : row + 1], sigma[row : row + 1], condition[row : row + 1])[0])


def test_the_denoised_image_is_the_mean_of_the_clean_images_that_could_have_been() -> None:
    means, covariances = np.array([[0.2, -0.4]]), np.array([[[0.3, 0.1], [0.1, 0.2]]])
    model = GaussianGenerator(GaussiansSpec((1, 2, 1), 1), *map(torch.from_numpy, (means, covariances, np.ones(1))))
    x, sigma = np.array([0.5, 0.1]), 0.6
    clean = np.random.default_rng(0).multivariate_normal(means[0], covariances[0], 400_000)
    weights = np.exp(-((x - clean) ** 2).sum(axis=1) / (2 * sigma**2))
    expected = (weights[:, None] * clean).sum(axis=0) / weights.sum()
    noisy = torch.tensor(x, dtype=torch.float32).view(1, 1, 1, 2)
    denoised = model.denoise(noisy, torch.tensor([sigma]), model.embed(torch.tensor([0])))
    np.testing.assert_allclose(denoised.numpy().ravel(), expected, atol=3e-3)


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_a_mixture_of_conditions_is_the_gaussian_of_the_mixed_parameters(lam: float) -> None:
    model, (means, covariances) = generator(), truth()
    first, second = (model.embed(torch.full((4,), label)) for label in (0, 2))
    condition = mix_embeddings(first, second, torch.full((4,), lam))
    denoised = model.denoise(batch(), torch.full((4,), 0.4), condition)
    mean, covariance = (lam * values[0] + (1 - lam) * values[2] for values in (means, covariances))
    for row, x in enumerate(batch()):
        expected = conditional_mean(x.double().numpy().ravel(), float(np.float32(0.4)), mean, covariance)
        np.testing.assert_allclose(denoised[row].numpy().ravel(), expected, rtol=2e-6, atol=2e-7)


def test_another_condition_is_not_mistaken_for_the_last() -> None:
    model, sigma = generator(), torch.ones(4)
    zero, one = (model.embed(torch.full((4,), label)) for label in (0, 1))
    first = model.denoise(batch(), sigma, zero)
    zero.copy_(one)  # the caller may use its tensor again
    assert torch.equal(model.denoise(batch(), sigma, zero), generator().denoise(batch(), sigma, one))
    assert not torch.allclose(first, model.denoise(batch(), sigma, one), atol=1e-3)


def test_rows_of_one_condition_may_be_many_or_few_and_lie_anywhere() -> None:
    model = generator()
    labels = torch.tensor([2, 0, 0, 1, 0, 2, 0, 0, 0, 0, 0])
    x = torch.randn((11, 2, 1, 3), generator=torch.Generator().manual_seed(8))
    sigma = torch.linspace(0.1, 5, 11)
    together = model.denoise(x, sigma, model.embed(labels))
    for row in range(11):
        alone = model.denoise(x[row : row + 1], sigma[row : row + 1], model.embed(labels[row : row + 1]))
        assert torch.allclose(together[row], alone[0], atol=1e-6)


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_the_density_is_scipys(sigma: float) -> None:
    model, (means, covariances) = generator(), truth()
    labels, x = [2, 0, 1, 2], batch(scale=0.5)
    found = model.log_density(x, torch.full((4,), sigma), model.embed(torch.tensor(labels)))
    for row, label in enumerate(labels):
        noisy = multivariate_normal(means[label], covariances[label] + sigma**2 * np.eye(D))
        assert found[row].item() == pytest.approx(noisy.logpdf(x[row].double().numpy().ravel()), rel=1e-6)
        one = model.log_likelihoods(x)[row, label].item()
        assert sigma > 0 or one == pytest.approx(found[row].item(), rel=1e-6)


def test_a_singular_covariance_is_kept_in_its_plane() -> None:
    covariance = np.zeros((1, D, D))
    covariance[0, 0, 0] = 0.5
    model = GaussianGenerator(GaussiansSpec(SHAPE, 1), *map(torch.from_numpy, (np.full((1, D), 0.25), covariance, np.ones(1))))
    condition = model.embed(torch.zeros(4, dtype=torch.int64))
    denoised = model.denoise(batch(), torch.full((4,), 0.002), condition).flatten(1)
    assert torch.equal(denoised[:, 1:], torch.full((4, D - 1), 0.25))
    assert torch.allclose(denoised[:, 0], batch().flatten(1)[:, 0], atol=1e-4)


def test_the_flow_solves_its_equation() -> None:
    model, (means, covariances) = generator(), truth()
    condition, start, end = model.embed(torch.tensor([1])), 3.0, 0.01
    x = batch(1, start)

    def slope(sigma: float, state: np.ndarray) -> np.ndarray:
        return (state - conditional_mean(state, sigma, means[1], covariances[1])) / sigma

    solved = solve_ivp(slope, (start, end), x.double().numpy().ravel(), method="DOP853", rtol=1e-10, atol=1e-12)
    flowed = model.flow(x, start, end, condition)
    assert flowed.dtype == torch.float64
    np.testing.assert_allclose(flowed.numpy().ravel(), solved.y[:, -1], rtol=1e-7, atol=1e-8)


def test_the_flow_goes_by_way_of_any_level_and_back() -> None:
    model, condition = generator(), generator().embed(torch.tensor([0, 1, 2, 0]))
    x = batch(scale=80)
    direct = model.flow(x, 80.0, 0.0, condition)
    assert torch.allclose(model.flow(model.flow(x, 80.0, 0.7, condition), 0.7, 0.0, condition), direct, atol=1e-9)
    assert torch.allclose(model.flow(direct, 0.0, 80.0, condition), x.double(), rtol=1e-6)


def test_a_solver_ends_where_the_flow_ends() -> None:
    model = generator()
    condition = mix_embeddings(model.embed(torch.tensor([0, 1])), model.embed(torch.tensor([1, 2])), torch.tensor([0.3, 0.6]))
    config = SamplerConfig(solver="heun", steps=300, sigma_min=1e-4)
    images = solve(lambda x, sigma: model.denoise(x, sigma, condition), batch(2), config)
    exact = model.flow(80.0 * batch(2), 80.0, 0.0, condition)
    assert torch.allclose(images.double(), exact, atol=1e-3)


def test_the_posterior_is_that_of_scipys_densities() -> None:
    model, (means, covariances) = generator(), truth()
    x = np.concatenate(
        [np.random.default_rng(label).multivariate_normal(means[label], covariances[label], 5) for label in range(K)]
    )
    joint = np.stack([np.log(PRIORS[k]) + multivariate_normal(means[k], covariances[k]).logpdf(x) for k in range(K)], axis=1)
    expected = joint - np.logaddexp.reduce(joint, axis=1, keepdims=True)
    found = model.log_posterior(torch.from_numpy(x).view(-1, 2, 1, 3))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)
    assert found.argmax(dim=1).tolist() == np.repeat(range(K), 5).tolist()  # almost no overlap at these covariances


def test_equal_gaussians_leave_the_prior() -> None:
    means, covariances = truth()
    same = (np.repeat(array[:1], K, axis=0) for array in (means, covariances))
    model = GaussianGenerator(GaussiansSpec(SHAPE, K), *(torch.from_numpy(array) for array in (*same, PRIORS)))
    np.testing.assert_allclose(model.log_posterior(batch(2)).exp().numpy(), [PRIORS, PRIORS], rtol=1e-9)


def test_draws_have_the_moments_of_their_class() -> None:
    model, (means, covariances) = generator(), truth()
    rows = 4000
    images = model.sample([0] * rows + [2] * rows, list(range(2 * rows)))
    assert images.dtype == torch.float32
    assert images.shape == (2 * rows, 2, 1, 3)
    for label, part in zip((0, 2), images.flatten(1).double().numpy().reshape(2, rows, D), strict=True):
        spread = np.sqrt(np.diag(covariances[label]))
        assert (np.abs(part.mean(axis=0) - means[label]) < 4.5 * spread / np.sqrt(rows)).all()
        error = np.cov(part.T) - covariances[label]
        # Var of a sample covariance: (s_ii s_jj + s_ij^2) / n.
        bound = np.sqrt((np.outer(spread, spread) ** 2 + covariances[label] ** 2) / rows)
        assert (np.abs(error) < 4.5 * bound).all()


def test_a_draw_belongs_to_its_seed_and_class() -> None:
    model = generator()
    images = model.sample([0, 1, 0, 0], [7, 7, 8, 7])
    assert torch.equal(images[0], images[3])
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    assert torch.allclose(model.sample([1], [7])[0], images[1])


def test_a_draw_is_what_the_flow_makes_of_its_noise_from_far_away() -> None:
    from csm.noise import initial_noise

    model = generator()
    flowed = model.flow(1e6 * initial_noise([4, 5], (2, 1, 3)).double(), 1e6, 0.0, model.embed(torch.tensor([0, 2])))
    assert torch.allclose(model.sample([0, 2], [4, 5]).double(), flowed, atol=1e-5)


def test_what_solvers_need_to_know() -> None:
    model = generator((1, 2, 3))
    assert model.noise_shape == (3, 1, 2)
    assert model.sigma_range == (0.002, 80.0)
    assert model.device == torch.device("cpu")
    assert model.n_classes == K
    assert model.network is None
    x = batch()
    assert model.decode(x) is x


def data(rows: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images (rows, 1, 2, 3) of two classes; the first pixel is constant."""
    draw = np.random.default_rng(1)
    labels = np.arange(rows) % 3 // 2  # two thirds of class 0
    images = (100 + 60 * labels[:, None] + draw.normal(0, 20, (rows, D)) @ np.triu(np.ones((D, D))) / 2).clip(0, 255)
    images[:, 0] = 17
    return torch.from_numpy(images.astype(np.uint8)).view(rows, 1, 2, 3), torch.from_numpy(labels)


def test_the_fit_is_the_shrunk_covariance_of_each_class() -> None:
    images, labels = data()
    model = fit_gaussians(images, labels, 2)
    assert model.spec == GaussiansSpec((2, 3, 1), 2)
    np.testing.assert_allclose(model.priors.numpy(), np.bincount(labels.numpy()) / len(labels))
    for label in range(2):
        pixels = images[labels == label].flatten(1).double().numpy() / 127.5 - 1
        np.testing.assert_allclose(model.means[label].numpy(), pixels.mean(axis=0), atol=1e-12)
        expected = LedoitWolf().fit(pixels).covariance_ + (2 / 255) ** 2 / 12 * np.eye(D)
        np.testing.assert_allclose(model.covariances[label].numpy(), expected, atol=1e-12)


def test_constant_pixels_and_equal_images_have_a_density() -> None:
    images, labels = data()
    images[labels == 1] = images[labels == 1][:1]
    model = fit_gaussians(images, labels, 2)
    assert (torch.linalg.eigvalsh(model.covariances) > 5e-6).all()
    posterior = model.log_posterior(images.float() / 127.5 - 1)
    assert posterior.isfinite().all()
    assert torch.equal(posterior.argmax(dim=1), labels)
    denoised = model.denoise(images.float() / 127.5 - 1, torch.full((len(images),), 0.002), model.embed(labels))
    assert torch.allclose(denoised, images.float() / 127.5 - 1, atol=0.01)


def test_colour_images_are_channels_first() -> None:
    images = torch.randint(0, 256, (20, 3, 2, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[:, 2] = 255
    model = fit_gaussians(images, torch.arange(20) % 2, 2)
    assert model.spec.shape == (2, 2, 3)
    assert torch.equal(model.means.view(2, 3, 4)[:, 2], torch.ones(2, 4, dtype=torch.float64))


def test_too_many_pixels_and_too_few_images_are_refused() -> None:
    labels = torch.arange(4) % 2
    with pytest.raises(InputError, match=r"images of 32 x 32 x 3 have 3072 values, at most 1024"):
        fit_gaussians(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), labels, 2)
    with pytest.raises(InputError, match="class 2 has 0 training images, at least 2"):
        fit_gaussians(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), labels, 3)


def test_a_saved_generator_is_the_same(tmp_path: Path) -> None:
    model = generator()
    model.save(tmp_path)
    again = load_generator(tmp_path)
    assert isinstance(again, GaussianGenerator)
    assert again.spec == model.spec
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert json.loads((tmp_path / "generator.json").read_text())["kind"] == "gaussians"


def test_foreign_parameters_are_named(tmp_path: Path) -> None:
    generator((1, 2, 2)).save(tmp_path / "foreign")
    generator().save(tmp_path)
    (tmp_path / "foreign" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors holds the parameters of other classes or images"):
        load_gaussians(tmp_path)
