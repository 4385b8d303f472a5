"""What the import of every kind of trained model shares: the user's wishes, and which of the model's classes the data's are."""

from collections.abc import Sequence
from dataclasses import dataclass

from csm.errors import InputError


@dataclass(frozen=True)
class ImportOptions:
    """How a model that somebody else trained is to be used.

    Attributes:
        class_names: of the data set, in order.
        classes: the model's class for each class of the data set; empty: the same numbers.
        guidance: scale w of classifier-free guidance, D = D(none) + w (D(c) - D(none)); 1 is none (Ho & Salimans 2022, eq. 6).
        prompt: template for models that take text; ``{}`` stands for the class name.
    """

    class_names: tuple[str, ...]
    classes: tuple[int, ...] = ()
    guidance: float = 1.0
    prompt: str = "a photo of a {}"


def class_numbers(options: ImportOptions, n_model: int) -> tuple[int, ...]:
    """The model's class for each class of the data set; ``InputError`` if they do not fit a model of ``n_model`` classes."""
    n_data = len(options.class_names)
    if not options.classes and n_data != n_model:
        raise InputError(
            f"generator.classes: the model has {n_model} classes and the data {n_data}; "
            f"say which of the model's classes the data's are, as a list of {n_data} numbers"
        )
    numbers: Sequence[int] = options.classes or range(n_model)
    if len(numbers) != n_data:
        raise InputError(f"generator.classes: expected {n_data} numbers, one for each class of the data, got {len(numbers)}")
    for number in numbers:
        if not 0 <= number < n_model:
            raise InputError(f"generator.classes: {number} is no class of the model, which has 0..{n_model - 1}")
    if len(set(numbers)) != n_data:
        raise InputError("generator.classes: two classes of the data have the same class of the model")
    return tuple(numbers)
