"""Finished classifiers as the teacher's members (``annotate.teacher.models``): found, checked, and copied into the workspace."""

import glob
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from csm import storage
from csm.classifiers import ClassifierSpec, load_classifier
from csm.datasets import DatasetInfo
from csm.errors import InputError
from csm.locations import is_remote, local, location, remove, store
from flows.artifacts import Workspace

WHERE = "annotate.teacher.models"
FILES = ("model.safetensors", "model.json")


@dataclass(frozen=True)
class Taken:
    """What was copied (``models.json``): folder -> digest of its files, in the order of the members."""

    models: dict[str, str]


def find_models(patterns: Sequence[str]) -> list[Path]:
    """The folders that ``patterns`` name, absolute, each once; those of a glob in alphabetical order.

    Raises:
        InputError: a pattern matches nothing, or what it matches is no finished classifier.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        place = location(pattern)
        if is_remote(place):
            files = store(place)
            matched = [location(files.unstrip_protocol(name)) for name in sorted(files.glob(str(place)))]
        else:
            matched = [Path(name).absolute() for name in sorted(glob.glob(str(place.expanduser())))]
        if not matched:
            raise InputError(f"{WHERE}: {pattern} matches no folder; name folders of classifiers, such as first/runs/csm-seed*")
        for folder in matched:
            lacking = next((name for name in FILES if not (folder / name).is_file()), None)
            if lacking:
                raise InputError(f"{WHERE}: {folder} holds no {lacking}: it is no finished classifier")
        found |= {str(folder): folder for folder in matched}
    return list(found.values())


def check_models(folders: Sequence[Path], info: DatasetInfo) -> None:
    """``InputError`` if a classifier in ``folders`` was trained for other classes or images than those of ``info``."""
    for folder in folders:
        spec = storage.read_record(folder / "model.json", ClassifierSpec)
        if spec.class_names != info.class_names:
            classes = "other classes" if sorted(spec.class_names) != sorted(info.class_names) else "the classes in another order"
            raise InputError(
                f"{WHERE}: {folder} has {classes} ({_some(spec.class_names)}) than {info.name} ({_some(info.class_names)})"
            )
        if spec.channels != info.shape[2]:
            raise InputError(f"{WHERE}: {folder} takes images of {spec.channels} channels, {info.name} has {info.shape[2]}")


def take_models(workspace: Workspace, folders: Sequence[Path]) -> str:
    """Copy the classifiers in ``folders`` into the workspace, in place of those taken before; give a digest of what they are.

    Raises:
        InputError: a file is damaged.
    """
    record = workspace.teacher_models / "models.json"
    remove(workspace.teacher_models)
    taken = {}
    for number, folder in enumerate(folders):
        target = workspace.teacher_models / f"{number:02d}"
        for name in FILES:
            with storage.replacing(target / name) as temporary:
                shutil.copyfile(local(folder / name), temporary)
        try:
            load_classifier(target)
        except InputError as error:
            raise InputError(f"{WHERE}: {folder}: {error}") from None
        taken[str(folder)] = _digest(target)
    storage.write_json(record, asdict(Taken(taken)))
    return storage.digest(list(taken.values()))


def taken_models(workspace: Workspace) -> tuple[Path, ...]:
    """Folders of the copies, none before they were made."""
    record = workspace.teacher_models / "models.json"
    taken = storage.read_record(record, Taken).models if record.is_file() else {}
    return tuple((workspace.teacher_models / f"{number:02d}").absolute() for number in range(len(taken)))


def changed_models(workspace: Workspace, patterns: Sequence[str]) -> str | None:
    """That a classifier which ``patterns`` name is not the one that was taken, in words; None if all are.

    What is gone was copied, and does not count; nor do those of the workspace itself, which are trained anew with the teacher's labels.
    """
    taken = storage.read_record(workspace.teacher_models / "models.json", Taken).models
    try:
        folders = find_models(patterns)
    except InputError:
        return None
    for folder in folders:
        if not _is_inside(folder, workspace.root.absolute()) and taken.get(str(folder)) != _digest(folder):
            return f"was made from other classifiers ({folder} {'has changed' if str(folder) in taken else 'is new'})"
    return None


def _is_inside(folder: Path, root: Path) -> bool:
    inner, outer = (str(path) if is_remote(path) else str(path.resolve()) for path in (folder, root))
    return inner.startswith(f"{outer}/")


def _digest(folder: Path) -> str:
    return storage.digest(*(storage.file_digest(folder / name) for name in FILES))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
