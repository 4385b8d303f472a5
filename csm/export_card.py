"""What an export says of itself: ``csm-export.json`` for machines, ``README.md`` for people, on the Hub as the dataset card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from csm.reannotation import Calibration, describe
from csm.storage import write_text

CARD = "csm-export.json"
# Of the split; without them `datasets` takes the most frequent kind of file, of one tar beside one JSON file the wrong one.
_FILES = {"webdataset": "mixed-*.tar", "huggingface": "data/train-*.parquet"}
_MADE = {
    "semantic": "each between two of them, made by semantic mixing (Luo et al., ICML 2025)",
    "unmixed": "each of one of them, made by the generator",
    "pixel": "each a mixture of two training images, pixel by pixel",
    "noised": "each a training image, noised and denoised as a mixture of two of them (SDEdit, Meng et al., ICLR 2022)",
    "real": "the training images as they are",
}
_SHARED = {
    kind: f"; where only the last number differs, the images were made from {source}"
    for kind, source in {"semantic": "one noise", "pixel": "the same two", "noised": "one noise"}.items()
}


@dataclass(frozen=True)
class Card:
    """What is exported and where it comes from (``csm-export.json``). Equal cards, equal files.

    Attributes:
        csm: version that wrote the files.
        format: of ``csm.export.FORMATS``.
        rows: images in all.
        shard_rows: of one tar or parquet file.
        config: name of the configuration.
        dataset: name of the real data set; ``shape`` (H, W, C) and ``class_names`` are its.
        generator: kind of the generator.
        plan, mix: settings of pairs, ratios and seed, and of the solver.
        annotator: whose soft labels they are, with its ``calibration``; None: no labels.
        digests: stage -> digest of what it made.
        kind: of the images, of ``tables.KINDS``.
    """

    csm: str
    format: str
    rows: int
    shard_rows: int
    config: str
    dataset: str
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    generator: str
    plan: dict[str, Any]
    mix: dict[str, Any]
    annotator: str | None
    calibration: Calibration | None
    digests: dict[str, str]
    kind: str = "semantic"


def write_readme(directory: Path, card: Card) -> None:
    """Write how the images were made, what their columns are and where the split lies: a dataset card of the Hub."""
    height, width, channels = card.shape
    made = (
        f"{card.rows:,} {'grey' if channels == 1 else 'colour'} images of {width} x {height} pixels of "
        f"{len(card.class_names)} classes, {_MADE[card.kind]}: csm {card.csm}, configuration `{card.config}`, generator "
        f"`{card.generator}`."
    )
    items = [
        "- `lam`: share of `class_a` that went into the image; the rest is `class_b`.",
        f"- `mix_id`: names the image{'' if card.plan.get('noise') == 'image' else _SHARED.get(card.kind, '')}.",
        *_describe_labels(card),
    ]
    title = "Mixed" if card.kind == "semantic" else card.kind.capitalize()
    paragraphs = [f"# {title} images of {card.dataset}", made, "\n".join(items), f"Settings and digests: `{CARD}`."]
    write_text(directory / "README.md", _front(card.format) + "\n".join(f"{paragraph}\n" for paragraph in paragraphs))


def _front(format_name: str) -> str:
    """What the Hub reads, and the `datasets` library: where the split lies."""
    about: dict[str, Any] = {"task_categories": ["image-classification"]}
    if format_name in _FILES:
        split = {"split": "train", "path": _FILES[format_name]}
        about["configs"] = [{"config_name": "default", "data_files": [split]}]
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n\n"


def _describe_labels(card: Card) -> list[str]:
    """What the soft labels are, as items of the dataset card."""
    if card.calibration is None:
        return []
    return [
        f"- `soft_label`: probabilities {describe(card.calibration)}, by annotator `{card.annotator}`.",
        "- `label`: the class of the largest probability.",
    ]
