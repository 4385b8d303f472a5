"""bench train: images per second of training on real and mixed images against the original's way of working, on one device."""

import itertools
import multiprocessing
import os
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset

from csm.classifiers import Classifier, ClassifierSpec, build_classifier
from csm.losses.soft import l2
from csm.methods import Method, MixedTerm
from csm.optimization import OptimizerConfig
from csm.precision import dtype_of
from csm.schedules import MixedSet
from csm.training import Split, fit
from flows.bench.clock import device_kind, now, peak_mib
from flows.progress import say

CLASSES, SIDE, RATIOS = 10, 32, 8
PAIRS = [(a, b) for a in range(CLASSES) for b in range(a + 1, CLASSES)]
SETS = 4  # of each pair
PER_REAL = 2  # mixed images for each real one
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
NETWORK = {"cpu": "resnet18", "cuda": "resnet50"}
STEPS = {"cpu": 5, "cuda": 100}
LOADERS = 2
WARM = {"cpu": 1, "cuda": 20}  # steps of the baseline before those that are timed
METHOD = Method(mixed=MixedTerm())  # cross-entropy, and L2 on the mixed images
OPTIMIZER = OptimizerConfig(epochs=2, batch_size=128, schedule="constant", shift=4, flip=True)


@dataclass(frozen=True)
class Setting:
    """What the product trains with, besides what is given: see ``OptimizerConfig``."""

    precision: str = "auto"
    channels_last: bool = False
    compile: bool = False


DEFAULT = {"cpu": Setting(), "cuda": Setting(channels_last=True)}
VARIANTS = [Setting(*values) for values in itertools.product(("float32", "bfloat16"), (False, True), (False, True))]


def training_speed(steps: int = 0, network: str = "", variants: bool = False) -> dict[str, Any]:
    """Throughput of training by this code and by the original's procedure, on random 32x32 colour images of 10 classes.

    The baseline is written from the description of the original: images in PNG files, opened one by one by a ``DataLoader`` with two
    processes, cropped and mirrored one by one with PIL; for each real image, mixed sets are drawn until the pair of one holds its class,
    then its own endpoint and an interior image are opened; float32, default layout. Ours is ``csm.training.fit``. Both have the same
    network, SGD, batch (128 real, 256 mixed), losses (cross-entropy, L2) and number of threads; the baseline's two loaders come beside
    them. The files are small and in the system's cache, which favours the baseline. Each is measured in a process of its own.

    Args:
        steps: that are timed; 0: 5 on a CPU, 100 on a GPU.
        network: a key of ``NETWORKS``; "": ResNet-18 on a CPU, ResNet-50 on a GPU.
        variants: measure every precision and layout, with and without torch.compile, too.

    Returns:
        network, device, threads (of each side), steps, batch (real and mixed images of a step), baseline_images_per_s, images_per_s (real
        and mixed), ratio, baseline_wait_share (of a step, spent waiting for the loaders), data_share (at most so much of our step goes
        into drawing, gathering and augmenting: the time of a step whose network is one linear layer), precision, channels_last, compile,
        baseline_peak_mib, peak_mib (of the GPU, or else of the process, without loaders), load_before (of the machine, 1 minute), and with
        ``variants`` those as a list of dicts.
    """
    device = device_kind()
    network, steps, load = network or NETWORK[device], steps or STEPS[device], os.getloadavg()[0]
    batch = OPTIMIZER.batch_size * (1 + PER_REAL)
    with tempfile.TemporaryDirectory(prefix="csm-bench-") as folder:
        root = Path(folder)
        _write_png(root, (WARM[device] + steps) * OPTIMIZER.batch_size)
        say(f"baseline: {network}, float32, PNG files, {LOADERS} loaders; {steps} steps of {batch} images")
        original = _in_a_process(_original, root, network, steps)
    own = DEFAULT[device]
    say(f"ours: {network}, precision {own.precision}; {steps} steps of {batch} images")
    ours = _in_a_process(_ours, network, steps, own)
    data = _in_a_process(_ours, "", 5 * steps, own)
    result = {
        "network": network,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, threads: {torch.get_num_threads()}",
        "threads": torch.get_num_threads(),
        "steps": steps,
        "batch": batch,
        "baseline_images_per_s": round(batch / original["seconds"], 2),
        "images_per_s": round(batch / ours["seconds"], 2),
        "ratio": round(original["seconds"] / ours["seconds"], 2),
        "baseline_wait_share": round(original["wait"] / original["seconds"], 4),
        "data_share": round(data["seconds"] / ours["seconds"], 4),
        "precision": ours["precision"],
        "channels_last": own.channels_last,
        "compile": own.compile,
        "baseline_peak_mib": original["peak"],
        "peak_mib": ours["peak"],
        "load_before": round(load, 2),
    }
    return {**result, "variants": [_variant(network, steps, batch, setting) for setting in VARIANTS]} if variants else result


def _variant(network: str, steps: int, batch: int, setting: Setting) -> dict[str, Any]:
    say(f"ours: {setting}")
    ours = _in_a_process(_ours, network, steps, setting)
    return {
        "precision": setting.precision,
        "channels_last": setting.channels_last,
        "compile": setting.compile,
        "images_per_s": round(batch / ours["seconds"], 2),
        "peak_mib": ours["peak"],
    }


def _ours(network: str, steps: int, setting: Setting) -> dict[str, Any]:
    """Seconds of a step of ``fit`` in its second epoch of ``steps``; "" is a network of one layer."""
    real, mixed = _images(steps * OPTIMIZER.batch_size)
    classifier = _classifier(network)
    optimizer = replace(OPTIMIZER, **vars(setting))  # type: ignore[arg-type]
    device = torch.device(device_kind())
    first: list[float] = []
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as in the workers of csm train
    fit(classifier, real, real, METHOD, optimizer, 0, mixed, save_state=lambda state: first.append(now()), device=device)
    seconds = (now() - first[0]) / steps
    return {"seconds": seconds, "peak": _peak(), "precision": str(dtype_of(optimizer.precision, classifier, device))[6:]}


def _original(root: Path, network: str, steps: int) -> dict[str, Any]:
    """Seconds of a step, and of it those in which it waits for the loaders."""
    device = torch.device(device_kind())
    model = _classifier(network).network.to(device).train()
    sgd = torch.optim.SGD(model.parameters(), lr=OPTIMIZER.learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    loader = DataLoader(_Files(root), OPTIMIZER.batch_size, shuffle=True, num_workers=LOADERS, drop_last=True)
    waits, started = 0.0, 0.0
    batches = iter(loader)
    warm = WARM[device.type]
    for step in range(warm + steps):
        if step == warm:
            waits, started = 0.0, now()
        before = now()
        images, labels, mixed, soft = (tensor.to(device) for tensor in next(batches))
        waits += now() - before
        logits = model(torch.cat([images, mixed.flatten(0, 1)]))
        loss = F.cross_entropy(logits[: len(images)], labels) + l2(logits[len(images) :], soft.flatten(0, 1))
        sgd.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip)
        sgd.step()
    return {"seconds": (now() - started) / steps, "wait": waits / steps, "peak": _peak()}


class _Files(Dataset[tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]]):
    """Item by item: a real image, its label, and two mixed images of its class with their soft labels."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.real = sorted((root / "real").iterdir())
        self.sets = [(a, b, group) for a, b in PAIRS for group in range(SETS)]

    def __len__(self) -> int:
        return len(self.real)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]:
        label = int(self.real[index].stem.split("_")[1])
        while True:
            a, b, group = random.choice(self.sets)
            if label in (a, b):
                break
        steps = [RATIOS - 1 if label == a else 0, random.randrange(1, RATIOS - 1)]
        mixed = [self._open(self.root / "mixed" / f"{a}_{b}_{group}_{step}.png") for step in steps]
        return self._open(self.real[index]), label, torch.stack(mixed), torch.stack([soft_label(a, b, step) for step in steps])

    def _open(self, path: Path) -> torch.Tensor:
        """Normalised pixels (3, 32, 32) of an image that is cropped from itself with a margin of 4, and mirrored half of the time."""
        with Image.open(path) as file:
            image = ImageOps.expand(file.convert("RGB"), border=4)
        left, top = random.randrange(9), random.randrange(9)
        image = image.crop((left, top, left + SIDE, top + SIDE))
        if random.random() < 0.5:
            image = ImageOps.mirror(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def soft_label(a: int, b: int, step: int) -> torch.Tensor:
    """(K,), linear in the ratio."""
    share = step / (RATIOS - 1)
    return share * F.one_hot(torch.tensor(a), CLASSES) + (1 - share) * F.one_hot(torch.tensor(b), CLASSES)


def _images(rows: int) -> tuple[Split, MixedSet]:
    """Random real images with labels, and mixed sets."""
    draw = torch.Generator().manual_seed(0)
    count = len(PAIRS) * SETS * RATIOS
    real, mixed = (torch.randint(0, 256, (number, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8) for number in (rows, count))
    soft = torch.stack([soft_label(a, b, step) for a, b in PAIRS for _ in range(SETS) for step in range(RATIOS)])
    class_a, class_b = torch.tensor(PAIRS).repeat_interleave(SETS, dim=0).unbind(dim=1)
    ratios = torch.linspace(0, 1, RATIOS)
    sets = MixedSet(mixed, soft, torch.arange(count).view(-1, RATIOS), class_a, class_b, ratios)
    return (real, torch.arange(rows) % CLASSES), sets


def _write_png(root: Path, rows: int) -> None:
    """The images of ``_images``, each in a file of its own."""
    (real, labels), mixed = _images(rows)
    names = [f"{a}_{b}_{group}_{step}" for a, b in PAIRS for group in range(SETS) for step in range(RATIOS)]
    for folder, files, images in (
        ("real", [f"{number:08d}_{label}" for number, label in enumerate(labels.tolist())], real),
        ("mixed", names, mixed.images),
    ):
        (root / folder).mkdir()
        for name, image in zip(files, images.permute(0, 2, 3, 1).numpy(), strict=True):
            Image.fromarray(image).save(root / folder / f"{name}.png")


def _classifier(network: str) -> Classifier:
    torch.manual_seed(0)
    spec = ClassifierSpec(network, {}, 3, tuple(str(label) for label in range(CLASSES)), MEAN, STD)
    if network:
        return build_classifier(spec)
    return Classifier(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES)), spec)


def _in_a_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """``function(*arguments)`` in a new process, which may have processes of its own, with as many threads as this one."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.submit(function, *arguments).result()


def _peak() -> int:
    """MiB."""
    if device_kind() == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return peak_mib()
