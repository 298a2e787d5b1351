"""Pictures of any kind to tensors in [-1, 1] and back."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffoc.data.files import replacing

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
"""Of the files in a folder that count as pictures, in small letters or capitals."""

OVER_WHITE = "composited over white where it is transparent"
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of ITU-R 601


def picture_names(folder: Path) -> list[str]:
    """Returns the names of a folder's pictures, sorted; hidden files such as ._a.png are none."""
    names = sorted(
        path.name
        for path in folder.glob("*")
        if path.suffix.lower() in ENDINGS and not path.name.startswith(".") and path.is_file()
    )
    if not names:
        raise FileNotFoundError(
            f"{folder} has no pictures: expected files there that end in {', '.join(ENDINGS)}"
        )
    return names


def read_picture(
    path: Path | str, shape: Sequence[int], crop: Sequence[int] | None = None
) -> tuple[Tensor, list[str]]:
    """Returns a picture as image (1, C, H, W) in [-1, 1], and a note for each change made to it.

    It is turned as its EXIF data say, composited over white, made grey or coloured, cut to the
    wanted aspect ratio, and resized (anti-aliased, bicubic). Nothing is rounded on the way. Colour
    profiles are not applied.

    >>> image, notes = read_picture(Path("face.jpg"), (3, 64, 64), crop=(120, 80, 200))

    Pillow reads the file: JPEG, PNG, TIFF, WebP and others, of 8 or 16 bits, or of floating-point
    values in [0, 1] or [-1, 1]. The shape is (C, H, W), with C 1 or 3. The crop is left and top
    edge and width, in pixels of the upright picture, of what is used of it; by default the largest
    part around its centre. A FileNotFoundError says that there is no such file, a ValueError that
    it is no picture or a damaged one, that its values can be read in more than one way, that the
    crop is not within it, or that C is another number.
    """
    sides = [n if isinstance(n, int) else 0 for n in shape] if isinstance(shape, Sequence) else []
    if len(sides) != 3 or sides[0] not in (1, 3) or min(sides) < 1:
        raise ValueError(f"shape is {shape!r}, expected (C, H, W), C of 1 or 3 channels")
    channels, height, width = sides
    values, notes = values_of(Path(path))
    if values.shape[-1] != channels:
        if channels == 3:
            values = values.repeat(3, axis=-1)
            notes.append("colour made from grey")
        elif (values == values[..., :1]).all():  # grey that was stored in colour
            values = values[..., :1]
        else:
            values = (values @ _LUMA)[..., None]
            notes.append("grey made from colour")
    size = values.shape[1::-1]
    box = _window(size, (width, height), crop)
    used = (round(box[2] - box[0]), round(box[3] - box[1]))
    if crop is not None:
        notes.append(f"cut from {_size(size)} to {_size(used)} at {crop[0]},{crop[1]}")
    elif used != size:
        notes.append(f"cut from {_size(size)} to {_size(used)} around its centre")
    if used != (width, height):
        notes.append(f"resized from {_size(used)} to {_size((width, height))}")
    layers = [Image.fromarray(np.ascontiguousarray(layer)) for layer in np.moveaxis(values, -1, 0)]
    scaled = [layer.resize((width, height), Image.Resampling.BICUBIC, box) for layer in layers]
    image = torch.from_numpy(np.stack([np.asarray(layer) for layer in scaled]))
    return 2 * image.clamp(0, 1).unsqueeze(0) - 1, notes


def read_transparency(path: Path) -> Tensor:
    """Returns 1 where a picture is opaque and 0 where it is transparent, (1, 1, H, W).

    A ValueError refuses a picture that has none of either, or half transparent pixels.
    """
    picture, _ = open_picture(path)
    opacity = np.array(picture.convert("RGBA"))[..., 3]
    if opacity.min() == 255 or opacity.max() == 0:
        which = "transparent" if opacity.min() else "opaque"
        raise ValueError(
            f"measurement {path} has no {which} pixel: make those that were dropped transparent, "
            "and no others"
        )
    if not np.isin(opacity, (0, 255)).all():
        raise ValueError(
            f"measurement {path} has half transparent pixels: make each opaque or transparent"
        )
    return torch.from_numpy(opacity == 255).float()[None, None]


def picture_size(path: Path) -> tuple[int, int]:
    """Returns height and width of a picture in pixels."""
    width, height = open_picture(path)[0].size
    return height, width


def write_picture(image: Tensor, path: Path, mask: Tensor | None = None) -> None:
    """Writes an image (C, H, W), C 1 or 3, as PNG, transparent where a mask (1, H, W) is 0.

    What lies outside of [-1, 1] is clipped.
    """
    pixels = ((image.float() + 1) * 127.5).round().clamp(0, 255).byte().cpu()
    if mask is not None:
        pixels = torch.cat([pixels, (255 * mask).byte().cpu()])
    values = pixels.movedim(0, -1).numpy()
    with replacing(path) as part:
        Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values).save(part)


def values_of(path: Path) -> tuple[np.ndarray, list[str]]:
    """Returns a picture's values (H, W, 1 or 3) in [0, 1], float32, and what was done to them.

    It is upright and composited over white; for what is refused see :func:`read_picture`.
    """
    picture, notes = open_picture(path)
    if picture.mode.startswith(("I", "F")):
        if picture.has_transparency_data:
            raise ValueError(f"{path} has a transparent colour and more than 8 bits: flatten it")
        values, note = _of_many_bits(np.asarray(picture, dtype=np.float64), picture.mode, path)
        return values[..., None].astype(np.float32), [*notes, note]
    if picture.has_transparency_data:
        layers = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255
        opacity = layers[..., 3:]
        values = layers[..., :3] * opacity + 1 - opacity
        return values, notes + [OVER_WHITE] * bool((opacity < 1).any())
    if picture.mode not in ("1", "L", "P", "RGB"):
        notes.append(f"{picture.mode} converted to RGB")
    grey = picture.mode in ("1", "L")
    values = np.asarray(picture.convert("L" if grey else "RGB"), dtype=np.float32) / 255
    return values.reshape(*values.shape[:2], -1), notes


def _of_many_bits(values: np.ndarray, mode: str, path: Path) -> tuple[np.ndarray, str]:
    """Returns values of 16 bits or more in [0, 1], and how they were read."""
    if not np.isfinite(values).all():
        raise ValueError(f"{path} has pixels that are not finite")
    low, high = values.min(), values.max()
    if mode.startswith("I") and low >= 0 and 255 < high <= 65535:
        return values / 65535, f"16 bits, black 0 and white 65535, kept: values {low:g} to {high:g}"
    if mode == "F" and low >= 0 and high <= 1:
        return values, "floating-point values, black 0 and white 1, kept"
    if mode == "F" and low >= -1 and high <= 1:
        return (values + 1) / 2, "floating-point values, black -1 and white 1, kept"
    whole = mode.startswith("I")
    expected = "0 to 65535, and more than 8 bits of it" if whole else "[0, 1] or [-1, 1]"
    raise ValueError(f"{path} has values from {low:g} to {high:g}, expected {expected}: scale it")


def _window(
    size: tuple[int, int], shape: tuple[int, int], crop: Sequence[int] | None
) -> tuple[float, float, float, float]:
    """Returns the edges left, top, right, bottom of what is used of a picture; sizes are (W, H)."""
    if crop is None:
        scale = min(size[0] / shape[0], size[1] / shape[1])
        used = (scale * shape[0], scale * shape[1])
        left, top = ((a - b) / 2 for a, b in zip(size, used, strict=True))
    else:
        if not isinstance(crop, tuple | list) or [type(n) for n in crop] != [int] * 3:
            raise TypeError(f"crop is {crop!r}, expected X, Y and SIDE: three whole numbers")
        left, top, side = crop
        used = (side, side * shape[1] / shape[0])
        if min(left, top) < 0 or side < 1 or left + used[0] > size[0] or top + used[1] > size[1]:
            raise ValueError(
                f"crop is {','.join(map(str, crop))}, expected X,Y,SIDE of a part of the picture, "
                f"which is {_size(size)} (width x height)"
            )
    return left, top, left + used[0], top + used[1]


def open_picture(path: Path) -> tuple[Image.Image, list[str]]:
    """Returns a picture, upright, and what of its file is left out."""
    if not path.is_file():
        what = "is no file" if path.exists() else "is missing"
        raise FileNotFoundError(f"{path} {what}: expected a picture there")
    try:
        with Image.open(path) as picture:
            notes = []
            if (frames := getattr(picture, "n_frames", 1)) > 1:
                notes.append(f"the first of {frames} pictures in the file")
            # Pillow's colour pictures have 8 bits; where a file has more, its tiles say so.
            if re.search(r";16|\b65535\b", str(picture.tile)) and not picture.mode.startswith("I"):
                notes.append("16 bits a channel cut to 8, which Pillow's colour pictures have")
            return ImageOps.exif_transpose(picture), notes
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no picture that Pillow knows: save it as PNG") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large a picture, make it smaller: {error}") from error
    except PermissionError:
        raise
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is a damaged picture: {error}") from error


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
