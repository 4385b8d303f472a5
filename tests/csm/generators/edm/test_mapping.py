import math

import pytest
import torch

from csm.generators.edm.mapping import DhariwalMapping, FourierEmbedding, PositionalEmbedding, SongMapping

NOISE = torch.tensor([0.0, 1.5, 700.0])


@pytest.mark.parametrize(("endpoint", "last"), [(True, 1e-4), (False, 1e-3)])
def test_positions_at_frequencies_from_1_to_the_last(endpoint: bool, last: float) -> None:
    waves = PositionalEmbedding(8, endpoint, sines_first=False)(NOISE)
    assert waves.shape == (3, 8)
    for row, noise in zip(waves.tolist(), NOISE.tolist(), strict=True):
        frequencies = [last ** (i / 3) for i in range(4)]
        expected = [math.cos(noise * f) for f in frequencies] + [math.sin(noise * f) for f in frequencies]
        assert row == pytest.approx(expected, abs=1e-4)


def test_sines_may_come_first() -> None:
    cosines, sines = PositionalEmbedding(8, True, sines_first=False)(NOISE).split(4, dim=1)
    assert torch.equal(PositionalEmbedding(8, True, sines_first=True)(NOISE), torch.cat([sines, cosines], dim=1))


def test_fourier_features_are_of_turns() -> None:
    embedding = FourierEmbedding(6)
    embedding.freqs = torch.tensor([0.25, 1.0, 2.0])
    assert torch.allclose(embedding(torch.tensor([1.0])), torch.tensor([[1.0, 0, 0, 0, 1, 1]]), atol=1e-5)


@pytest.mark.parametrize("kind", [SongMapping, DhariwalMapping])
def test_without_augmentation_is_with_zeros(kind: type[SongMapping] | type[DhariwalMapping]) -> None:
    mapping = kind(PositionalEmbedding(8, True, True), 8, 16, 4, augment_dim=3)
    classes, zeros = torch.eye(4)[:3], torch.zeros(3, 3)
    assert torch.equal(mapping(NOISE, classes), mapping(NOISE, classes, zeros))
    assert not torch.allclose(mapping(NOISE, classes), mapping(NOISE, classes, zeros + 1))
    assert mapping(NOISE, classes).shape == (3, 16)


def test_a_class_enters_as_a_row_of_a_table() -> None:
    mapping = DhariwalMapping(PositionalEmbedding(8, True, True), 8, 16, 4, 0)
    hidden = mapping.map_layer1(torch.nn.functional.silu(mapping.map_layer0(mapping.map_noise(NOISE))))
    mixture = 0.3 * mapping.map_label.weight[:, 1] + 0.7 * mapping.map_label.weight[:, 2]
    expected = torch.nn.functional.silu(hidden + mixture)
    assert torch.allclose(mapping(NOISE, torch.tensor([[0, 0.3, 0.7, 0]]).expand(3, 4)), expected, atol=1e-6)
