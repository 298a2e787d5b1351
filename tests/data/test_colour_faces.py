"""Colour faces: read from mosaics that the test makes, and refused when damaged."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffoc.data import images as data
from diffoc.figures import sheet


@pytest.fixture
def mosaics(tmp_path, monkeypatch):
    """Writes 70 known training faces and 5 test faces as mosaics; returns the training faces."""
    monkeypatch.setattr(data, "COLOUR_FACES", {"train": 70, "test": 5})
    folder = tmp_path / "faces64_rgb"
    folder.mkdir()
    faces = np.random.default_rng(0).integers(0, 256, (96, 64, 64, 3), dtype=np.uint8)
    for number, some in enumerate((faces[:64], faces[64:])):
        _write_mosaic(some, folder / f"train_{number:02}.webp")
    _write_mosaic(faces[:32], folder / "test.webp")
    return tmp_path, faces


def _write_mosaic(faces, path):
    """Lays faces out row by row, 32 of them side by side, one pixel block after the other."""
    rows = len(faces) // 32
    picture = np.zeros((64 * rows, 64 * 32, 3), np.uint8)
    for index, face in enumerate(faces):
        top, left = 64 * (index // 32), 64 * (index % 32)
        picture[top : top + 64, left : left + 64] = face
    Image.fromarray(picture).save(path, lossless=True)


def test_faces_come_in_the_order_of_the_mosaics(mosaics):
    root, faces = mosaics
    assert np.array_equal(data.colour_faces("train", root), faces[:70])
    assert np.array_equal(data.colour_faces("test", root), faces[:5])


def test_states_are_channels_first_and_signed(mosaics):
    root, faces = mosaics
    x = data.as_states(data.colour_faces("test", root))
    assert x.shape == (5, 3, 64, 64)
    expected = torch.tensor(faces[3, 10, 20].astype(np.float32)) / 127.5 - 1
    torch.testing.assert_close(x[3, :, 10, 20], expected)
    # A sheet of the states gives the bytes back.
    assert np.array_equal(sheet(x, 5)[:64, 64:128].numpy(), faces[1])


def test_faces_are_cut_out_of_lfw_s_own_pictures(tmp_path, monkeypatch):
    """A small LFW: two people who are left out, one of them in the test set, and two others."""
    monkeypatch.setenv("DIFFOC_CACHE", str(tmp_path / "cache"))
    people = {"Abba_Eban": 1, "Abdel_Madi_Shabneh": 2, "George_W_Bush": 3, "Zico": 1}
    generator, faces = np.random.default_rng(0), {}
    for person, count in people.items():
        (tmp_path / "lfw" / person).mkdir(parents=True)
        for number in range(1, count + 1):
            path = tmp_path / "lfw" / person / f"{person}_{number:04}.jpg"
            Image.fromarray(generator.integers(0, 256, (250, 250, 3), dtype=np.uint8)).save(path)
            part = Image.open(path).crop((83, 92, 166, 175))
            faces[path.stem] = part.resize((64, 64), Image.Resampling.BICUBIC)
    expected = {
        "train": ["George_W_Bush_0001", "George_W_Bush_0002", "George_W_Bush_0003", "Zico_0001"],
        "test": ["Abdel_Madi_Shabneh_0001"],
    }
    for _ in range(2):  # the second time from the cache
        for split, names in expected.items():
            found = data.colour_faces(split, tmp_path).astype(int)
            wanted = np.stack([np.asarray(faces[name]) for name in names]).astype(int)
            # Beyond the box's edge the filter sees the picture here, and nothing there.
            assert found.shape == wanted.shape
            assert abs(found - wanted)[:, 4:-4, 4:-4].max() <= 1
        shutil.rmtree(tmp_path / "lfw", ignore_errors=True)
        (tmp_path / "lfw").mkdir(exist_ok=True)


def test_the_split_leaves_768_people_out():
    text = (Path(data.__file__).parent / "lfw_left_out.txt").read_text()
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    assert len({person for person, *_ in lines}) == len(lines) == 768
    assert sum(marks == ["test"] for _, *marks in lines) == 512


def test_damaged_missing_and_cut_mosaics_are_named(mosaics):
    root, _ = mosaics
    (root / "faces64_rgb" / "train_01.webp").unlink()
    with pytest.raises(ValueError, match=r"64 faces .* expected 70"):
        data.colour_faces("train", root)
    (root / "faces64_rgb" / "train_00.webp").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"train_00.webp is damaged"):
        data.colour_faces("train", root)
    Image.new("RGB", (64, 64)).save(root / "faces64_rgb" / "test.webp")
    with pytest.raises(ValueError, match=r"test.webp has 64 x 64 pixels"):
        data.colour_faces("test", root)
    with pytest.raises(FileNotFoundError, match="DIFFOC_DATA"):
        data.colour_faces("test", root / "nowhere")
    with pytest.raises(ValueError, match="'all'"):
        data.colour_faces("all", root)
