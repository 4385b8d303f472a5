"""Generators as encoders: log p(y | x) by Bayes' rule, exact where the law of the images is known, else from denoising errors."""

import math

import numpy as np
import polars as pl
import torch
from torch import nn

from csm.encoders.classifier import Teacher, load_teacher
from csm.encoders.sources import Sources
from csm.errors import InputError
from csm.generators import ExactGenerator, Generator, is_exact, load_generator, load_truth
from csm.micro_batches import in_micro_batches
from csm.mixing import fit_to
from csm.noise import initial_noise, mix_seeds

_ERROR_NOISE = 6  # the key of the noise under which errors are measured


class ExactPosterior(nn.Module):
    """log p(y | x) float32 (N, K) of images uint8 (N, C, H, W), in closed form."""

    def __init__(self, generator: ExactGenerator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.generator.log_posterior(images.double() / 127.5 - 1).float()


class DenoisingPosterior(nn.Module):
    """log p(y | x) float32 (N, K) of images uint8 (N, C, H, W), for equal priors, from the errors of a denoiser.

    With e standard normal, log p(x | y) is the same constant for all y less the integral over ln(sigma), from -inf to inf, of
    E ||x - D(x + sigma e; sigma, y)||^2 / sigma^2, if D is the conditional mean (Kong et al. 2023, "Information-theoretic diffusion",
    whose signal-to-noise ratio is 1 / sigma^2). Li et al. 2023, "Your diffusion model is secretly a zero-shot classifier", compare
    classes by such errors. Outside of ``sigma_min``..``sigma_max`` the errors of the classes are taken to be equal: far below the
    differences between images a denoiser only keeps its input, far above them the weight falls as 1 / sigma^2.

    The integral is the sum over the middles of ``levels`` equal parts of that range of ln(sigma), the expectation the mean over
    ``draws`` noises, of which each second one is the negative of the one before: that cancels what is odd in the noise. Levels and
    noises are the same for all images and classes, so that what they have in common cancels in the differences.
    """

    sigmas: torch.Tensor
    noises: torch.Tensor

    def __init__(
        self, generator: Generator, levels: int, draws: int, sigma_min: float, sigma_max: float, batch_size: int, seed: int
    ) -> None:
        """``batch_size``: images, classes, levels and draws that go through the network together."""
        super().__init__()
        generator.guidance = 1.0  # a guided denoiser is no conditional mean
        self.generator, self.batch_size = generator, batch_size
        low, high = (
            math.log(min(max(sigma, generator.sigma_range[0]), generator.sigma_range[1])) for sigma in (sigma_min, sigma_max)
        )
        self.step = (high - low) / levels / draws
        sigmas = (low + (torch.arange(levels, dtype=torch.float64) + 0.5) * (high - low) / levels).exp()
        level, draw = np.divmod(np.arange(levels * draws), draws)
        noises = initial_noise(
            mix_seeds(_ERROR_NOISE, np.full(len(level), seed), level, draw // 2).tolist(), generator.noise_shape
        )
        signs = torch.from_numpy(1 - 2 * (draw % 2)).float()
        self.register_buffer("sigmas", sigmas.repeat_interleave(draws))
        self.register_buffer("noises", signs.view(-1, 1, 1, 1) * noises)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        asked = torch.ones(len(images), self.generator.n_classes, dtype=torch.bool, device=images.device)
        return self.log_likelihoods(images, asked).log_softmax(dim=1).float()

    def log_likelihoods(self, images: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """log p(x | y) float64 (N, K) but for a constant of each image; minus infinity where ``asked``, bool (N, K), is not set."""
        channels, height, width = self.generator.noise_shape
        clean = fit_to(images.float() / 127.5 - 1, (height, width, channels))
        conditions = self.generator.embed(torch.arange(self.generator.n_classes, device=clean.device))
        pairs = asked.nonzero()
        shape = (len(self.sigmas), len(pairs))

        def errors(rows: pl.DataFrame) -> torch.Tensor:
            level, pair = np.unravel_index(rows["row"].to_numpy(), shape)
            image, label = pairs[pair].T
            sigma = self.sigmas[level]
            noisy = clean[image] + sigma.float().view(-1, 1, 1, 1) * self.noises[level]
            denoised = self.generator.denoise(noisy, sigma.float(), conditions[label])
            return (denoised - clean[image]).double().square().flatten(1).sum(dim=1) / sigma.square()

        rows = pl.DataFrame({"row": np.arange(math.prod(shape))})
        weighted = torch.cat(list(in_micro_batches(rows, self.batch_size, errors, "annotating"))).view(shape)
        result = torch.full(asked.shape, -math.inf, dtype=torch.float64, device=clean.device)
        result[asked] = -self.step * weighted.sum(dim=0)
        return result


class ShortlistPosterior(nn.Module):
    """log p(y | x) float32 (N, K) of images uint8 (N, C, H, W): the teacher's, but among classes that it leaves open the generator's.

    A class is open if the teacher gives it at least ``least``, and two always are. With S the open classes, t the teacher and g the
    generator, p(y) = t(S) g(y | S) in S and t(y) elsewhere: only the open classes cost evaluations of the network, of which
    ``DenoisingPosterior`` needs as many for each class.
    """

    def __init__(self, teacher: Teacher, generator: DenoisingPosterior, least: float) -> None:
        super().__init__()
        self.teacher, self.generator, self.least = teacher, generator, least

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        said = self.teacher(images).double()
        if said.shape[1] != self.generator.generator.n_classes:
            raise InputError(
                f"encoder shortlist: the teacher knows {said.shape[1]} classes, the generator {self.generator.generator.n_classes}: "
                "take a generator of this data, or another encoder"
            )
        asked = (said >= math.log(self.least)).scatter(1, said.topk(2, dim=1).indices, True)
        mass = said.masked_fill(~asked, -math.inf).logsumexp(dim=1, keepdim=True)
        within = self.generator.log_likelihoods(images, asked).log_softmax(dim=1)
        return torch.where(asked, mass + within, said).float()


def load_true_posterior(sources: Sources) -> ExactPosterior:
    """The posterior of the law that the images were drawn from.

    Raises:
        InputError: it is not known.
    """
    truth = load_truth(sources.truth) if sources.truth else None
    if truth is None:
        raise InputError(
            "encoder truth: the law of these images is not known: set data.source=gaussians, or take another encoder"
        )
    return ExactPosterior(truth)


def load_generator_posterior(
    sources: Sources,
    levels: int = 4,
    draws: int = 2,
    sigma_min: float = 0.2,
    sigma_max: float = 3.0,
    batch_size: int = 1024,
    seed: int = 0,
) -> ExactPosterior | DenoisingPosterior:
    """The posterior of the diffusion model: see ``DenoisingPosterior``; exact, whatever the settings, for Gaussians.

    The defaults cost 8 network evaluations for each image and class. They were chosen with the demo's UNet on ``digits-hard``, by the
    validation NLL of its logarithmic pool with the teacher: 0.411, and 0.419 with 8 levels from 0.1 to 5. A noise and its negative are
    worth more than as many noises of their own. A lower ``sigma_min`` loses accuracy to the errors of the network, a higher one the finer
    details of data that has them.

    Raises:
        InputError: a setting is out of range, or the generator works on latent codes, which it makes images of but not from images.
    """
    if sources.generator is None:
        raise InputError("encoder generator: there is no generator: run csm fit-generator or csm import-generator")
    for name, value in (("levels", levels), ("draws", draws), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"encoder generator: {name} must be at least 1, got {value}")
    if not 0 < sigma_min < sigma_max:
        raise InputError(f"encoder generator: sigma_min must be above 0 and below sigma_max, got {sigma_min:g} and {sigma_max:g}")
    generator = load_generator(sources.generator)
    if is_exact(generator):
        return ExactPosterior(generator)
    probe = torch.zeros(1, *generator.noise_shape)
    if generator.decode(probe) is not probe:
        raise InputError(
            f"encoder generator: the model in {sources.generator} works on latent codes and csm cannot make those of images: "
            "take another encoder (teacher, classifier, clip)"
        )
    return DenoisingPosterior(generator, levels, draws, sigma_min, sigma_max, batch_size, seed)


def load_shortlist_posterior(
    sources: Sources,
    least: float = 0.003,
    levels: int = 4,
    draws: int = 2,
    sigma_min: float = 0.2,
    sigma_max: float = 3.0,
    batch_size: int = 1024,
    seed: int = 0,
) -> ExactPosterior | ShortlistPosterior:
    """The posterior of the diffusion model among the classes that the teacher leaves open; of all where it is exact, as that costs nothing.

    Args:
        least: probability from which on a class is open, in (0, 1). With the demo's UNet on ``digits-hard``, where 10 classes can be
            asked, the default takes 0.42 times as long, and the validation NLL of the pool with the teacher stays what it is (0.396 for
            0.397; docs/reannotation.md).

    The other arguments are those of ``load_generator_posterior``.

    Raises:
        InputError: as there, or ``least`` is out of range.
    """
    if not 0 < least < 1:
        raise InputError(f"encoder shortlist: least must be above 0 and below 1, got {least:g}")
    posterior = load_generator_posterior(sources, levels, draws, sigma_min, sigma_max, batch_size, seed)
    return posterior if isinstance(posterior, ExactPosterior) else ShortlistPosterior(load_teacher(sources), posterior, least)
