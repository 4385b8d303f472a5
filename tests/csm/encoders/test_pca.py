from pathlib import Path

import pytest
import torch
from sklearn import decomposition

from csm import storage
from csm.encoders import ENCODERS, Sources
from csm.encoders.pca import fit_pca, load_pca
from csm.errors import InputError


def images(rows: int = 60, side: int = 5, seed: int = 0) -> torch.Tensor:
    """Two channels; the directions of largest variance stand out, one column never changes."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 20, (rows, 2, side, side), generator=draw)
    for step, cell in enumerate((0, 3, 7, 12, 16)):
        x.flatten(1)[:, cell] += torch.randint(0, 230 - 40 * step, (rows,), generator=draw)
    x[..., -1] = 9
    return x.to(torch.uint8)


def fitted(tmp_path: Path, x: torch.Tensor, components: int, batch: int = 7) -> Sources:
    sources = Sources(tmp_path / str(batch))
    fit_pca(sources, lambda: iter(x.split(batch)), components)
    return sources


def test_components_are_those_of_scikit_learn(tmp_path: Path) -> None:
    found = load_pca(fitted(tmp_path, images(), 5), 5)(images(9, seed=1))
    reference = decomposition.PCA(5, svd_solver="full").fit((images().flatten(1).double() / 127.5 - 1).numpy())
    expected = torch.from_numpy(reference.transform((images(9, seed=1).flatten(1).double() / 127.5 - 1).numpy()))
    assert found.dtype == torch.float32
    signs = (found.double() * expected).sum(dim=0).sign()
    assert torch.allclose(found.double(), expected * signs, atol=1e-4)


def test_signs_and_batches_make_no_difference(tmp_path: Path) -> None:
    small, whole = (load_pca(fitted(tmp_path, images(), 5, batch), 5) for batch in (7, 60))
    assert torch.allclose(small.components, whole.components, atol=1e-5)
    largest = whole.components.gather(0, whole.components.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()


def test_no_more_directions_than_the_images_vary_in(tmp_path: Path) -> None:
    for rows, rank in ((60, 40), (4, 3)):  # 50 numbers, of which 10 are constant; rows - 1
        sources = fitted(tmp_path, images(rows), rank)
        assert load_pca(sources, rank)(images(2)).shape == (2, rank)
        with pytest.raises(InputError, match=rf"vary in {rank} directions: set components to that or less, got {rank + 1}"):
            fitted(tmp_path, images(rows), rank + 1)


def test_bad_settings_and_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="components: expected a number of at least 1, got 0"):
        fitted(tmp_path, images(), 0)
    with pytest.raises(InputError, match="vary in 0 directions"):
        fitted(tmp_path, torch.zeros(4, 1, 3, 3, dtype=torch.uint8), 1)
    with pytest.raises(InputError, match="there are no training images"):
        fit_pca(Sources(tmp_path), lambda: iter(()))
    with pytest.raises(InputError, match=r"images of 4098 numbers are too large, it takes at most 4096: set data.size lower"):
        fitted(tmp_path, torch.zeros(2, 1, 1, 4098, dtype=torch.uint8), 1)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    sources = fitted(tmp_path, images(), 5)
    with pytest.raises(InputError, match="fitted on images of 50 numbers, these have 18"):
        load_pca(sources, 5)(images(side=3))
    with pytest.raises(InputError, match=r"pca.safetensors has 5 components, not 4: fit the annotators again"):
        load_pca(sources, 4)
    with pytest.raises(InputError, match=r"absent/pca.safetensors does not exist"):
        load_pca(Sources(tmp_path / "absent"))


def test_it_is_registered_and_fitted_first(tmp_path: Path) -> None:
    kind = ENCODERS["pca"]
    assert kind.fit is not None
    kind.fit(Sources(tmp_path), lambda: iter([images()]), components=3)
    assert kind.load(Sources(tmp_path), components=3)(images()).shape == (60, 3)
    assert set(storage.read_tensors(tmp_path / "pca.safetensors")) == {"mean", "components"}
