"""Metrics and comparisons of three methods, as `csm evaluate` writes them."""

import polars as pl

from csm.tables import COMPARISON, METRICS, SHIFT_METRICS
from flows.summary import NONE, TEMPERATURE, Method

METHODS = [
    Method("ce", "cross-entropy", is_baseline=True),
    Method("focal", "focal loss"),
    Method("csm", "semantic mixtures", is_ours=True),
]
# method -> one value per seed, before and after temperature
NLL = {"ce": ([1.0, 1.2, 1.4], [0.9, 0.9, 0.9]), "focal": ([1.3] * 3, [1.1] * 3), "csm": ([0.8] * 3, [0.7] * 3)}
ECE = {"ce": ([0.15] * 3, [0.05] * 3), "focal": ([0.03] * 3, [0.06] * 3), "csm": ([0.04] * 3, [0.055] * 3)}


def metrics(nll=NLL, ece=ECE, split="test", bins=15, accuracy=0.7):
    rows = []
    for method in nll:
        for index, posthoc in enumerate((NONE, TEMPERATURE)):
            for seed in range(len(nll[method][index])):
                values = {
                    "accuracy": accuracy,
                    "ece": ece[method][index][seed],
                    "aece": ece[method][index][seed],
                    "nll": nll[method][index][seed],
                    "brier": nll[method][index][seed] / 2,
                }
                temperature = 1.5 + seed / 2 if index else 1.0
                for metric, value in values.items():
                    n_bins = bins if metric in ("ece", "aece") else None
                    run = f"{method}-{seed}"
                    rows.append((run, method, seed, split, posthoc, temperature, metric, n_bins, value))
    return pl.DataFrame(rows, schema=dict(METRICS), orient="row")


def comparison(p_holm, difference=-0.1, posthocs=(NONE, TEMPERATURE), methods=METHODS):
    """The `comparison` table: method -> p, the same for every metric; intervals reach 0.01 below and 0.03 above the mean 0.5."""
    rows = []
    for posthoc in posthocs:
        for method in methods:
            for metric in ("accuracy", "ece", "nll", "brier"):
                p = p_holm.get(method.name)
                against = (None,) * 5 if method.is_baseline else (difference, difference - 0.02, difference + 0.02, p, p)
                rows.append((method.name, posthoc, metric, 0.5, 0.49, 0.53, *against))
    return pl.DataFrame(rows, schema=dict(COMPARISON), orient="row")


def shift_metrics():
    """A corruption set and one out of distribution: accuracy falls with severity, and csm is best."""
    rows = []
    for order, name in enumerate(("focal", "ce", "csm")):
        for seed in (0, 1):
            for posthoc in (NONE, TEMPERATURE):
                common = (f"{name}-{seed}", name, seed)
                for corruption, harder in (("blur", 0.0), ("noise", 0.2)):
                    for severity in (1, 5):
                        good = 0.9 - 0.1 * severity - harder + 0.01 * order + 0.02 * seed
                        for metric, value in (("accuracy", good), ("ece", 1 - good), ("nll", 2 - good), ("brier", 1.5 - good)):
                            rows.append((*common, "corrupted", corruption, severity, posthoc, metric, value))
                for metric, value in (("auroc_msp", 0.8), ("fpr95_msp", 0.4), ("auroc_entropy", 0.7)):
                    rows.append((*common, "letters", None, None, posthoc, metric, value + 0.01 * order))
    return pl.DataFrame(rows, schema=dict(SHIFT_METRICS), orient="row")
