r"""Denoising diffusion null-space models for noisy measurements, DDNM+: arXiv:2212.00490.

The estimate of the image is corrected in the range of A, as far as the noise of the measurements
fits into that of the step, and the step's own noise is what is missing. In the basis of
:math:`A = U S V^T`, with :math:`\kappa = \sqrt{1 - \eta^2}` and
:math:`a = \alpha_s - \kappa \sigma_s \alpha_t / \sigma_t`,

.. math::
    \hat x &= m + V G \, U^T (y - A m), \qquad m = m(x_t, t), \quad
        g_i = \min\Big(\frac{1}{s_i}, \frac{\eta \sigma_s}{a \sigma_y}\Big) \\
    x_s &= a \hat x + \kappa \frac{\sigma_s}{\sigma_t} x_t + V \Gamma z, \qquad
        \gamma_i^2 = \eta^2 \sigma_s^2 - a^2 g_i^2 \sigma_y^2

and :math:`g_i = 0` where :math:`s_i = 0`. These are Eqs. 17-19 of the paper, for the sampler of its
experiments: DDIM, whose noise is new to a fraction :math:`\eta`.
"""

from __future__ import annotations

import torch
from azula.denoise import Denoiser
from deepinv.physics import Physics
from torch import Tensor

from diffoc.baselines.decomposition import decompose


@torch.no_grad()
def ddnm(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int = 100,
    eta: float = 0.85,
) -> Tensor:
    r"""Images (B, ...) by DDNM+; see :mod:`diffoc.baselines` for the arguments that all share.

    Args:
        noise_std: :math:`\sigma_y`, not negative.
        steps: at least 1; each costs an evaluation.
        eta: :math:`\eta`, in ]0, 1].

    Raises:
        UnsupportedTask: see :func:`diffoc.baselines.decomposition.decompose`.
        ValueError: if a setting is out of its range.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    if not 0 < eta <= 1:
        raise ValueError(f"eta is {eta}, expected in ]0, 1]")
    if not noise_std >= 0:
        raise ValueError(f"noise_std is {noise_std}, expected at least 0")
    svd = decompose(physics, x)
    singular = svd.mask.to(x).expand_as(x[:1])
    inverse = torch.where(singular > 0, 1 / singular, 0)
    kappa = (1 - eta**2) ** 0.5

    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    scales = torch.stack(prior.schedule(times), dim=1).tolist()
    for t, (alpha_t, sigma_t), (alpha_s, sigma_s) in zip(
        times.to(x), scales, scales[1:], strict=False
    ):
        kept = kappa * sigma_s / sigma_t
        a = alpha_s - kept * alpha_t
        fresh = eta * sigma_s
        gain = inverse.clamp(max=fresh / (a * noise_std)) if noise_std > 0 else inverse
        std = (fresh**2 - (a * noise_std * gain) ** 2).clamp(min=0).sqrt()
        mean = prior(x, t).mean
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device)
        correction = svd.V(a * gain * svd.U_adjoint(y - physics.A(mean)) + std * noise.to(x))
        x = a * mean + kept * x + correction
    return x
