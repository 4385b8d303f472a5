"""Folders that settings name: of models that were made elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def folder_files(parameters: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(setting, relative name, bytes) of every file in the folders that ``parameters`` name."""
    folders = {key: Path(value) for key, value in parameters.items() if isinstance(value, str) and Path(value).is_dir()}
    return sorted(
        (key, file.relative_to(folder).as_posix(), file.stat().st_size)
        for key, folder in folders.items()
        for file in folder.rglob("*")
        if file.is_file()
    )


def absolute_folders(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """``parameters`` for workers, whose current folder may be another one."""
    return {
        key: str(Path(value).absolute()) if isinstance(value, str) and Path(value).is_dir() else value
        for key, value in parameters.items()
    }
