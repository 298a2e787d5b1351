"""LPIPS and FID, with random weights in the place of trained ones, against the packages."""

import dataclasses
import hashlib

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from diffoc.problems import perceptual
from diffoc.problems.perceptual import missing_metrics, perceptual_metrics

lpips = pytest.importorskip("lpips")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and an empty folder of torch's hub."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("DIFFOC_CACHE", str(folder))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return folder


@pytest.fixture
def alex(cache, monkeypatch):
    """The package's network with a random trunk, which is also what lies in the cache."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = {k.split(".", 1)[1]: v for k, v in network.net.state_dict().items()}
    file = perceptual.WEIGHTS["alex"]
    torch.save({f"features.{k}": v for k, v in trunk.items()}, cache / file.name)
    digest = hashlib.sha256((cache / file.name).read_bytes()).hexdigest()
    monkeypatch.setitem(perceptual.WEIGHTS, "alex", dataclasses.replace(file, sha256=digest[:8]))
    return network


def pair(channels, seed=0, side=64):
    generator = torch.Generator().manual_seed(seed)
    truth = 2 * torch.rand(3, channels, side, side, generator=generator) - 1
    return truth + 0.5 * torch.randn(truth.shape, generator=generator), truth


def test_lpips_is_the_package_s(alex):
    images, truth = pair(3)
    names = ("lpips_alex", "lpips_alex_01")
    found, missing = perceptual_metrics(images, truth, names, batch=2)
    assert not missing
    clipped = images.clamp(-1, 1)
    for name, a, b in (
        ("lpips_alex", clipped, truth),
        ("lpips_alex_01", (clipped + 1) / 2, (truth + 1) / 2),
    ):
        torch.testing.assert_close(found[name], alex(a, b).flatten(), rtol=1e-4, atol=1e-7)
    assert (found["lpips_alex"] / found["lpips_alex_01"] - 1).abs().min() > 0.05


def test_lpips_uses_the_weights_that_ship_with_the_package(alex):
    images, truth = pair(3)
    with torch.no_grad():
        untrained = lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False)
        untrained.net.load_state_dict(alex.net.state_dict())
        other = untrained(images.clamp(-1, 1), truth).flatten()
    found, _ = perceptual_metrics(images, truth, ["lpips_alex"])
    assert (found["lpips_alex"] / other - 1).abs().min() > 0.05


def test_grey_images_are_repeated(alex):
    images, truth = pair(1)
    grey, _ = perceptual_metrics(images, truth, ["lpips_alex"])
    colour, _ = perceptual_metrics(images.repeat(1, 3, 1, 1), truth.repeat(1, 3, 1, 1))
    assert torch.equal(grey["lpips_alex"], colour["lpips_alex"])
    assert grey["lpips_alex"].shape == (3,)


def test_what_is_missing_is_said_and_nothing_takes_its_name(alex):
    images, truth = pair(1)
    before = torch.random.get_rng_state()
    found, missing = perceptual_metrics(images, truth)
    assert set(found) == {"lpips_alex"}
    assert set(missing) == {"lpips_vgg"}
    for part in ("vgg16-397923af.pth", "https://download.pytorch.org", "553 MB", "checkpoints"):
        assert part in missing["lpips_vgg"]
    assert torch.equal(before, torch.random.get_rng_state())
    known = missing_metrics()
    assert {"lpips_alex", "lpips_vgg"} & set(known) == {"lpips_vgg"}
    assert known["lpips_vgg"] == missing["lpips_vgg"]


def test_weights_in_the_folder_of_torch_s_hub_are_found(alex, cache, tmp_path):
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    name = perceptual.WEIGHTS["alex"].name
    (cache / name).rename(folder / name)
    found, _ = perceptual_metrics(*pair(1))
    assert "lpips_alex" in found


def test_other_weights_are_refused(alex, cache):
    path = cache / perceptual.WEIGHTS["alex"].name
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(ValueError, match="sha256"):
        perceptual_metrics(*pair(1))


def test_unfit_arguments_are_refused():
    images, truth = pair(1)
    with pytest.raises(ValueError, match="names has"):
        perceptual_metrics(images, truth, ["lpips"])
    with pytest.raises(ValueError, match="images and truth"):
        perceptual_metrics(images, truth[:1])
    with pytest.raises(ValueError, match="1 or 3"):
        perceptual_metrics(images.repeat(1, 2, 1, 1), truth.repeat(1, 2, 1, 1))
    with pytest.raises(ValueError, match="sides of 32"):
        perceptual_metrics(*pair(1, side=28))
    with pytest.raises(ValueError, match="not finite"):
        perceptual_metrics(images / 0, truth)


def test_inception_without_weights_is_an_error():
    with pytest.raises(FileNotFoundError, match=r"weights-inception-2015-12-05-6726825d\.pth"):
        perceptual.inception()


def test_inception_sees_8_bits_at_the_original_size(cache, monkeypatch):
    pytest.importorskip("torch_fidelity")
    file = perceptual.WEIGHTS["inception"]
    monkeypatch.setitem(perceptual.WEIGHTS, "inception", dataclasses.replace(file, sha256=None))
    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "load_state_dict", lambda self, state: None)
        torch.save({}, cache / file.name)
        untrained = FrechetInceptionDistance(
            feature_extractor_weights_path=str(cache / file.name), antialias=False
        ).inception
    torch.save(untrained.state_dict(), cache / file.name)
    generator = torch.Generator().manual_seed(6)
    pixels = torch.randint(256, (2, 1, 64, 64), generator=generator, dtype=torch.uint8)
    pixels = pixels.expand(-1, 3, -1, -1)
    found, expected = perceptual.inception()(pixels), untrained(pixels)
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
