"""Latent priors: the shipped one, and diffusers' pipelines against their own modules."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from PIL import Image

from diffoc.commands import main as command_line
from diffoc.data import images as data
from diffoc.data.manifest import load_weights
from diffoc.priors import latent
from diffoc.priors.autoencoder import (
    Autoencoder,
    autoencoding_loss,
    encoded,
    load_autoencoder,
)
from diffoc.priors.counting import CountedPrior
from diffoc.priors.latent import LatentPrior, latent_prior
from diffoc.priors.networks import UNetBackbone, parameter_count
from diffoc.priors.pretrained import load_prior
from diffoc.priors.weights import write_weights
from diffoc.training import trainer as training

KL = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
SMALL = {"block_out_channels": (32, 32), "layers_per_block": 1}


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def portraits():
    return torch.cat([data.portrait(who) for who in ("astronaut", "grace_hopper")])


# --- ours


def test_the_shipped_prior_is_one_of_latents():
    prior = load_prior("faces64_latent")
    assert isinstance(prior, LatentPrior)
    assert (prior.image_shape, prior.decoded_shape) == ((6, 16, 16), (3, 64, 64))
    assert not prior.training
    x = portraits()
    z = prior.encode(x)
    assert z.shape == (2, *prior.image_shape)
    # What the card says of held-out faces, 41 dB, is more than of these sharper pictures.
    error = (prior.decode(z) - x).square().flatten(1).mean(1)
    assert (10 * torch.log10(4 / error) > 34).all()
    # It denoises: at sigma / alpha = 1 the estimate is far closer than the noisy latents are.
    prior.schedule = prior.denoiser.schedule = lambda t: (torch.tensor(0.6), torch.tensor(0.6))
    noisy = z + noise(*z.shape)
    estimate = prior(0.6 * noisy, torch.tensor(0.5)).mean
    assert (estimate - z).square().mean() < 0.4 * (noisy - z).square().mean()


def test_the_shipped_networks_are_small_and_in_half_precision():
    for name in ("faces64_autoencoder", "faces64_latent", "faces64_severity"):
        weights = load_weights(name)
        assert {value.dtype for value in weights.values()} == {torch.float16}
    assert parameter_count(load_autoencoder()) <= 700_000
    assert parameter_count(training.PLANS["faces64_latent"].build()) <= 5_000_000


def test_half_precision_changes_little(tmp_path):
    """Weights that were rounded on disk give the images of those that were not."""
    torch.manual_seed(0)
    network = Autoencoder(32)
    write_weights(network, "faces64_autoencoder", tmp_path)
    weights = load_weights("faces64_autoencoder", tmp_path)
    rounded = Autoencoder(32)
    rounded.load_state_dict({name: value.float() for name, value in weights.items()})
    x = portraits()
    with torch.no_grad():
        torch.testing.assert_close(rounded.encode(x), network.encode(x), rtol=1e-2, atol=1e-2)
        z = noise(2, 6, 16, 16)
        torch.testing.assert_close(rounded.decode(z), network.decode(z), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("colours", [1, 3])
def test_an_autoencoder_begins_as_the_lowest_cosines(colours):
    """Constant images, and slopes in either direction's first cosine, survive untrained."""
    torch.manual_seed(0)
    network = Autoencoder(32, 4 if colours == 1 else 6, colours=colours)
    ramp = torch.cos(torch.pi * (torch.arange(4) + 0.5) / 4).tile(4)
    x = torch.stack([torch.full((16, 16), 0.3), ramp.expand(16, 16), ramp.expand(16, 16).mT])
    x = x[:, None].expand(-1, colours, -1, -1)
    if colours == 3:  # and any even colour
        x = torch.cat([x, torch.tensor([0.5, -0.2, 0.9])[:, None, None].expand(1, 3, 16, 16)])
    with torch.no_grad():
        torch.testing.assert_close(network.decode(network.encode(x)), x)
        checkers = torch.ones(1, colours, 16, 16)
        checkers[..., ::2, :] *= -1
        assert network.decode(network.encode(checkers)).abs().mean() < 0.9


def test_latents_are_standardised_and_decoded_back():
    torch.manual_seed(0)
    network = Autoencoder(32)
    x = portraits()
    before = network.decode(network.encode(x))
    network.standardise(x)
    z = network.encode(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(6), rtol=1e-3, atol=0)
    torch.testing.assert_close(network.decode(z), before, rtol=1e-4, atol=1e-4)
    pixels = ((x + 1) * 127.5).round().to(torch.uint8)
    found = torch.from_numpy(encoded(network, pixels.movedim(1, -1).numpy()))
    torch.testing.assert_close(found, network.encode(pixels.float() / 127.5 - 1))


def test_the_autoencoder_s_loss_is_the_variational_bound():
    """Against torch.distributions, the divergence summed and the error of the same sample."""
    torch.manual_seed(0)
    network = Autoencoder(32)
    x = portraits()
    loss = autoencoding_loss(network, x, torch.Generator().manual_seed(7))
    with torch.no_grad():
        mean, log_variance = network.posterior(x)
        posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
        standard = torch.distributions.Normal(torch.zeros_like(mean), 1)
        divergence = torch.distributions.kl_divergence(posterior, standard).sum() / x.numel()
        draw = torch.randn(mean.shape, generator=torch.Generator().manual_seed(7))
        error = (network.decode(mean + posterior.stddev * draw) - x).square().mean()
    assert loss.item() == pytest.approx((error + 2 * 0.01**2 * divergence).item(), rel=1e-5)


def test_checkpoints_of_the_latent_network_are_latent_priors(tmp_path):
    run = training.start(training.PLANS["faces64_latent"])
    training.save(run, tmp_path / "run.pt")
    prior = load_prior(tmp_path / "run.pt")
    assert isinstance(prior, LatentPrior)
    assert prior.image_shape == (6, 16, 16)
    assert prior.decoded_shape == (3, 64, 64)


def test_the_commands_train_autoencoder_prior_and_severity_encoder(tmp_path, monkeypatch, capsys):
    """A few steps each; the prior's latents are those of the autoencoder beside it."""
    faces = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)
    monkeypatch.setattr("diffoc.data.images.colour_faces", lambda split: faces)
    for part, score in (("autoencoder", "PSNR"), ("latent", "sigma"), ("severity", "correlation")):
        name = f"faces64_{part}"
        recipe = replace(training.PLANS[name], images=16, batch=8)
        if part == "latent":
            recipe = replace(recipe, build=lambda: UNetBackbone((16, 16), (1, 1), in_channels=6))
        monkeypatch.setitem(training.PLANS, name, recipe)
        command = ["train", name, "--out", str(tmp_path)]
        assert command_line.main([*command, "--checkpoint", str(tmp_path / f"{part}.pt")]) == 0
        assert score in capsys.readouterr().out
        assert f"{name}.safetensors" in json.loads((tmp_path / "manifest.json").read_text())
    z = torch.from_numpy(encoded(load_autoencoder(tmp_path), faces))
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(6), rtol=2e-2, atol=0)
    with Image.open(tmp_path / "latent.png") as sheet:
        assert sheet.size == (8 * 64 * 2, 2 * 64 * 2)  # decoded, not latents


def test_a_pixel_prior_is_told_apart():
    prior = LatentPrior(load_prior("mnist"), Autoencoder(32))
    assert latent_prior(CountedPrior(prior)) is prior
    for wrong in (load_prior("mnist"), CountedPrior(load_prior("mnist"))):
        with pytest.raises(ValueError, match="prior is a KarrasDenoiser"):
            latent_prior(wrong)


# --- diffusers'


def randomize(network, seed=0):
    """Weights without the zeros that a fresh diffusion network has in its last layers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def write_pipeline(folder, autoencoder, unet, first_stage):
    autoencoder.save_pretrained(folder / first_stage)
    unet.save_pretrained(folder / "unet")
    DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False).save_pretrained(
        folder / "scheduler"
    )


def small_unet():
    return randomize(
        UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            **SMALL,
        )
    )


def small_vq():
    return randomize(
        VQModel(latent_channels=3, num_vq_embeddings=16, scaling_factor=0.7, **KL, **SMALL)
    )


def small_conditional():
    return randomize(
        UNet2DConditionModel(
            sample_size=8,
            cross_attention_dim=16,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            **SMALL,
        )
    )


def check_estimate(prior, network, *condition):
    """The prior's estimate is the scheduler's, at every scale of the state."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(1000)
    z = noise(2, *prior.image_shape)
    for step in (0, 500, 999):
        bar = scheduler.alphas_cumprod[step].double()
        scales = (2 * bar.sqrt().float(), 2 * (1 - bar).sqrt().float())
        prior.denoiser.schedule = lambda t, scales=scales: scales
        with torch.no_grad():
            output = network(z, step, *condition).sample
            expected = scheduler.step(output, step, z).pred_original_sample
            found = prior(2 * z, torch.tensor(0.5)).mean
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max(), step


def test_a_vector_quantised_pipeline_agrees_with_its_modules(tmp_path):
    vq, unet = small_vq(), small_unet()
    write_pipeline(tmp_path, vq, unet, "vqvae")
    prior = load_prior(tmp_path)
    assert (prior.image_shape, prior.decoded_shape) == ((3, 8, 8), (3, 16, 16))
    images, z = noise(2, 3, 16, 16).clamp(-1, 1), noise(2, 3, 8, 8).requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(prior.encode(images), 0.7 * vq.encode(images).latents)
        torch.testing.assert_close(prior.decode(z), vq.decode(z / 0.7).sample)
    (gradient,) = torch.autograd.grad(prior.decode(z).sum(), z)
    assert gradient.abs().max() > 0  # straight through the codewords
    check_estimate(prior, unet)


def test_stable_diffusion_is_given_the_empty_prompt(tmp_path, monkeypatch):
    kl = randomize(AutoencoderKL(latent_channels=4, scaling_factor=0.18, **KL, **SMALL))
    unet, embedding = small_conditional(), noise(1, 5, 16, seed=9)
    write_pipeline(tmp_path, kl, unet, "vae")
    # transformers and its weights are not here; what its encoder would say is as good as another.
    monkeypatch.setattr(latent, "_embed_nothing", lambda folder: embedding)
    prior = load_prior(tmp_path)
    assert (prior.image_shape, prior.decoded_shape) == ((4, 8, 8), (3, 16, 16))
    images, z = noise(2, 3, 16, 16).clamp(-1, 1), noise(2, 4, 8, 8)
    with torch.no_grad():
        expected = 0.18 * kl.encode(images).latent_dist.mean
        torch.testing.assert_close(prior.encode(images), expected)
        torch.testing.assert_close(prior.decode(z), kl.decode(z / 0.18).sample)
    check_estimate(prior, unet, embedding.expand(2, -1, -1))


def test_pipelines_that_lack_a_part_say_so(tmp_path, monkeypatch):
    write_pipeline(tmp_path, small_vq(), small_unet(), "vqvae")
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "Transformer"}))
    with pytest.raises(ValueError, match="unet holds a Transformer"):
        load_prior(tmp_path)
    (tmp_path / "vqvae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="vqvae has no weights"):
        load_prior(tmp_path)
    (tmp_path / "vqvae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_prior(tmp_path)


def test_stable_diffusion_without_transformers_says_what_to_install(tmp_path, monkeypatch):
    write_pipeline(tmp_path, AutoencoderKL(**KL, **SMALL), small_conditional(), "vae")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="pip install transformers"):
        load_prior(tmp_path)
