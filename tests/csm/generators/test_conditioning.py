import numpy as np
import torch

from csm.generators.conditioning import mix_embeddings


def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(4, 5, generator=draw), torch.randn(4, 5, generator=draw)


def test_both_ends_are_the_classes_themselves() -> None:
    a, b = embeddings()
    assert torch.equal(mix_embeddings(a, b, torch.ones(4)), a)
    assert torch.equal(mix_embeddings(a, b, torch.zeros(4)), b)


def test_each_row_has_its_own_share_of_class_a() -> None:
    a, b = embeddings()
    lam = torch.tensor([0.0, 0.25, 0.5, 1.0])
    mixed = mix_embeddings(a, b, lam)
    for row, share in enumerate(lam.tolist()):
        expected = [share * x + (1 - share) * y for x, y in zip(a[row].tolist(), b[row].tolist(), strict=True)]
        assert np.allclose(mixed[row].numpy(), expected, atol=1e-6)


def test_a_mixture_is_symmetric_in_the_classes() -> None:
    a, b = embeddings()
    lam = torch.tensor([0.1, 0.3, 0.6, 0.9])
    assert torch.allclose(mix_embeddings(a, b, lam), mix_embeddings(b, a, 1 - lam), atol=1e-6)


def test_each_row_of_encoded_texts_has_its_own_share() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 2, 4, generator=draw), torch.randn(3, 2, 4, generator=draw)
    lam = torch.tensor([0.0, 0.25, 1.0])
    mixed = mix_embeddings(a, b, lam)
    for row, share in enumerate(lam.tolist()):
        assert torch.allclose(mixed[row], share * a[row] + (1 - share) * b[row], atol=1e-6)
