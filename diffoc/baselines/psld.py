r"""Posterior sampling with latent diffusion, PSLD: Rout et al. 2023, arXiv:2307.00619.

A DDIM step of the latents, and then one along a gradient of two residuals: that of the measurement,
and, so that decoded estimates are images that the encoder knows ("gluing"), that of the latent
estimate :math:`m = m(z_t, t)` from the encoding of its image, made to agree with the measurement:

.. math:: z_s = \text{DDIM}(z_t) - \nabla_{z_t} \big( \zeta \, \|y - A D(m)\|
    + \gamma \, \|m - E(A^T y + (I - A^T A) D(m))\| \big)

with the decoder D and the encoder E. As in the authors' code, the norms are not squared.
"""

from itertools import pairwise

import torch
from torch import Tensor

from diffoc.baselines import Given, Method, method, one_a_step, product_a_step
from diffoc.baselines.decomposition import require_linear
from diffoc.checks import check_at_least, check_steps, check_within
from diffoc.priors.latent import latent_prior


@method
def psld(
    given: Given, *, steps: int = 1000, guidance: float = 1.0, gluing: float = 0.1, eta: float = 1.0
) -> Tensor:
    r"""Returns images (B, C, H, W) by PSLD, for a :class:`diffoc.priors.latent.LatentPrior`.

    Args:
        guidance: the weight :math:`\zeta` of the measurement's residual, not negative, which has to
            be tuned to the noise.
        gluing: the weight :math:`\gamma` of the encoding's residual, not negative.
        eta: how much noise DDIM adds, from 0 for none to 1 for DDPM's.
    """
    check_guided(steps, guidance, gluing, eta)
    autoencoder, z = latent_prior(given.prior), given.x
    require_linear(given.physics)
    times = torch.linspace(1, 0, steps + 1, dtype=z.dtype, device=z.device)
    for t, s in pairwise(times):
        z = guided_step(given, z, t, s, guidance, gluing, eta)
    return autoencoder.decode(z)


def check_guided(steps: int, guidance: float, gluing: float, eta: float) -> None:
    """Raises unless numbers are such as :func:`psld` takes."""
    check_steps(steps=steps)
    check_at_least(0, guidance=guidance, gluing=gluing)
    check_within(0, 1, eta=eta)


def guided_step(
    given: Given, z: Tensor, t: Tensor, s: Tensor, guidance: float, gluing: float, eta: float
) -> Tensor:
    """Returns latents at time s from those at time t, (B, c, h, w); times are () or (B,)."""
    prior, physics, y = given.prior, given.physics, given.y
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
    tau = eta * (1 - (alpha_t / alpha_s * sigma_s / sigma_t) ** 2)
    ahead = alpha_s * mean + sigma_s * (1 - tau).sqrt() * (z - alpha_t * mean) / sigma_t
    return ahead + sigma_s * tau.sqrt() * given.noise(z) - gradient


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
