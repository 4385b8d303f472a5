"""How good are the annotator's own labels? Students cannot be expected to be much better than what they learn from.

python docs/experiments/annotator.py WORKSPACE
"""

from common import Experiment

from csm.generators import load_truth
from csm.metrics import evaluate
from csm.truth import tv
from flows.bench.truth import true_posterior

METRICS = {"accuracy": "accuracy %", "ece": "ECE %", "nll": "NLL x100", "brier": "Brier x100"}

run = Experiment(__doc__)
law = load_truth(run.workspace.truth)
print("|", " | ".join([f"labels of `{run.annotator}` for", "images", *METRICS.values(), "TV %"]), "|")
print("|" + "---|" * (len(METRICS) + 3))
for split, (images, classes) in {
    "the validation images, which it is calibrated on": run.val,
    "the test images": run.test,
}.items():
    labels = run.labels(images)
    measured = evaluate(labels.clamp_min(1e-30).log(), classes, metrics=tuple(METRICS))
    figures = [f"{100 * measured[metric]:.1f}" for metric in METRICS]
    figures.append("" if law is None else f"{100 * tv(labels.double(), true_posterior(law, images)):.1f}")
    print("|", " | ".join([split, f"{len(images):,}", *figures]), "|")
