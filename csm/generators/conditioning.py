"""The mixture of two classes: operators that make one denoiser of a generator and two classes."""

from collections.abc import Callable

import torch

from csm.errors import InputError
from csm.generators import Generator
from csm.sampling import Denoiser

Operator = Callable[[Generator, torch.Tensor, torch.Tensor, torch.Tensor], Denoiser]


def embedding(generator: Generator, labels_a: torch.Tensor, labels_b: torch.Tensor, lam: torch.Tensor) -> Denoiser:
    """Under the linear mixture of the two conditions (Luo et al. 2025, semantic mixing in the embedding space)."""
    return denoiser(generator, mix_embeddings(generator.embed(labels_a), generator.embed(labels_b), lam))


def slerp(generator: Generator, labels_a: torch.Tensor, labels_b: torch.Tensor, lam: torch.Tensor) -> Denoiser:
    """Under the spherical mixture of the two conditions, see ``slerp_embeddings``.

    Raises:
        InputError: the generator's condition is no vector of an embedding space: the weights of classes lie on no sphere, and their
            spherical mixture would not add up to one.
    """
    check_spherical(generator)
    return denoiser(generator, slerp_embeddings(generator.embed(labels_a), generator.embed(labels_b), lam))


def check_spherical(generator: Generator) -> None:
    """``InputError`` as for ``slerp``."""
    if not generator.spherical:
        raise InputError(
            "mix.operator: slerp needs a generator whose condition is an embedding, and this one's is a weight for each class: "
            "set it to embedding or score"
        )


def score(generator: Generator, labels_a: torch.Tensor, labels_b: torch.Tensor, lam: torch.Tensor) -> Denoiser:
    """lam * D(x | a) + (1 - lam) * D(x | b), which mixes the scores (D - x) / sigma^2 (composition of Liu et al. 2022, weights of sum 1).

    For any generator, whatever its condition. Rows with lam 0 or 1 go through the network once, all others twice.
    """
    parts = [
        (generator.embed(labels), share, share.nonzero().flatten()) for labels, share in ((labels_a, lam), (labels_b, 1 - lam))
    ]

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        mixed = torch.zeros_like(x)
        for condition, share, rows in parts:
            if len(rows):
                weight = share[rows].view(-1, *[1] * (x.ndim - 1))
                mixed[rows] += weight * generator.denoise(x[rows], sigma[rows], condition[rows])
        return mixed

    return denoise


def denoiser(generator: Generator, condition: torch.Tensor) -> Denoiser:
    """The generator's denoiser of N rows under ``condition`` (N, ...)."""
    return lambda x, sigma: generator.denoise(x, sigma, condition)


def mix_embeddings(embedding_a: torch.Tensor, embedding_b: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """lam * c_a + (1 - lam) * c_b (Luo et al. 2025, semantic mixing in the embedding space).

    Args:
        embedding_a, embedding_b: conditions (N, ...) of the two classes, for instance vectors (N, E) or encoded texts (N, T, D).
        lam: share of class a (N,), in [0, 1].
    """
    share = lam.view(-1, *[1] * (embedding_a.ndim - 1))
    return share * embedding_a + (1 - share) * embedding_b


def slerp_embeddings(embedding_a: torch.Tensor, embedding_b: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """Along the arc from c_b to c_a (Shoemake 1985), with a norm that changes linearly. Arguments as for ``mix_embeddings``.

    Each row is one vector of all its numbers. Where the two are parallel, opposite or zero, which leaves the arc open or undefined, the
    mixture is linear. lam 0 and 1 give c_b and c_a themselves.
    """
    a, b = embedding_a.flatten(1).double(), embedding_b.flatten(1).double()
    share = lam.double()[:, None]
    norm_a, norm_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    unit_a, unit_b = a / norm_a, b / norm_b
    # The arc cosine of the inner product would lose half of the digits of small and of flat angles.
    angle = 2 * torch.atan2((unit_a - unit_b).norm(dim=1, keepdim=True), (unit_a + unit_b).norm(dim=1, keepdim=True))
    direction = ((share * angle).sin() * unit_a + ((1 - share) * angle).sin() * unit_b) / angle.sin()
    spherical = (share * norm_a + (1 - share) * norm_b) * direction
    is_arc = (angle.sin() > FLAT) & (share > 0) & (share < 1)  # False where the angle is no number
    mixed = torch.where(is_arc, spherical, share * a + (1 - share) * b)
    return mixed.to(embedding_a.dtype).view_as(embedding_a)


def evaluations(operator: str, lam: torch.Tensor) -> torch.Tensor:
    """How often each row (N,) goes through the network in one call of the operator's denoiser, int64 (N,)."""
    twice = (lam > 0) & (lam < 1) if operator == "score" else torch.zeros_like(lam, dtype=torch.bool)
    return 1 + twice.long()


FLAT = 1e-6  # sine of an angle at which two vectors count as parallel or opposite
OPERATORS: dict[str, Operator] = {"embedding": embedding, "slerp": slerp, "score": score}
