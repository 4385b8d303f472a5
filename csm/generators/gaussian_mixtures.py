"""Class-conditional mixtures of Gaussians: images of several kinds in each class, with denoiser and posterior in closed form."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from csm import storage
from csm.errors import InputError
from csm.generators.gaussians import GaussianGenerator, GaussiansSpec
from csm.generators.importing import marking
from csm.noise import mix_seeds

_COMPONENT = 2  # the key of the draw of a component


@dataclass(frozen=True)
class MixturesSpec(GaussiansSpec):
    """Everything but the parameters (``generator.json``). ``components``: of each class, M."""

    components: int


class GaussianMixtureGenerator(nn.Module):
    """x0 | y is N(mean_ym, covariance_ym) with probability weight_ym: the exact ``denoise``, and the truth about its images.

    The condition is the weight of each class, float32 (N, K), as that of ``GaussianGenerator``, which this is for one component. Classes
    are mixed component by component: component m of a mixed condition has the weighted sums of means, covariances and weights of the
    classes' components m, so that which component of one class meets which of the other is up to their order. There is no closed form
    of the flow (``GaussianGenerator.flow``): the responsibilities change on the way.

    Attributes:
        parts: component m of every class, as a ``GaussianGenerator``, for each m.
        weights: float64 (K, M), rows of sum 1.
        priors: float64 (K,), of sum 1.
    """

    network: nn.Module | None = None
    spherical = False  # weights of classes lie on no sphere
    guides, guidance = False, 1.0
    weights: torch.Tensor

    def __init__(
        self,
        spec: MixturesSpec,
        means: torch.Tensor,
        covariances: torch.Tensor,
        weights: torch.Tensor,
        priors: torch.Tensor,
    ) -> None:
        """Take over ``means`` (K, M, D), ``covariances`` (K, M, D, D), ``weights`` (K, M) and ``priors`` (K,), see the class."""
        super().__init__()
        found = tuple(tuple(tensor.shape[:2]) for tensor in (means, covariances, weights))
        if set(found) != {(spec.n_classes, spec.components)}:
            raise ValueError(f"{spec.n_classes} classes of {spec.components} components expected, got parameters of {found}")
        self.spec = spec
        shape = GaussiansSpec(spec.shape, spec.n_classes)
        self.parts = nn.ModuleList(
            GaussianGenerator(shape, means[:, part], covariances[:, part], priors) for part in range(spec.components)
        )
        self.register_buffer("weights", weights.double())

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def priors(self) -> torch.Tensor:
        return self._parts[0].priors

    @property
    def n_classes(self) -> int:
        return self.spec.n_classes

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        return self._parts[0].noise_shape

    @property
    def sigma_range(self) -> tuple[float, float]:
        """That of ``GaussianGenerator``."""
        return self._parts[0].sigma_range

    @property
    def _parts(self) -> Sequence[GaussianGenerator]:
        return list(self.parts)  # type: ignore[arg-type]  # torch knows them as modules

    def embed(self, labels: torch.Tensor) -> torch.Tensor:
        """One-hot conditions float32 (N, K) of class labels int64 (N,)."""
        return self._parts[0].embed(labels)

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """E[clean | x], the components' conditional means weighted with their probabilities given x, float32 (N, C, H, W).

        Args:
            x: float32 (N, C, H, W), clean + sigma * noise.
            sigma: (N,), > 0.
            condition: (N, K).
        """
        joint = torch.stack([part.log_density(x, sigma, condition) for part in self._parts], dim=1)  # (N, M)
        shares = (joint + (condition.double() @ self.weights).log()).softmax(dim=1).float()
        means = torch.stack([part.denoise(x, sigma, condition) for part in self._parts], dim=1)  # (N, M, C, H, W)
        return torch.einsum("nm,nm...->n...", shares, means)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` itself: the model works on pixels."""
        return x

    def sample(self, labels: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """Exact draws float32 (N, C, H, W) of classes ``labels`` (N,), component and noise of row i from ``seeds[i]``.

        No pixel is clipped.
        """
        uniform = torch.from_numpy(mix_seeds(_COMPONENT, np.asarray(seeds)) / 2.0**63).to(self.device)
        ends = self.weights.cumsum(dim=1)[torch.tensor(labels, device=self.device)]  # (N, M)
        components = (uniform[:, None] >= ends[:, :-1]).sum(dim=1)
        images = torch.empty(len(components), *self.noise_shape, device=self.device)
        for number, part in enumerate(self._parts):
            rows = (components == number).nonzero().flatten()
            if len(rows):
                images[rows] = part.sample([labels[row] for row in rows.tolist()], [seeds[row] for row in rows.tolist()])
        return images

    def log_posterior(self, x: torch.Tensor) -> torch.Tensor:
        """log p(y | x) float64 (N, K) of images (N, C, H, W) without noise, by Bayes' rule."""
        likelihoods = torch.stack([part.log_likelihoods(x) for part in self._parts], dim=2)  # (N, K, M)
        joint = self.priors.log() + (self.weights.log() + likelihoods).logsumexp(dim=2)
        return joint - joint.logsumexp(dim=1, keepdim=True)

    def save(self, directory: Path) -> None:
        """Write ``model.safetensors`` and then ``generator.json``."""
        tensors = {
            "means": torch.stack([part.means for part in self._parts], dim=1),
            "covariances": torch.stack([part.covariances for part in self._parts], dim=1),
            "weights": self.weights,
            "priors": self.priors,
        }
        with marking(directory, {"kind": "gaussian-mixtures", **asdict(self.spec)}):
            storage.write_tensors(directory / "model.safetensors", tensors)


def load_gaussian_mixtures(directory: Path) -> GaussianMixtureGenerator:
    """Return the generator that ``GaussianMixtureGenerator.save`` wrote to ``directory``."""
    spec = storage.read_record(directory / "generator.json", MixturesSpec)
    file = directory / "model.safetensors"
    tensors = storage.read_tensors(file)
    try:
        return GaussianMixtureGenerator(spec, **tensors)
    except (TypeError, ValueError):
        raise InputError(f"{file} holds the parameters of other classes or images: make it again") from None
