r"""Latent diffusion: a prior of latents z, and an autoencoder that makes images of them.

A `LatentPrior` is an azula denoiser like any other, :math:`z_t = \alpha_t z_0 + \sigma_t n` with
the posterior mean :math:`m(z_t, t)`; beside it are the encoder E and the decoder D, and images are
:math:`x_0 = D(z_0)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.noise import Schedule
from torch import Tensor, nn

from diffoc.checks import one_line
from diffoc.priors.counting import CountedPrior
from diffoc.priors.pipelines import (
    DiffusersDenoiser,
    alphas_cumprod_of,
    load_network,
    sides_of,
    try_network,
)

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from diffoc.priors.autoencoder import Autoencoder


class LatentPrior(Denoiser):
    """A denoiser of latents with the autoencoder that they belong to.

    The autoencoder has differentiable methods `encode`, images to latents, and `decode`.
    `image_shape` is the shape of a latent, (c, h, w): the prior's states are latents.
    `decoded_shape` is that of an image, (C, H, W). Both are set by `load_prior`.
    """

    def __init__(self, denoiser: Denoiser, autoencoder: Autoencoder | DiffusersAutoencoder) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.autoencoder = autoencoder
        self.schedule = denoiser.schedule

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: object) -> DiracPosterior:
        return DiracPosterior(self.denoiser(x_t, t, **kwargs).mean)

    def encode(self, images: Tensor) -> Tensor:
        """Returns latents (B, c, h, w) of images (B, C, H, W) in [-1, 1]; it draws nothing."""
        return self.autoencoder.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Returns images (B, C, H, W), not clipped, of latents (B, c, h, w)."""
        return self.autoencoder.decode(latents)


def latent_prior(prior: Denoiser) -> LatentPrior:
    """Returns the latent prior that `prior` is or counts."""
    inner = prior.prior if isinstance(prior, CountedPrior) else prior
    if not isinstance(inner, LatentPrior):
        raise ValueError(
            f"prior is a {type(inner).__name__}, a prior of images: expected a LatentPrior, "
            "such as load_prior('faces64_latent')"
        )
    return inner


class DiffusersAutoencoder(nn.Module):
    """A `diffusers.AutoencoderKL` or `VQModel`, its latents scaled as its pipeline scales them.

    The decoder of a VQModel moves latents to the nearest codewords, straight through for gradients.
    """

    def __init__(self, network: ModelMixin) -> None:
        super().__init__()
        self.network = network
        # A shift is what later models than Stable Diffusion 1.5 have; None where they have none.
        self.shift = getattr(network.config, "shift_factor", None) or 0.0
        self.scale = network.config.scaling_factor

    def encode(self, images: Tensor) -> Tensor:
        """Returns scaled latents; of a KL model the posterior's mean."""
        output = self.network.encode(images)
        latents = output.latents if "latents" in output else output.latent_dist.mean
        return (latents - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Returns images of scaled latents."""
        return self.network.decode(latents / self.scale + self.shift).sample


class EmptyPrompt(nn.Module):
    """A `diffusers.UNet2DConditionModel` that is asked for nothing: Stable Diffusion as a prior.

    The embedding is that of the empty prompt, (1, tokens, features).
    """

    embedding: Tensor

    def __init__(self, network: ModelMixin, embedding: Tensor) -> None:
        super().__init__()
        self.network = network
        self.config = network.config
        self.register_buffer("embedding", embedding, persistent=False)

    def forward(self, x: Tensor, timestep: Tensor) -> object:
        return self.network(x, timestep, self.embedding.to(x).expand(len(x), -1, -1))


def load_pipeline(folder: Path, schedule: Schedule | None) -> LatentPrior:
    """Returns an unconditional `LDMPipeline`, or a `StableDiffusionPipeline` without a prompt.

    Latent diffusion on FFHQ, as PSLD uses it, comes in the first form (vqvae, unet, scheduler),
    Stable Diffusion 1.5 in the second (vae, unet, scheduler, tokenizer, text_encoder), which needs
    the package `transformers`. The folder is as `save_pretrained` writes it.
    """
    import diffusers  # slow to import

    first_stage = folder / ("vqvae" if (folder / "vqvae").is_dir() else "vae")
    unet = folder / "unet"
    network = load_network(first_stage, diffusers.VQModel, diffusers.AutoencoderKL)
    backbone = load_network(unet, diffusers.UNet2DModel, diffusers.UNet2DConditionModel)
    if backbone.config.in_channels != network.config.latent_channels:
        raise ValueError(
            f"{unet} takes {backbone.config.in_channels} channels, but {first_stage} makes latents "
            f"of {network.config.latent_channels}: expected a network of latents alone"
        )
    if isinstance(backbone, diffusers.UNet2DConditionModel):
        backbone = EmptyPrompt(backbone, _embed_nothing(folder))
    try_network(backbone, unet)
    denoiser = DiffusersDenoiser(backbone, *alphas_cumprod_of(folder), schedule)
    prior = LatentPrior(denoiser, DiffusersAutoencoder(network))
    height, width = sides_of(backbone)
    factor = 2 ** (len(network.config.block_out_channels) - 1)
    prior.image_shape = (backbone.config.in_channels, height, width)
    prior.decoded_shape = (network.config.out_channels, factor * height, factor * width)
    return prior


@torch.no_grad()
def _embed_nothing(folder: Path) -> Tensor:
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{folder} needs its text encoder once, for the empty prompt: pip install transformers",
            name="transformers",
        ) from error
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    except Exception as error:  # a damaged file makes it fail anywhere
        raise FileNotFoundError(
            f"{folder} has no tokenizer or text encoder, or damaged ones: {one_line(error)}"
        ) from error
    tokens = tokenizer("", padding="max_length", truncation=True, return_tensors="pt").input_ids
    return encoder(tokens)[0]
