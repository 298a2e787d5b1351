r"""The deep image prior, of arXiv:1711.10925: a network that never saw an image.

.. math:: \min_\theta \; \|A(G_\theta(z)) - y\|^2

by Adam on the weights of deepinv's convolutional decoder G (arXiv:2107.09565), z being one random
input. deepinv's own loop ends after a fixed number of iterations, by which the noise is fitted as
well; this one ends like the controller, where the residual is the noise's.
"""

from itertools import cycle

import torch
from deepinv.models import ConvDecoder
from torch import Tensor

from diffoc.baselines import Given, Method, global_generator, method
from diffoc.checks import check_above, check_whole
from diffoc.problems.tasks import UnsupportedTask, measured, parts_of


@method
def deep_image_prior(
    given: Given, *, iterations: int = 1000, channels: int = 64, rate: float = 1e-2
) -> Tensor:
    """Returns images (B, C, H, W), made one after the other, without the prior.

    Args:
        iterations: the largest number of forward and backward passes of the decoder, at least 1.
        channels: the width of the decoder's seven layers, at least 1.
        rate: Adam's learning rate, above 0.
    """
    physics, y, x = given.physics, given.y, given.x
    if x.ndim != 4:
        raise UnsupportedTask(f"x has shape {tuple(x.shape)}, the decoder makes (B, C, H, W)")
    check_whole(1, iterations=iterations, channels=channels)
    check_above(0, rate=rate)
    targets = (given.noise_std**2 * measured(physics, y).flatten(1).mean(dim=1)).tolist()
    images = []
    with global_generator(given.generator), torch.enable_grad():
        # One by one: the decoder normalises over the batch.
        parts = cycle(parts_of(physics))
        for each, operator, target in zip(y.split(1), parts, targets, strict=False):
            decoder = ConvDecoder(tuple(x.shape[1:]), channels=channels).to(x)
            z = torch.randn(1, channels, 4, 4, device=x.device, dtype=x.dtype)
            optimizer = torch.optim.Adam(decoder.parameters(), lr=rate)
            for _ in range(iterations):
                image = decoder(z)
                loss = (operator.A(image) - each).square().mean()
                if loss.item() < target:
                    break
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            images.append(image.detach())
            del decoder, optimizer, image, loss  # before the next decoder is made
    return torch.cat(images)


METHOD = Method("Deep image prior", deep_image_prior, lambda task, nfe: {}, lambda settings: (0, 0))
