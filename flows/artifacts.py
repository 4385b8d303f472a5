"""The workspace: where each artifact lies, which stage made it, and whether it is still what the configuration asks for."""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from csm import storage
from csm.errors import InputError
from csm.locations import cache, is_remote, location, reach, remove
from flows.store_lock import hold

# Where files are written, besides the root.
FOLDERS = (
    "stages", "real", "truth", "generator", "mixed", "annotations", "annotators", "runs", "model", "tune", "shift",
)  # fmt: skip

UNSET = "(not set)"  # of a setting that only one of two records has
LEFT_OUT = {"plan.noise": "set", "plan.grid": "uniform"}  # settings of the first version, which records leave out


@dataclass(frozen=True)
class StageRecord:
    """What ``stages/NAME.json`` holds.

    Attributes:
        name: of the stage.
        fingerprint: of ``settings``, ``code_version`` and ``inputs``: equal fingerprints give equal results.
        settings: the part of the configuration that the stage depends on.
        inputs: stage -> digest of what it made.
        done: False while it runs (or was interrupted).
        digest: of what it made.
        rows: how many rows (images, runs, ...) it made.
        seconds: it took, over all its sessions.
    """

    name: str
    fingerprint: str
    settings: dict[str, Any]
    code_version: int
    inputs: dict[str, str]
    done: bool = False
    digest: str = ""
    rows: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Workspace:
    """Paths below one folder.

    Attributes:
        root: on storage that every node sees: a folder, or a place on a store.
        records: of stages, by name, as far as they were read or written; None: they are read each time, as others may write them.
    """

    root: Path
    records: dict[str, StageRecord] | None = field(default=None, compare=False, repr=False)

    @property
    def own(self) -> Path:
        """Where this machine keeps what only a file system can: ``root``, or for one on a store a folder of this machine."""
        if not is_remote(self.root):
            return self.root
        folder = cache() / "workspaces" / storage.digest(str(self.root))
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def dataset(self) -> Path:
        return self.root / "dataset.json"

    @property
    def real(self) -> Path:
        """The `real` table."""
        return self.root / "real" / "part-00000.parquet"

    @property
    def truth(self) -> Path:
        """The law of the real images, where it is known."""
        return self.root / "truth"

    @property
    def generator(self) -> Path:
        return self.root / "generator"

    @property
    def plan(self) -> Path:
        return self.root / "plan.parquet"

    @property
    def mixed(self) -> Path:
        return self.root / "mixed"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.parquet"

    @property
    def comparison(self) -> Path:
        return self.root / "comparison.parquet"

    @property
    def shift_metrics(self) -> Path:
        return self.root / "shift_metrics.parquet"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def model(self) -> Path:
        """Folder of the finished model."""
        return self.root / "model"

    @property
    def choice(self) -> Path:
        """Which annotator "auto" is."""
        return self.root / "annotators" / "auto.json"

    def annotator(self, name: str) -> Path:
        """Folder of a fitted annotator."""
        return self.root / "annotators" / name

    def teacher_member(self, number: int) -> Path:
        """Folder of one classifier of the teacher; member 0 is also the encoder ``classifier``."""
        return self.root / "annotators" / "members" / f"{number:02d}"

    @property
    def teacher_models(self) -> Path:
        """Folder of the classifiers that were taken for the teacher's, in place of those that are trained here."""
        return self.root / "annotators" / "members" / "models"

    def encoder(self, name: str) -> Path:
        """Folder of what an encoder says of the real images, and of what was fitted of it."""
        return self.root / "annotators" / "encoders" / name

    def annotations(self, name: str) -> Path:
        return self.root / "annotations" / name

    def run(self, name: str) -> Path:
        return self.root / "runs" / name

    def shift(self, name: str) -> Path:
        """Folder of a shift set."""
        return self.root / "shift" / name

    def record(self, stage: str) -> StageRecord | None:
        """The record of ``stage``, or None if it never started here."""
        if self.records is not None and stage in self.records:
            return self.records[stage]
        path = self._record_path(stage)
        found = storage.read_record(path, StageRecord) if path.is_file() else None
        if self.records is not None and found is not None:
            self.records[stage] = found
        return found

    def write_record(self, record: StageRecord) -> None:
        storage.write_json(self._record_path(record.name), asdict(record))
        if self.records is not None:
            self.records[record.name] = record

    def drop(self, stage: str, outputs: list[Path]) -> None:
        """Remove what ``stage`` made, its record first."""
        if self.records is not None:
            self.records.pop(stage, None)
        self._record_path(stage).unlink(missing_ok=True)
        for path in outputs:
            remove(path)

    def _record_path(self, stage: str) -> Path:
        return self.root / "stages" / f"{stage}.json"


@contextmanager
def open_workspace(root: Path, create: bool = True) -> Iterator[Workspace]:
    """Make or open the workspace at ``root`` and keep it to this process until the block ends.

    Raises:
        InputError: it cannot be written, it is a file, it does not exist and ``create`` is False, another process works in it, or its
            store does not answer.
    """
    root = location(root)
    if is_remote(root):
        with _open_remote(root, create):
            yield Workspace(root, {})
        return
    if not create and not root.is_dir():
        raise InputError(f"--workspace {root}: does not exist; run `csm run --workspace {root}` first")
    if root.exists() and not root.is_dir():
        raise InputError(f"--workspace {root}: cannot be written (it is a file); choose another folder")
    is_new = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"--workspace {root}: cannot be written ({error.strerror}); choose another folder") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            raise InputError(f"--workspace {root}: process {holder} works in it; wait for it or choose another folder") from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        _remove_temporaries(root)
        yield Workspace(root, {})
    finally:
        if is_new and os.listdir(root) == [".lock"]:  # the command was refused: leave nothing behind
            os.unlink(root / ".lock")
            root.rmdir()
        os.close(lock)


@contextmanager
def _open_remote(root: Path, create: bool) -> Iterator[None]:
    """Keep the place on a store to this process."""
    try:
        reach(root)
    except InputError as error:
        raise InputError(f"--workspace {error}") from None
    if not create and not (root / "stages").is_dir():
        raise InputError(f"--workspace {root}: does not exist; run `csm run --workspace {root}` first")
    with hold(root / ".lock"):
        yield


def is_url(path: Path) -> bool:
    """Whether ``path`` was given as scheme://..., of which ``Path`` keeps one slash."""
    return is_remote(path) or "://" in str(path) or str(path).split("/", 1)[0].endswith(":")


def _remove_temporaries(root: Path) -> None:
    """Remove what a killed process wrote beside its files (`storage.replacing`) and could not rename any more."""
    if (root / "stages").is_dir():
        folders = [root / name for name in FOLDERS]
        for path in [*root.glob(".*.tmp"), *(path for folder in folders for path in folder.rglob(".*.tmp"))]:
            path.unlink(missing_ok=True)


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Changed settings as "dotted.key old -> new"."""
    changed = []
    for key in dict.fromkeys([*before, *after]):
        unset = LEFT_OUT.get(f"{prefix}{key}", UNSET)
        old, new = before.get(key, unset), after.get(key, unset)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            changed.append(f"{prefix}{key} {old} -> {new}")
    return changed
