r"""Denoising diffusion restoration models: Kawar et al. 2022, arXiv:2201.11793.

States are :math:`x_t / \alpha_t`, with noise :math:`\tau_t = \sigma_t / \alpha_t`, in the basis of
:math:`A = U S V^T`: :math:`\bar x = V^T x_t / \alpha_t`, :math:`\bar m = V^T m(x_t, t)` and
:math:`\bar y_i = (U^T y)_i / s_i`, whose noise is :math:`\sigma_y / s_i`. The coefficients of the
next state have the means (Eqs. 7 and 8 of the paper)

.. math::
    \bar m_i + \sqrt{1 - \eta^2} \, \tau_s (\bar x_i - \bar m_i) / \tau_t
        & \qquad \text{standard deviation } \eta \tau_s
        && \text{where } s_i = 0 \\
    \bar m_i + \sqrt{1 - \eta^2} \, \tau_s (\bar y_i - \bar m_i) s_i / \sigma_y
        & \qquad \eta \tau_s && \text{where } \tau_s < \sigma_y / s_i \\
    (1 - \eta_b) \bar m_i + \eta_b \bar y_i
        & \qquad (\tau_s^2 - \eta_b^2 \sigma_y^2 / s_i^2)^{1/2} && \text{elsewhere.}

and the first have :math:`\bar y_i`, where its noise is below :math:`\tau_1`. The defaults are those
of the released code.
"""

import torch
from torch import Tensor

from diffoc.baselines import Given, Method, Share, method, no_products, one_a_step
from diffoc.baselines.decomposition import decompose
from diffoc.checks import check_steps, check_within


@method
@torch.no_grad()
def ddrm(given: Given, *, steps: int = 20, eta: float = 0.85, eta_b: float = 1.0) -> Tensor:
    r"""Returns images by DDRM; :math:`\eta` and :math:`\eta_b` are in [0, 1]."""
    check_steps(steps=steps)
    check_within(0, 1, eta=eta, eta_b=eta_b)
    prior, x, noise_std = given.prior, given.x, given.noise_std
    svd = decompose(given.physics, x)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    alphas, sigmas = prior.schedule(times)
    levels = (sigmas / alphas).tolist()
    kappa = (1 - eta**2) ** 0.5

    singular, coefficients = svd.mask.to(x).expand_as(x), svd.U_adjoint(given.y)
    measured = singular > 0
    y_noise = torch.where(measured, noise_std / singular, 1)
    y_bar = torch.where(measured, coefficients / singular, 0)

    x_bar = svd.V_adjoint(x) / alphas[0].item()
    first = y_bar + (1 - (y_noise / levels[0]) ** 2).clamp(min=0).sqrt() * x_bar
    # A coefficient with more noise than the first state has none that it could start with.
    x_bar = torch.where(singular * levels[0] > noise_std, first, x_bar)
    for t, alpha, tau_t, tau_s in zip(
        times.to(x), alphas.tolist(), levels, levels[1:], strict=False
    ):
        m_bar = svd.V_adjoint(prior(alpha * svd.V(x_bar), t).mean)
        noise = given.noise()
        unseen = m_bar + kappa * tau_s / tau_t * (x_bar - m_bar) + eta * tau_s * noise
        # Without dividing by singular values, which may be next to nothing.
        excess = (coefficients - singular * m_bar) / max(noise_std, 1e-12)
        noisy = m_bar + kappa * tau_s * excess + eta * tau_s * noise
        std = (tau_s**2 - (eta_b * y_noise) ** 2).clamp(min=0).sqrt()
        seen = m_bar + eta_b * (y_bar - m_bar) + std * noise
        x_bar = torch.where(measured, torch.where(y_noise > tau_s, noisy, seen), unseen)
    return svd.V(x_bar) * alphas[-1].item()


METHOD = Method(
    "DDRM",
    ddrm,
    one_a_step,
    no_products,
    tuned={"eta": (0.3, 0.6, 0.85, 1.0), "steps": (Share(1 / 15), Share(1))},
    largest={"eta": 1.0},
)
