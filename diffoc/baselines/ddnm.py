r"""Denoising diffusion null-space models for noisy measurements, DDNM+: arXiv:2212.00490.

The estimate of the image is corrected in the range of A, as far as the noise of the measurements
fits into that of the step, and the step's own noise is what is missing. In the basis of
:math:`A = U S V^T`, with :math:`\kappa = \sqrt{1 - \eta^2}` and the predicted noise
:math:`e = (x_t - \alpha_t m) / \sigma_t`,

.. math::
    x_s = \alpha_s (m + V G \, U^T (y - A m)) + V (\Gamma z + K \, V^T e), \qquad m = m(x_t, t) ,

where the coefficients are

.. math::
    g_i &= 0 & \gamma_i &= \eta \sigma_s & k_i &= \kappa \sigma_s
        & \text{where } s_i = 0 \\
    g_i &= 1 / s_i & \gamma_i^2 &= \sigma_s^2 - \alpha_s^2 \sigma_y^2 / s_i^2 & k_i &= 0
        & \text{where } \sigma_s \geq \alpha_s \sigma_y / s_i \\
    g_i &= \kappa \sigma_s / (\alpha_s \sigma_y) & \gamma_i &= \eta \sigma_s & k_i &= 0
        & \text{elsewhere.}

This is the released code: Eq. 17 of the paper in the basis of A, followed by what its comments
call Eq. 51, for DDIM whose noise is new to a fraction :math:`\eta`. But for its start it is DDRM
with :math:`\eta_b = 1`. Without noise of the measurements it is plain DDNM, with
:math:`\gamma_i` and :math:`k_i` of the first line for all. There is no time travel, as by default.
"""

import torch
from torch import Tensor

from diffoc.baselines import Given, Method, Share, method, no_products, one_a_step
from diffoc.baselines.decomposition import decompose
from diffoc.checks import check_above, check_steps, check_within


@method
@torch.no_grad()
def ddnm(given: Given, *, steps: int = 100, eta: float = 0.85) -> Tensor:
    r"""Returns images by DDNM+; :math:`\eta` is in ]0, 1], and 0.85 in the released code."""
    check_steps(steps=steps)
    check_above(0, eta=eta)
    check_within(0, 1, eta=eta)
    prior, x, noise_std = given.prior, given.x, given.noise_std
    svd = decompose(given.physics, x)
    singular = svd.mask.to(x) * torch.ones_like(x[:1])
    inverse = torch.where(singular > 0, 1 / singular, 0)
    kappa = (1 - eta**2) ** 0.5

    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    scales = torch.stack(prior.schedule(times), dim=1).tolist()
    for t, (alpha_t, sigma_t), (alpha_s, sigma_s) in zip(
        times.to(x), scales, scales[1:], strict=False
    ):
        gain, kept = inverse, torch.full_like(inverse, kappa * sigma_s)
        std = torch.full_like(inverse, eta * sigma_s)
        if noise_std > 0:
            missing = sigma_s**2 - (alpha_s * noise_std * inverse) ** 2
            kept = torch.where(singular > 0, 0, kept)
            std = torch.where((singular > 0) & (missing >= 0), missing.clamp(min=0).sqrt(), std)
            weak = kappa * sigma_s / (alpha_s * noise_std)
            gain = torch.where(missing >= 0, inverse, weak)
        mean = prior(x, t).mean
        predicted = svd.V_adjoint(x - alpha_t * mean) / sigma_t
        corrected = alpha_s * gain * svd.U_adjoint(given.y - given.physics.A(mean))
        x = alpha_s * mean + svd.V(corrected + std * given.noise() + kept * predicted)
    return x


METHOD = Method(
    "DDNM+",
    ddnm,
    one_a_step,
    no_products,
    tuned={"eta": (0.3, 0.6, 0.85, 1.0), "steps": (Share(1 / 3), Share(1))},
    largest={"eta": 1.0},
)
