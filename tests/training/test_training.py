"""The trainer: exact resumption, schedules, losses, and that it learns."""

import math

import numpy as np
import pytest
import torch
from azula.denoise import DiracPosterior, GaussianDenoiser
from azula.linalg.covariance import IsotropicCovariance
from azula.noise import VESchedule
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from diffoc.commands import main as command_line
from diffoc.priors.networks import DigitClassifier, UNetBackbone, parameter_count
from diffoc.priors.weights import load_shipped, read_weights
from diffoc.training import evaluation
from diffoc.training import trainer as training
from diffoc.training.trainer import (
    Plan,
    learning_rate,
    resume,
    save,
    shift,
    start,
    step,
    train,
)


class Tiny(nn.Module):
    """A backbone of one convolution that knows the noise level as a second channel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x, log_sigma):
        level = log_sigma.reshape(-1, 1, 1, 1).expand_as(x)
        return self.conv(torch.cat([x, level], dim=1))


def images(count=50, side=8):
    return np.random.default_rng(0).integers(0, 256, (count, side, side), dtype=np.uint8)


def tiny(**changes):
    return Plan(Tiny, **{"images": 64, "batch": 8, "warmup": 16, "flip": True, **changes})


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    whole = start(tiny(), seed=3)
    train(whole, images())
    half = start(tiny(), seed=3)
    for _ in range(3):
        step(half, images())
    save(half, tmp_path / "run.pt")
    resumed = resume(tiny(), tmp_path / "run.pt")
    assert resumed.seen == 24
    train(resumed, images())
    for name in ("network", "average"):
        expected, found = getattr(whole, name).state_dict(), getattr(resumed, name).state_dict()
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), (name, key)


def test_the_seed_decides_everything():
    states = []
    for seed in (0, 0, 1):
        run = start(tiny(), seed)
        train(run, images())
        states.append(run.network.conv.weight)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_a_run_begins_with_the_weights_of_another(tmp_path):
    earlier = start(tiny(), seed=5)
    train(earlier, images())
    path = tmp_path / "weights.safetensors"
    save_file(earlier.average.state_dict(), path)
    run = start(tiny(), seed=6, weights=read_weights(path))
    for network in (run.network, run.average):
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, earlier.average.state_dict()[key])
    assert run.seen == 0


def test_unfit_weights_to_begin_with_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(FileNotFoundError, match="earlier training"):
        read_weights(path)
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(ValueError, match="damaged"):
        read_weights(path)
    with pytest.raises(ValueError, match="another network"):
        start(tiny(), weights=DigitClassifier().state_dict())


def test_a_broken_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    run = start(tiny())
    save(run, path)
    before = path.read_bytes()

    def fail(state, part):
        part.write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save(run, path)
    assert path.read_bytes() == before


def test_checkpoints_of_others_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(FileNotFoundError, match=r"run\.pt"):
        resume(tiny(), path)
    save(start(tiny()), path)
    with pytest.raises(ValueError, match="another network"):
        resume(Plan(DigitClassifier, images=1), path)


def test_learning_rate_warms_up_and_decays():
    plan = tiny(images=1000, warmup=100, rate=0.5)
    rates = [learning_rate(plan, seen) for seen in range(0, 1001, 10)]
    peak = rates.index(max(rates))
    assert peak == 10  # at the end of the warm-up
    assert rates[peak] == pytest.approx(0.5)
    assert rates[0] == pytest.approx(0.5 * 8 / 108)
    assert rates[55] == pytest.approx(0.25)  # the cosine's middle
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_the_loss_is_edm_s_for_a_known_denoiser(monkeypatch):
    """With a zero network the estimate is c_skip x, whose expected loss has a closed form."""

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def forward(self, x, log_sigma):
            return 0 * x

    run = start(Plan(Zero, images=1, log_sigma=(math.log(0.7), 0.0)))
    x = torch.randn(4000, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    loss = training.denoising_loss(Zero(), x, run).item()
    s2 = 0.7**2
    # estimate = (x + s z) / (1 + s^2); the error's variance for x ~ N(0, 1):
    expected = (1 / s2 + 1) * (s2**2 + s2) / (1 + s2) ** 2
    assert loss == pytest.approx(expected, rel=0.02)


def test_time_of_inverts_the_schedule():
    sigma = torch.tensor([training.SIGMA_MIN, 0.1, 1.0, training.SIGMA_MAX])
    _, found = training.denoiser(Tiny()).schedule(training.time_of(sigma))
    torch.testing.assert_close(found, sigma, rtol=1e-5, atol=0)


def test_psnr_of_an_untouched_image():
    """A denoiser that returns its input scores the noise: 10 log10(4 / sigma^2)."""

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def forward(self, x, t):
            return DiracPosterior(x)

    psnr = evaluation.denoising_psnr(Same(), images(200, 16), 0.5)
    assert psnr == pytest.approx(10 * math.log10(4 / 0.25), abs=0.05)


def test_samples_of_a_gaussian_have_its_spread():
    """Heun's method maps the noise to N(m, s^2) when the denoiser is that Gaussian's."""
    covariance = IsotropicCovariance(torch.tensor(0.2**2))
    prior = GaussianDenoiser(torch.tensor(0.3), covariance, VESchedule(2e-3, 80.0))
    prior.register_parameter("unused", nn.Parameter(torch.zeros(())))
    found = evaluation.draw_samples(prior, (60, 1, 8, 8), torch.Generator().manual_seed(0), 64)
    assert found.mean().item() == pytest.approx(0.3, abs=0.01)
    assert found.std().item() == pytest.approx(0.2, rel=0.03)


def test_training_lowers_the_denoising_error():
    smooth = np.full((50, 8, 8), 200, dtype=np.uint8)
    run = start(tiny(images=8000, rate=1e-2), seed=1)
    before = evaluation.denoising_psnr(training.denoiser(run.average), smooth, 0.5)
    train(run, smooth)
    assert evaluation.denoising_psnr(training.denoiser(run.average), smooth, 0.5) > before + 3


def test_the_classifier_learns_bright_from_dark():
    labels = np.arange(60) % 2
    pictures = np.where(labels[:, None, None] == 1, 220, 30) + np.zeros((60, 28, 28))
    pictures = pictures.astype(np.uint8)
    run = start(Plan(DigitClassifier, images=640, batch=16, warmup=64), seed=0)
    train(run, pictures, labels)
    assert evaluation.accuracy(run.average, pictures, labels) == 1.0


def test_shift_moves_and_fills_with_black():
    x = torch.ones(2, 1, 6, 6)
    moved = shift(x, torch.Generator().manual_seed(4))
    assert moved.shape == x.shape
    assert set(moved.unique().tolist()) <= {-1.0, 1.0}
    assert (moved == -1).any()


def test_half_precision_trains_and_resumes_exactly(tmp_path):
    """Autocast changes the passes, not the weights' precision nor the exactness of a resumption."""
    whole = start(tiny(), seed=3, precision=torch.bfloat16)
    train(whole, images())
    full = start(tiny(), seed=3)
    train(full, images())
    half = start(tiny(), seed=3, precision=torch.bfloat16)
    for _ in range(3):
        step(half, images())
    save(half, tmp_path / "run.pt")
    resumed = resume(tiny(), tmp_path / "run.pt", precision=torch.bfloat16)
    train(resumed, images())
    assert whole.network.conv.weight.dtype == torch.float32
    assert torch.equal(whole.network.conv.weight, resumed.network.conv.weight)
    assert not torch.equal(whole.network.conv.weight, full.network.conv.weight)
    torch.testing.assert_close(
        whole.network.conv.weight, full.network.conv.weight, rtol=0, atol=5e-3
    )
    with pytest.raises(ValueError, match="precision"):
        start(tiny(), precision=torch.float16)


def test_a_compiled_network_trains_the_same_weights():
    """The trainer calls what `compile` returned, and optimises the network behind it."""
    runs = [start(tiny(), seed=2), start(tiny(), seed=2)]
    train(runs[0], images())
    calls = []

    class Compiled(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, *args, **kwargs):
            calls.append(1)
            return self.network(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", Compiled)
        train(runs[1], images(), compile=True)
    assert len(calls) == 8
    assert torch.equal(runs[0].network.conv.weight, runs[1].network.conv.weight)


@pytest.mark.parametrize(("side", "fold"), [(28, 2), (64, 4)])
def test_backbones_fold_and_unfold(side, fold):
    network = UNetBackbone((32, 64), (1, 1), fold=fold)
    x = torch.randn(2, 1, side, side, generator=torch.Generator().manual_seed(0))
    y = network(x, torch.zeros(()))
    assert y.shape == x.shape
    torch.testing.assert_close(network(x, torch.zeros(2)), y)


def test_noise_beyond_the_trained_levels_counts_as_the_nearest():
    network = UNetBackbone((16, 16), (1, 1))
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    most = network(x, torch.tensor(math.log(80.0)))
    torch.testing.assert_close(network(x, torch.tensor(9.0)), most)
    assert not torch.allclose(network(x, torch.tensor(2.0)), most)


@pytest.mark.parametrize("sigma", [0.002, 0.1, 3.0, 80.0])
def test_exact_means_are_those_of_a_gaussian_posterior(sigma):
    generator = torch.Generator().manual_seed(0)
    network = UNetBackbone((16, 16), (1, 1), in_channels=3, exact_means=True).double()
    mix = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    images = torch.randn(500, 3, 4, 4, generator=generator, dtype=torch.float64)
    images = torch.einsum("ij,njhw->nihw", mix, images + 0.1)
    network.measure_means(images)
    x = 2 * torch.randn(5, 3, 8, 8, generator=generator, dtype=torch.float64)
    found = training.denoiser(network)(
        x, training.time_of(torch.tensor(sigma, dtype=torch.float64))
    ).mean
    means = images.mean((-2, -1))
    covariance = torch.cov(means.mT)
    gain = covariance @ torch.linalg.inv(covariance + sigma**2 / 64 * torch.eye(3).double())
    expected = means.mean(0) + (x.mean((-2, -1)) - means.mean(0)) @ gain.mT
    torch.testing.assert_close(found.mean((-2, -1)), expected, rtol=1e-6, atol=1e-8)


def test_exact_means_are_measured_before_the_first_step():
    plan = Plan(lambda: UNetBackbone((16, 16), (1, 1), exact_means=True), images=16, batch=8)
    run = start(plan)
    train(run, images())
    expected = training.as_states(images()).mean((-2, -1))
    for network in (run.network, run.average):
        torch.testing.assert_close(network.mean, expected.mean(0))
        torch.testing.assert_close(network.variances[0], expected.var())


def test_an_image_that_cannot_be_folded_is_refused():
    with pytest.raises(ValueError, match=r"x has shape \(1, 1, 30, 32\)"):
        UNetBackbone((32, 64), (1, 1), fold=4)(torch.zeros(1, 1, 30, 32), torch.zeros(()))


def test_the_trainer_s_checkpoints_run_no_code(tmp_path):
    class Touch:
        def __reduce__(self):
            return open, (str(tmp_path / "touched"), "w")

    torch.save({"network": Touch()}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="damaged or no file of tensors"):
        resume(tiny(), tmp_path / "run.pt")
    assert not (tmp_path / "touched").exists()
    (tmp_path / "run.pt").write_bytes(b"half a fi")
    with pytest.raises(ValueError, match="damaged"):
        resume(tiny(), tmp_path / "run.pt")


def test_sizes_are_as_promised():
    assert parameter_count(DigitClassifier()) <= 500_000
    assert parameter_count(training.PLANS["mnist"].build()) <= 2_000_000
    assert parameter_count(training.PLANS["faces64"].build()) <= 5_000_000
    # At most 2 MB in half precision.
    assert parameter_count(training.PLANS["faces64_severity"].build()) <= 1_000_000


def test_the_command_trains_goes_on_and_writes_weights(tmp_path, monkeypatch, capsys):
    labels = np.arange(40) % 10
    pictures = np.random.default_rng(1).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    monkeypatch.setattr("diffoc.data.images.mnist", lambda split: (pictures, labels))
    checkpoint, out = tmp_path / "run" / "classifier.pt", tmp_path / "out"
    out.mkdir()
    command = ["train", "classifier", "--checkpoint", str(checkpoint), "--out", str(out)]
    for images in (32, 96):  # the second call goes on where the first one ended
        plan = Plan(DigitClassifier, images=images, batch=16, warmup=16)
        monkeypatch.setitem(training.PLANS, "classifier", plan)
        assert command_line.main(command) == 0
        assert f"{images} of {images} images" in capsys.readouterr().out
    trained = resume(plan, checkpoint).average
    x = torch.from_numpy(pictures).float().unsqueeze(1) / 127.5 - 1
    written = load_shipped(DigitClassifier, "classifier", out)
    torch.testing.assert_close(written(x), trained(x), rtol=1e-2, atol=1e-3)


def test_the_command_reports_a_denoiser_with_a_sheet_of_samples(tmp_path, monkeypatch, capsys):
    pictures = np.random.default_rng(1).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    monkeypatch.setattr("diffoc.data.images.mnist", lambda split: (pictures, np.arange(40) % 10))
    plan = Plan(lambda: UNetBackbone((16, 16), (1, 1), fold=2), images=32, batch=16)
    monkeypatch.setitem(training.PLANS, "mnist", plan)
    checkpoint = tmp_path / "mnist.pt"
    command = ["train", "mnist", "--checkpoint", str(checkpoint), "--out", str(tmp_path)]
    assert command_line.main([*command, "--precision", "bf16"]) == 0
    assert "PSNR at sigma 0.1, 0.3, 1" in capsys.readouterr().out
    with Image.open(tmp_path / "mnist.png") as picture:
        assert picture.size == (8 * 28 * 2, 2 * 28 * 2)
    assert (tmp_path / "mnist.safetensors").exists()


def test_the_command_goes_on_from_shipped_weights(tmp_path, monkeypatch, capsys):
    pictures = np.random.default_rng(1).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    monkeypatch.setattr("diffoc.data.images.mnist", lambda split: (pictures, np.arange(40) % 10))
    torch.manual_seed(3)
    first = tmp_path / "first.safetensors"
    save_file(DigitClassifier().state_dict(), first)
    monkeypatch.setitem(
        training.PLANS, "classifier", Plan(DigitClassifier, images=10_000, batch=16)
    )
    command = ["train", "classifier", "--init", str(first), "--images", "32", "--rate", "1e-9"]
    where = ["--checkpoint", str(tmp_path / "run.pt"), "--out", str(tmp_path)]
    assert command_line.main([*command, *where]) == 0
    assert "32 of 32 images" in capsys.readouterr().out
    # With next to no learning rate the weights are those of the beginning.
    expected = read_weights(first)
    for key, tensor in read_weights(tmp_path / "classifier.safetensors").items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-4)
    assert (
        command_line.main([*command[:3], "no.safetensors", *where[:1], str(tmp_path / "b.pt")]) == 2
    )
