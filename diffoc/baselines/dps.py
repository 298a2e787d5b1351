r"""Diffusion posterior sampling, azula's: arXiv:2209.14687.

A DDPM step, and then one along the gradient of the residual of Tweedie's estimate:

.. math:: x_s = \text{DDPM}(x_t) - \zeta \, \nabla_{x_t} \|y - A(m(x_t, t))\|
"""

from __future__ import annotations

import math

import torch
from azula.denoise import Denoiser
from azula.guidance import DPSSampler
from deepinv.physics import Physics
from torch import Tensor

from diffoc.baselines import Method, Share, global_generator, method, one_a_step, product_a_step


@method
def dps(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int = 1000,
    guidance: float = 1.0,
) -> Tensor:
    r"""Images (B, ...) by DPS; see :mod:`diffoc.baselines` for the arguments that all share.

    Args:
        noise_std: not used, the guidance has to be tuned to it.
        steps: at least 1; each costs an evaluation and a product.
        guidance: :math:`\zeta`, not negative.

    Raises:
        ValueError: if a setting is out of its range.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance is {guidance}, expected finite and at least 0")

    def distances(x0: Tensor) -> Tensor:
        # azula takes one norm of everything: as it is of one number here, the images' norms add up
        # and do not influence each other.
        return (physics.A(x0) - y).flatten(1).norm(dim=1).sum().reshape(1)

    sampler = DPSSampler(prior, y.new_zeros(1), distances, zeta=guidance, steps=steps, silent=True)
    with global_generator(generator):
        return sampler(x)


METHOD = Method(
    "DPS",
    dps,
    one_a_step,
    product_a_step,
    tuned={"guidance": (0.3, 1.0, 3.0, 10.0), "steps": (Share(1 / 6), Share(1))},
)
