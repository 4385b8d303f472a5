"""Which trials of a sweep train on."""

from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from cluster.tuning_trials import Race


def build_scheduler(race: Race) -> TrialScheduler:
    """Tune's scheduler for ``race``."""
    if race.kind == "asha":
        return _Halving(
            time_attr="epoch",
            metric=race.metric,
            mode=race.mode,
            max_t=race.epochs,
            grace_period=min(race.grace, race.epochs),
            reduction_factor=race.reduction,
        )
    return FIFOScheduler()


class _Halving(AsyncHyperBandScheduler):
    """Asynchronous successive halving (Li et al. 2020, algorithm 2, in the variant that stops instead of promoting).

    What a trial repeats from an earlier time fills the rungs, but it was decided then.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if result.get("replayed") else decision
