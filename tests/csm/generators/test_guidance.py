import pytest
import torch

from csm.generators.guidance import guided


class Network:
    """Adds up its arguments in a way that tells them apart, and counts the rows that it saw."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, z: torch.Tensor, steps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(z))
        return z.sin() + steps.view(-1, 1, 1, 1) * condition.flatten(1).sum(1).view(-1, 1, 1, 1)


@pytest.mark.parametrize("shape", [(5,), (2, 4)], ids=["vector", "text"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
def test_it_goes_away_from_the_prediction_without_a_class(shape: tuple[int, ...], scale: float) -> None:
    draw = torch.Generator().manual_seed(0)
    z, steps = torch.randn(3, 2, 4, 4, generator=draw), torch.tensor([1.0, 2.5, 7.0])
    condition, none = torch.randn(3, *shape, generator=draw), torch.randn(1, *shape, generator=draw)
    network = Network()
    prediction = guided(network, z, steps, condition, none, scale)
    assert network.rows == [6]
    for row in range(3):
        one = slice(row, row + 1)
        with_class, without = network(z[one], steps[one], condition[one]), network(z[one], steps[one], none)
        assert torch.allclose(prediction[one], (1 - scale) * without + scale * with_class, atol=1e-4)


def test_a_scale_of_one_costs_one_evaluation() -> None:
    network = Network()
    z, steps, condition = torch.ones(3, 1, 2, 2), torch.ones(3), torch.ones(3, 5)
    prediction = guided(network, z, steps, condition, torch.zeros(1, 5), 1.0)
    assert network.rows == [3]
    assert torch.equal(prediction, network(z, steps, condition))
