"""What is written is read back with other means: Pillow, tarfile, json, pyarrow; labels are those of the definition."""

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import pytest
from PIL import Image
from pyarrow import parquet

from csm.datasets import load_dataset
from csm.errors import InputError
from csm.export import ENCODE_ROWS, FORMATS, WORK, encode, rows, safe_names
from csm.export_card import Card
from csm.planning import PlanConfig, make_plan
from csm.reannotation import Calibration, soft_labels

NAMES = ("black cat", "dog/wolf", "größe \u2028 “猫”\n: {x}")
GREY, COLOUR = (5, 4, 1), (4, 6, 3)


def card(form, shape, total, annotator="teacher"):
    calibration = Calibration("temperature", images=30, nll_before=1.0, nll_after=0.9, temperature=2.0) if annotator else None
    return Card("9.9", form, total, 8, "tiny", "pets", shape, NAMES, "unet", {}, {}, annotator, calibration, {"mix": "abc"})


@pytest.fixture
def made():
    """``made(shape)`` gives plan (18 rows), images by mix_id, the `mixed` table and annotations, each in an order of its own."""

    def make(shape):
        draw = np.random.default_rng(0)
        plan = make_plan(3, "data", "generator", PlanConfig(ratios=3, sets_per_pair=2, shard_rows=7))
        pixels = {mix_id: draw.integers(0, 256, shape, np.uint8) for mix_id in plan["mix_id"]}
        mixed = pl.DataFrame({"mix_id": list(pixels), "image": [image.tobytes() for image in pixels.values()]}).sample(
            fraction=1, shuffle=True, seed=1
        )
        posterior = np.log(draw.dirichlet(np.ones(3), len(plan))).astype(np.float32)
        annotations = plan.select(
            "mix_id",
            lam_raw=pl.Series(draw.normal(size=len(plan)), dtype=pl.Float32),
            log_posterior=pl.Series(posterior, dtype=pl.Array(pl.Float32, 3)),
        ).sample(fraction=1, shuffle=True, seed=2)
        return plan, pixels, mixed, annotations

    return make


def softmax(row, temperature):
    powers = np.exp(np.float64(row) / temperature)
    return powers / powers.sum()


def expected(plan, annotations, temperature=2.0):
    """mix_id -> soft label, from the definition."""
    posterior = {mix_id: softmax(row, temperature) for mix_id, _, row in annotations.iter_rows()}
    return {mix_id: posterior[mix_id] for mix_id in plan["mix_id"]}


def written(form, directory, made, shape, annotator="teacher"):
    """Write three pieces of 8, 8 and 2 rows; gives their names and what they were made of."""
    plan, pixels, mixed, annotations = made(shape)
    about = card(form, shape, len(plan), annotator)
    labels = soft_labels(plan, annotations, 3, about.calibration) if annotator else None
    table = rows(plan, mixed, labels, NAMES)
    pieces = [FORMATS[form].piece(number, 3) for number in range(3)]
    with ThreadPoolExecutor(2) as pool:
        for number, piece in enumerate(pieces):
            frames = encode(table.slice(8 * number, 8), shape, pool)
            FORMATS[form].write(directory, piece, frames, about)
    FORMATS[form].finish(directory, pieces)
    return pieces, plan, pixels, annotations


def check_pixels(png, pixels):
    """The PNG file holds these pixels, grey as one channel."""
    with Image.open(io.BytesIO(png)) as image:
        assert (image.format, image.mode) == ("PNG", "L" if pixels.shape[2] == 1 else "RGB")
        assert (np.asarray(image).reshape(pixels.shape) == pixels).all()


def check_row(row, planned, label):
    """A JSON row says what the plan and the annotation say."""
    a, b = planned["class_a"], planned["class_b"]
    assert (row["class_a"], row["class_b"], row["name_a"], row["name_b"]) == (a, b, NAMES[a], NAMES[b])
    assert np.float32(row["lam"]) == np.float32(planned["lam"])
    assert row["label"] == label.argmax()
    assert (np.float32(row["soft_label"]) == np.float32(label)).all()  # to the last bit


# rows


def test_rows_are_joined_by_mix_id_in_the_order_of_the_plan(made):
    plan, pixels, mixed, annotations = made(GREY)
    labels = soft_labels(plan, annotations, 3, Calibration("temperature", temperature=2.0)).sample(
        fraction=1, shuffle=True, seed=3
    )
    table = rows(plan, mixed, labels, NAMES)
    assert table["mix_id"].equals(plan["mix_id"])
    assert table.columns == ["mix_id", "class_a", "class_b", "name_a", "name_b", "lam", "label", "soft_label", "image"]
    label = expected(plan, annotations)
    for row in table.iter_rows(named=True):
        assert row["image"] == pixels[row["mix_id"]].tobytes()
        np.testing.assert_array_equal(np.float32(row["soft_label"]), np.float32(label[row["mix_id"]]))


def test_rows_without_labels_have_the_ratio_alone(made):
    plan, _, mixed, _ = made(GREY)
    table = rows(plan, mixed, None, NAMES)
    assert table.columns == ["mix_id", "class_a", "class_b", "name_a", "name_b", "lam", "image"]
    assert table["lam"].equals(plan["lam"])


def test_a_missing_image_or_label_is_counted(made):
    plan, _, mixed, annotations = made(GREY)
    labels = soft_labels(plan, annotations, 3, Calibration("temperature", temperature=2.0))
    for some, all_ in ((mixed[2:], labels), (mixed, labels[:-2])):
        with pytest.raises(
            InputError, match=r"^shard 7: 2 of 18 planned images are not mixed and annotated: remove its part files"
        ):
            rows(plan, some, all_, NAMES, "shard 7")


def test_an_image_or_label_that_stands_twice_is_refused(made):
    plan, _, mixed, annotations = made(GREY)
    labels = soft_labels(plan, annotations, 3, Calibration("temperature", temperature=2.0))
    for images, all_ in ((pl.concat([mixed, mixed[:1]]), labels), (mixed, pl.concat([labels, labels[:1]]))):
        with pytest.raises(InputError, match=r"^plan: some mixed images or annotations stand twice"):
            rows(plan, images, all_, NAMES)


@pytest.mark.parametrize("mix_id", ["a.b", "../a", "a/b", "é", "", "a\n"])
def test_a_mix_id_that_is_no_file_name_is_refused(made, mix_id):
    plan, _, mixed, _ = made(GREY)
    old = plan["mix_id"][3]
    plan, mixed = (frame.with_columns(pl.col("mix_id").replace({old: mix_id})) for frame in (plan, mixed))
    with pytest.raises(InputError, match="a mix_id has other characters"):
        rows(plan, mixed, None, NAMES)


# encode


def test_images_come_in_slices_that_bound_the_memory(made):
    draw = np.random.default_rng(0).integers(0, 256, (2 * ENCODE_ROWS + 3, *GREY), np.uint8)
    frame = pl.DataFrame({"image": [image.tobytes() for image in draw]})
    with ThreadPoolExecutor(3) as pool:
        parts = list(encode(frame, GREY, pool))
    assert [len(part) for part in parts] == [ENCODE_ROWS, ENCODE_ROWS, 3]
    for png, pixels in zip(pl.concat(parts)["image"], draw, strict=True):
        check_pixels(png, pixels)


def test_images_of_two_channels_are_refused():
    with ThreadPoolExecutor(1) as pool, pytest.raises(InputError, match="images of 2 channels cannot be written as PNG"):
        next(encode(pl.DataFrame({"image": [bytes(8)]}), (2, 2, 2), pool))


# safe_names


@pytest.mark.parametrize(
    ("names", "safe"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        (["black cat", "dog/wolf", "../up", ".hidden"], ["black_cat", "dog_wolf", "up", "hidden"]),
        (["größe", "猫", "n01440764-tench"], ["größe", "猫", "n01440764_tench"]),
        (["a b", "a/b", "c"], ["a_b_0", "a_b_1", "c_2"]),
        (["Cat", "cat"], ["Cat_0", "cat_1"]),
        (["a b", "a/b", "a_b_0"], ["a_b_0", "a_b_1", "a_b_0_2"]),
        (["...", "?"], ["class_0", "class_1"]),
    ],
)
def test_safe_names(names, safe):
    assert safe_names(names) == safe


def test_long_names_stay_below_what_a_file_system_takes():
    first, second = safe_names(["猫" * 200, "犬" * 200])
    assert len(f"{first}-{second}".encode()) <= 255
    assert first == "猫" * 33  # cut between letters, not inside one


# The formats.


@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_image_folder(made, shape, tmp_path):
    pieces, plan, pixels, annotations = written("image-folder", tmp_path, made, shape)
    assert all(piece.startswith(f"{WORK}/") for piece in pieces)
    lines = (tmp_path / "metadata.jsonl").read_text().removesuffix("\n").split("\n")
    label = expected(plan, annotations)
    for line, planned in zip(lines, plan.iter_rows(named=True), strict=True):
        row = json.loads(line)
        assert row["mix_id"] == planned["mix_id"]
        check_row(row, planned, label[row["mix_id"]])
        folder = "-".join(safe_names(NAMES)[planned[name]] for name in ("class_a", "class_b"))
        assert row["file_name"] == f"images/{folder}/{row['mix_id']}.png"
        check_pixels((tmp_path / row["file_name"]).read_bytes(), pixels[row["mix_id"]])
    files = [str(path.relative_to(tmp_path)) for path in (tmp_path / "images").rglob("*.png")]
    assert sorted(files) == sorted(json.loads(line)["file_name"] for line in lines)
    assert {path.name for path in (tmp_path / "images").iterdir()} == {
        "black_cat-dog_wolf", "black_cat-größe_猫_x", "dog_wolf-größe_猫_x",
    }  # fmt: skip


@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_webdataset(made, shape, tmp_path):
    pieces, plan, pixels, annotations = written("webdataset", tmp_path, made, shape)
    assert pieces == ["mixed-000000.tar", "mixed-000001.tar", "mixed-000002.tar"]
    label = expected(plan, annotations)
    planned = plan.iter_rows(named=True)
    for piece, count in zip(pieces, (8, 8, 2), strict=True):
        with tarfile.open(tmp_path / piece) as tar:
            members = tar.getmembers()
            assert len(members) == 2 * count
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
            for png, text in zip(members[::2], members[1::2], strict=True):  # a sample's files stand side by side
                row, here = json.load(tar.extractfile(text)), next(planned)
                assert (png.name, text.name) == (f"{here['mix_id']}.png", f"{here['mix_id']}.json")
                assert row["mix_id"] == here["mix_id"]
                check_row(row, here, label[here["mix_id"]])
                check_pixels(tar.extractfile(png).read(), pixels[here["mix_id"]])
    assert next(planned, None) is None


@pytest.mark.parametrize("form", list(FORMATS))
def test_the_same_rows_give_the_same_bytes(made, form, tmp_path):
    for name in ("a", "b"):
        written(form, tmp_path / name, made, COLOUR)
    first, second = ({path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()} for root in
                     (tmp_path / "a", tmp_path / "b"))  # fmt: skip
    assert first == second


@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_huggingface(made, shape, tmp_path):
    pieces, plan, pixels, annotations = written("huggingface", tmp_path, made, shape)
    assert pieces == [f"data/train-{number:05d}-of-00003.parquet" for number in range(3)]
    table = [row for piece in pieces for row in parquet.read_table(tmp_path / piece).to_pylist()]
    label = expected(plan, annotations)
    for row, planned in zip(table, plan.iter_rows(named=True), strict=True):
        mix_id = planned["mix_id"]
        assert (row["mix_id"], row["class_a"], row["class_b"]) == (mix_id, planned["class_a"], planned["class_b"])
        assert row["image"]["path"] == f"{mix_id}.png"
        check_pixels(row["image"]["bytes"], pixels[mix_id])
        assert np.float32(row["lam"]) == np.float32(planned["lam"])
        assert row["label"] == label[mix_id].argmax()
        np.testing.assert_array_equal(np.float32(row["soft_label"]), np.float32(label[mix_id]))


def test_huggingface_says_what_its_columns_are(made, tmp_path):
    pieces, *_ = written("huggingface", tmp_path, made, GREY)
    schema = parquet.read_schema(tmp_path / pieces[0])
    kinds = {name: str(schema.field(name).type) for name in schema.names}
    classes = {"names": list(NAMES), "_type": "ClassLabel"}
    number = {"dtype": "float32", "_type": "Value"}
    assert kinds == {
        "image": "struct<bytes: binary, path: string>", "class_a": "int64", "class_b": "int64", "lam": "float",
        "mix_id": "string", "label": "int64", "soft_label": "list<element: float>",
    }  # fmt: skip
    assert json.loads(schema.metadata[b"huggingface"]) == {
        "info": {
            "features": {
                "image": {"_type": "Image"}, "class_a": classes, "class_b": classes, "lam": number,
                "mix_id": {"dtype": "string", "_type": "Value"}, "label": classes,
                "soft_label": {"feature": number, "_type": "Sequence"},
            }
        }
    }  # fmt: skip


@pytest.mark.parametrize("form", list(FORMATS))
def test_without_an_annotator_nothing_speaks_of_labels(made, form, tmp_path):
    pieces, *_ = written(form, tmp_path, made, GREY, annotator=None)
    if form == "huggingface":
        columns = parquet.read_schema(tmp_path / pieces[0]).names
    elif form == "webdataset":
        with tarfile.open(tmp_path / pieces[0]) as tar:
            columns = json.load(tar.extractfile(tar.getmembers()[1]))
    else:
        columns = json.loads((tmp_path / "metadata.jsonl").read_text().split("\n")[0])
    assert {"mix_id", "class_a", "class_b", "lam"} <= set(columns)
    assert not {"label", "soft_label"} & set(columns)


@pytest.mark.parametrize("form", list(FORMATS))
def test_a_piece_that_is_cut_off_is_not_there_and_is_made_whole_again(made, form, tmp_path):
    plan, _, mixed, _ = made(GREY)
    about = card(form, GREY, len(plan), None)
    piece = FORMATS[form].piece(0, 1)

    def broken(frames):
        yield next(frames)
        raise OSError(28, "No space left on device")

    table = rows(plan, mixed, None, NAMES)
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(OSError, match="No space left"):
            FORMATS[form].write(cut, piece, broken(encode(table, GREY, pool)), about)
        assert not (cut / piece).exists()
        assert not list((cut / piece).parent.glob(".*"))
        for directory in (cut, whole):
            FORMATS[form].write(directory, piece, encode(table, GREY, pool), about)
    assert (cut / piece).read_bytes() == (whole / piece).read_bytes()


# Our own readers.


@pytest.mark.parametrize("shape", [GREY, COLOUR])
@pytest.mark.parametrize("form", ["webdataset", "huggingface"])
def test_our_readers_read_the_images_and_the_likeliest_classes(made, form, shape, tmp_path):
    _, plan, pixels, annotations = written(form, tmp_path / "out", made, shape)
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\n")  # lines, which these class names are not
    given = {"class_names": str(names)} if form == "webdataset" else {}
    data = load_dataset(form, path=str(tmp_path / "out"), channels=shape[2], val=0.2, test=0.2, **given)
    assert data.info.shape == shape
    assert data.info.class_names == (("a", "b", "c") if form == "webdataset" else NAMES)
    label = expected(plan, annotations)
    assert data.frame["image"].to_list() == [pixels[mix_id].tobytes() for mix_id in plan["mix_id"]]
    assert data.frame["label"].to_list() == [label[mix_id].argmax() for mix_id in plan["mix_id"]]


def test_our_reader_of_folders_takes_the_pairs_for_classes(made, tmp_path):
    _, _, pixels, _ = written("image-folder", tmp_path, made, COLOUR)
    data = load_dataset("image-folder", path=str(tmp_path / "images"), size=0, val=0.2, test=0.2)
    assert data.info.class_names == ("black_cat-dog_wolf", "black_cat-größe_猫_x", "dog_wolf-größe_猫_x")
    assert sorted(data.frame["image"]) == sorted(image.tobytes() for image in pixels.values())


def test_an_export_without_labels_has_none_to_read(made, tmp_path):
    for form, message in {"webdataset": "has no label; expected", "huggingface": "no column label or"}.items():
        written(form, tmp_path / form, made, COLOUR, annotator=None)
        with pytest.raises(InputError, match=message):
            load_dataset(form, path=str(tmp_path / form))
