"""Encoded images (PNG, JPEG, ...) as one array of pixels: middle square, size, number of channels."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from csm.errors import InputError


def check_form(size: int, channels: int = 3) -> None:
    """``InputError`` unless ``decode`` takes these settings."""
    if channels not in (1, 3):
        raise InputError(f"data.channels: expected 1 (grey) or 3 (RGB), got {channels}")
    if not 0 <= size <= 4096:
        raise InputError(f"data.size: expected pixels from 1 to 4096, or 0 for images as they are, got {size}")


def decode(files: Iterable[tuple[str, Path | bytes]], number: int, size: int, channels: int) -> np.ndarray:
    """Decode ``number`` files to one array uint8 (number, height, width, channels).

    Grey levels of 16 bits are scaled to 8, palettes resolved, transparency left out.

    Args:
        files: name for messages, and the file or what is in it.
        size: height and width in pixels; other images are centre-cropped to a square and resized (antialiased bicubic).
            0: as they are, if all are of one shape.
        channels: 3 (RGB) or 1 (grey, luma of BT.601).

    Raises:
        InputError: a file cannot be read or is of another shape than the first (it is named).
    """
    images, first = np.empty((0, 0, 0, 0), dtype=np.uint8), ""
    for row, (name, file) in enumerate(files):
        pixels = _read(name, file, size, channels)
        if row == 0:
            images, first = np.empty((number, *pixels.shape), dtype=np.uint8), name
        elif pixels.shape != images.shape[1:]:
            raise InputError(
                f"image {name} has {_pixels(pixels.shape)} pixels, {first} has {_pixels(images.shape[1:])}: set data.size"
            )
        images[row] = pixels
    return images


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Images uint8 (N, H, W, C), C 1 or 3, made ``size`` pixels high and wide as ``decode`` does it; 0: as they are."""
    if size == 0 or images.shape[1:3] == (size, size):
        return images
    resized = np.empty((len(images), size, size, images.shape[3]), dtype=np.uint8)
    for row, pixels in enumerate(images):
        resized[row] = _square(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), size)
    return resized


def decode_as(name: str, image: Path | bytes | np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """One image as a model of images uint8 ``shape`` (height, width, channels) takes it, made as ``decode`` and ``resize`` make them.

    Args:
        name: for messages.
        image: a file, what is in one, or pixels uint8 (H, W, 1 or 3).
        shape: a square one can be made of every image; of another one the image must be already.

    Raises:
        InputError: the file cannot be read, or the image is of another shape and ``shape`` is no square.
    """
    height, width, channels = shape
    size = height if height == width else 0
    if isinstance(image, np.ndarray):
        if image.shape == shape:
            return image
        converted = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert("RGB" if channels == 3 else "L")
        pixels = _square(converted, size) if size else np.asarray(converted).reshape(converted.height, converted.width, channels)
    else:
        pixels = _read(name, image, size, channels)
    if pixels.shape != shape:
        raise InputError(f"image {name} has {_pixels(pixels.shape)} pixels, the model takes {_pixels(shape)} and crops no square")
    return pixels


def _read(name: str, file: Path | bytes, size: int, channels: int) -> np.ndarray:
    """Decode one image to uint8 (height, width, channels)."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            image.load()
            converted = _eight_bit(image).convert("RGB" if channels == 3 else "L")
    except FileNotFoundError:
        raise InputError(f"image {name} does not exist: restore it, or leave it out, and run again") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow names what it was given: for bytes an object at an address.
        reason = "no image" if isinstance(error, UnidentifiedImageError) and isinstance(file, bytes) else error
        raise InputError(f"cannot read image {name} ({reason}): repair or remove it and run again") from None
    if size > 0:
        return _square(converted, size)
    return np.asarray(converted, dtype=np.uint8).reshape(converted.height, converted.width, channels)


def _square(image: Image.Image, size: int) -> np.ndarray:
    """The middle square, resized: uint8 (size, size, C)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    if side != size:
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(square, dtype=np.uint8).reshape(size, size, -1)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey levels to 8 bits; PIL's own conversion clips them at 255."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))


def _pixels(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"
