r"""A prior as the denoiser that plug-and-play methods expect, of an image with noise added.

.. math:: D(x, \sigma) = m(\alpha_t x, t) \approx E[x_0 \mid x_0 + \sigma z = x], \qquad
          \sigma_t / \alpha_t = \sigma
"""

from __future__ import annotations

import torch
from azula.denoise import Denoiser
from azula.noise import Schedule
from torch import Tensor, nn

from diffoc.process import times_of_levels


def time_of_level(schedule: Schedule, sigma: float) -> Tensor:
    """As :func:`diffoc.process.times_of_levels`, of a number: a float64 scalar."""
    return times_of_levels(schedule, torch.tensor(float(sigma), dtype=torch.float64))


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
