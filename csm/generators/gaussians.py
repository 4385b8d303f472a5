"""Class-conditional Gaussians: the generator whose denoiser, flow and posterior are known in closed form."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from csm import storage
from csm.errors import InputError
from csm.generators.importing import marking
from csm.noise import initial_noise

MAX_PIXELS = 1024
ROUNDING_VARIANCE = (2 / 255) ** 2 / 12


@dataclass(frozen=True)
class GaussiansSpec:
    """Everything but the parameters (``generator.json``). ``shape`` is (H, W, C)."""

    shape: tuple[int, int, int]
    n_classes: int


@dataclass(frozen=True)
class Basis:
    """Means (N, D) of N conditions, eigenvalues (N, D) of their covariances, and the eigenvectors, by block of rows that share them.

    Row i lies at ``slots[i]`` (N,) of the B blocks of ``length`` rows; ``vectors`` (B, D, D). To copy a matrix for each row would take
    twenty times as long as all the rest.
    """

    means: torch.Tensor
    values: torch.Tensor
    vectors: torch.Tensor
    slots: torch.Tensor
    length: int

    def scaled(self, offsets: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """mu + V diag(f) V^T offset, float64 (N, D), of ``offsets`` and ``factors`` float64 (N, D)."""
        return self.means + self._times(factors * self.coefficients(offsets), self.vectors.mT)

    def coefficients(self, offsets: torch.Tensor) -> torch.Tensor:
        """V^T offset, float64 (N, D), of ``offsets`` float64 (N, D)."""
        return self._times(offsets, self.vectors)

    def _times(self, rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        """``rows`` (N, D), each times the matrix of its block."""
        blocks, size = len(matrices), rows.shape[1]
        padded = rows.new_zeros(blocks * self.length, size)
        padded[self.slots] = rows
        return (padded.view(blocks, self.length, size) @ matrices).view(-1, size)[self.slots]


class GaussianGenerator(nn.Module):
    """x0 | y ~ N(mean_y, covariance_y): the exact ``denoise``, and the truth about its images.

    The condition is the weight of each class, float32 (N, K), one-hot for a class. A row's parameters are the weighted sums of the
    classes' means and covariances, so a mixture of conditions is the Gaussian of the mixed parameters, for which ``denoise`` is exact.
    (The image of a mixed condition is thus no draw from a mixture of two classes.) All is computed in float64.

    Attributes:
        means: float64 (K, D), D = C * H * W pixels in [-1, 1], channels first.
        covariances: float64 (K, D, D), symmetric, positive definite.
        priors: float64 (K,), of sum 1.
    """

    network: nn.Module | None = None
    spherical = False  # weights of classes lie on no sphere
    guides, guidance = False, 1.0
    means: torch.Tensor
    covariances: torch.Tensor
    priors: torch.Tensor

    def __init__(self, spec: GaussiansSpec, means: torch.Tensor, covariances: torch.Tensor, priors: torch.Tensor) -> None:
        """Take over the parameters, see the class."""
        super().__init__()
        size = math.prod(spec.shape)
        shapes = ((spec.n_classes, size), (spec.n_classes, size, size), (spec.n_classes,))
        found = tuple(tuple(tensor.shape) for tensor in (means, covariances, priors))
        if found != shapes:
            raise ValueError(f"means, covariances and priors must have the shapes {shapes}, got {found}")
        self.spec = spec
        self.register_buffer("means", means.double())
        self.register_buffer("covariances", covariances.double())
        self.register_buffer("priors", priors.double())
        self._last: tuple[torch.Tensor, Basis] | None = None

    @property
    def device(self) -> torch.device:
        return self.means.device

    @property
    def n_classes(self) -> int:
        return self.spec.n_classes

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.spec.shape
        return channels, height, width

    @property
    def sigma_range(self) -> tuple[float, float]:
        """EDM's (Karras et al. 2022, table 1); the denoiser is exact at every level."""
        return 0.002, 80.0

    def embed(self, labels: torch.Tensor) -> torch.Tensor:
        """One-hot conditions float32 (N, K) of class labels int64 (N,)."""
        return nn.functional.one_hot(labels, self.n_classes).float()

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """E[clean | x] = mu + C (C + sigma^2 I)^-1 (x - mu), float32 (N, C, H, W), of x = clean + sigma * noise.

        Args:
            x: float32 (N, C, H, W).
            sigma: (N,), >= 0.
            condition: (N, K).
        """
        basis = self._basis(condition)
        kept = basis.values / (basis.values + sigma.double().square()[:, None])
        return basis.scaled(x.double().flatten(1) - basis.means, kept).view(x.shape).float()

    def flow(self, x: torch.Tensor, start: float, end: float, condition: torch.Tensor) -> torch.Tensor:
        """Where the probability flow takes x from noise level ``start`` to ``end``: the oracle of solvers, float64 (N, C, H, W).

        dx/dsigma = (x - E[clean | x]) / sigma decouples in the eigenbasis of C: the coordinate u of x - mu along an eigenvector of
        eigenvalue l obeys du/dsigma = u sigma / (l + sigma^2), so it is scaled by sqrt((l + end^2) / (l + start^2)).

        Args:
            x: (N, C, H, W).
            start, end: >= 0; ``end`` 0 gives the images.
            condition: (N, K).
        """
        basis = self._basis(condition)
        factors = ((basis.values + end**2) / (basis.values + start**2)).sqrt()
        return basis.scaled(x.double().flatten(1) - basis.means, factors).view(x.shape)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` itself: the model works on pixels."""
        return x

    def sample(self, labels: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """Exact draws float32 (N, C, H, W) of classes ``labels`` (N,), row i from the noise of ``seeds[i]``; no pixel is clipped."""
        basis = self._basis(self.embed(torch.tensor(labels, dtype=torch.int64, device=self.device)))
        noise = initial_noise(seeds, self.noise_shape).to(self.device)
        return basis.scaled(noise.double().flatten(1), basis.values.sqrt()).view(noise.shape).float()

    def log_density(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """log p(x; sigma, condition) float64 (N,), of x = clean + sigma * noise; arguments as for ``denoise``."""
        basis = self._basis(condition)
        variances = basis.values + sigma.double().square()[:, None]
        coefficients = basis.coefficients(x.double().flatten(1) - basis.means)
        return -(coefficients.square() / variances + (2 * math.pi * variances).log()).sum(dim=1) / 2

    def log_posterior(self, x: torch.Tensor) -> torch.Tensor:
        """log p(y | x) float64 (N, K) of images (N, C, H, W) without noise, by Bayes' rule."""
        joint = self.priors.log() + self.log_likelihoods(x)
        return joint - joint.logsumexp(dim=1, keepdim=True)

    def log_likelihoods(self, x: torch.Tensor) -> torch.Tensor:
        """log p(x | y) float64 (N, K) of images (N, C, H, W) without noise."""
        factors = torch.linalg.cholesky(self.covariances)
        offsets = x.double().flatten(1) - self.means[:, None]  # (K, N, D)
        whitened = torch.linalg.solve_triangular(factors, offsets.mT, upper=False)  # (K, D, N)
        log_determinants = factors.diagonal(dim1=1, dim2=2).log().sum(dim=1)  # of the factors: half those of the covariances
        constant = x[0].numel() * math.log(2 * math.pi) / 2
        likelihoods: torch.Tensor = -log_determinants - whitened.square().sum(dim=1).mT / 2 - constant
        return likelihoods

    def save(self, directory: Path) -> None:
        """Write ``model.safetensors`` and then ``generator.json``."""
        with marking(directory, {"kind": "gaussians", **asdict(self.spec)}):
            storage.write_tensors(directory / "model.safetensors", self.state_dict())

    def _basis(self, condition: torch.Tensor) -> Basis:
        """Eigenbasis of the rows of ``condition`` (N, K), each distinct one decomposed once; a solver asks for the same again."""
        if self._last is None or self._last[0].device != condition.device or not torch.equal(self._last[0], condition):
            weights, number, counts = condition.unique(dim=0, return_inverse=True, return_counts=True)
            weights = weights.double()
            values, vectors = torch.linalg.eigh(torch.einsum("uk,kde->ude", weights, self.covariances))
            owners, slots, length = _blocks(number, counts)
            # Rounding may leave an eigenvalue of a singular matrix just below 0.
            basis = Basis((weights @ self.means)[number], values.clamp(min=0)[number], vectors[owners], slots, length)
            self._last = condition.clone(), basis
        return self._last[1]


def _blocks(number: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Blocks of rows of one kind each, all as long as kinds have rows on average: at most twice as many blocks as kinds.

    Args:
        number: kind of each row, int64 (N,).
        counts: rows of each kind, int64 (U,), > 0.

    Returns:
        kind of each block (B,), place of each row among the B * length (N,), length.
    """
    length = -(-len(number) // len(counts))
    blocks = (counts + length - 1) // length
    owners = torch.arange(len(counts), device=number.device).repeat_interleave(blocks)
    order = number.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=number.device) - (counts.cumsum(0) - counts)[number[order]]
    return owners, (blocks.cumsum(0) - blocks)[number] * length + rank, length


def fit_gaussians(images: torch.Tensor, labels: torch.Tensor, n_classes: int) -> GaussianGenerator:
    """Fit a Gaussian to each class: its mean, its covariance shrunk after Ledoit & Wolf (2004), and its share as prior.

    Shrinkage is towards (trace / D) I, by the amount that minimises the expected squared error. To every eigenvalue the variance of
    rounding to 8 bits is added, (2/255)^2 / 12, so that classes of constant pixels and even of equal images have a density.

    Args:
        images: uint8 (N, C, H, W), the train split only.
        labels: int64 (N,).
        n_classes: K.

    Raises:
        InputError: images of more than 1,024 pixels times channels (K covariances of D^2 numbers, and one more for each mixed
            condition of a batch), or a class with fewer than 2 images.
    """
    from sklearn.covariance import ledoit_wolf  # a second to import, which every worker would pay

    channels, height, width = images.shape[1:]
    size = channels * height * width
    if size > MAX_PIXELS:
        raise InputError(
            f"gaussians: images of {height} x {width} x {channels} have {size} values, at most {MAX_PIXELS} can be fitted: "
            "make them smaller (data.size) or train a UNet"
        )
    data = images.flatten(1).double() / 127.5 - 1
    means, covariances, counts = [], [], []
    for label in range(n_classes):
        members = data[labels == label]
        if len(members) < 2:
            raise InputError(f"gaussians: class {label} has {len(members)} training images, at least 2 are needed")
        shrunk, _ = ledoit_wolf(members.numpy())
        means.append(members.mean(dim=0))
        covariances.append(torch.from_numpy(shrunk) + ROUNDING_VARIANCE * torch.eye(size, dtype=torch.float64))
        counts.append(len(members))
    priors = torch.tensor(counts, dtype=torch.float64) / len(data)
    spec = GaussiansSpec((height, width, channels), n_classes)
    return GaussianGenerator(spec, torch.stack(means), torch.stack(covariances), priors)


def load_gaussians(directory: Path) -> GaussianGenerator:
    """Return the generator that ``GaussianGenerator.save`` wrote to ``directory``."""
    spec = storage.read_record(directory / "generator.json", GaussiansSpec)
    file = directory / "model.safetensors"
    tensors = storage.read_tensors(file)
    try:
        return GaussianGenerator(spec, **tensors)
    except (TypeError, ValueError):
        raise InputError(f"{file} holds the parameters of other classes or images: fit the generator again") from None
