r"""Non-linear diffusion trajectory matching (NDTM): Pandey et al. 2025, arXiv:2502.03686.

At every time t a control u of the step's input minimises, by N steps of Adam from u = 0,

.. math::
    w \, \|A(m(x_t + \gamma u, t)) - y\|^2 + \kappa \, \|\gamma u\|^2
      + \tau \, \|z(x_t + \gamma u, t) - z(x_t, t)\|^2, \qquad
    z(x, t) = (x - \alpha_t m(x, t)) / \sigma_t ,

the cost at the end as Tweedie's estimate has it, and the two parts of a bound on how far the
step's mean is moved. Then a step of DDIM is taken from :math:`x_t + \gamma u`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from azula.denoise import Denoiser
from deepinv.physics import Physics
from torch import Tensor


def ndtm(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int = 50,
    iterations: int = 5,
    guidance: float = 1.0,
    control_cost: float = 1e-4,
    score_cost: float = 1e-4,
    scale: float = 1.0,
    rate: float = 0.05,
    eta: float = 0.5,
) -> Tensor:
    r"""Images (B, ...) by NDTM; see :mod:`diffoc.baselines` for the arguments that all share.

    Args:
        noise_std: not used, the weights have to be tuned to it.
        steps: T, at least 1; each costs N + 1 evaluations and N products.
        iterations: N, at least 1.
        guidance: w, not negative.
        control_cost, score_cost: :math:`\kappa` and :math:`\tau`, not negative.
        scale: :math:`\gamma`, above 0.
        rate: Adam's, above 0.
        eta: the noise of DDIM in [0, 1].

    Raises:
        ValueError: if an argument is out of its range.
    """
    if steps < 1 or iterations < 1:
        raise ValueError(f"steps and iterations are {steps} and {iterations}, expected at least 1")
    if not all(weight >= 0 for weight in (guidance, control_cost, score_cost)):
        raise ValueError(
            f"guidance, control_cost and score_cost are {guidance}, {control_cost} and "
            f"{score_cost}, expected at least 0"
        )
    if not (scale > 0 and rate > 0):
        raise ValueError(f"scale and rate are {scale} and {rate}, expected above 0")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected in [0, 1]")

    def control(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = prior.schedule(t)
        u = torch.zeros_like(x, requires_grad=True)
        optimizer = torch.optim.Adam([u], lr=rate)
        with torch.enable_grad():
            for i in range(iterations):
                controlled = x + scale * u
                mean = prior(controlled, t).mean
                z = (controlled - alpha * mean) / sigma
                if i == 0:
                    uncontrolled = z.detach()
                cost = guidance * (physics.A(mean) - y).square().sum()
                cost = cost + control_cost * (scale * u).square().sum()
                cost = cost + score_cost * (z - uncontrolled).square().sum()
                (u.grad,) = torch.autograd.grad(cost, u)
                optimizer.step()
        return u.detach()

    with torch.no_grad():
        for t, s in pairwise(torch.linspace(1, 0, steps + 1, dtype=x.dtype, device=x.device)):
            x = x + scale * control(x, t)
            (alpha_t, sigma_t), (alpha_s, sigma_s) = prior.schedule(t), prior.schedule(s)
            mean = prior(x, t).mean
            renewed = eta * (1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2)
            drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            x = (
                alpha_s * mean
                + sigma_s * (1 - renewed).sqrt() / sigma_t * (x - alpha_t * mean)
                + sigma_s * renewed.sqrt() * drawn
            )
    return x
