r"""The deep image prior, of arXiv:1711.10925: a network that never saw an image.

.. math:: \min_\theta \; \|A(G_\theta(z)) - y\|^2

by Adam on the weights of deepinv's convolutional decoder G (arXiv:2107.09565), z being one random
input. deepinv's own loop ends after a fixed number of iterations, by which the noise is fitted as
well; this one ends like the controller, where the residual is the noise's.
"""

from __future__ import annotations

from itertools import cycle

import torch
from azula.denoise import Denoiser
from deepinv.models import ConvDecoder
from deepinv.physics import Physics
from torch import Tensor

from diffoc.baselines import Method, global_generator, method
from diffoc.problems.tasks import UnsupportedTask, noise_level, parts_of


@method
def deep_image_prior(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    iterations: int = 1000,
    channels: int = 64,
    rate: float = 1e-2,
) -> Tensor:
    """Images (B, C, H, W), one after the other; see :mod:`diffoc.baselines` for shared arguments.

    Args:
        prior: not used, nor are the values of `x`.
        noise_std: of the measurements.
        iterations: at most, at least 1; each is a forward and a backward pass of the decoder, and
            costs no evaluation of a prior.
        channels: of the decoder's seven layers, at least 1.
        rate: of Adam, above 0.

    Raises:
        UnsupportedTask: if states are no images.
        ValueError: if a setting is out of its range.
    """
    if x.ndim != 4:
        raise UnsupportedTask(f"x has shape {tuple(x.shape)}, the decoder makes (B, C, H, W)")
    for name, value in (("iterations", iterations), ("channels", channels)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if not rate > 0:
        raise ValueError(f"rate is {rate}, expected above 0")
    target = noise_level(physics, y, noise_std) ** 2
    images = []
    with global_generator(generator):
        # One by one: the decoder normalises over the batch.
        for each, operator in zip(y.split(1), cycle(parts_of(physics)), strict=False):
            decoder = ConvDecoder(tuple(x.shape[1:]), channels=channels).to(x)
            z = torch.randn(1, channels, 4, 4, device=x.device, dtype=x.dtype)
            images.append(_fit(decoder, z, operator, each, target, iterations, rate))
    return torch.cat(images)


@torch.enable_grad()
def _fit(
    decoder: ConvDecoder,
    z: Tensor,
    physics: Physics,
    y: Tensor,
    target: float,
    iterations: int,
    rate: float,
) -> Tensor:
    optimizer = torch.optim.Adam(decoder.parameters(), lr=rate)
    for _ in range(iterations):
        image = decoder(z)
        loss = (physics.A(image) - y).square().mean()
        if loss.item() < target:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return image.detach()


METHOD = Method("Deep image prior", deep_image_prior, lambda task, nfe: {}, lambda settings: (0, 0))
