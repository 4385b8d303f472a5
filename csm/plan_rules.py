"""Rules by which a plan fits the data: which pairs of classes, and how many sets of each. Numbers in, numbers out; ``auto`` resolved."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # planning asks the rule of pairs
    from csm.planning import PlanConfig

AUTO = "auto"
ALL_PAIRS = 16  # classes at most of which every pair is mixed: 120 pairs
LEAST_NEAR = 5  # classes at least that each is mixed with where not all are
PER_FEW = 32  # mixed images for each real one where there are few
ENOUGH, PER_CLASS = 16_384, 1_024  # mixed images, and those of a class if that is more, up to which few get more
PER_MANY = 4  # mixed images for each real one where there are many
MOST = 1_000_000  # mixed images


def pair_policy(n_classes: int) -> Literal["all", "confusion"]:
    """``plan.pairs`` of K classes: "all", or above ``ALL_PAIRS`` those that the teacher confuses."""
    return "all" if n_classes <= ALL_PAIRS else "confusion"


def near_classes(n_classes: int) -> int:
    """``plan.pairs_per_class`` of K classes: log2 K, rounded up, and at least ``LEAST_NEAR``.

    Pairs of points with their k nearest ones join all of n random points, with a probability that goes to 1, once k exceeds 0.5139 ln n
    (Balister, Bollobas, Sarkar & Walters, "Connectivity of random k-nearest-neighbour graphs", Adv. Appl. Probability 37, 2005); log2 n is
    2.8 times that. So no group of classes stays alone, and the number of pairs grows as K log K.
    """
    return min(n_classes - 1, max(LEAST_NEAR, (n_classes - 1).bit_length()))


def mixed_images(train_images: int, n_classes: int) -> int:
    """How many mixed images go with so many real ones of K classes, ends of sets included.

    A plan of all pairs has as many or, to be of whole sets, some more.
    """
    enough = max(ENOUGH, PER_CLASS * n_classes)
    return min(MOST, max(min(PER_FEW * train_images, enough), PER_MANY * train_images))


def count_pairs(pairs: str | Sequence[object], n_classes: int, per_class: int) -> int:
    """How many pairs the policy ``pairs``, or list of pairs, gives.

    Those of each class with its ``per_class`` nearest are known once the distances are; here every second of these pairs counts as near
    from both sides, so that 4 nearest make 3 pairs.
    """
    possible = n_classes * (n_classes - 1) // 2
    if not isinstance(pairs, str):
        return len(pairs)
    return possible if pairs == "all" else min(possible, -(-3 * n_classes * per_class // 4))


def resolve_plan(config: "PlanConfig", n_classes: int, train_images: int) -> "PlanConfig":
    """``config`` with a value wherever it says ``auto``, for data of K classes and so many training images."""
    pairs = pair_policy(n_classes) if config.pairs == AUTO else config.pairs
    near = near_classes(n_classes) if isinstance(config.pairs_per_class, str) else config.pairs_per_class
    sets = config.sets_per_pair
    if isinstance(sets, str):
        sets = -(-mixed_images(train_images, n_classes) // (count_pairs(pairs, n_classes, near) * _images_of_a_set(config)))
    return replace(config, pairs=pairs, pairs_per_class=near, sets_per_pair=sets)


def explain(config: "PlanConfig", n_classes: int, train_images: int, pairs: int) -> list[str]:
    """A line for each ``auto`` of ``config``: what it came to and why, with the ``pairs`` that the plan has in the end."""
    resolved, lines = resolve_plan(config, n_classes, train_images), []
    if config.pairs == AUTO:
        all_of_them = f"all {pairs:,} of {n_classes} classes, which are no more than {ALL_PAIRS}"
        near = f"each of {n_classes:,} classes with the {resolved.pairs_per_class} that the teacher takes it for most easily"
        lines.append(f"pairs: {all_of_them if resolved.pairs == 'all' else near}")
    if config.sets_per_pair == AUTO:
        images = mixed_images(train_images, n_classes)
        each = images // train_images
        asked = f"{each} for each of" if each * train_images == images else f"{images:,} for"
        lines.append(
            f"{resolved.sets:,} sets for each of {pairs:,} pairs: {pairs * resolved.sets * _images_of_a_set(config):,} mixed images; "
            f"the rule asks for {asked} {train_images:,} real ones"
        )
    return lines


def _images_of_a_set(config: "PlanConfig") -> int:
    return config.ratios if isinstance(config.ratios, int) else max(1, len(config.ratios))
