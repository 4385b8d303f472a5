from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from csm import tables
from csm.encoders import FeatureTable
from csm.reannotation.heads import FitInputs

Split = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def fit_inputs(tmp_path: Path) -> Callable[..., FitInputs]:
    """``fit_inputs(train, val)`` writes a `features` table of (features (N, F), labels (N,)) in two parts, splits mixed up."""

    def write(train: Split, val: Split | None = None, n_classes: int = 3) -> FitInputs:
        directory = tmp_path / "features"
        splits = {"train": train} if val is None else {"train": train, "val": val}
        features = torch.cat([x for x, _ in splits.values()]).numpy()
        labels = torch.cat([y for _, y in splits.values()]).numpy().astype(np.uint16)
        names = [name for name, (x, _) in splits.items() for _ in range(len(x))]
        schema = tables.features(features.shape[1])
        columns = {"image_id": np.arange(len(labels), dtype=np.uint32), "split": names, "label": labels, "feature": features}
        frame = pl.DataFrame(columns, schema=dict(schema)).sample(fraction=1.0, shuffle=True, seed=0)
        half = len(frame) // 2
        for number, part in enumerate((frame[:half], frame[half:])):
            tables.write(part.sort("image_id"), directory / f"part-{number:08d}.parquet", schema)
        return FitInputs(FeatureTable(directory), n_classes, tuple("abcdefgh"[:n_classes]))

    return write


@pytest.fixture(scope="session")
def clouds() -> Callable[..., Split]:
    """``clouds(rows, seed)`` draws features float32 (rows, size) of three overlapping Gaussians, ``alike`` in shape or not, and labels.

    Rows are of classes 0, 0, 1, 2, in turn; classes are the same for every seed.
    """

    def draw(rows: int, seed: int = 0, size: int = 5, alike: bool = False) -> Split:
        fixed, own = np.random.default_rng(7), np.random.default_rng(seed)
        means, shapes = fixed.normal(0, 1.5, (3, size)), fixed.normal(0, 0.7, (3, size, size))
        labels = np.resize([0, 0, 1, 2], rows)
        shapes = shapes[[0, 0, 0]] if alike else shapes
        x = 4.0 + means[labels] + np.einsum("nij,nj->ni", shapes[labels], own.normal(size=(rows, size)))
        return torch.from_numpy(x).float(), torch.from_numpy(labels)

    return draw
