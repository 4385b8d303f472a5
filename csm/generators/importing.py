"""The import of models that somebody else trained: which kind a path is, and what the import of every kind shares."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csm import storage
from csm.errors import InputError
from csm.model_folders import read_config


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


@contextmanager
def marking(directory: Path, value: dict[str, Any]) -> Iterator[None]:
    """Take ``generator.json`` away from ``directory``; when the block that writes the rest ends well, write ``value`` there.

    ``value`` is the kind and what its loader needs to know. A folder with ``generator.json`` is whole.
    """
    mark = directory / "generator.json"
    mark.unlink(missing_ok=True)
    yield
    storage.write_json(mark, value)


def detect(path: Path) -> str:
    """The kind of the model at ``path``, a key of ``IMPORTERS``; ``InputError`` if it is none of them."""
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_file() and path.suffix == ".pkl":
        return "edm"
    index, single = path / "model_index.json", path / "config.json"
    if index.exists():
        config = read_config(index)
        name = config.get("_class_name")
        if name == "DiTPipeline":
            return "dit"
        if name == "StableDiffusionPipeline":
            return "stable-diffusion"
        if config.get("unet") == ["diffusers", "UNet2DModel"]:
            return "diffusers-unet"
        found = f"{index} is of a {name}"
    elif single.exists():
        name = read_config(single).get("_class_name")
        if name == "UNet2DModel":
            return "diffusers-unet"
        found = f"{single} is of a {name}"
    elif path.is_file():
        found = f"{path} is a file that does not end in .pkl"
    else:
        found = f"{path} is no folder with model_index.json or config.json"
    raise InputError(
        f"{found}; expected diffusers' folder of a DiTPipeline, a StableDiffusionPipeline, a pipeline with a UNet2DModel, "
        "or a UNet2DModel; or EDM's pickle, a file that ends in .pkl"
    )


def _import_diffusers_unet(path: Path, directory: Path, options: ImportOptions) -> None:
    from csm.generators.diffusers_unet import import_diffusers_unet  # importing diffusers takes seconds; only who needs it pays

    import_diffusers_unet(path, directory, options)


def _import_dit(path: Path, directory: Path, options: ImportOptions) -> None:
    from csm.generators.dit import import_dit

    import_dit(path, directory, options)


def _import_stable_diffusion(path: Path, directory: Path, options: ImportOptions) -> None:
    from csm.generators.stable_diffusion import import_stable_diffusion

    import_stable_diffusion(path, directory, options)


def _import_edm(path: Path, directory: Path, options: ImportOptions) -> None:
    from csm.generators.edm.generator import import_edm

    import_edm(path, directory, options)


IMPORTERS: dict[str, Callable[[Path, Path, ImportOptions], None]] = {
    "diffusers-unet": _import_diffusers_unet,
    "dit": _import_dit,
    "stable-diffusion": _import_stable_diffusion,
    "edm": _import_edm,
}
