import numpy as np
import polars as pl
import pytest
import torch

from csm.errors import InputError
from csm.logits_files import read_logits

LOGITS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2])
PROBS = torch.from_numpy(LOGITS).softmax(dim=1).numpy()


@pytest.fixture
def npz(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "logits.npz", **arrays)
        return tmp_path / "logits.npz"

    return write


@pytest.mark.parametrize("key", ["labels", "label", "targets"])
def test_npz(npz, key):
    read = read_logits(npz(logits=LOGITS, **{key: LABELS}))
    assert torch.equal(read.logits, torch.from_numpy(LOGITS))
    assert read.labels.tolist() == LABELS.tolist()
    assert (read.logits.dtype, read.labels.dtype, read.splits) == (torch.float32, torch.int64, ())


@pytest.mark.parametrize("key", ["probs", "probabilities"])
def test_probabilities_become_logarithms_with_the_same_softmax(npz, key):
    read = read_logits(npz(labels=LABELS[:, None], **{key: PROBS}))
    torch.testing.assert_close(read.logits.softmax(dim=1), torch.from_numpy(PROBS))


def test_a_probability_of_0_stays_finite(npz):
    read = read_logits(npz(probs=np.eye(3)[LABELS], labels=LABELS))
    assert read.logits.isfinite().all()
    assert read.logits.dtype == torch.float64


@pytest.mark.parametrize("dtype", [pl.List(pl.Float32), pl.Array(pl.Float32, 3)])
def test_parquet_with_splits(tmp_path, dtype):
    path = tmp_path / "predictions.parquet"
    logits = pl.Series(LOGITS.tolist(), dtype=dtype)
    pl.DataFrame({"split": ["val"] * 4 + ["test"] * 2, "label": LABELS, "logits": logits}).write_parquet(path)
    read = read_logits(path)
    torch.testing.assert_close(read.logits, torch.from_numpy(LOGITS))
    test = read.split("test")
    assert (test.labels.tolist(), len(test.logits)) == ([1, 2], 2)


def test_half_and_whole_numbers_are_read_as_floating_point(npz):
    assert read_logits(npz(logits=LOGITS.astype(np.float16), labels=LABELS)).logits.dtype == torch.float32
    assert read_logits(npz(logits=LABELS[:, None] * np.arange(3), labels=LABELS)).logits.dtype == torch.float64


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"logits": LOGITS}, "no labels or label or targets in it; it has logits"),
        ({"scores": LOGITS, "y": LABELS}, "no logits or probs or probabilities in it; it has scores, y"),
        ({"logits": LOGITS[0], "labels": LABELS}, r"logits is float32 of shape \(3,\)"),
        ({"logits": LOGITS[:0], "labels": LABELS[:0]}, r"shape \(0, 3\)"),
        ({"logits": LOGITS[:, :1], "labels": LABELS}, "K >= 2"),
        ({"logits": np.array([["a", "b"]]), "labels": LABELS[:1]}, "expected numbers"),
        ({"logits": np.where(LOGITS > 1, np.nan, LOGITS), "labels": LABELS}, "nan or inf in [1-6] of 6 rows"),
        ({"logits": LOGITS, "labels": LABELS[:4]}, r"labels is int64 of shape \(4,\); expected a whole number for each of 6"),
        ({"logits": LOGITS, "labels": LABELS.astype(float)}, "labels is float64"),
        ({"logits": LOGITS, "labels": LABELS + 1}, "values from 1 to 3; expected 0 to 2, as logits has 3 columns"),
        ({"logits": LOGITS, "labels": LABELS - 1}, "values from -1 to 1"),
        ({"probs": LOGITS, "labels": LABELS}, "or name them logits"),
        ({"probs": 0.5 * PROBS, "labels": LABELS}, "sums to 1 only within 0.5"),
        ({"logits": np.array([LOGITS, None], dtype=object), "labels": LABELS}, "pickled objects, which are never read"),
    ],
)
def test_bad_arrays_are_told_in_one_line(npz, arrays, said):
    with pytest.raises(InputError, match=said) as caught:
        read_logits(npz(**arrays))
    assert "\n" not in str(caught.value)


def test_bad_files_are_told_in_one_line(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_logits(tmp_path / "no.npz")
    with pytest.raises(InputError, match=r"expected a file \*.npz or \*.parquet"):
        read_logits(tmp_path / "logits.pt")
    for name, said in (("a.npz", "no whole file of plain numpy arrays"), ("a.parquet", "not a whole parquet file")):
        (tmp_path / name).write_bytes(b"PAR1 nonsense")
        with pytest.raises(InputError, match=said) as caught:
            read_logits(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_uneven_and_missing_rows_of_parquet_are_told(tmp_path):
    path = tmp_path / "a.parquet"
    pl.DataFrame({"logits": [[1.0, 2.0], [1.0]], "label": [0, 1]}).write_parquet(path)
    with pytest.raises(InputError, match="lists of 1 to 2 numbers"):
        read_logits(path)
    pl.DataFrame({"logits": [[1.0, 2.0], None], "label": [0, 1]}).write_parquet(path)
    with pytest.raises(InputError, match="logits is missing in 1 of 2 rows"):
        read_logits(path)
