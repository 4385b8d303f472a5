"""How much each setting of a search mattered."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from csm.search.space import SearchSpace, Setting
from csm.search.study import quiet

METHOD = "fANOVA"
FEWEST = 10  # trials; a forest of fewer explains what happened to come out
TREES = 16  # shares are those of 64 to about 0.01, and a long sweep's come in seconds


class Importance(NamedTuple):
    """Of one setting.

    Attributes:
        key: dotted key.
        beside: the choices that it exists beside, as "key=value"; empty for one that every trial had.
        share: of the objective's variance over the space, in [0, 1], that this setting explains by itself: what is missing from 1
            is due to several at once, or left to chance.
        trials: number of trials that had it.
    """

    key: str
    beside: str
    share: float
    trials: int


def importance(space: SearchSpace, trials: Sequence[tuple[Mapping[str, Any], float]], seed: int = 0) -> list[Importance]:
    """Main effects by fANOVA (Hutter, Hoos and Leyton-Brown 2014: variance of a random forest's marginal predictions), largest first.

    A setting that exists beside a choice is compared within the trials that made this choice, with all that they have in common.

    Args:
        space: what was searched.
        trials: assignment and objective of each; those whose objective is not finite are left out.
        seed: of the forest.

    Returns:
        Settings with at least two values that were tried in at least ``FEWEST`` trials; none if the objective was the same in all of them.
    """
    measured = [(space.settings(assignment), value) for assignment, value in trials if math.isfinite(value)]
    groups: dict[str, list[int]] = defaultdict(list)  # choices -> numbers of the trials that made them
    for number, (settings, _) in enumerate(measured):
        for before in dict.fromkeys(setting.before for setting in settings):
            groups[before].append(number)
    found = []
    for before, numbers in groups.items():
        if len(numbers) < FEWEST:
            continue
        shares = _shares([measured[number] for number in numbers], seed)
        for setting in measured[numbers[0]][0]:
            if setting.before == before and setting.name in shares:
                beside = before.rstrip().replace('"', "")
                found.append(Importance(setting.key, beside, shares[setting.name], len(numbers)))
    return sorted(found, key=lambda item: -item.share)


def _shares(trials: Sequence[tuple[Sequence[Setting], float]], seed: int) -> dict[str, float]:
    """Of the settings that all of ``trials`` have and that are not the same in all of them: name -> share of the variance."""
    import optuna
    from optuna.importance import FanovaImportanceEvaluator
    from optuna.trial import create_trial

    encoded = [{setting.name: setting.domain.encode(setting.value) for setting in settings} for settings, _ in trials]
    common = [name for name in encoded[0] if all(name in other for other in encoded)]
    varied = [name for name in common if len({other[name] for other in encoded}) > 1]
    distributions = {setting.name: setting.domain.distribution for setting in trials[0][0] if setting.name in varied}
    with quiet():
        study = optuna.create_study()
        for values, (_, objective) in zip(encoded, trials, strict=True):
            params = {name: values[name] for name in distributions}
            study.add_trial(create_trial(value=objective, params=params, distributions=distributions))
        try:
            shares = FanovaImportanceEvaluator(n_trees=TREES, seed=seed).evaluate(study, params=list(distributions))
        except RuntimeError:  # the forest found the same objective everywhere
            return {}
    return {name: float(share) for name, share in shares.items()}
