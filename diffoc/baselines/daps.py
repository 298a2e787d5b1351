r"""Decoupled annealing posterior sampling (DAPS): Zhang et al. 2024, arXiv:2407.01521.

At each of T annealing times, from :math:`x_t`: a few DDIM steps of the flow lead to an image
:math:`\hat x_0`; Langevin dynamics samples

.. math:: p(x_0 \mid x_t, y) \propto N(x_0; \hat x_0, r_t^2 I) \, N(y; A(x_0), s^2 I), \qquad
          r_t = \sigma_t / \alpha_t ;

and noise of the next time is added to the sample. The prior is never differentiated. Langevin's
step is :math:`\eta_t / (\|A\|^2 / s^2 + 1 / r_t^2)`, with 1 in the place of the norm of operators
that are not linear; and :math:`\eta_t` falls linearly in time, to a hundredth. In the paper all of
it is one number that is tuned, and falls likewise.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from azula.denoise import Denoiser
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor

from diffoc.baselines import global_generator


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
    step_size: float = 0.5,
) -> Tensor:
    r"""Images (B, ...) by DAPS; see :mod:`diffoc.baselines` for the arguments that all share.

    Args:
        noise_std: s, above 0.
        steps: annealing times T, at least 1; each costs `ode_steps` evaluations, and no product.
        ode_steps: of DDIM for each annealing time, at least 1.
        langevin_steps: for each annealing time, not negative.
        step_size: :math:`\eta_1`, above 0; stable up to 2.

    Raises:
        ValueError: if an argument is out of its range.
    """
    if not noise_std > 0:
        raise ValueError(f"noise_std is {noise_std}, expected above 0")
    if steps < 1 or ode_steps < 1 or langevin_steps < 0:
        raise ValueError(
            f"steps, ode_steps and langevin_steps are {steps}, {ode_steps} and {langevin_steps}, "
            "expected at least 1, 1 and 0"
        )
    if not step_size > 0:
        raise ValueError(f"step_size is {step_size}, expected above 0")

    square_norm = 1.0
    if isinstance(physics, LinearPhysics):
        with global_generator(generator):
            square_norm = physics.compute_sqnorm(x[:1], verbose=False).item()

    def draw() -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)

    for t, s in pairwise(torch.linspace(1, 0, steps + 1, dtype=x.dtype, device=x.device)):
        estimate = _flow(prior, x, t, ode_steps)
        alpha, sigma = prior.schedule(t)
        precision = (alpha / sigma) ** 2
        rate = step_size * (0.01 + 0.99 * t) / (square_norm / noise_std**2 + precision)
        x0 = estimate
        for _ in range(langevin_steps):
            descent = precision * (x0 - estimate) + _gradient(physics, y, x0) / noise_std**2
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
