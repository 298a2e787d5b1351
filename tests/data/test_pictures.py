"""Any picture becomes an image of the wanted shape, and says what was done to it."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffoc.data.pictures import (
    picture_names,
    picture_size,
    read_picture,
    read_transparency,
    write_picture,
)


def test_a_picture_of_the_right_kind_is_read_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image, notes = read_picture(tmp_path / "a.png", (3, 6, 8))
    assert notes == []
    expected = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(image, expected)
    write_picture(image[0], tmp_path / "b.png")
    assert np.array_equal(np.array(Image.open(tmp_path / "b.png")), pixels)
    assert picture_size(tmp_path / "a.png") == (6, 8)


LEVELS = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4  # every pixel another
COLOUR = np.stack([LEVELS, LEVELS.T, 255 - LEVELS], -1)
ALPHA = np.where(np.arange(64).reshape(8, 8) % 3, 255, 51).astype(np.uint8)
RGB, GREY = COLOUR / 255, LEVELS[..., None] / 255
FADED = ALPHA[..., None] / 255
PALETTE = Image.fromarray(COLOUR).quantize(8)
CLEAR = Image.fromarray(LEVELS).convert("P")
CLEAR.info["transparency"] = 4
FLOATS = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
KINDS = {
    "RGB": (COLOUR, RGB, None),
    "RGB jpg": (Image.new("RGB", (8, 8), (200, 200, 200)), np.full((8, 8, 1), 200 / 255), None),
    "grey in RGB": (LEVELS[..., None].repeat(3, -1), GREY, None),
    "grey": (LEVELS, GREY, None),
    "grey in a palette": (Image.fromarray(LEVELS).convert("P"), GREY, None),
    "bits": (LEVELS > 99, 1.0 * (LEVELS > 99)[..., None], None),
    "palette": (PALETTE, np.asarray(PALETTE.convert("RGB")) / 255, None),
    "RGBA": (np.dstack([COLOUR, ALPHA]), RGB * FADED + 1 - FADED, "composited over white"),
    "RGBA, opaque": (np.dstack([COLOUR, 0 * ALPHA + 255]), RGB, None),
    "LA": (np.dstack([LEVELS, ALPHA]), GREY * FADED + 1 - FADED, "composited over white"),
    "clear palette": (CLEAR, np.where(GREY == 4 / 255, 1, GREY), "composited over white"),
    "CMYK tif": (Image.fromarray(COLOUR).convert("CMYK"), RGB, "CMYK converted to RGB"),
    "16 bits": (LEVELS.astype(np.uint16) * 257 + 100, GREY + 100 / 65535, "16 bits, black 0"),
    "floats tif": (FLOATS, FLOATS[..., None], "black 0 and white 1"),
    "signed floats tif": (2 * FLOATS - 1, FLOATS[..., None], "black -1 and white 1"),
}
"""What is saved, the values (H, W, C) in [0, 1] that it means, and what has to be said."""


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_is_read_as_what_it_means(kind, channels, tmp_path):
    saved, values, note = KINDS[kind]
    path = tmp_path / f"a.{kind.split()[-1] if kind[-3:] in ('tif', 'jpg') else 'png'}"
    picture = saved if isinstance(saved, Image.Image) else Image.fromarray(saved)
    picture.save(path)
    image, notes = read_picture(path, (channels, 8, 8))
    colour = values.shape[-1] == 3
    if channels == 1 and colour:
        values = (values @ [0.299, 0.587, 0.114])[..., None]
    expected = torch.from_numpy(2 * np.broadcast_to(values, (8, 8, channels)) - 1).movedim(-1, 0)
    torch.testing.assert_close(image[0].double(), expected.double(), rtol=0, atol=1e-6)
    assert (note is None) or note in notes[0]
    assert ("grey made from colour" in notes) == (channels == 1 and colour)
    in_colour = kind.startswith(("RGB", "LA", "clear", "CMYK", "grey in", "palette"))
    assert ("colour made from grey" in notes) == (channels == 3 and not in_colour)
    assert len(notes) <= 2


def test_what_can_be_read_in_more_than_one_way_is_refused(tmp_path):
    for values, message in (
        (255 * FLOATS, r"values from 0 to 255, expected \[0, 1\] or \[-1, 1\]"),
        (3 * FLOATS - 2, "values from -2 to 1"),
        (np.full((8, 8), 70000, np.int32), "from 70000 to 70000, expected 0 to 65535"),
        (np.full((8, 8), np.nan, np.float32), "not finite"),
        (LEVELS.astype(np.uint16), "from 0 to 252, expected 0 to 65535, and more than 8 bits"),
        (LEVELS.astype(np.int32), "from 0 to 252, expected 0 to 65535, and more than 8 bits"),
        (LEVELS.astype(np.int32) - 5, "from -5 to 247, expected 0 to 65535"),
    ):
        Image.fromarray(values).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match=message):
            read_picture(tmp_path / "a.tif", (1, 8, 8))


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_resized_as_pillow_resizes_floats(channels, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for crop, box in ((None, (10, 0, 40, 30)), ((3, 4, 20), (3, 4, 23, 24))):
        image, notes = read_picture(tmp_path / "a.png", (channels, 8, 8), crop)
        part = pixels if channels == 3 else (pixels @ [0.299, 0.587, 0.114])[..., None]
        for layer, found in zip(np.moveaxis(part, -1, 0), image[0], strict=True):
            whole = Image.fromarray(layer.astype(np.float32))
            scaled = np.asarray(whole.resize((8, 8), Image.Resampling.BICUBIC, box)) / 127.5 - 1
            np.testing.assert_allclose(found, scaled, rtol=0, atol=1e-5)
        where = "around its centre" if crop is None else "at 3,4"
        side = box[2] - box[0]
        assert f"cut from 50x30 to {side}x{side} {where}" in notes
        assert f"resized from {side}x{side} to 8x8" in notes
    for crop in ((31, 0, 20), (0, 0, 31), (-1, 0, 5), (0, 0, 0)):
        with pytest.raises(ValueError, match=r"crop is .* which is 50x30"):
            read_picture(tmp_path / "a.png", (channels, 8, 8), crop)


def test_a_shape_a_crop_or_a_path_that_is_none_is_told(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    assert read_picture(str(path), (1, 8, 8))[0].shape == (1, 1, 8, 8)
    for shape in ((8, 8), (1, 0, 8), (1, 8.0, 8), (2, 8, 8), None):
        with pytest.raises(ValueError, match=r"^shape is"):
            read_picture(path, shape)
    for crop in ((0, 0), (0.5, 0, 4), "0,0,4", 4):
        with pytest.raises(TypeError, match=r"^crop is .* three whole numbers"):
            read_picture(path, (1, 8, 8), crop)


def test_a_folder_s_pictures_by_name(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.JPEG", "._a.jpg", ".hidden.png", "notes.txt", "d.npz"):
        (tmp_path / name).touch()
    assert picture_names(tmp_path) == ["a.jpg", "b.PNG", "c.JPEG"]
    (tmp_path / "empty" / "a.png").mkdir(parents=True)  # a folder is none, whatever its name
    with pytest.raises(FileNotFoundError, match="has no pictures"):
        picture_names(tmp_path / "empty")


def test_the_centre_is_kept_and_the_camera_turned_upright(tmp_path):
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 255
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "wide.png")
    image, notes = read_picture(tmp_path / "wide.png", (3, 20, 20))
    assert notes == ["cut from 60x20 to 20x20 around its centre"]
    assert image.min() == 1
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert picture_size(tmp_path / "turned.jpg") == (60, 20)


UPRIGHT = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: np.swapaxes(pixels, 0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.swapaxes(np.rot90(pixels, 2), 0, 1),
    8: np.rot90,
}
"""What EXIF's orientations say."""


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("stored", [COLOUR, FLOATS], ids=["png", "tif"])
def test_a_picture_is_turned_once(stored, orientation, tmp_path):
    picture = Image.fromarray(stored)
    exif = picture.getexif()
    exif[0x0112] = orientation
    path = tmp_path / ("a.tif" if stored is FLOATS else "a.png")
    picture.save(path, exif=exif)
    expected = UPRIGHT[orientation](stored if stored is FLOATS else stored / 255)
    found = read_picture(path, (1 if stored is FLOATS else 3, 8, 8))[0][0].movedim(0, -1)
    np.testing.assert_allclose(np.squeeze(found.numpy()), 2 * expected - 1, rtol=0, atol=1e-6)


def png(depth, colour, rows, *chunks):
    """The bytes of a PNG, as Pillow does not write it, of rows of bytes."""

    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", 8, len(rows), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("kind", ["png", "ppm"])
def test_colours_of_16_bits_are_cut_with_a_note(kind, tmp_path):
    rows = [row.tobytes() for row in (COLOUR.astype(">u2") * 257)]
    content = png(16, 2, rows) if kind == "png" else b"P6\n8 8\n65535\n" + b"".join(rows)
    (tmp_path / f"a.{kind}").write_bytes(content)
    image, notes = read_picture(tmp_path / f"a.{kind}", (3, 8, 8))
    np.testing.assert_allclose(image[0].movedim(0, -1), 2 * RGB - 1, rtol=0, atol=1e-6)
    assert notes == ["16 bits a channel cut to 8, which Pillow's colour pictures have"]


def test_a_transparent_colour_of_16_bits_and_an_empty_png_are_refused(tmp_path):
    rows = [row.tobytes() for row in (LEVELS.astype(">u2") * 257)]
    (tmp_path / "a.png").write_bytes(png(16, 0, rows, (b"tRNS", struct.pack(">H", 257 * 4))))
    with pytest.raises(ValueError, match="transparent colour and more than 8 bits"):
        read_picture(tmp_path / "a.png", (1, 8, 8))
    (tmp_path / "a.png").write_bytes(png(8, 2, []))
    with pytest.raises(ValueError, match="no picture that Pillow knows"):
        read_picture(tmp_path / "a.png", (1, 8, 8))


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tif"])
def test_of_a_film_the_first_picture_is_read_with_a_note(kind, tmp_path):
    film = [Image.fromarray(LEVELS), Image.fromarray(255 - LEVELS)]
    options = {"lossless": True} if kind == "webp" else {}
    film[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=film[1:], **options)
    image, notes = read_picture(tmp_path / f"a.{kind}", (1, 8, 8))
    np.testing.assert_allclose(image[0, 0], 2 * GREY[..., 0] - 1, rtol=0, atol=1e-6)
    assert notes[0] == "the first of 2 pictures in the file"


def test_transparency_is_a_mask(tmp_path):
    mask = (torch.arange(12) % 3 > 0).float().reshape(1, 3, 4)
    write_picture(torch.zeros(3, 3, 4), tmp_path / "a.png", mask)
    assert torch.equal(read_transparency(tmp_path / "a.png"), mask[None])
    for opacity, said in ((255, "no transparent"), (0, "no opaque"), (ALPHA, "half transparent")):
        alpha = np.broadcast_to(np.uint8(opacity), (8, 8))
        Image.fromarray(np.dstack([COLOUR, alpha])).save(tmp_path / "b.png")
        with pytest.raises(ValueError, match=f"{said} pixel"):
            read_transparency(tmp_path / "b.png")


def test_what_is_no_picture_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        read_picture(tmp_path / "a.png", (1, 8, 8))
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match="no picture that Pillow knows"):
        read_picture(tmp_path / "a.png", (1, 8, 8))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "b.png")
    content = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        read_picture(tmp_path / "b.png", (1, 8, 8))
    with pytest.raises(ValueError, match="channels"):
        read_picture(tmp_path / "b.png", (2, 8, 8))
