from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from csm import tables
from csm.errors import InputError
from csm.planning import PlanConfig, make_plan


def real_frame(rows: int = 4) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "image_id": pl.Series(range(rows), dtype=pl.UInt32),
            "split": pl.Series([tables.SPLITS[row % 3] for row in range(rows)], dtype=tables.SPLIT),
            "label": pl.Series([row % 2 for row in range(rows)], dtype=pl.UInt16),
            "image": pl.Series([bytes([row, 0, 255]) for row in range(rows)], dtype=pl.Binary),
        }
    )


def annotation_frame(cells: list[list[float] | None]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "mix_id": [f"id-{row}" for row in range(len(cells))],
            "lam_raw": pl.Series([float("nan"), -0.25, 1.5][: len(cells)], dtype=pl.Float32),
            "log_posterior": pl.Series(cells, dtype=pl.Array(pl.Float32, 2)),
        }
    )


def test_pieces_make_the_table_that_they_are_of(tmp_path: Path) -> None:
    frame = real_frame(7).drop("split")
    schema = {name: dtype for name, dtype in tables.REAL.items() if name != "split"}
    with tables.in_pieces(tmp_path / "whole.parquet", schema) as write:
        for start in (0, 3, 6):
            write(frame.slice(start, 3))
            assert not (tmp_path / "whole.parquet").exists()
    assert tables.read(tmp_path / "whole.parquet", schema).equals(frame)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.parquet"]


def test_a_piece_of_another_schema_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    def write_both() -> None:
        with tables.in_pieces(tmp_path / "whole.parquet", tables.MIXED) as write:
            write(pl.DataFrame({"mix_id": ["a"], "image": [b"x"]}))
            write(pl.DataFrame({"mix_id": ["a"], "image": ["x"]}))

    with pytest.raises(InputError, match="column 'image' should be Binary, got String"):
        write_both()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("column", "dtype"),
    [
        ("image_id", pl.Int64),
        ("split", pl.String),
        ("split", pl.Enum(["train", "test", "val"])),  # the same names in another order are other codes
        ("label", pl.UInt8),
        ("image", pl.List(pl.UInt8)),
    ],
)
def test_a_column_of_another_dtype_is_named(column: str, dtype: pl.DataType) -> None:
    frame = real_frame()
    wrong = pl.Series(column, [[1]] * 4, dtype=dtype) if column == "image" else frame[column].cast(pl.String).cast(dtype)
    with pytest.raises(InputError, match=rf"^here: column '{column}' should be "):
        tables.check(frame.with_columns(wrong), tables.REAL, "here")


def test_an_array_of_another_length_is_another_dtype() -> None:
    frame = annotation_frame([[0.0, 1.0]])
    assert tables.check(frame, tables.annotations(2)) is frame
    with pytest.raises(InputError, match="'log_posterior'"):
        tables.check(frame, tables.annotations(3))


@pytest.mark.parametrize(
    "columns",
    [["image_id", "split", "label"], ["split", "image_id", "label", "image"], ["image_id", "split", "label", "image", "more"]],
    ids=["missing", "order", "extra"],
)
def test_other_columns_are_named(columns: list[str]) -> None:
    frame = real_frame().with_columns(more=pl.lit(1)).select(columns)
    with pytest.raises(InputError, match=r"expected columns .*'image_id', 'split', 'label', 'image'.* got ") as caught:
        tables.check(frame, tables.REAL)
    assert str(columns) in str(caught.value)


def test_enum_and_binary_survive_the_file(tmp_path: Path) -> None:
    frame = real_frame().with_columns(image=pl.Series([b"", b"\x00\x00", b"\xff" * 300, b"a\nb"], dtype=pl.Binary))
    tables.write(frame, tmp_path / "deep" / "real.parquet", tables.REAL)
    again = tables.read(tmp_path / "deep" / "real.parquet", tables.REAL)
    assert again.schema == frame.schema
    assert again.equals(frame)


@pytest.mark.parametrize("cells", [[[0.0, -1.5], None, [float("-inf"), 2.0]], [None, None, None]], ids=["some-null", "all-null"])
def test_arrays_and_nulls_survive_the_file(tmp_path: Path, cells: list[list[float] | None]) -> None:
    frame = annotation_frame(cells)
    tables.write(frame, tmp_path / "part.parquet", tables.annotations(2))
    again = tables.read(tmp_path / "part.parquet", tables.annotations(2))
    assert again["log_posterior"].to_list() == cells
    assert again.equals(frame)  # polars counts NaN equal to NaN


def test_a_table_without_rows_survives_the_file(tmp_path: Path) -> None:
    tables.write(real_frame(0), tmp_path / "none.parquet", tables.REAL)
    assert tables.read(tmp_path / "none.parquet", tables.REAL).equals(real_frame(0))


def test_a_refused_table_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "real.parquet"
    tables.write(real_frame(), path, tables.REAL)
    with pytest.raises(InputError, match=r"real.parquet: expected columns"):
        tables.write(real_frame().drop("label"), path, tables.REAL)
    assert tables.read(path, tables.REAL).equals(real_frame())
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent.parquet does not exist"):
        tables.read(tmp_path / "absent.parquet", tables.REAL)


def test_a_file_of_another_schema_is_named(tmp_path: Path) -> None:
    tables.write(real_frame(), tmp_path / "real.parquet", tables.REAL)
    with pytest.raises(InputError, match=r"real.parquet: expected columns"):
        tables.read(tmp_path / "real.parquet", tables.MIXED)


def test_every_truncation_is_seen_and_the_file_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.parquet"
    tables.write(real_frame(), path, tables.REAL, {"key": "value"})
    whole = path.read_bytes()
    for length in [0, 1, 4, *range(5, len(whole) - 8, 97), *range(len(whole) - 8, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut.parquet is not a whole parquet file"):
            tables.read(path, tables.REAL)
        assert tables.metadata(path) is None


def test_no_damage_to_the_footer_is_more_than_bad_input(tmp_path: Path) -> None:
    # polars panics for some of these, and a panic is no Exception.
    path = tmp_path / "flipped.parquet"
    tables.write(real_frame(), path, tables.REAL)
    whole = path.read_bytes()
    messages = []
    for place in range(len(whole) - 600, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            tables.check(tables.read(path, tables.REAL), tables.REAL)
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert all("flipped.parquet" in message for message in messages)


def test_a_text_file_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "text.parquet"
    path.write_text("mix_id,image\n1,2\n")
    with pytest.raises(InputError, match=r"text.parquet"):
        tables.read(path, tables.MIXED)


def test_metadata_comes_back_without_the_rows(tmp_path: Path) -> None:
    tables.write(real_frame(), tmp_path / "real.parquet", tables.REAL, {"csm.key": "abc", "csm.rows": "4"})
    footer = tables.metadata(tmp_path / "real.parquet")
    assert footer is not None
    assert (footer["csm.key"], footer["csm.rows"]) == ("abc", "4")
    assert tables.metadata(tmp_path / "absent.parquet") is None


@pytest.mark.parametrize("shape", [(2, 3, 3), (3, 2, 1), (1, 1, 3)])
def test_bytes_are_read_row_by_row_channels_last(shape: tuple[int, int, int]) -> None:
    height, width, channels = shape
    cells = [np.random.default_rng(row).integers(0, 256, height * width * channels, dtype=np.uint8).tobytes() for row in range(3)]
    images = tables.to_images(pl.Series("image", cells, dtype=pl.Binary), shape)
    assert images.dtype == torch.uint8
    assert images.shape == (3, channels, height, width)
    for number, cell in enumerate(cells):
        for y in range(height):
            for x in range(width):
                for channel in range(channels):
                    assert images[number, channel, y, x] == cell[(y * width + x) * channels + channel]


def test_images_survive_the_column() -> None:
    images = torch.randint(0, 256, (5, 3, 2, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    strided = images.transpose(2, 3).contiguous().transpose(2, 3)  # the same values, not contiguous
    column = tables.from_images(strided)
    assert column.dtype == pl.Binary
    assert torch.equal(tables.to_images(column, (2, 4, 3)), images)


def test_no_rows_are_no_images() -> None:
    assert tables.to_images(pl.Series("image", [], dtype=pl.Binary), (2, 4, 3)).shape == (0, 3, 2, 4)


@pytest.mark.parametrize(
    "cells",
    [[b"\x00" * 6, b"\x00" * 5], [b"\x00" * 6, b"\x00" * 7], [b"\x00" * 5, b"\x00" * 7], [b""], [b"\x00" * 6, None]],
    ids=["short", "long", "total-right", "empty", "null"],
)
def test_a_wrong_number_of_bytes_is_refused(cells: list[bytes | None]) -> None:
    with pytest.raises(InputError, match=r"expected 6 per image for shape \(2, 1, 3\)"):
        tables.to_images(pl.Series("image", cells, dtype=pl.Binary), (2, 1, 3))


def test_annotations_are_read_whole_or_truncated(tmp_path: Path) -> None:
    whole = annotation_frame([[0.0, -1.0], None])
    tables.write(whole, tmp_path / "whole.parquet", tables.annotations(2))
    assert tables.read_annotations(tmp_path / "whole.parquet", 2).equals(whole, null_equal=True)
    with pytest.raises(InputError, match=r"column 'log_posterior' should be Array\(Float32, shape=\(3,\)\)"):
        tables.read_annotations(tmp_path / "whole.parquet", 3)
    rest = pl.Series("log_rest", [-3.0, None], dtype=pl.Float32)
    stored = whole.with_columns(pl.Series("classes", [[4, 1], None], dtype=pl.Array(pl.UInt16, 2)), rest)
    stored = stored.select("mix_id", "lam_raw", "classes", "log_posterior", "log_rest")
    tables.write(stored, tmp_path / "stored.parquet", tables.annotations(5, 2))
    assert tables.read_annotations(tmp_path / "stored.parquet", 5).equals(stored, null_equal=True)
    other = tables.annotations(5, 2) | {"log_rest": pl.Float64()}
    tables.write(stored.cast({"log_rest": pl.Float64}), tmp_path / "other.parquet", other)
    with pytest.raises(InputError, match="column 'log_rest' should be Float32, got Float64"):
        tables.read_annotations(tmp_path / "other.parquet", 5)


def test_a_plan_of_a_version_without_kinds_is_of_mixtures(tmp_path: Path) -> None:
    plan = make_plan(3, "data", "net", PlanConfig(ratios=3, sets_per_pair=2))
    plan.drop("kind").write_parquet(tmp_path / "plan.parquet")
    assert tables.read_plan(tmp_path / "plan.parquet").equals(plan)
    assert tables.read_plan(tmp_path / "plan.parquet", "pixel").is_empty()
    plan.drop("seed").write_parquet(tmp_path / "plan.parquet")
    with pytest.raises(InputError, match=r"plan.parquet: expected columns \['mix_id'"):
        tables.read_plan(tmp_path / "plan.parquet")
