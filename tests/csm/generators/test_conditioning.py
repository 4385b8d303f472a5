import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from csm.errors import InputError
from csm.generators.conditioning import (
    OPERATORS,
    evaluations,
    mix_embeddings,
    slerp_embeddings,
)

LAM = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])


@dataclass
class Linear:
    """D(x; sigma, c) = x / (1 + sigma^2) + W c, one number for each pixel: in it, score and embedding mixing are the same.

    ``squared`` puts |c|^2 in place of c, and then they are not. It counts the rows that it is given.
    """

    table: torch.Tensor = field(default_factory=lambda: torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))
    squared: bool = False
    spherical: bool = True
    rows: list[int] = field(default_factory=list)

    device = torch.device("cpu")
    noise_shape = (1, 2, 2)
    sigma_range = (0.002, 80.0)
    n_classes = 3

    def embed(self, labels: torch.Tensor) -> torch.Tensor:
        return self.table[labels]

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        assert len(x) == len(sigma) == len(condition)
        self.rows.append(len(x))
        pulled = condition.square() if self.squared else condition
        return x / (1 + sigma.view(-1, 1, 1, 1) ** 2) + pulled.view(-1, *self.noise_shape)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return x


def noisy(rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(rows, 1, 2, 2, generator=draw), torch.rand(rows, generator=draw) + 0.1


def denoised(name: str, generator: Linear, lam: torch.Tensor = LAM) -> torch.Tensor:
    a, b = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([1, 2, 0, 2, 0])
    return OPERATORS[name](generator, a, b, lam)(*noisy())


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


def arcs() -> tuple[np.ndarray, np.ndarray]:
    """Vectors of different norms, at angles from nearly parallel to nearly opposite."""
    draw = np.random.default_rng(0)
    angles = np.array([1e-3, 0.1, 1.0, np.pi / 2, 2.5, np.pi - 1e-3])
    axes = np.linalg.qr(draw.normal(size=(6, 6)))[0]
    a = np.repeat(axes[:, :1].T, 6, axis=0) * draw.uniform(0.5, 3, (6, 1))
    b = (np.cos(angles)[:, None] * axes[:, 0] + np.sin(angles)[:, None] * axes[:, 1]) * draw.uniform(0.5, 3, (6, 1))
    return a, b


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.8])
def test_slerp_turns_by_its_share_of_the_angle_with_the_norm_in_proportion(lam: float) -> None:
    a, b = arcs()
    mixed = slerp_embeddings(torch.from_numpy(a), torch.from_numpy(b), torch.full((6,), lam)).numpy()
    lengths = [np.linalg.norm(vectors, axis=1) for vectors in (a, b, mixed)]
    share = float(torch.tensor(lam))  # as a float32 says it
    assert lengths[2] == pytest.approx(share * lengths[0] + (1 - share) * lengths[1], rel=1e-9)

    def angle(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        # scipy has rotations of three dimensions only; in any plane the angle is that of the two triangles' sides
        one, other = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (one, other))
        return 2 * np.arcsin(np.clip(np.linalg.norm(one - other, axis=1) / 2, 0, 1))

    assert angle(mixed, b) == pytest.approx(share * angle(a, b), rel=1e-5)
    assert angle(mixed, a) == pytest.approx((1 - share) * angle(a, b), rel=1e-5)
    plane = np.stack([a, b], axis=2)
    for basis, vector in zip(plane, mixed, strict=True):  # it stays in the plane of the two
        assert np.linalg.lstsq(basis, vector, rcond=None)[1] == pytest.approx(0, abs=1e-12)


def test_slerp_of_unit_vectors_is_that_of_rotations() -> None:
    from scipy.spatial.transform import Rotation, Slerp

    one, other = Rotation.random(2, rng=np.random.default_rng(3))
    quaternions = [rotation.as_quat() for rotation in (one, other)]
    if np.dot(*quaternions) < 0:  # scipy takes the short way round between q and -q, which are one rotation
        quaternions[1] = -quaternions[1]
    lam = torch.tensor([0.2, 0.5, 0.7])
    a, b = (torch.from_numpy(quaternion).expand(3, 4) for quaternion in quaternions)
    expected = Slerp([0, 1], Rotation.concatenate([other, one]))(lam.double().numpy()).as_quat()
    mixed = slerp_embeddings(a, b, lam).numpy()
    assert np.abs((mixed * expected).sum(axis=1)) == pytest.approx(np.ones(3), abs=1e-9)  # the same up to sign


def test_slerp_gives_the_conditions_themselves_at_both_ends() -> None:
    a, b = embeddings()
    assert torch.equal(slerp_embeddings(a, b, torch.ones(4)), a)
    assert torch.equal(slerp_embeddings(a, b, torch.zeros(4)), b)


def test_slerp_is_symmetric_in_the_classes_and_each_row_has_its_own_share() -> None:
    a, b = embeddings()
    lam = torch.tensor([0.125, 0.25, 0.5, 0.75])
    mixed = slerp_embeddings(a, b, lam)
    assert torch.allclose(mixed, slerp_embeddings(b, a, 1 - lam), atol=1e-6)
    for row in range(4):
        alone = slerp_embeddings(a[row : row + 1], b[row : row + 1], lam[row : row + 1])
        assert torch.equal(mixed[row : row + 1], alone)


def test_slerp_takes_an_encoded_text_as_one_vector() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 2, 4, generator=draw), torch.randn(3, 2, 4, generator=draw)
    lam = torch.tensor([0.2, 0.5, 0.8])
    mixed = slerp_embeddings(a, b, lam)
    assert mixed.shape == (3, 2, 4)
    assert torch.equal(mixed.flatten(1), slerp_embeddings(a.flatten(1), b.flatten(1), lam))


@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0, -0.5, 0.0], ids=["same", "parallel", "opposite", "opposite shorter", "zero"])
def test_slerp_is_linear_where_there_is_no_arc(factor: float) -> None:
    a, _ = embeddings()
    lam = torch.tensor([0.0, 0.3, 0.5, 1.0])
    assert torch.allclose(slerp_embeddings(a, factor * a, lam), mix_embeddings(a, factor * a, lam), atol=1e-6)
    assert torch.allclose(slerp_embeddings(factor * a, a, lam), mix_embeddings(factor * a, a, lam), atol=1e-6)


def test_slerp_is_not_linear_where_there_is_one() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    half = torch.tensor([0.5])
    assert slerp_embeddings(a, b, half)[0].tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    assert mix_embeddings(a, b, half)[0].tolist() == [0.5, 0.5]


def test_slerp_keeps_the_dtype() -> None:
    a, b = embeddings()
    assert slerp_embeddings(a, b, torch.full((4,), 0.3)).dtype == torch.float32


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_an_endpoint_is_denoised_under_its_class_alone(name: str, lam: float) -> None:
    generator = Linear(squared=True)
    labels = torch.tensor([0, 1, 2, 0, 1]) if lam else torch.tensor([1, 2, 0, 2, 0])
    alone = generator.denoise(*noisy(), generator.embed(labels))
    assert torch.equal(denoised(name, generator, torch.full((5,), lam)), alone)


@pytest.mark.parametrize("name", OPERATORS)
def test_rows_do_not_touch_each_other(name: str) -> None:
    a, b = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([1, 2, 0, 2, 0])
    generator, (x, sigma) = Linear(squared=True), noisy()
    together = OPERATORS[name](generator, a, b, LAM)(x, sigma)
    for row in range(5):
        one = slice(row, row + 1)
        alone = OPERATORS[name](generator, a[one], b[one], LAM[one])(x[one], sigma[one])
        assert torch.allclose(together[one], alone, atol=1e-6)


def test_score_is_the_mixture_of_the_two_denoisers() -> None:
    generator, (x, sigma) = Linear(squared=True), noisy()
    mixed = denoised("score", generator)
    for row, (a, b) in enumerate([(0, 1), (1, 2), (2, 0), (0, 2), (1, 0)]):
        share, level = LAM[row].item(), sigma[row].item()
        pulls = [
            share * s**2 + (1 - share) * t**2
            for s, t in zip(generator.table[a].tolist(), generator.table[b].tolist(), strict=True)
        ]
        expected = [value / (1 + level**2) + pull for value, pull in zip(x[row].flatten().tolist(), pulls, strict=True)]
        assert mixed[row].flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_score_and_embedding_agree_where_the_denoiser_is_linear_in_the_condition_and_only_there() -> None:
    assert torch.allclose(denoised("score", Linear()), denoised("embedding", Linear()), atol=1e-6)
    assert not torch.allclose(denoised("score", Linear(squared=True)), denoised("embedding", Linear(squared=True)), atol=1e-2)


def test_score_pays_twice_for_mixtures_and_once_for_endpoints() -> None:
    generator = Linear()
    denoised("score", generator)
    assert sum(generator.rows) == 8 == evaluations("score", LAM).sum()
    assert evaluations("score", LAM).tolist() == [1, 2, 2, 2, 1]
    for name in ("embedding", "slerp"):
        generator.rows.clear()
        denoised(name, generator)
        assert sum(generator.rows) == 5 == evaluations(name, LAM).sum()


@pytest.mark.parametrize(("lam", "calls"), [(0.0, 1), (1.0, 1), (0.5, 2)])
def test_score_asks_for_no_empty_batch(lam: float, calls: int) -> None:
    generator = Linear()
    denoised("score", generator, torch.full((5,), lam))
    assert generator.rows == [5] * calls


def test_slerp_of_weights_is_refused_and_the_others_are_not() -> None:
    weights = Linear(table=torch.eye(4)[:3], spherical=False)
    with pytest.raises(InputError, match=r"mix.operator: slerp needs a generator whose condition is an embedding") as caught:
        denoised("slerp", weights)
    assert "\n" not in str(caught.value)
    for name in ("embedding", "score"):
        assert denoised(name, weights).isfinite().all()
