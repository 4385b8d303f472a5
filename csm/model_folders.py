"""Models as diffusers and transformers save them: a folder with ``config.json`` and weights. Nothing of what is in them is run."""

import json
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from csm import storage
from csm.errors import InputError
from csm.locations import remove

FILES = ["*.json", "model*.safetensors", "merges.txt"]  # of a model on the hub: configurations, words, weights


def find_folder(path: str) -> Path:
    """The folder of the model of transformers at ``path``, fetched from the Hugging Face hub if that is no folder here.

    Args:
        path: a local folder; or the model's name on the hub, owner/name. What was fetched before is taken from the hub's cache.

    Raises:
        InputError: there is no such folder, and the model cannot be fetched.
    """
    from huggingface_hub import snapshot_download  # it and transformers take seconds to import; only who needs them pays

    folder = Path(path).expanduser()
    if path and folder.is_dir():
        return folder
    if folder.is_file() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        reason = "is a file, not a folder" if folder.is_file() else "does not exist"
        raise InputError(f"path: folder {path!r} {reason}: give the folder that the model was saved to, or owner/name on the hub")
    try:
        found = Path(snapshot_download(path, allow_patterns=FILES))
        if not list(found.glob("*.safetensors")):  # some of the oldest models have none; `read_model` takes only tensors from it
            found = Path(snapshot_download(path, allow_patterns=[*FILES, "pytorch_model.bin"]))
    except Exception as error:  # many types: of the hub, of the connection, of the disk
        raise InputError(
            f"path: there is no folder {path}, and the Hugging Face hub does not give a model of this name "
            f"({type(error).__name__}): fetch it elsewhere and give its folder"
        ) from error
    return found


def model_type(folder: Path, expected: Collection[str]) -> str:
    """The type of the model of transformers in ``folder``, from its configuration; ``InputError`` if it is none of ``expected``."""
    file = folder / "config.json"
    name = read_config(file).get("model_type")
    if name not in expected:
        raise InputError(f"{file}: model_type is {name!r}; expected {' or '.join(expected)}")
    return str(name)


def read_config(path: Path, classes: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON object in ``path``, which diffusers or transformers wrote.

    Args:
        path: a ``config.json``, ``scheduler_config.json`` or ``model_index.json``.
        classes: if given, its ``_class_name`` must be one of these.

    Raises:
        InputError: the file is missing, damaged or of another class.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error})") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object")
    if classes and value.get("_class_name") not in classes:
        raise InputError(f"{path}: {value.get('_class_name')!r} cannot be used; expected {' or '.join(classes)}")
    return value


def read_model(
    kind: Any, folder: Path, weights: str = "diffusion_pytorch_model", new: Collection[str] = (), **options: Any
) -> Any:
    """The model saved in ``folder``, float32, on the CPU, in evaluation mode and without gradients.

    Args:
        kind: the class of diffusers or transformers that has ``from_pretrained``.
        folder: with ``config.json`` and ``{weights}.safetensors``, or shards and their ``{weights}.safetensors.index.json``, or a pickle
            (``.bin``) of tensors alone, read as such (``weights_only``).
        weights: "diffusion_pytorch_model" for diffusers, "model" for transformers.
        new: parts of the model, by a name on the way to their weights, that need not be in the files: what lacks or has another shape is
            drawn anew, what the model does not have is left out.
        options: of ``from_pretrained``.

    Raises:
        InputError: a file is missing or damaged, a pickle holds more than tensors, or weights and configuration do not fit each other.
    """
    read_config(folder / "config.json")
    with _safe(folder, weights) as safe:
        for file in _weight_files(safe, weights):
            _check_whole(file)
        options |= {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        if weights == "model":
            # Other shapes are told below: the error of transformers points to a table that it prints.
            options |= {"dtype": torch.float32, "ignore_mismatched_sizes": True}
        else:
            options |= {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}  # needs accelerate
        try:
            with _quiet():
                model, report = kind.from_pretrained(safe, **options)
        # Many types for a configuration that does not fit: TypeError, ValueError, RuntimeError, OSError, ...
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{folder} cannot be loaded as {kind.__name__} ({type(error).__name__}: {reason})") from None

    def must_fit(name: str) -> bool:
        return set(name.split(".")).isdisjoint(new)

    missing = sorted(filter(must_fit, report["missing_keys"]))
    if missing:  # both libraries would go on with random numbers
        raise InputError(f"{folder}: {len(missing)} of the weights of {kind.__name__} are missing, for example {missing[0]}")
    mismatched = sorted(entry for entry in report["mismatched_keys"] if must_fit(entry[0])) if weights == "model" else []
    if mismatched:
        name, found, wanted = mismatched[0]
        raise InputError(f"{folder}: {name} is {tuple(found)}; by config.json it is {tuple(wanted)}")
    # Old files of text encoders also hold the numbers of their positions, which are no weights.
    unexpected = sorted(name for name in filter(must_fit, report["unexpected_keys"]) if not name.endswith("position_ids"))
    if unexpected:  # those of a larger model than the configuration's would be left out
        raise InputError(f"{folder}: {len(unexpected)} of the weights are not of {kind.__name__}, for example {unexpected[0]}")
    return model.eval().requires_grad_(False)


def read_tokenizer(folder: Path) -> Any:
    """The CLIPTokenizer saved in ``folder``.

    Raises:
        InputError: a file is missing or damaged.
    """
    from transformers import CLIPTokenizer

    # Without its files transformers makes a tokenizer to which every word is unknown, and says nothing.
    if not (folder / "tokenizer.json").exists() and not ((folder / "vocab.json").exists() and (folder / "merges.txt").exists()):
        raise InputError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    # Many types for damaged files: OSError, JSONDecodeError, the tokenizers library's plain Exception, ...
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder} cannot be loaded as CLIPTokenizer ({type(error).__name__}: {reason})") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and tables of transformers: what is wrong is raised."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _safe(folder: Path, weights: str) -> Iterator[Path]:
    """``folder``, or, if its weights are one pickle, a temporary folder with the same model as safetensors."""
    name = "pytorch_model.bin" if weights == "model" else f"{weights}.bin"
    if not (folder / name).exists() or list(folder.glob(f"{weights}*.safetensors*")):
        yield folder
        return
    try:
        tensors = torch.load(folder / name, map_location="cpu", weights_only=True)
    except Exception as error:  # many types for what is no file of tensors: UnpicklingError, RuntimeError, EOFError, ...
        raise InputError(f"{folder / name} is damaged, or holds more than tensors: nothing of it was run") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise InputError(f"{folder / name} is no table of tensors")
    with TemporaryDirectory(prefix="csm-") as temporary:
        shutil.copy(folder / "config.json", temporary)
        whole = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}  # tensors may share their memory
        save_file(whole, Path(temporary) / f"{weights}.safetensors", metadata={"format": "pt"})
        yield Path(temporary)


def write_model(model: Any, folder: Path) -> None:
    """Save ``model`` so that ``read_model`` reads it, in place of what ``folder`` held: shards of a larger one would be read first."""
    remove(folder)
    with storage.placing(folder) as here:
        model.save_pretrained(here)


def _weight_files(folder: Path, weights: str) -> list[Path]:
    """The safetensors files of ``folder``; ``InputError`` if there are none."""
    single = folder / f"{weights}.safetensors"
    index = folder / f"{weights}.safetensors.index.json"
    if index.exists():  # both libraries prefer it; the files that it names are loaded by their ending, so no other is let through
        shards = read_config(index).get("weight_map")
        names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
        if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
            raise InputError(f"{index} names no safetensors files of its own folder")
        return [folder / name for name in names]
    if single.exists():
        return [single]
    # Half precision, or not averaged: which one is the user's choice.
    for wanted, pattern in ((index, f"{weights}.safetensors.index.*.json"), (single, f"{weights}.*.safetensors")):
        if variants := sorted(file.name for file in folder.glob(pattern)):
            raise InputError(f"{wanted} does not exist, only {', '.join(variants)}: rename the one to use")
    raise InputError(f"{single} does not exist")


def _check_whole(path: Path) -> None:
    """``InputError`` if ``path`` is no whole safetensors file; reads only its header."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error})") from None
