"""The mixture of two classes, as the condition of a generator."""

import torch


def mix_embeddings(embedding_a: torch.Tensor, embedding_b: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """lam * c_a + (1 - lam) * c_b (Luo et al. 2025, semantic mixing in the embedding space).

    Args:
        embedding_a, embedding_b: conditions (N, ...) of the two classes, for instance vectors (N, E) or encoded texts (N, T, D).
        lam: share of class a (N,), in [0, 1].
    """
    share = lam.view(-1, *[1] * (embedding_a.ndim - 1))
    return share * embedding_a + (1 - share) * embedding_b
