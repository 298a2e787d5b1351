r"""Faint states: what a controller meets and a sampler does not.

A denoiser is trained on :math:`x + \sigma z`, where z has almost surely the length
:math:`\sqrt n`. What it returns for shorter states is left to chance, and a controller that starts
from zero, the most probable noise, meets little else. A share of each batch is therefore

.. math:: x' = b x + c \sigma z, \qquad b, c \in [0, 1],

and is asked for the posterior mean L of a Gaussian with the images' mean and covariance, which is
defined everywhere, plus the part of the correction that the state still tells:

.. math:: L(x') + \min(b, c) \, (x - L(x + \sigma z)).

With b = c = 1 this is the usual target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RANK = 256
NO_IMAGE = 0.25
"""The share of faint states in which b is 0, so that there is noise alone."""


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
