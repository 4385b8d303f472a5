"""What one setting may be: a choice, with the settings that exist only beside it, or a range."""

import json
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # a configuration is checked without importing optuna, which only a sweep needs
    from optuna import Trial
    from optuna.distributions import BaseDistribution

    from csm.search.space import SearchSpace


@dataclass(frozen=True)
class Choice:
    """One of ``values``; ``branches`` are the spaces of the settings that exist only beside each of them."""

    values: tuple[Any, ...]
    branches: tuple["SearchSpace", ...]

    @property
    def size(self) -> int | None:
        """Number of configurations; None without end."""
        sizes = [branch.size for branch in self.branches]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def distribution(self) -> "BaseDistribution":
        """Of the index: optuna cannot tell 1 from True, and keeps no lists."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(range(len(self.values)))

    def suggest(self, trial: "Trial", name: str) -> Any:
        return self.values[trial.suggest_categorical(name, range(len(self.values)))]

    def encode(self, value: Any) -> int:
        """The index of ``value``."""
        texts = [identity(known) for known in self.values]
        if identity(value) not in texts:
            raise ValueError(f"expected one of {list(self.values)}, got {value!r}")
        return texts.index(identity(value))


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both of them included: whole ones if both are whole, every ``step``-th if that is given."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @property
    def size(self) -> int | None:
        """Number of values; None for real numbers."""
        if self.step is not None:
            return int((Decimal(str(self.high)) - Decimal(str(self.low))) / Decimal(str(self.step))) + 1
        return self.high - self.low + 1 if isinstance(self.low, int) and isinstance(self.high, int) else None

    @property
    def distribution(self) -> "BaseDistribution":
        """Of the value, or of its place among those that ``step`` leaves, for sums of steps in binary are not what was written."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.step is not None:
            assert self.size is not None
            return IntDistribution(0, self.size - 1)
        if self.size is None:
            return FloatDistribution(self.low, self.high, log=self.log)
        return IntDistribution(int(self.low), int(self.high), log=self.log)

    def suggest(self, trial: "Trial", name: str) -> int | float:
        if self.step is not None:
            assert self.size is not None
            return self.at(trial.suggest_int(name, 0, self.size - 1))
        if self.size is None:
            return trial.suggest_float(name, self.low, self.high, log=self.log)
        return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)

    def at(self, place: int) -> int | float:
        """The value at ``place``, from 0, of a range that can be counted."""
        value = Decimal(str(self.low)) + place * Decimal(str(self.step or 1))
        return int(value) if isinstance(self.low, int) and not isinstance(self.step, float) else float(value)

    def encode(self, value: Any) -> int | float:
        """What ``distribution`` is of, for ``value``."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            raise ValueError(f"expected a number from {self.low:g} to {self.high:g}, got {value!r}")
        if self.step is None:
            return value if self.size is None else int(value)
        return round(float((Decimal(str(value)) - Decimal(str(self.low))) / Decimal(str(self.step))))


Domain: TypeAlias = Choice | Range


def identity(value: Any) -> str:
    """A text that tells values apart as YAML does (1, 1.0 and true differ) and is the same after a trip through JSON.

    Raises:
        TypeError: JSON cannot hold the value.
    """
    return json.dumps(value)
