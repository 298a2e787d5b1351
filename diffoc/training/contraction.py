r"""Contraction: a sampler's error of contrast must not grow with every evaluation.

Let a face x become :math:`x + \Delta`: brighter, of more contrast, or with a share of another face,
everywhere or in a rectangle. Under the same noise, a denoiser's estimate should follow by a little
less than :math:`\Delta`, because a prior holds extremes to be rare. How far it follows is its gain

.. math:: g = \frac{\langle m(x + \Delta + \sigma z) - m(x + \sigma z), \Delta \rangle}
    {\|\Delta\|^2} .

An excess of one per cent is too small for the mean square error to see. But 300 evaluations repeat
it, and :math:`1.01^{300} \approx 20`. The penalty is the square of what g has above 1. Below it
nothing is asked. Of brightness itself the network has the gain in closed form, see
:class:`diffoc.priors.networks.UNetBackbone`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST_SIGMA = 1.0
"""Above it the noise hides such errors, and gains are below 1 by themselves."""

SIZES = (0.15, 2.0)
"""Changes are of a root mean square between these, on the scale of images in [-1, 1]."""


def changes(x: Tensor, generator: torch.Generator) -> Tensor:
    """Returns changes of faces (B, C, H, W) that a sampler might make, of the same shape.

    A change is a sum of brightness, contrast and a share of another face of the batch, of a root
    mean square between the two `SIZES`. Half of them are in a random rectangle only.
    """
    count, *_, height, width = x.shape
    brightness, contrast, share = torch.randn(3, count, 1, 1, 1, generator=generator).to(x)
    centred = x - x.mean((1, 2, 3), keepdim=True)
    change = brightness + 2 * contrast * centred + share * centred.roll(1, 0)
    small, large = (math.log(size) for size in SIZES)
    size = torch.exp(small + (large - small) * torch.rand(count, 1, 1, 1, generator=generator))
    change = change * size.to(x) / change.square().mean((1, 2, 3), keepdim=True).sqrt()
    low, high = torch.rand(2, 2, count, 1, generator=generator).sort(0).values
    rows, columns = torch.arange(height) / height, torch.arange(width) / width
    down, across = (rows >= low[0]) & (rows <= high[0]), (columns >= low[1]) & (columns <= high[1])
    inside = down[:, None, :, None] & across[:, None, None, :]
    inside |= torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return change * inside.to(x)


def gain(before: Tensor, after: Tensor, change: Tensor) -> Tensor:
    """Returns the gain g, (B,), of estimates (B, ...) before and after a change of the images."""
    follows = ((after - before) * change).flatten(1).sum(1)
    return follows / change.square().flatten(1).sum(1).clamp(min=1e-6)


def excess(before: Tensor, after: Tensor, change: Tensor, sigma: Tensor) -> Tensor:
    """Returns what the gain is above 1, at least 0, (B,); nothing above the largest sigma."""
    return (gain(before, after, change) - 1).clamp(min=0) * (sigma <= LARGEST_SIGMA)
