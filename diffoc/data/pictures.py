"""Pictures of any kind to tensors in [-1, 1] and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffoc.data.files import replacing


def read_picture(path: Path, shape: Sequence[int]) -> tuple[Tensor, list[str]]:
    """A picture as image in [-1, 1], and what had to be done to it.

    It is turned as its EXIF data say, made grey or coloured, cut to the wanted aspect ratio around
    its centre, and resized (anti-aliased, bicubic).

    Args:
        path: of a file that Pillow reads: JPEG, PNG, TIFF, WebP and others, of 8 or 16 bits.
        shape: (C, H, W) of the image, with C 1 or 3.

    Returns:
        The image (1, C, H, W) float32, and notes for its user, one per change.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no picture or a damaged one, or C is another number.
    """
    channels, height, width = shape
    if channels not in (1, 3) or min(height, width) < 1:
        raise ValueError(f"shape is {tuple(shape)}, expected 1 or 3 channels and at least a pixel")
    picture, notes = _open(path), []
    grey = len(picture.getbands()) < 3 and picture.mode != "P"
    if picture.mode.startswith(("I", "F")):
        # Pillow would cut 16 bits off at 255.
        values = np.asarray(picture, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"{path} has pixels that are not finite")
        bright = 65535 if picture.mode.startswith("I") else max(1.0, values.max())
        picture = Image.fromarray((values * (255 / bright)).clip(0, 255).astype(np.uint8))
    picture = picture.convert("L" if channels == 1 else "RGB")
    if grey != (channels == 1):
        notes.append("grey made from colour" if channels == 1 else "colour made from grey")
    side = min(picture.width / width, picture.height / height)
    window = (round(side * width), round(side * height))
    if window != picture.size:
        notes.append(f"cut from {_size(picture.size)} to {_size(window)} around its centre")
    if window != (width, height):
        notes.append(f"resized from {_size(window)} to {_size((width, height))}")
    if notes:
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).reshape(height, width, channels)
    return (pixels / 127.5 - 1).movedim(-1, 0).unsqueeze(0), notes


def read_transparency(path: Path) -> Tensor:
    """1 where a picture is opaque and 0 where it is transparent, (1, 1, H, W).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no picture, or has no transparent pixel.
    """
    picture = _open(path)
    opaque = np.array(picture.convert("RGBA"))[..., 3] > 127
    if opaque.all():
        raise ValueError(
            f"measurement {path} has no transparent pixel: make those that were dropped transparent"
        )
    return torch.from_numpy(opaque).float()[None, None]


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture in pixels; errors as for :func:`read_picture`."""
    width, height = _open(path).size
    return height, width


def write_picture(image: Tensor, path: Path, mask: Tensor | None = None) -> None:
    """Writes an image as PNG.

    Args:
        image: (C, H, W) in [-1, 1], C 1 or 3; what lies outside is clipped.
        path: of the file.
        mask: (1, H, W), pixels to be transparent where it is 0.
    """
    pixels = ((image.float() + 1) * 127.5).round().clamp(0, 255).byte().cpu()
    if mask is not None:
        pixels = torch.cat([pixels, (255 * mask).byte().cpu()])
    values = pixels.movedim(0, -1).numpy()
    with replacing(path) as part:
        Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values).save(part)


def _open(path: Path) -> Image.Image:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a picture there")
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no picture that Pillow knows: save it as PNG") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large a picture, make it smaller: {error}") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is a damaged picture: {error}") from error


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
