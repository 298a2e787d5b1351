r"""Manifold constrained gradients: Chung et al. 2022, arXiv:2206.00941.

:mod:`diffoc.baselines.score_sde` with a step along the gradient of the residual of Tweedie's
estimate before the one towards the measurements:

.. math:: x_s' = \text{DDPM}(x_t) - \zeta \, \nabla_{x_t} \|y - A m(x_t, t)\|

The gradient is that of the norm: the step of the paper, along the gradient of its square, is
divided by it there, too.
"""

from __future__ import annotations

import torch
from azula.denoise import Denoiser
from azula.guidance import DPSSampler
from deepinv.physics import Physics
from torch import Tensor

from diffoc.baselines import Method, method, one_a_step, product_a_step
from diffoc.baselines.decomposition import require_linear
from diffoc.baselines.score_sde import sample_projected


@method
def mcg(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int = 1000,
    guidance: float = 0.2,
    strength: float = 1.0,
) -> Tensor:
    r"""Images (B, ...) by MCG; see :mod:`diffoc.baselines` for the arguments that all share.

    Args:
        noise_std: not used, the method takes measurements to be exact.
        steps: at least 1; each costs an evaluation and a product.
        guidance: :math:`\zeta`, not negative.
        strength: :math:`\lambda` of the step towards the measurements, in [0, 1].

    Raises:
        UnsupportedTask: if the task is not linear.
        ValueError: if a setting is out of its range.
    """
    require_linear(physics)
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    if not guidance >= 0:
        raise ValueError(f"guidance is {guidance}, expected at least 0")

    def distances(x0: Tensor) -> Tensor:
        # One number for azula to take the norm of, in which images do not influence each other.
        return (physics.A(x0) - y).flatten(1).norm(dim=1).sum().reshape(1)

    sampler = DPSSampler(
        prior, y.new_zeros(1), distances, zeta=guidance, steps=steps, silent=True, dtype=x.dtype
    )
    return sample_projected(sampler, physics, y, x, generator, strength)


METHOD = Method(
    "MCG",
    mcg,
    one_a_step,
    product_a_step,
    tuned={"guidance": (0.03, 0.1, 0.3, 1.0), "strength": (0.1, 1.0)},
)
