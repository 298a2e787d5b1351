"""Metrics of kept files against scikit-image, SciPy and torchmetrics, in parts and at once."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from diffoc.experiments.measured import (
    Measured,
    Moments,
    measure,
    metrics_of,
    pictures_in,
    read_part,
    read_resized,
    sets_in,
    write_part,
)


class Network(nn.Module):
    """Stands in for Inception: 8-bit images to eight features."""

    num_features = 8

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Conv2d(3, 8, 5, stride=3)

    def forward(self, pixels):
        return torch.tanh(self.layer(pixels.float() / 255)).mean((2, 3))


def pixels(count, side=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(count, 3, side // 8, side // 8, generator=generator)
    grown = nn.functional.interpolate(smooth, (side, side), mode="bicubic")
    noisy = grown + 0.1 * torch.randn(grown.shape, generator=generator)
    return (255 * noisy).round().clamp(0, 255).byte()


def write(folder, images, ending="png", start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.movedim(0, -1).numpy()).save(folder / f"{start + i:05d}.{ending}")


@pytest.fixture
def folders(tmp_path):
    """Originals of twice the size in nested folders, and what was kept of them."""
    large = pixels(12, 80)
    write(tmp_path / "truth" / "00000", large[:5])
    write(tmp_path / "truth" / "01000", large[5:], start=5)
    write(tmp_path / "kept" / "task" / "one", pixels(12, seed=1))
    return tmp_path / "kept", tmp_path / "truth"


def test_numbers_of_a_picture_are_scikit_images():
    one, two = pixels(3), pixels(3, seed=1)
    found, _ = metrics_of(one, two)
    for i in range(3):
        a, b = (x[i].movedim(0, -1).numpy() for x in (two, one))
        assert found["psnr"][i].item() == pytest.approx(peak_signal_noise_ratio(a, b), abs=1e-4)
        mse = ((a.astype(float) - b) ** 2).mean()
        assert found["mse_255"][i].item() == pytest.approx(mse, rel=1e-5)
        uniform = structural_similarity(a, b, channel_axis=2)
        assert found["ssim_uniform"][i].item() == pytest.approx(uniform, abs=1e-6)
        gaussian = structural_similarity(
            a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert found["ssim"][i].item() == pytest.approx(gaussian, abs=1e-4)


def test_missing_weights_are_said_with_their_place(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFOC_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found, missing = metrics_of(pixels(1), pixels(1, seed=1))
    assert "lpips_vgg_01" not in found
    assert str(tmp_path) in missing["lpips_vgg_01"]


def test_fid_is_that_of_torchmetrics_and_of_scipys_square_root(folders):
    kept, truth = (pictures_in(folder) for folder in folders)
    network = Network()
    found = measure(kept, truth, network, batch=5).means()
    x, t = (
        torch.stack([read_resized(path, 40, "lanczos")[0] for path in some.values()])
        for some in (kept, truth)
    )
    theirs = FrechetInceptionDistance(feature=network)
    theirs.update(t, real=True)
    theirs.update(x, real=False)
    assert found["fid_png"] == pytest.approx(theirs.compute().item(), rel=1e-3)
    with torch.no_grad():
        (m1, c1), (m2, c2) = (
            (f.mean(0), np.cov(f.T)) for f in (network(z).double().numpy() for z in (x, t))
        )
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    assert found["fid_png"] == pytest.approx(expected, rel=1e-3)
    assert found["fid_jpeg"] != pytest.approx(found["fid_png"], rel=1e-3)


def test_parts_that_are_written_and_merged_are_the_whole(folders, tmp_path):
    kept, truth = (pictures_in(folder) for folder in folders)
    whole, merged = measure(kept, truth, Network()), Measured()
    for i in range(3):
        part = measure(dict(list(kept.items())[i::3]), truth, Network(), batch=2)
        write_part(tmp_path / f"{i}.pt", part)
        merged.merge(read_part(tmp_path / f"{i}.pt"))
    assert merged.means() == pytest.approx(whole.means(), rel=1e-6)
    with pytest.raises(ValueError, match="two parts have 00000"):
        merged.merge(read_part(tmp_path / "0.pt"))
    (tmp_path / "0.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match="damaged"):
        read_part(tmp_path / "0.pt")


def test_moments_are_mean_and_covariance():
    f = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double() + 3
    moments = Moments()
    for part in f.split(7):
        moments.add(part)
    mean, covariance = moments.gaussian()
    torch.testing.assert_close(mean, f.mean(0))
    torch.testing.assert_close(covariance, torch.cov(f.mT))
    with pytest.raises(ValueError, match="at least 2"):
        Moments().gaussian()


def test_two_averages_of_psnr(folders):
    kept, truth = (pictures_in(folder) for folder in folders)
    found = measure(kept, truth, None)
    means, mse = found.means(), [row["mse_255"] for row in found.rows.values()]
    assert means["psnr_of_mse"] == pytest.approx(10 * np.log10(255**2 / np.mean(mse)))
    assert means["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / np.array(mse))), abs=1e-4)
    assert means["psnr"] > means["psnr_of_mse"]  # Jensen


def test_originals_are_found_and_resized(folders):
    truth = pictures_in(folders[1])
    assert list(truth) == [f"{i:05d}" for i in range(12)]
    assert list(sets_in(folders[0])) == ["task/one"]
    path = truth["00003"]
    for name, theirs in (("lanczos", Image.Resampling.LANCZOS), ("box", Image.Resampling.BOX)):
        with Image.open(path) as picture:
            expected = np.array(picture.resize((40, 40), theirs))
        found, notes = read_resized(path, 40, name)
        assert (found.movedim(0, -1).numpy() == expected).all()
        assert not notes
    with pytest.raises(ValueError, match="filter is 'nearest'"):
        read_resized(path, 40, "nearest")
    with pytest.raises(ValueError, match="square of at least 100"):
        read_resized(path, 100, "box")


def test_pictures_are_read_as_solve_reads_them(tmp_path):
    """What was visible, in its whole precision; what can be read in two ways is refused."""
    ramp = np.linspace(0, 1, 64).reshape(8, 8).repeat(5, 0).repeat(5, 1)
    clear = np.full((40, 40, 4), (255, 0, 0, 255), np.uint8)
    clear[:4, :, 3] = 0  # red that nobody sees
    white = np.where(clear[..., 3:] == 0, 255, clear[..., :3])
    grey = np.round(255 * ramp)[..., None].repeat(3, -1)
    for name, pixels, expected, note in (
        ("clear.png", clear, white, "composited over white where it is transparent"),
        ("many.png", np.round(65535 * ramp).astype(np.uint16), grey, "16 bits, black 0 and white"),
        ("float.tif", (2 * ramp - 1).astype(np.float32), grey, "values, black -1 and white 1"),
        ("grey.png", grey[..., 0].astype(np.uint8), grey, None),
    ):
        Image.fromarray(pixels).save(tmp_path / name)
        found, notes = read_resized(tmp_path / name, None, "box")
        assert abs(found.movedim(0, -1).numpy() - expected).max() == 0, name
        assert [note in said for said in notes] == [True] * bool(note)
    pictures = {path.stem: path for path in tmp_path.iterdir()}
    part = measure(pictures, pictures, None)
    assert len(part.notes) == 3
    write_part(tmp_path / "part", part)
    assert read_part(tmp_path / "part") == part
    Image.fromarray((300 * ramp).astype(np.float32)).save(tmp_path / "any.tif")
    with pytest.raises(ValueError, match=r"any\.tif has values from 0 to 300"):
        read_resized(tmp_path / "any.tif", None, "box")


def test_hidden_files_and_folders_are_no_pictures(tmp_path):
    for name in ("a.png", "._a.png"):
        (tmp_path / name).touch()
    (tmp_path / "b.png").mkdir()
    assert pictures_in(tmp_path) == {"a": tmp_path / "a.png"}
    assert sets_in(tmp_path) == {".": tmp_path}


@pytest.mark.parametrize("search", [pictures_in, sets_in])
def test_a_whole_disk_is_not_searched(search, tmp_path, monkeypatch):
    monkeypatch.setattr("diffoc.experiments.measured.MOST_FILES", 2)
    for name in ("a.png", "b.txt"):
        (tmp_path / name).touch()
    assert len(search(tmp_path)) == 1
    (tmp_path / "c").touch()
    with pytest.raises(ValueError, match=r"has more than 2 files: name a folder in it"):
        search(tmp_path)


def test_jpeg_and_names_that_do_not_fit(tmp_path):
    write(tmp_path / "jpeg", pixels(2), "jpg")
    write(tmp_path / "png", pixels(3))
    one, two = pictures_in(tmp_path / "jpeg"), pictures_in(tmp_path / "png")
    assert len(measure(one, two, None).rows) == 2
    with pytest.raises(ValueError, match="two pictures 00000"):
        pictures_in(tmp_path)
    with Image.open(two["00002"]) as picture:
        picture.resize((9, 9)).save(two["00002"])
    with pytest.raises(
        ValueError, match=r"00001.png and .*00000.png are of different|00002.png and"
    ):
        measure(two, two, None)
    with pytest.raises(FileNotFoundError, match="no pictures"):
        pictures_in(tmp_path / "none")


def test_pictures_in_hidden_folders_are_none_of_a_set(tmp_path):
    """Such as a viewer's thumbnails; the set itself may lie in a hidden folder."""
    folder = tmp_path / ".cache" / "set"
    for place in (folder, folder / ".thumbs", folder / "part", folder / "part" / ".old" / "deep"):
        place.mkdir(parents=True)
        (place / f"{place.name.strip('.')}.png").touch()
    assert [*pictures_in(folder)] == ["part", "set"]
