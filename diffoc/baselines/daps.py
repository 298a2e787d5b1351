r"""Decoupled annealing posterior sampling (DAPS): Zhang et al. 2024, arXiv:2407.01521.

At each of T annealing times, from :math:`x_t`: a few DDIM steps of the flow lead to an image
:math:`\hat x_0`; Langevin dynamics samples

.. math:: p(x_0 \mid x_t, y) \propto N(x_0; \hat x_0, r_t^2 I) \, N(y; A(x_0), \tau^2 I), \qquad
          r_t = \sigma_t / \alpha_t ;

and noise of the next time is added to the sample. The prior is never differentiated. Langevin's
step falls linearly in time, to a hundredth, and is meant to be too short for its noise to fill
the whole of :math:`r_t` where nothing is measured: as white noise there, which images do not have,
it would be more than the network expects at the next time. Therefore :math:`\tau` is less than the
noise of the measurements.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from azula.denoise import Denoiser
from deepinv.physics import Physics
from torch import Tensor


@torch.no_grad()
def daps(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int = 60,
    ode_steps: int = 5,
    langevin_steps: int = 100,
    step_size: float = 1e-4,
    likelihood_std: float = 0.01,
) -> Tensor:
    r"""Images (B, ...) by DAPS; see :mod:`diffoc.baselines` for the arguments that all share.

    Args:
        noise_std: not used, the two settings at the end have to be tuned to it.
        steps: annealing times T, at least 1; each costs `ode_steps` evaluations, and no product.
        ode_steps: of DDIM for each annealing time, at least 1.
        langevin_steps: for each annealing time, not negative.
        step_size: of Langevin at time 1, above 0; unstable from
            :math:`2 / (\|A\|^2 / \tau^2 + 1 / r_t^2)` on.
        likelihood_std: :math:`\tau`, above 0; 0.01 in the paper.

    Raises:
        ValueError: if an argument is out of its range.
    """
    if steps < 1 or ode_steps < 1 or langevin_steps < 0:
        raise ValueError(
            f"steps, ode_steps and langevin_steps are {steps}, {ode_steps} and {langevin_steps}, "
            "expected at least 1, 1 and 0"
        )
    if not step_size > 0:
        raise ValueError(f"step_size is {step_size}, expected above 0")
    if not likelihood_std > 0:
        raise ValueError(f"likelihood_std is {likelihood_std}, expected above 0")

    def draw() -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)

    for t, s in pairwise(torch.linspace(1, 0, steps + 1, dtype=x.dtype, device=x.device)):
        estimate = _flow(prior, x, t, ode_steps)
        alpha, sigma = prior.schedule(t)
        precision = (alpha / sigma) ** 2
        rate = step_size * (0.01 + 0.99 * t)
        x0 = estimate
        for _ in range(langevin_steps):
            descent = precision * (x0 - estimate) + _gradient(physics, y, x0) / likelihood_std**2
            x0 = x0 - rate * descent + (2 * rate).sqrt() * draw()
        alpha, sigma = prior.schedule(s)
        x = alpha * x0 + sigma * draw()
    return x0


def _flow(prior: Denoiser, x: Tensor, t: Tensor, steps: int) -> Tensor:
    """The image at the end of the flow from x at t, by DDIM with equal steps."""
    for now, then in pairwise(torch.linspace(1, 0, steps + 1, dtype=x.dtype, device=x.device) * t):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = prior.schedule(now), prior.schedule(then)
        mean = prior(x, now).mean
        x = alpha_s * mean + sigma_s / sigma_t * (x - alpha_t * mean)
    return x


def _gradient(physics: Physics, y: Tensor, x0: Tensor) -> Tensor:
    """The gradient of half the squared residual."""
    with torch.enable_grad():
        x0 = x0.detach().requires_grad_()
        return torch.autograd.grad((physics.A(x0) - y).square().sum() / 2, x0)[0]
