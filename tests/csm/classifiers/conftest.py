from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def seeded() -> Callable[..., Any]:
    """``seeded(function, ...)`` is its result with torch's global generator at 0; the generator is left as it was."""

    def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return function(*arguments, **options)

    return call


@pytest.fixture(scope="session")
def count() -> Callable[..., int]:
    """``count(network, ...)`` is its number of parameters; none is made."""

    def number(network: Callable[..., nn.Module], *arguments: Any, **options: Any) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in network(*arguments, **options).parameters())

    return number
