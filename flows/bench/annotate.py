"""bench annotate: images per second of annotation against the original's procedure, with the same encoder on one device."""

import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from PIL import Image
from torch import nn

from cluster.shards import part_path, plan_shards, read_plan, write_part
from csm import tables
from csm.encoders import Encoder, FeatureTable, encode_table
from csm.encoders.classifier import Penultimate
from csm.planning import PlanConfig, make_plan
from csm.reannotation import HEADS, Annotator, AnnotatorSpec, FitInputs, annotate
from flows.bench.clock import device_kind, now, peak_mib
from flows.progress import say

SHAPE, CLASSES, RATIOS = (32, 32, 3), 10, 8
SHARD_ROWS = 2048  # at most, as by default
REAL = 0.28  # real images for each mixed one: the paper's CIFAR-10 set has 45,000 for 159,840


def annotation_speed(images: int = 16_000, encoder: str = "clip-tiny") -> dict[str, Any]:
    """Throughput of the paper's annotator (projection) by this code and by the original's procedure, on random 32x32 colour images.

    The baseline is written from the description of the original, in float32: one encoder call for each real image to get the
    prototypes; the mixed images are PNG files named by classes, set and step, their names are listed once; for each mixed set all names
    are searched for its prefix, its eight files are opened, and the encoder is called for the eight. Ours: part files, ``encode_table``
    over the real images, prototypes from the `features` table, ``annotate`` and ``write_part`` over shards. Nothing is extrapolated.

    What both gain or lose lies in the encoder's fixed cost of a call and in its arithmetic, so there are two encoders with random
    weights. ``clip-tiny`` is as deep as CLIP's ViT-B/32 and so narrow that on a CPU, as ViT-B/32 on a GPU, a call for one image costs
    nearly as much as one for a hundred; and with so little arithmetic, what is not the encoder shows most. ``small-cnn`` is the
    network of the pipeline's own classifiers; on a CPU its arithmetic bounds both ways alike, and the ratio cannot be large.

    Args:
        images: mixed images; there are ``REAL`` times as many real ones. Rounded up to whole sets and four equal parts.
        encoder: a key of ``ENCODERS``.

    Returns:
        encoder, device, images, real; seconds_quarter, seconds_half, seconds (a quarter, half and all of the images, real and mixed, in
        processes of their own), linearity (seconds over four times seconds_quarter), images_per_s, forward_share (of the encoder's
        forward in our time), peak_mib_quarter, peak_mib (resident, of the process); baseline_s, baseline_images_per_s,
        baseline_forward_s, baseline_scan_s (searching names), ratio; max_difference (of the share of class a between the two),
        load_before (processes that wanted to run in the minute before).
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="csm-bench-") as folder:
        root = Path(folder)
        say(f"{images} mixed images as part files and as PNG files")
        total, real = _write_images(root, images)
        mine = []
        for share in (4, 2, 1):
            say(f"ours: {encoder}, {total // share} mixed images")
            mine.append(_in_a_process(_ours, root, encoder, share))
        say(f"baseline: a call for each of {real} real images and each of {total // RATIOS} sets")
        original = _in_a_process(_original, root, encoder)
        shards = sorted((root / "annotations").glob("part-*.parquet"))
        shares = pl.concat([tables.read(part, tables.annotations(CLASSES)) for part in shards])["lam_raw"].to_numpy()
        difference = np.abs(shares - np.load(root / "original.npy")).max()
    quarter, half, whole = mine
    return {
        "encoder": encoder,
        "device": torch.cuda.get_device_name() if device_kind() == "cuda" else f"CPU, threads: {torch.get_num_threads()}",
        "images": total,
        "real": real,
        "seconds_quarter": round(quarter["seconds"], 2),
        "seconds_half": round(half["seconds"], 2),
        "seconds": round(whole["seconds"], 2),
        "linearity": round(whole["seconds"] / quarter["seconds"] / 4, 3),
        "images_per_s": round(total / whole["seconds"], 1),
        "forward_share": round(whole["forward"] / whole["seconds"], 3),
        "peak_mib_quarter": quarter["peak"],
        "peak_mib": whole["peak"],
        "baseline_s": round(original["seconds"], 2),
        "baseline_images_per_s": round(total / original["seconds"], 1),
        "baseline_forward_s": round(original["forward"], 2),
        "baseline_scan_s": round(original["scan"], 2),
        "ratio": round(original["seconds"] / whole["seconds"], 2),
        "max_difference": float(f"{difference:.2g}"),
        "load_before": round(load, 2),
    }


class _Clip(nn.Module):
    """CLIP's vision tower with the depth and the patches of ViT-B/32, but of width 48: an image is one patch."""

    def __init__(self) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        size = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 3, "projection_dim": 48}
        self.tower = CLIPVisionModelWithProjection(
            CLIPVisionConfig(**size, num_hidden_layers=12, image_size=SHAPE[0], patch_size=32)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        embedding: torch.Tensor = self.tower(pixel_values=images.float() / 127.5 - 1).image_embeds
        return embedding


def _small_cnn() -> Penultimate:
    from csm.classifiers import ClassifierSpec, build_classifier

    names = tuple(str(label) for label in range(CLASSES))
    return Penultimate(build_classifier(ClassifierSpec("small-cnn", {}, SHAPE[2], names, (0.5,) * SHAPE[2], (0.25,) * SHAPE[2])))


ENCODERS: dict[str, Callable[[], nn.Module]] = {"clip-tiny": _Clip, "small-cnn": _small_cnn}


class _Timed:
    """An encoder that knows the seconds its calls took."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.network = ENCODERS[name]().eval().requires_grad_(False).to(device_kind())
        self.seconds = 0.0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        started = now()
        features: torch.Tensor = self.network(images)
        self.seconds += now() - started
        return features

    def to(self, device: torch.device) -> Encoder:
        raise NotImplementedError


def _ours(root: Path, name: str, share: int) -> dict[str, float]:
    """Annotate the first ``1 / share`` of the shards, with prototypes of as much of the real images."""
    encoder = _Timed(name)
    shards = list(plan_shards(root / "plan.parquet"))
    _annotate(root, name, encoder, shards[:1])  # what is slow only once is not counted
    encoder.seconds = 0.0
    started = now()
    _annotate(root, name, encoder, shards[: len(shards) // share])
    seconds = now() - started
    return {"seconds": seconds, "forward": encoder.seconds, "peak": peak_mib()}


def _annotate(root: Path, name: str, encoder: _Timed, shards: Sequence[int]) -> None:
    features = FeatureTable(root / f"features-{len(shards)}")
    for shard in shards:
        frame = encode_table(encoder, tables.read(part_path(root / "real", shard), tables.REAL), SHAPE, device_kind())
        write_part(frame, features.directory, shard, frame.schema, "bench")
    head = root / f"head-{len(shards)}"
    HEADS["projection"].fit(head, FitInputs(features, CLASSES, tuple("0123456789")))
    annotators = {"projection": Annotator(AnnotatorSpec("projection", "projection", head, name), device_kind())}
    for shard in shards:
        mixed = tables.read(part_path(root / "mixed", shard), tables.MIXED)
        plan = read_plan(root / "plan.parquet", shard)
        frames = annotate(plan, mixed, annotators, {name: encoder}, SHAPE, CLASSES, device_kind())
        write_part(frames["projection"], root / "annotations", shard, tables.annotations(CLASSES), "bench")


@torch.no_grad()
def _original(root: Path, name: str) -> dict[str, float]:
    """Annotate everything image by image and set by set; the shares go to ``original.npy`` in the plan's order."""
    encoder = _Timed(name)
    encoder(torch.zeros(RATIOS, SHAPE[2], *SHAPE[:2], dtype=torch.uint8, device=device_kind()))
    encoder.seconds = 0.0
    plan = tables.read(root / "plan.parquet", tables.PLAN)
    sets = plan.select("class_a", "class_b", "group").unique(maintain_order=True).rows()
    scan = 0.0
    shares = []
    started = now()
    features: dict[int, list[torch.Tensor]] = {}
    for file in sorted(os.listdir(root / "real-png")):
        label = int(file.removesuffix(".png").split("_")[1])
        features.setdefault(label, []).append(encoder(_read(root / "real-png" / file)[None])[0])
    prototypes = {label: torch.stack(own).mean(dim=0) for label, own in features.items()}
    names = os.listdir(root / "mixed-png")
    for class_a, class_b, group in sets:
        before, prefix = time.monotonic(), f"{class_a}_{class_b}_{group}_"
        found = sorted([file for file in names if file.startswith(prefix)])
        scan += time.monotonic() - before
        encoded = encoder(torch.stack([_read(root / "mixed-png" / file) for file in found]))
        line = prototypes[class_a] - prototypes[class_b]
        shares += ((encoded - prototypes[class_b]) @ line / (line @ line)).tolist()
    seconds = now() - started
    np.save(root / "original.npy", np.array(shares, dtype=np.float32))
    return {"seconds": seconds, "forward": encoder.seconds, "scan": scan}


def _read(path: Path) -> torch.Tensor:
    """uint8 (C, H, W) on the device."""
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).to(device_kind())


def _write_images(root: Path, images: int) -> tuple[int, int]:
    """The plan, and random real and mixed images twice: as part files and as PNG files. Gives the numbers of mixed and real images."""
    shards = 4 * math.ceil(images / 4 / SHARD_ROWS)
    rows = RATIOS * math.ceil(images / shards / RATIOS)
    sets = math.ceil(shards * rows / RATIOS / math.comb(CLASSES, 2))
    plan = make_plan(CLASSES, "bench", "bench", PlanConfig(ratios=RATIOS, sets_per_pair=sets, shard_rows=rows))
    plan = plan.head(shards * rows)
    tables.write(plan, root / "plan.parquet", tables.PLAN)
    each = max(CLASSES, round(REAL * rows))
    draw = torch.Generator().manual_seed(0)
    for folder in ("real-png", "mixed-png"):
        (root / folder).mkdir()
    for shard in range(shards):
        pixels = torch.randint(0, 256, (each, SHAPE[2], *SHAPE[:2]), generator=draw).to(torch.uint8)
        number = np.arange(shard * each, (shard + 1) * each)
        real = {"image_id": number, "split": ["train"] * each, "label": number % CLASSES, "image": tables.from_images(pixels)}
        write_part(pl.DataFrame(real, schema=dict(tables.REAL)), root / "real", shard, tables.REAL, "bench")
        _write_png(root / "real-png", [f"{index:08d}_{index % CLASSES}" for index in number], pixels)
        pixels = torch.randint(0, 256, (rows, SHAPE[2], *SHAPE[:2]), generator=draw).to(torch.uint8)
        own = plan.filter(pl.col("shard") == shard)
        write_part(own.select("mix_id", tables.from_images(pixels)), root / "mixed", shard, tables.MIXED, "bench")
        names = own.select("class_a", "class_b", "group", "step").iter_rows()
        _write_png(root / "mixed-png", ["_".join(map(str, values)) for values in names], pixels)
    return shards * rows, shards * each


def _write_png(folder: Path, names: list[str], pixels: torch.Tensor) -> None:
    for name, image in zip(names, pixels.permute(0, 2, 3, 1).numpy(), strict=True):
        Image.fromarray(image).save(folder / f"{name}.png")


def _in_a_process(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """``function(*arguments)`` in a new process, with as many threads as this one."""
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.apply(function, arguments)
