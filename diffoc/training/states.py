r"""Faint states and contraction: what training on images with noise alone leaves to chance.

A denoiser is trained on :math:`x + \sigma z`, where z has almost surely the length
:math:`\sqrt n`. A controller that starts from zero, the most probable noise, meets little else than
shorter states. A share of each batch is therefore

.. math:: x' = b x + c \sigma z, \qquad b, c \in [0, 1],

and is asked for the posterior mean L of a Gaussian with the images' mean and covariance, which is
defined everywhere, plus the part of the correction that the state still tells:

.. math:: L(x') + \min(b, c) \, (x - L(x + \sigma z)).

With b = c = 1 this is the usual target.

A sampler's error of contrast must not grow with every evaluation. Let a face x become
:math:`x + \Delta`: brighter, of more contrast, or with a share of another face, everywhere or in a
rectangle. Under the same noise, a denoiser's estimate should follow by a little less than
:math:`\Delta`, because a prior holds extremes to be rare. How far it follows is its gain

.. math:: g = \frac{\langle m(x + \Delta + \sigma z) - m(x + \sigma z), \Delta \rangle}
    {\|\Delta\|^2} .

An excess of one per cent is too small for the mean square error to see. But 300 evaluations repeat
it, and :math:`1.01^{300} \approx 20`. The penalty is the square of what g has above 1. Below it
nothing is asked. Of brightness itself the network has the gain in closed form, see
:class:`diffoc.priors.networks.UNetBackbone`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RANK = 256
NO_IMAGE = 0.25
"""The share of faint states in which b is 0, so that there is noise alone."""

LARGEST_SIGMA = 1.0
"""Above it the noise hides such errors, and gains are below 1 by themselves."""

SIZES = (0.15, 2.0)
"""Changes are of a root mean square between these, on the scale of images in [-1, 1]."""


@dataclass(frozen=True)
class LinearDenoiser:
    r"""The posterior mean of :math:`N(\mu, U \Lambda U^T + \lambda (I - U U^T))` under noise.

    .. math:: L(x) = \mu + \Lambda (\Lambda + \sigma^2)^{-1} (x - \mu)

    along U, and the same with :math:`\lambda`, `rest`, along the rest. U has orthonormal columns,
    (n, k), and Lambda is diagonal.
    """

    mean: Tensor
    basis: Tensor
    variances: Tensor
    rest: Tensor

    @classmethod
    def fit(cls, x: Tensor, rank: int = RANK) -> LinearDenoiser:
        """Returns mean and leading covariance of states (N, ...), by a randomised decomposition."""
        flat = x.flatten(1)
        mean = flat.mean(0)
        centred = flat - mean
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, values, basis = torch.svd_lowrank(centred, min(rank + 20, min(flat.shape)), niter=2)
        variances = values[:rank].square() / len(x)
        rest = centred.square().sum() / len(x) - variances.sum()
        return cls(mean, basis[:, :rank], variances, rest / max(1, flat.shape[1] - rank))

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Returns L of states (B, ...) at noise levels (B,)."""
        centred = x.flatten(1) - self.mean
        noise = sigma[:, None].square()
        rest = self.rest / (self.rest + noise)
        gain = self.variances / (self.variances + noise) - rest
        estimate = self.mean + rest * centred + (gain * (centred @ self.basis)) @ self.basis.mT
        return estimate.view_as(x)


def faint(
    x: Tensor, z: Tensor, sigma: Tensor, linear: LinearDenoiser, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Returns faint states of images x at noise levels (B,), and their targets, of x's shape."""
    b, c, keep = torch.rand(3, len(x), 1, 1, 1, generator=generator).to(x)
    b = b * (keep >= NO_IMAGE)
    noise = sigma.reshape(-1, 1, 1, 1) * z
    states = b * x + c * noise
    return states, linear(states, sigma) + torch.minimum(b, c) * (x - linear(x + noise, sigma))


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
