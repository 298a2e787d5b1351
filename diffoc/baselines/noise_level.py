r"""A prior as the denoiser that plug-and-play methods expect, of an image with noise added.

.. math:: D(x, \sigma) = m(\alpha_t x, t) \approx E[x_0 \mid x_0 + \sigma z = x], \qquad
          \sigma_t / \alpha_t = \sigma
"""

import torch
from azula.denoise import Denoiser
from azula.noise import Schedule
from torch import Tensor, nn


def times_of_levels(schedule: Schedule, sigmas: Tensor) -> Tensor:
    r"""Returns the times in [0, 1] at which :math:`\sigma_t / \alpha_t` are `sigmas`, in float64.

    The ratio grows with the time. Levels must not be above the one at time 1; below the least, the
    time is 0.
    """
    sigmas = sigmas.double()
    if not (sigmas.isfinite() & (sigmas >= 0)).all():
        raise ValueError(f"sigma is {sigmas.tolist()}, expected finite and at least 0")
    low, high = torch.zeros_like(sigmas), torch.ones_like(sigmas)
    alpha, noise = schedule(high)
    if (sigmas * alpha > noise * (1 + 1e-6)).any():
        raise ValueError(
            f"sigma is {sigmas.max().item():g}, the schedule ends at {(noise / alpha).max():g}"
        )
    for _ in range(60):  # to float64's precision
        middle = (low + high) / 2
        alpha, noise = schedule(middle)
        above = noise > sigmas * alpha
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return low


class NoiseLevelDenoiser(nn.Module):
    """A prior, any azula denoiser, as the module's denoiser; all images have one noise level."""

    def __init__(self, prior: Denoiser) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        t = times_of_levels(self.prior.schedule, torch.tensor(float(sigma), dtype=torch.float64))
        alpha, _ = self.prior.schedule(t)
        return self.prior(alpha.item() * x, t.to(x)).mean
