"""Which trials of a sweep train on."""

import math
import random
from collections import defaultdict
from typing import Any, NamedTuple

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from cluster.tuning_population import SHARE, Donor, perturb, snapshot_path
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
    return _Population(race) if race.kind == "pbt" else FIFOScheduler()


class _Halving(AsyncHyperBandScheduler):
    """Asynchronous successive halving (Li et al. 2020, algorithm 2, in the variant that stops instead of promoting).

    What a trial repeats from an earlier time fills the rungs, but it was decided then.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if result.get("replayed") else decision


class _Member(NamedTuple):
    """A trial as it was at some epoch; ``score``: higher is better."""

    score: float
    number: int
    directory: str
    values: dict[str, Any]


class _Population(FIFOScheduler):
    """Population-based training (Jaderberg et al. 2017, algorithm 1, truncation selection), asynchronous.

    A trial is compared with all that ever came to the same epoch, so that a population may be larger than the number of trials at once.
    Tune's own scheduler wants checkpoints of its own and no searcher.
    """

    def __init__(self, race: Race) -> None:
        super().__init__()
        self._metric, self.sign = race.metric, 1 if race.mode == "max" else -1
        self.members: dict[int, dict[int, _Member]] = defaultdict(dict)  # epoch -> number -> member

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "standing" not in result:
            return TrialScheduler.CONTINUE
        number, epoch, standing = trial.config["number"], result["epoch"], result["standing"]
        peers = self.members[epoch]
        if result["replayed"] and number in peers:
            return TrialScheduler.CONTINUE  # it took over a state and tells again how it came there
        peers[number] = _Member(self.sign * result[self._metric], number, standing.directory, standing.values)
        ranked = sorted(peers.values(), reverse=True)
        share = min(math.ceil(SHARE * len(ranked)), len(ranked) // 2)
        for member in ranked[share + 1 :]:
            snapshot_path(member.directory, epoch).unlink(missing_ok=True)
        donors = [member for member in ranked[:share] if snapshot_path(member.directory, epoch).is_file()]
        if result["replayed"] or peers[number] not in ranked[len(ranked) - share :] or not donors:
            return TrialScheduler.CONTINUE
        draw = random.Random(f"{number} {epoch}")
        donor = draw.choice(donors)
        after = Donor(donor.number, donor.directory, epoch, perturb(donor.values, draw), donor.values, standing.history)
        trial.set_config({**trial.config, "donor": after})
        tune_controller.pause_trial(trial, should_checkpoint=False)
        return TrialScheduler.NOOP
