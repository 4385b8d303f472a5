"""check: is a finished model calibrated on these labelled images?"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from csm import storage
from csm.assessment import DRAWS, Assessment, assess
from csm.datasets.image_sources import Item, decoded, labelled_images_of
from csm.errors import InputError
from csm.metrics.calibration import top_label
from csm.plots import reliability_diagram
from flows import pages
from flows.measures import MEASURES, chance_sentence, percent, plain
from flows.models import open_model
from flows.predict import find_device
from flows.progress import task
from flows.reliability import Predictions, Reliability, diagram

ABOVE, WITHIN, OPEN = "above", "within", "open"  # where the ECE's interval lies: above the threshold, below it, on both sides


@dataclass(frozen=True)
class Checked:
    """What `csm check` found.

    ``state``: of ``ABOVE``, ``WITHIN`` and ``OPEN``. ``sentences``: the verdict, and what chance alone makes.
    """

    assessment: Assessment
    threshold: float
    state: str
    sentences: tuple[str, str]


def check(
    model: str,
    data: str,
    split: str = "test",
    threshold: float = 0.05,
    bins: int = 15,
    draws: int = DRAWS,
    output: Path | None = None,
    batch_size: int = 256,
    device: str = "auto",
    tracking_uri: str | None = None,
    command: str = "",
) -> tuple[dict[str, Any], Checked]:
    """Measure ``model`` on the labelled images of ``data`` and judge its ECE by ``threshold``.

    Returns:
        What ``--json`` prints, and the same for the terminal. With ``output`` the folder holds ``report.html``, ``reliability.png`` and
        ``check.json`` then.

    Raises:
        InputError: the model or the data cannot be used, an image cannot be read, or a class is unknown to the model.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"--threshold {threshold}: expected a fraction from 0 to 1, for example 0.05")
    if output is not None and output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; choose a folder")
    place = find_device(device)
    classifier = open_model(model, tracking_uri)
    names = classifier.spec.class_names
    source = labelled_images_of(data, split)
    probs, labels = [], []
    with task("check", source.count) as progress:
        for batch in decoded(source.read(), classifier.spec.shape, batch_size):
            for error in batch.errors:
                if error is not None:
                    raise error
            labels += _targets(batch.items, source.class_names, names, data)
            probs.append(classifier.predict(batch.images, batch_size, place))
            progress.advance(len(batch.items))
    if not labels:
        raise InputError(f"{data}: no images in split {split!r}; choose another with --split")
    # A probability that float32 cannot tell from 0 counts as its smallest normal number: the NLL stays finite.
    log_probs = torch.cat(probs).double().clamp(min=torch.finfo(torch.float32).tiny).log().log_softmax(dim=1)
    targets = torch.tensor(labels)
    checked = judge(assess(log_probs, targets, bins, draws), threshold)
    result = {
        "model": model,
        "data": data,
        "split": split,
        "classes": len(names),
        "threshold": threshold,
        "bins": bins,
        "state": checked.state,
        "passed": checked.state != ABOVE,
        **plain(checked.assessment),
        "output": None if output is None else str(output),
    }
    if output is not None:
        confidence, correct = (column.numpy() for column in top_label(log_probs.exp(), targets))
        storage.write_json(output / "check.json", result)
        figure = reliability_diagram(confidence, correct, bins, "Reliability")
        with storage.replacing(output / "reliability.png") as temporary:
            figure.savefig(temporary, format="png")
        page = pages.render(
            "check.html.j2",
            title="Is this model calibrated?",
            created=datetime.now(UTC),
            command=command,
            model=model,
            origin=_origin(classifier.spec.origin),
            data=data,
            split=split,
            checked=checked,
            n_bins=bins,
            draws=draws,
            columns={"value": checked.assessment.metrics},
            ticks=_ticks(checked),
            view=diagram(Reliability(Predictions(confidence, correct)), bins),
        )
        storage.write_text(output / "report.html", page)
    return result, checked


def judge(assessment: Assessment, threshold: float) -> Checked:
    """The ECE's interval against ``threshold``, in a sentence."""
    ece = assessment.metrics["ece"]
    assert ece.low is not None
    assert ece.high is not None
    interval, limit = MEASURES["ece"].interval(ece), percent(threshold)
    if ece.low > threshold:
        state = ABOVE
        verdict = (
            f"Not calibrated: the ECE is at least {percent(ece.low)} %, above the threshold of {limit} % "
            f"(measured {percent(ece.value)} %, 95 % interval {interval} %)."
        )
    elif ece.high <= threshold:
        state = WITHIN
        verdict = (
            f"Calibrated within the threshold: the ECE is at most {percent(ece.high)} %, the threshold {limit} % "
            f"(measured {percent(ece.value)} %, 95 % interval {interval} %)."
        )
    else:
        state = OPEN
        verdict = (
            f"Not shown to be above the threshold of {limit} %, nor below it: the ECE's 95 % interval is {interval} % "
            f"(measured {percent(ece.value)} %). More images would tell."
        )
    return Checked(assessment, threshold, state, (verdict, chance_sentence(assessment)))


def table(checked: Checked) -> Table:
    """Every metric with its interval, for a terminal."""
    shown = Table(title=f"{checked.assessment.images:,} images")
    for name, justify in (
        ("metric", "left"),
        ("value", "right"),
        ("95 % interval", "right"),
        ("", "left"),
        ("what it is", "left"),
    ):
        shown.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, measure in MEASURES.items():
        estimate = checked.assessment.metrics[name]
        shown.add_row(measure.label, measure.text(estimate.value), measure.interval(estimate), measure.unit, measure.about)
    return shown


def _ticks(checked: Checked) -> list[float]:
    """Round fractions from 0 to beyond all that the page puts on the axis of the ECE."""
    ece, chance = checked.assessment.metrics["ece"], checked.assessment.chance
    ends = [value for value in (ece.value, ece.high, chance.high, checked.threshold) if value is not None]
    ticks: list[float] = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(0, max(*ends, 0.001)).tolist()
    return ticks


def _targets(items: Sequence[Item], known: tuple[str, ...], names: tuple[str, ...], data: str) -> list[int]:
    """The model's number of each label; the classes of both are matched by name, numbers without names are the model's own."""
    index = {name: number for number, name in enumerate(names)}
    targets = []
    for item in items:
        label = item.label
        if isinstance(label, int) and not (known and not 0 <= label < len(known)):
            name = known[label] if known else names[label] if 0 <= label < len(names) else None
        else:
            name = label if isinstance(label, str) else None
        if name is None or name not in index:
            shown = ", ".join(names[:10]) + (f", ... ({len(names)} classes)" if len(names) > 10 else "")
            what = "no label" if label is None else f"class {name if name is not None else label!r}"
            raise InputError(f"{data}: {item.name} has {what}, which the model does not know; it knows {shown}")
        targets.append(index[name])
    return targets


def _origin(origin: dict[str, Any]) -> str:
    """What the model says of itself, in a line."""
    return ", ".join(f"{key} {value}" for key, value in origin.items() if isinstance(value, str | int | float))


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
