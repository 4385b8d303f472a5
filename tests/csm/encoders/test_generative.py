import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from csm.classifiers import ClassifierSpec, build_classifier
from csm.encoders import ENCODERS, Sources, encode
from csm.encoders.classifier import Teacher
from csm.encoders.generative import DenoisingPosterior, ExactPosterior, ShortlistPosterior
from csm.errors import InputError
from csm.generators import GENERATORS
from csm.generators.gaussian_mixtures import GaussianMixtureGenerator, MixturesSpec
from csm.generators.gaussians import GaussianGenerator, GaussiansSpec
from csm.generators.unet import UNetGenerator, UNetSpec

SHAPE, K, D = (2, 2, 1), 3, 4
RANGE = (0.01, 30.0)  # beyond it nothing tells these classes apart


def gaussians() -> GaussianGenerator:
    draw = np.random.default_rng(2)
    factors = draw.normal(0, 0.2, (K, D, D))
    covariances = torch.from_numpy(factors @ factors.swapaxes(1, 2) + 0.02 * np.eye(D))
    return GaussianGenerator(
        GaussiansSpec(SHAPE, K), torch.from_numpy(draw.uniform(-0.3, 0.3, (K, D))), covariances, torch.ones(K) / K
    )


def images(rows: int = 40) -> torch.Tensor:
    x = gaussians().sample([row % K for row in range(rows)], list(range(rows)))
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def posterior(model: Any, levels: int, draws: int = 2, batch_size: int = 4096, seed: int = 0) -> DenoisingPosterior:
    return DenoisingPosterior(model, levels, draws, *RANGE, batch_size, seed)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean total variation of two log-posteriors (N, K)."""
    return ((one.double().exp() - other.double().exp()).abs().sum(dim=1) / 2).mean().item()


@pytest.mark.parametrize("encoder", ["truth", "generator"])
def test_a_known_law_gives_its_exact_posterior(encoder: str, tmp_path: Path) -> None:
    model = gaussians()
    model.save(tmp_path)
    features = encode(ENCODERS[encoder].load(Sources(tmp_path / "none", generator=tmp_path, truth=tmp_path)), images())
    assert features.dtype == torch.float32
    points = images().flatten(1).double().numpy() / 127.5 - 1
    joint = np.stack([multivariate_normal(model.means[k], model.covariances[k]).logpdf(points) for k in range(K)], axis=1)
    np.testing.assert_allclose(features.numpy(), joint - np.logaddexp.reduce(joint, axis=1, keepdims=True), atol=1e-5)


def test_a_guided_generator_answers_as_it_would_without() -> None:
    """Errors of a guided denoiser would say something else."""
    spec = UNetSpec(SHAPE, K, 0.5, (8, 16), 1, 0.0, label_dropout=0.1)
    torch.manual_seed(0)
    model = UNetGenerator(spec).eval().requires_grad_(False)
    expected = posterior(model, 3)(images(6))
    model.guidance = 4.0
    assert torch.equal(posterior(model, 3)(images(6)), expected)


@pytest.mark.parametrize("components", [1, 2])
def test_denoising_errors_converge_to_the_exact_posterior(components: int) -> None:
    model: Any = gaussians()
    if components == 2:
        means = torch.stack([model.means, model.means.flip(0) + 0.2], dim=1)
        covariances = torch.stack([model.covariances, model.covariances.flip(0)], dim=1)
        weights = torch.tensor([[0.3, 0.7]]).expand(K, 2)
        model = GaussianMixtureGenerator(MixturesSpec(SHAPE, K, 2), means, covariances, weights, torch.ones(K) / K)
    exact = ExactPosterior(model)(images())
    distances = [distance(posterior(model, levels, draws)(images()), exact) for levels, draws in ((8, 2), (64, 8), (64, 64))]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.02
    assert distance(torch.full((40, K), -math.log(K)), exact) > 0.2  # what would be said without looking


def test_a_noise_and_its_negative_are_worth_more_than_two_noises() -> None:
    model, exact = gaussians(), ExactPosterior(gaussians())(images())
    paired = np.mean([distance(posterior(model, 16, 2, seed=seed)(images()), exact) for seed in range(4)])
    single = np.mean([distance(posterior(model, 32, 1, seed=seed)(images()), exact) for seed in range(4)])
    assert paired < 0.8 * single


def test_the_score_is_the_sum_over_levels_and_draws() -> None:
    model, encoder = gaussians(), posterior(gaussians(), 3, 2)
    low, high = (math.log(sigma) for sigma in RANGE)
    expected = torch.zeros(4, K, dtype=torch.float64)
    clean = images(4).float() / 127.5 - 1
    for level in range(3):
        sigma = math.exp(low + (level + 0.5) * (high - low) / 3)
        for draw in range(2):
            noise = encoder.noises[2 * level + draw]
            for label in range(K):
                condition = model.embed(torch.full((4,), label))
                denoised = model.denoise(clean + sigma * noise, torch.full((4,), sigma), condition)
                error = (denoised - clean).double().square().sum(dim=(1, 2, 3))
                expected[:, label] -= error / sigma**2 * (high - low) / 3 / 2
        assert torch.equal(encoder.noises[2 * level], -encoder.noises[2 * level + 1])
    assert torch.allclose(encoder(images(4)).double(), expected.log_softmax(dim=1), atol=1e-4)


def test_noise_levels_stay_inside_the_range_of_the_generator() -> None:
    encoder = DenoisingPosterior(gaussians(), 50, 1, 1e-9, 1e9, 64, 0)
    assert encoder.sigmas.min() > 0.002
    assert encoder.sigmas.max() < 80


@pytest.mark.parametrize("batch_size", [1, 7, 24])
def test_an_image_is_read_alike_alone_and_in_any_batch(batch_size: int) -> None:
    model = gaussians()
    together = posterior(model, 4)(images(6))
    assert torch.allclose(posterior(model, 4, batch_size=batch_size)(images(6)), together, atol=1e-5)
    for row in range(6):
        assert torch.allclose(posterior(model, 4)(images(6)[row : row + 1])[0], together[row], atol=1e-5)


def test_the_noise_is_that_of_the_seed() -> None:
    model = gaussians()
    assert torch.equal(posterior(model, 4)(images(6)), posterior(model, 4)(images(6)))
    assert not torch.allclose(posterior(model, 4, seed=1)(images(6)), posterior(model, 4)(images(6)), atol=1e-2)


@torch.no_grad()
def test_a_network_of_another_size_sees_the_images_in_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = UNetGenerator(UNetSpec((4, 4, 3), K, 0.5, (4, 8), 1, 0.0))
    network.save(tmp_path)
    encoder = ENCODERS["generator"].load(Sources(tmp_path / "none", generator=tmp_path), levels=2, batch_size=5)
    assert isinstance(encoder, DenoisingPosterior)
    features = encode(encoder, images(6))
    assert features.shape == (6, K)
    assert torch.allclose(features.exp().sum(dim=1), torch.ones(6))
    assert not features.requires_grad


def test_a_model_of_latent_codes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Latent(UNetGenerator):
        def decode(self, x: torch.Tensor) -> torch.Tensor:
            return x.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)

    monkeypatch.setitem(GENERATORS, "latent", lambda directory: Latent(UNetSpec((4, 4, 3), K, 0.5, (4, 8), 1, 0.0)))
    (tmp_path / "generator.json").write_text(json.dumps({"kind": "latent"}))
    with pytest.raises(InputError, match=r"encoder generator: the model in .* works on latent codes"):
        ENCODERS["generator"].load(Sources(tmp_path / "none", generator=tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"draws": -1}, "draws must be at least 1, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"sigma_min": 0.0}, "sigma_min must be above 0 and below sigma_max, got 0 and 3"),
        ({"sigma_min": 6.0}, "sigma_min must be above 0 and below sigma_max, got 6 and 3"),
        ({"sigma_max": float("nan")}, "sigma_min must be above 0 and below sigma_max, got 0.2 and nan"),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    gaussians().save(tmp_path)
    with pytest.raises(InputError, match=f"encoder generator: {message}"):
        ENCODERS["generator"].load(Sources(tmp_path / "none", generator=tmp_path), **settings)


class Fixed(torch.nn.Module):
    """A teacher that says the same of every image: log-probabilities ``said``, one row for each."""

    def __init__(self, probs: torch.Tensor) -> None:
        super().__init__()
        self.probs = probs

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.probs.log().expand(len(images), -1)


def shortlist(probs: list[float], least: float, generator: Any = None) -> ShortlistPosterior:
    teacher: Any = Fixed(torch.tensor(probs))
    return ShortlistPosterior(teacher, posterior(generator or gaussians(), 4), least)


def test_a_shortlist_of_all_classes_is_the_generator() -> None:
    assert torch.allclose(shortlist([0.2, 0.3, 0.5], 0.1)(images()), posterior(gaussians(), 4)(images()), atol=1e-5)


def test_a_shortlist_leaves_the_teacher_what_it_says_of_other_classes() -> None:
    said = shortlist([0.04, 0.36, 0.6], 0.05)(images()).double().exp()
    assert torch.allclose(said[:, 0], torch.full((40,), 0.04, dtype=torch.float64), atol=1e-6)
    of_generator = posterior(gaussians(), 4)(images()).double().exp()[:, 1:]
    assert torch.allclose(said[:, 1:], 0.96 * of_generator / of_generator.sum(dim=1, keepdim=True), atol=1e-6)


def test_two_classes_are_always_open() -> None:
    said = shortlist([0.0001, 0.0002, 0.9997], 0.9)(images()).exp()
    assert torch.allclose(said[:, 0], torch.full((40,), 0.0001), atol=1e-6)
    assert not torch.allclose(said[:, 2], torch.full((40,), 0.9997), atol=1e-3)


def test_only_open_classes_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = gaussians(), []
    denoise = model.denoise
    monkeypatch.setattr(model, "denoise", lambda x, *rest: asked.append(len(x)) or denoise(x, *rest))
    shortlist([0.04, 0.36, 0.6], 0.05, model)(images(6))
    assert sum(asked) == 6 * 2 * 4 * 2  # images, open classes, levels, draws


def test_the_shortlist_of_an_image_is_its_own() -> None:
    class Parity(Fixed):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            odd = images.flatten(1).long().sum(dim=1, keepdim=True) % 2 == 1
            return torch.where(odd, self.probs, self.probs.flip(0)).log()

    teacher: Any = Parity(torch.tensor([0.01, 0.39, 0.6]))
    encoder = ShortlistPosterior(teacher, posterior(gaussians(), 4), 0.05)
    together = encoder(images(12))
    closed = (together.exp() - 0.01).abs().min(dim=1).indices
    assert set(closed.tolist()) == {0, 2}
    for row in range(12):
        assert torch.allclose(encoder(images(12)[row : row + 1])[0], together[row], atol=1e-5)


def test_a_shortlist_is_loaded_with_its_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    UNetGenerator(UNetSpec((4, 4, 3), K, 0.5, (4, 8), 1, 0.0)).save(tmp_path / "generator")
    classifier = build_classifier(ClassifierSpec("small-cnn", {"width": 4}, 3, tuple("abc"), (0.5,) * 3, (0.2,) * 3))
    classifier.save(tmp_path / "member")
    sources = Sources(tmp_path / "none", (tmp_path / "member",), tmp_path / "generator")
    encoder = ENCODERS["shortlist"].load(sources, least=0.9, levels=2)
    assert isinstance(encoder, ShortlistPosterior)
    batch = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    said, teacher = encode(encoder, batch), encode(Teacher([classifier.eval()]), batch)
    assert torch.allclose(said.exp().sum(dim=1), torch.ones(5), atol=1e-6)
    last = teacher.min(dim=1).indices
    assert torch.allclose(said[torch.arange(5), last], teacher[torch.arange(5), last], atol=1e-6)


def test_an_exact_generator_needs_no_shortlist(tmp_path: Path) -> None:
    gaussians().save(tmp_path)
    assert isinstance(ENCODERS["shortlist"].load(Sources(tmp_path / "none", generator=tmp_path)), ExactPosterior)


@pytest.mark.parametrize("least", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_out_of_range_is_named(least: float, tmp_path: Path) -> None:
    gaussians().save(tmp_path)
    with pytest.raises(InputError, match=f"encoder shortlist: least must be above 0 and below 1, got {least:g}"):
        ENCODERS["shortlist"].load(Sources(tmp_path / "none", generator=tmp_path), least=least)


def test_a_teacher_of_other_classes_is_refused() -> None:
    with pytest.raises(InputError, match="encoder shortlist: the teacher knows 4 classes, the generator 3"):
        shortlist([0.1, 0.2, 0.3, 0.4], 0.1)(images())


@pytest.mark.parametrize("truth", [None, Path("nowhere")])
def test_a_law_that_is_not_known_is_refused(truth: Path | None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"encoder truth: the law of these images is not known: set data.source=gaussians"):
        ENCODERS["truth"].load(Sources(tmp_path, truth=truth))


def test_a_generator_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="encoder generator: there is no generator"):
        ENCODERS["generator"].load(Sources(tmp_path))
