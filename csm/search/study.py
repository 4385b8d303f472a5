"""Which configuration to try next, from those that were tried."""

import itertools
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from csm import storage
from csm.errors import InputError
from csm.metrics import METRICS
from csm.search.space import SearchSpace

if TYPE_CHECKING:
    import optuna

SEARCHES = ("random", "grid", "tpe")
LARGEST_GRID = 1_000_000  # configurations; their order is drawn as a whole
ATTEMPTS = 100  # of a sampler at a configuration that was not tried yet


class Finished(NamedTuple):
    """A trial that ended: ``values`` of the objectives, or None if it failed or was stopped."""

    number: int
    assignment: Mapping[str, Any]
    values: Sequence[float] | None


class Study:
    """A sweep's memory of what was tried, which says what to try next.

    What is asked depends on the seed, the number of the trial and what was recorded until then, not on what else this process drew: a
    process that replays the finished trials goes on as the one before would have. No configuration is asked twice.

    Args:
        space: what may be tried.
        search: one of ``SEARCHES``: at random; every configuration once, in random order; or, after ten random ones, where good trials
            are denser than others (TPE, Bergstra et al. 2011, for several objectives Ozaki et al. 2022), away from those that run now
            or failed.
        objectives: names in ``csm.metrics.METRICS``.
        seed: of what is drawn, >= 0.
        finished: earlier trials.

    Raises:
        InputError: a grid without end or of more than ``LARGEST_GRID`` configurations, or a finished trial of another space.
    """

    def __init__(
        self,
        space: SearchSpace,
        search: str,
        objectives: Sequence[str],
        seed: int,
        finished: Iterable[Finished | tuple[int, Mapping[str, Any], Sequence[float] | None]] = (),
    ) -> None:
        check_search(space, search)
        self._space, self._search, self._objectives, self._seed = space, search, tuple(objectives), seed
        self._trials: dict[int, Mapping[str, Any]] = {}
        self._values: dict[int, Sequence[float] | None] = {}  # of those that ended
        for number, assignment, values in finished:
            self.resume(number, assignment)
            self.tell(number, values)

    def ask(self) -> tuple[int, dict[str, Any]] | None:
        """The lowest free number and the configuration to try under it; None if every configuration was asked."""
        number = next(number for number in range(len(self._trials) + 1) if number not in self._trials)
        if self._space.size is not None and len(self._trials) >= self._space.size:
            return None
        assignment = self._space.at(int(self._order[number])) if self._search == "grid" else self._sample(number)
        self._trials[number] = assignment
        return number, dict(assignment)

    def tell(self, number: int, values: Sequence[float] | None) -> None:
        """Record how trial ``number`` ended: its objectives in their order, or None if it failed or was stopped."""
        if number not in self._trials:
            raise ValueError(f"number: expected a trial that was asked or resumed, got {number}")
        if values is not None and len(values) != len(self._objectives):
            raise ValueError(f"values: expected one for each of {', '.join(self._objectives)}, got {len(values)}")
        self._values[number] = values if values is not None and all(math.isfinite(value) for value in values) else None

    def resume(self, number: int, assignment: Mapping[str, Any]) -> None:
        """Record that trial ``number`` is being tried, with what an earlier process asked."""
        self._space.settings(assignment)
        self._trials[number] = dict(assignment)

    @cached_property
    def _order(self) -> npt.NDArray[np.int64]:
        """The grid's indices as they are asked."""
        assert self._space.size is not None
        return np.random.default_rng(self._seed).permutation(self._space.size)

    def _sample(self, number: int) -> dict[str, Any]:
        """A configuration that was not tried: the sampler's, or, if it keeps to what it knows, any other one."""
        import optuna

        tried = {storage.digest(assignment) for assignment in self._trials.values()}
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        with quiet():
            at_random = optuna.samplers.RandomSampler(seed=seed)
            study = self._history(seed) if self._search == "tpe" else optuna.create_study(sampler=at_random)
            for attempt in itertools.count():
                trial = study.ask()
                assignment = self._space.sample(trial)
                if storage.digest(assignment) not in tried:
                    break
                study.tell(trial, state=optuna.trial.TrialState.FAIL)  # which a sampler ignores
                if attempt == ATTEMPTS:
                    study.sampler = at_random
        return assignment

    def _history(self, seed: int) -> "optuna.Study":
        """The trials so far as optuna's TPE sampler sees them; it draws from ``seed``."""
        import optuna
        from optuna.study import StudyDirection
        from optuna.trial import TrialState, create_trial

        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        higher = [METRICS[name].higher_is_better for name in self._objectives]
        directions = [StudyDirection.MAXIMIZE if better else StudyDirection.MINIMIZE for better in higher]
        study = optuna.create_study(sampler=sampler, directions=directions)
        for number, assignment in sorted(self._trials.items()):
            values = self._values.get(number)
            # One that failed counts as worse than any: where trainings diverge, more of them are no use.
            ended = TrialState.PRUNED if values is None else TrialState.COMPLETE
            settings = self._space.settings(assignment)
            study.add_trial(
                create_trial(
                    state=ended if number in self._values else TrialState.RUNNING,
                    values=values,
                    params={setting.name: setting.domain.encode(setting.value) for setting in settings},
                    distributions={setting.name: setting.domain.distribution for setting in settings},
                )
            )
        return study


def check_search(space: SearchSpace, search: str, where: str = "tune.search") -> None:
    """``InputError`` unless ``search`` can go through ``space``; the message starts with ``where``."""
    if search not in SEARCHES:
        raise InputError(f"{where}: unknown {search!r}; one of {', '.join(SEARCHES)}")
    if search == "grid" and space.size is None:
        raise InputError(f"{where}: a grid has no end along {', '.join(space.endless())}; give a step or choices, or take tpe")
    if search == "grid" and space.size is not None and space.size > LARGEST_GRID:
        raise InputError(f"{where}: a grid of {space.size:,} configurations is more than {LARGEST_GRID:,}; take random or tpe")


@contextmanager
def quiet() -> Iterator[None]:
    """Without optuna's log lines on every study and trial, and its warnings about experimental options."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)
