from pathlib import Path

import polars as pl
import pytest
import torch

from csm import tables
from csm.encoders import FeatureTable
from csm.errors import InputError
from csm.reannotation import HEADS
from csm.reannotation.heads import FitInputs

SIZE, CLASSES = 6, 3


@pytest.fixture
def inputs(tmp_path: Path) -> FitInputs:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % CLASSES
    features = torch.randn(120, SIZE, generator=draw) + labels[:, None]
    schema = tables.features(SIZE)
    frame = pl.DataFrame(
        {
            "image_id": list(range(120)),
            "split": ["train"] * 90 + ["val"] * 30,
            "label": labels.tolist(),
            "feature": features.numpy(),
        },
        schema=dict(schema),
    )
    tables.write(frame, tmp_path / "features" / "part-00000000.parquet", schema)
    return FitInputs(FeatureTable(tmp_path / "features"), CLASSES, ("a", "b", "c"))


@pytest.mark.parametrize("name", ["projection", "lda", "qda", "knn", "linear"])
def test_features_of_another_size_are_refused_in_one_line(name: str, inputs: FitInputs, tmp_path: Path) -> None:
    HEADS[name].fit(tmp_path, inputs)
    head = HEADS[name].load(tmp_path)
    pair = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64), torch.ones(2)
    with pytest.raises(InputError, match=f"{name}: it was fitted on 6 numbers for each image, the encoder gives 5"):
        head.share(torch.zeros(2, 5), *pair) if HEADS[name].pair else head(torch.zeros(2, 5))
