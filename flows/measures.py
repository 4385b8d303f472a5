"""Metrics of one model in words and figures, for the terminal and the pages of `csm check` and `csm calibrate`."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from csm.assessment import Assessment, Estimate


class Measure(NamedTuple):
    """How a metric is shown: its name, the factor and unit of its value, which way is better ("": neither), and what it is."""

    label: str
    factor: float
    unit: str
    better: str
    about: str

    def text(self, value: float) -> str:
        if self.factor * value >= 1e6:
            return f"{self.factor * value:.3g}"
        return f"{self.factor * value:.{3 if self.factor == 1 else 2 if self.factor * value < 1 else 1}f}"

    def interval(self, estimate: Estimate, dash: str = "–") -> str:
        """Its ends; "" where there are none."""
        if estimate.low is None or estimate.high is None:
            return ""
        return f"{self.text(max(0.0, estimate.low))}{dash}{self.text(max(0.0, estimate.high))}"


_PERCENT = (100.0, "%")
MEASURES: dict[str, Measure] = {
    "accuracy": Measure("Accuracy", *_PERCENT, "higher", "share of images whose most probable class is right"),
    "ece": Measure("ECE", *_PERCENT, "lower", "mean gap between confidence and accuracy, bins of equal width; biased upwards"),
    "smooth_ece": Measure("Smooth ECE", *_PERCENT, "lower", "the same with a kernel in place of bins"),
    "l2_ce_debiased": Measure("Debiased L2", *_PERCENT, "lower", "root mean square gap, less what chance adds"),
    "aece": Measure("Adaptive ECE", *_PERCENT, "lower", "as ECE, bins of equally many images"),
    "classwise_ece": Measure("Class-wise ECE", *_PERCENT, "lower", "ECE of each class's probability, mean over classes"),
    "mce": Measure("MCE", *_PERCENT, "lower", "largest gap of a bin, however few images it holds"),
    "ks": Measure("KS", *_PERCENT, "lower", "largest gap of the cumulated confidence and accuracy"),
    "oe": Measure("Overconfidence", *_PERCENT, "lower", "part of the gap where confidence is too high, weighted by it"),
    "ue": Measure("Underconfidence", *_PERCENT, "lower", "part of the gap where confidence is too low, weighted by it"),
    "nll": Measure("NLL", 1.0, "nats", "lower", "mean negative log-probability of the right class"),
    "brier": Measure("Brier score", 1.0, "", "lower", "mean squared distance of the probabilities to the right class"),
    "brier_reliability": Measure("Brier: reliability", 1.0, "", "lower", "its part that miscalibration makes"),
    "brier_resolution": Measure("Brier: resolution", 1.0, "", "higher", "how far probabilities tell images apart"),
    "brier_uncertainty": Measure(
        "Brier: uncertainty", 1.0, "", "", "what the classes' frequencies make; the data's, not the model's"
    ),
    "aurc": Measure("AURC", 1.0, "", "lower", "mean error when only the most confident images are answered"),
}


def best_of(metric: str, estimates: Mapping[str, Estimate]) -> set[str]:
    """The names of best ``metric`` as it is shown; none if neither way is better, or all are alike."""
    measure = MEASURES[metric]
    shown = {name: float(measure.text(estimate.value)) for name, estimate in estimates.items()}
    if not measure.better or len(set(shown.values())) < 2:
        return set()
    best = min(shown.values()) if measure.better == "lower" else max(shown.values())
    return {name for name, value in shown.items() if value == best}


def percent(value: float) -> str:
    """``3.1``; two digits below 1."""
    return MEASURES["ece"].text(value)


def chance_sentence(assessment: Assessment) -> str:
    """What chance alone makes of the ECE."""
    chance = assessment.chance
    return (
        f"A perfectly calibrated model with these confidences would show an ECE of {percent(chance.value)} % on {assessment.images:,} "
        f"images by chance alone (95 % of such: {MEASURES['ece'].interval(chance)} %)."
    )


def plain(assessment: Assessment) -> dict[str, Any]:
    """For JSON."""
    return asdict(assessment)
