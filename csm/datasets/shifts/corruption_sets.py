"""Published corruption sets from disk: CIFAR-10-C, CIFAR-100-C and Tiny-ImageNet-C (Hendrycks & Dietterich, ICLR 2019)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from csm.datasets.real import RealDataset
from csm.datasets.shifts.part import SEVERITIES, ShiftPart, choose, choose_severities, fit_images
from csm.errors import InputError

CIFAR_SHAPE = (32, 32, 3)


def cifar_c(data: RealDataset, path: str, corruptions: str = "all", severities: str = "all") -> Iterator[ShiftPart]:
    """CIFAR-10-C or CIFAR-100-C as published: one ``CORRUPTION.npy`` uint8 (5 N, 32, 32, 3) each, severities 1 to 5 in blocks of N
    (10,000) images, and ``labels.npy`` (5 N,).

    Files are read in blocks and never unpickled. All are looked at before the first part is given.

    Args:
        data: whose shape the images take.
        path: the folder.
        corruptions, severities: comma-separated, for example "gaussian_noise,fog" and "1,3,5"; "all".

    Raises:
        InputError: the folder or a file is missing, damaged or of another shape, or the labels are not those of K classes.
    """
    root = _folder(path)
    known = sorted(file.stem for file in root.glob("*.npy") if file.stem != "labels")
    names, levels = choose(f"corruptions (files in {root})", corruptions, known), choose_severities(severities)
    labels = _array(root / "labels.npy")
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) == 0 or len(labels) % len(SEVERITIES):
        raise InputError(
            f"{root / 'labels.npy'}: expected whole numbers, as many for each of 5 severities, got {labels.dtype} {labels.shape}"
        )
    classes, n_classes = np.unique(labels), data.info.n_classes
    if not np.array_equal(classes, np.arange(n_classes)):
        raise InputError(
            f"{root / 'labels.npy'}: expected labels of {n_classes} classes, 0..{n_classes - 1}, as the data set has, "
            f"got {len(classes)}, {classes[0]}..{classes[-1]}: it belongs to another data set"
        )
    arrays = {}
    for name in names:
        arrays[name] = _array(root / f"{name}.npy")
        if arrays[name].dtype != np.uint8 or arrays[name].shape != (len(labels), *CIFAR_SHAPE):
            raise InputError(
                f"{root / name}.npy: expected uint8 {(len(labels), *CIFAR_SHAPE)}, got {arrays[name].dtype} {arrays[name].shape}"
            )
    size = len(labels) // len(SEVERITIES)

    def parts() -> Iterator[ShiftPart]:
        for name, array in arrays.items():
            for level in levels:
                block = slice((level - 1) * size, level * size)
                images = torch.from_numpy(array[block].transpose(0, 3, 1, 2).copy())  # (N, C, H, W), off the map
                yield ShiftPart(
                    name, level, fit_images(images, data.info.shape), torch.from_numpy(labels[block].astype(np.int64))
                )

    return parts()


def tiny_imagenet_c(
    data: RealDataset, path: str, corruptions: str = "all", severities: str = "all", wnids: str = ""
) -> Iterator[ShiftPart]:
    """Tiny-ImageNet-C as published: ``CORRUPTION/SEVERITY/WNID/*.JPEG``.

    Which class a folder is: its line of the file ``wnids``, if that is given; else its place in the class names of the data set, if
    those are wnids; else its place among the sorted folder names, as in the source ``tiny-imagenet``.

    Args:
        data: whose shape the images take.
        path: the folder.
        corruptions, severities: comma-separated, for example "gaussian_noise,fog" and "1,3,5"; "all".
        wnids: file with the wnid of class k in line k, for data whose classes are in another order.

    Raises:
        InputError: a folder is missing, there are not K class folders, or an image cannot be read (when its part is made).
    """
    root = _folder(path)
    known = sorted(folder.name for folder in root.iterdir() if (folder / str(SEVERITIES[0])).is_dir())
    names, levels = choose(f"corruptions (folders in {root})", corruptions, known), choose_severities(severities)
    folders = [(name, level, root / name / str(level)) for name in names for level in levels]
    order = _class_order(data.info.class_names, _class_folders(folders[0][2]), root, wnids)
    for _, _, folder in folders:
        if not folder.is_dir() or set(_class_folders(folder)) != set(order):
            raise InputError(f"{folder}: expected the {len(order)} class folders of {folders[0][2]}")

    def parts() -> Iterator[ShiftPart]:
        for name, level, folder in folders:
            files = [(file, label) for label, wnid in enumerate(order) for file in sorted((folder / wnid).glob("*.JPEG"))]
            if not files:
                raise InputError(f"{folder}: no *.JPEG in the class folders")
            images = torch.cat([fit_images(_decode(file, data.info.shape[2]), data.info.shape) for file, _ in files])
            yield ShiftPart(name, level, images, torch.tensor([label for _, label in files]))

    return parts()


def npy_files(path: str) -> list[tuple[str, int, int]]:
    """(name, bytes, modification time in ns) of every array in the folder ``path``."""
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(Path(path).glob("*.npy"))]


def class_folders(path: str, wnids: str = "") -> list[tuple[str, int]]:
    """(relative name, modification time in ns) of every CORRUPTION/SEVERITY/WNID, and of the file ``wnids``.

    A folder's time changes when an image comes, goes or is renamed.
    """
    root = Path(path)
    folders = [(str(folder.relative_to(root)), folder.stat().st_mtime_ns) for folder in sorted(root.glob("*/*/*"))]
    return folders + [(str(file), file.stat().st_mtime_ns) for file in [Path(wnids)] if file.is_file()]


def _folder(path: str) -> Path:
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"path: folder {root} does not exist")
    return root


def _array(file: Path) -> np.ndarray:
    """The array in ``file``, mapped rather than read."""
    if not file.is_file():
        raise InputError(f"{file} does not exist")
    try:
        array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{file} is not a whole array ({' '.join(str(error).split())}): fetch it again") from None
    return array


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def _class_order(class_names: tuple[str, ...], found: list[str], root: Path, wnids: str) -> list[str]:
    """Class folders by label."""
    if len(found) != len(class_names):
        raise InputError(
            f"{root}: expected a folder for each of the {len(class_names)} classes of the data set, got {len(found)}"
        )
    if not wnids:
        return list(class_names) if set(class_names) == set(found) else found
    if not Path(wnids).is_file():
        raise InputError(f"wnids: {wnids} does not exist")
    order = Path(wnids).read_text(encoding="utf-8", errors="replace").split()
    if sorted(order) != found:
        raise InputError(f"wnids: expected {wnids} to name the {len(found)} class folders of {root}, each once")
    return order


def _decode(file: Path, channels: int) -> torch.Tensor:
    """One image as uint8 (1, C, H, W)."""
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"), dtype=np.uint8)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read image {file} ({error}): repair or remove it and run again") from None
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)[None].copy())
