r"""Posterior sampling with latent diffusion, PSLD: Rout et al. 2023, arXiv:2307.00619.

A DDIM step of the latents, and then one along a gradient of two residuals: that of the measurement,
and, so that decoded estimates are images that the encoder knows ("gluing"), that of the latent
estimate :math:`m = m(z_t, t)` from the encoding of its image, made to agree with the measurement:

.. math:: z_s = \text{DDIM}(z_t) - \nabla_{z_t} \big( \zeta \, \|y - A D(m)\|
    + \gamma \, \|m - E(A^T y + (I - A^T A) D(m))\| \big)

with the decoder D and the encoder E. As in the authors' code, the norms are not squared.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from azula.denoise import Denoiser
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor

from diffoc.baselines import Method, method, one_a_step, product_a_step
from diffoc.priors.latent import latent_prior
from diffoc.problems.tasks import UnsupportedTask


@method
def psld(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int = 1000,
    guidance: float = 1.0,
    gluing: float = 0.1,
    eta: float = 1.0,
) -> Tensor:
    r"""Images (B, C, H, W) by PSLD; see :mod:`diffoc.baselines` for the arguments that all share.

    Args:
        prior: a `LatentPrior`; `x` is the latents' state at time 1.
        noise_std: not used, the guidance has to be tuned to it.
        steps: at least 1; each costs an evaluation and a product, and passes through the decoder
            and, unless `gluing` is 0, the encoder.
        guidance: :math:`\zeta`, not negative.
        gluing: :math:`\gamma`, not negative.
        eta: of DDIM, in [0, 1]; 1 is DDPM.

    Raises:
        ValueError: for a prior of images.
        UnsupportedTask: if A is not linear, as gluing needs its adjoint.
    """
    autoencoder = latent_prior(prior)
    if not isinstance(physics, LinearPhysics):
        raise UnsupportedTask("PSLD's gluing term needs the adjoint of a linear operator")
    times = torch.linspace(1, 0, steps + 1, dtype=x.dtype, device=x.device)
    z = x
    for t, s in pairwise(times):
        z = guided_step(prior, physics, y, z, t, s, generator, guidance, gluing, eta)
    return autoencoder.decode(z)


def guided_step(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    z: Tensor,
    t: Tensor,
    s: Tensor,
    generator: torch.Generator,
    guidance: float,
    gluing: float,
    eta: float,
) -> Tensor:
    """Latents at time s from those at time t, (B, c, h, w); times are () or (B,)."""
    autoencoder = latent_prior(prior)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        (a.reshape(-1, *(1,) * (z.ndim - 1)) for a in prior.schedule(time)) for time in (t, s)
    )
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        mean = prior(z, t).mean
        image = autoencoder.decode(mean)
        measured = physics.A(image)
        loss = guidance * _norms(y - measured)
        if gluing:
            glued = image + physics.A_adjoint(y) - physics.A_adjoint(measured)
            loss = loss + gluing * _norms(mean - autoencoder.encode(glued))
        (gradient,) = torch.autograd.grad(loss.sum(), z)
    mean, z = mean.detach(), z.detach()
    noise = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=generator.device).to(z)
    tau = eta * (1 - (alpha_t / alpha_s * sigma_s / sigma_t) ** 2)
    ahead = alpha_s * mean + sigma_s * (1 - tau).sqrt() * (z - alpha_t * mean) / sigma_t
    return ahead + sigma_s * tau.sqrt() * noise - gradient


def _norms(residual: Tensor) -> Tensor:
    return residual.flatten(1).norm(dim=1)


METHOD = Method(
    "PSLD",
    psld,
    one_a_step,
    product_a_step,
    tuned={"guidance": (0.25, 0.5, 1.0, 2.0), "gluing": (0.0, 0.1)},
    latent=True,
)
