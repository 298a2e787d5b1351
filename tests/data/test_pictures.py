"""Any picture becomes an image of the wanted shape, and says what was done to it."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffoc.data.pictures import picture_size, read_picture, read_transparency, write_picture


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


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "LA", "I;16", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_all_kinds_of_pictures(mode, channels, tmp_path):
    """A left half of black and a right half of white stays one, in every format."""
    values = np.zeros((40, 40), dtype=np.uint8)
    values[:, 20:] = 255
    if mode == "I;16":
        picture = Image.fromarray(values.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(values).convert("RGB").convert(mode)
    path = tmp_path / ("a.tif" if mode in ("F", "CMYK") else "a.png")
    picture.save(path)
    image, notes = read_picture(path, (channels, 16, 16))
    assert image.shape == (1, channels, 16, 16)
    assert (image[..., :6] + 1).abs().max() < 0.01
    assert (image[..., 10:] - 1).abs().max() < 0.01
    assert any("resized from 40x40 to 16x16" in note for note in notes)


def test_colour_and_grey_are_told_apart(tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    image, notes = read_picture(tmp_path / "red.png", (1, 8, 8))
    assert notes == ["grey made from colour"]
    # The luma of ITU-R 601.
    assert image.unique().item() == pytest.approx(2 * round(0.299 * 255) / 255 - 1)
    Image.new("L", (8, 8), 7).save(tmp_path / "grey.png")
    assert read_picture(tmp_path / "grey.png", (3, 8, 8))[1] == ["colour made from grey"]


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


def test_transparency_is_a_mask(tmp_path):
    mask = (torch.arange(12) % 3 > 0).float().reshape(1, 3, 4)
    write_picture(torch.zeros(3, 3, 4), tmp_path / "a.png", mask)
    assert torch.equal(read_transparency(tmp_path / "a.png"), mask[None])
    write_picture(torch.zeros(3, 3, 4), tmp_path / "b.png")
    with pytest.raises(ValueError, match="no transparent pixel"):
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
