r"""A prior as the denoiser that plug-and-play methods expect, of an image with noise added.

.. math:: D(x, \sigma) = m(\alpha_t x, t) \approx E[x_0 \mid x_0 + \sigma z = x], \qquad
          \sigma_t / \alpha_t = \sigma
"""

from __future__ import annotations

import math

import torch
from azula.denoise import Denoiser
from azula.noise import Schedule
from torch import Tensor, nn


def time_of_level(schedule: Schedule, sigma: float) -> Tensor:
    r"""The time t in [0, 1] at which :math:`\sigma_t / \alpha_t` is `sigma`, a float64 scalar.

    Args:
        schedule: any whose ratio of noise to signal grows with the time.
        sigma: not negative; the time is 0 below the schedule's least level.

    Raises:
        ValueError: if it is negative, not finite, or above the level at time 1.
    """
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma is {sigma}, expected finite and at least 0")
    low, high = torch.tensor([0.0, 1.0], dtype=torch.float64)
    alpha, noise = schedule(high)
    if sigma * alpha > noise * (1 + 1e-6):
        raise ValueError(f"sigma is {sigma}, the schedule ends at {(noise / alpha).item():g}")
    for _ in range(60):  # to float64's precision
        middle = (low + high) / 2
        alpha, noise = schedule(middle)
        low, high = (low, middle) if noise > sigma * alpha else (middle, high)
    return low


class NoiseLevelDenoiser(nn.Module):
    """See the module.

    Args:
        prior: any azula denoiser.
    """

    def __init__(self, prior: Denoiser) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        """Denoised images of the shape of x (B, ...), all with one noise level."""
        t = time_of_level(self.prior.schedule, float(sigma))
        alpha, _ = self.prior.schedule(t)
        return self.prior(alpha.item() * x, t.to(x)).mean
