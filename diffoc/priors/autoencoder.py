r"""A small autoencoder of faces, which gives latent diffusion models their space.

Images are folded (every square of pixels becomes one of as many channels), so that all layers work
on the latents' grid; the blocks are those of `diffusers.AutoencoderKL`, without attention. Beside
them runs a linear path, which begins as the lowest cosines of squares and colours, so that the
blocks need to learn no more than what those miss. It is trained as a variational autoencoder whose
decoder has noise of standard deviation s,

.. math:: E \|x - D(z)\|^2 + 2 s^2 \, KL(q(z | x) \,\|\, N(0, I)), \qquad z \sim q(z | x),

and with a small s: the divergence only keeps the latents from growing and from carrying what the
decoder does not need. Latents are standardised channel by channel.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffoc.data.images import as_states
from diffoc.greedy import cosines
from diffoc.priors.weights import load_shipped

FOLD = 4  # pixels of a square's side
DECODER_STD = 0.01  # s


class Autoencoder(nn.Module):
    """Maps images (B, colours, H, W) in [-1, 1] to latents and back.

    Latents are (B, channels, H / 4, W / 4). The hidden layers are `width` channels wide, a
    multiple of 32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int = 64, channels: int = 6, colours: int = 3) -> None:
        super().__init__()
        from diffusers import AutoencoderKL  # slow to import

        folded = colours * FOLD**2
        self.blocks = AutoencoderKL(
            in_channels=folded,
            out_channels=folded,
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(width,),
            layers_per_block=1,
            latent_channels=channels,
            mid_block_add_attention=False,
        )
        self.down = nn.Conv2d(folded, channels, 1)
        self.up = nn.Conv2d(channels, folded, 1)
        with torch.no_grad():
            basis = _lowest_cosines(FOLD, colours)[:channels]
            self.down.weight.copy_(basis[:, :, None, None])
            self.up.weight.copy_(basis.mT[:, :, None, None])
            silent = (self.blocks.quant_conv, self.blocks.decoder.conv_out)
            biases = (self.down.bias, self.up.bias)
            for parameter in (*biases, *(p for c in silent for p in c.parameters())):
                parameter.zero_()
            self.blocks.quant_conv.bias[channels:] = -6  # the log-variance of z
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and log-variance of the latents given images, not standardised."""
        folded = nn.functional.pixel_unshuffle(x, FOLD)
        moments = self.blocks.encode(folded).latent_dist
        return self.down(folded) + moments.mean, moments.logvar

    def encode(self, x: Tensor) -> Tensor:
        """Returns the standardised latents' means."""
        return (self.posterior(x)[0] - self.mean) / self.std

    def decode(self, z: Tensor) -> Tensor:
        """Returns images of standardised latents, not clipped."""
        latents = z * self.std + self.mean
        folded = self.up(latents) + self.blocks.decode(latents).sample
        return nn.functional.pixel_shuffle(folded, FOLD)

    @torch.no_grad()
    def standardise(self, x: Tensor) -> None:
        """Sets the latents' mean and standard deviation to those of images (B, C, H, W)."""
        self.mean.zero_(), self.std.fill_(1)
        latents = torch.cat([self.encode(part) for part in x.split(64)])
        self.mean.copy_(latents.mean((0, 2, 3)).reshape(-1, 1, 1))
        self.std.copy_(latents.std((0, 2, 3)).reshape(-1, 1, 1))


def autoencoding_loss(network: Autoencoder, x: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the module's loss per pixel; `generator` draws z."""
    mean, log_variance = network.posterior(x)
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    z = mean + (log_variance / 2).exp() * noise
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
    error = (network.decode((z - network.mean) / network.std) - x).square().mean()
    return error + 2 * DECODER_STD**2 * divergence / x.numel()


@torch.no_grad()
def reconstruction_psnr(network: Autoencoder, images: np.ndarray) -> float:
    """Returns the mean PSNR in dB (peak 2) of encoded and decoded images, given as to `encoded`."""
    device, errors = next(network.parameters()).device, []
    for part in np.array_split(images, -(-len(images) // 64)):
        x = as_states(part).to(device)
        errors.append((network.decode(network.encode(x)) - x).square().flatten(1).mean(1))
    return (10 * torch.log10(4 / torch.cat(errors))).mean().item()


@torch.no_grad()
def encoded(network: Autoencoder, images: np.ndarray) -> np.ndarray:
    """Returns standardised latents (N, channels, h, w) of images as `as_states` takes them."""
    parts = np.array_split(images, -(-len(images) // 64))
    return torch.cat([network.encode(as_states(part)) for part in parts]).numpy()


def load_autoencoder(folder: Path | None = None) -> Autoencoder:
    """Returns the one that ships, trained, to evaluate, float32; see :func:`load_shipped`."""
    return load_shipped(Autoencoder, "faces64_autoencoder", folder)


def _lowest_cosines(side: int, colours: int) -> Tensor:
    """Returns the orthonormal cosine transform of squares and colours, low rows first.

    It is (n, n), n = colours * side^2, for vectors in the order of a pixel-unshuffle. Along
    three colours it gives their mean and two differences, which count as a frequency between the
    squares' third and fourth.
    """
    space, colour = cosines(side), cosines(colours)
    basis = torch.kron(colour, torch.kron(space, space))
    index = torch.arange(side).float()
    frequency = (index[:, None].square() + index.square()).flatten()
    difference = 3.0 * (torch.arange(colours) > 0)
    order = (difference[:, None] + frequency).flatten().argsort(stable=True)
    return basis[order].float()
