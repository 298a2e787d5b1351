r"""Plug-and-play ADMM, deepinv's, with the prior as denoiser: Chan et al. 2016, arXiv:1605.01710.

.. math::
    u &\gets \arg\min_u \; \tfrac{\gamma}{2} \|A u - y\|^2 + \tfrac{1}{2} \|u - (x - z)\|^2, \qquad
        \gamma = \lambda \, \sigma^2 / \sigma_y^2 \\
    x &\gets D(u + z, \sigma), \qquad z \gets z + u - x

with :mod:`D <diffoc.baselines.noise_level>` of a noise :math:`\sigma` that falls geometrically from
one iteration to the next. For a Gaussian prior and a constant :math:`\sigma`, the limit is the
posterior mean if :math:`\lambda = 1`.
"""

import torch
from deepinv.optim import ADMM, L2, PnP
from deepinv.physics import LinearPhysics
from torch import Tensor

from diffoc.baselines import Given, Method, method, no_products, one_a_step
from diffoc.baselines.decomposition import corrections, require_linear
from diffoc.baselines.noise_level import NoiseLevelDenoiser
from diffoc.checks import check_above, check_steps


class ImageByImage(L2):
    """deepinv's squared residual, with a proximal map in which no image decides for another."""

    def __init__(self, physics: LinearPhysics, x: Tensor) -> None:
        super().__init__()
        self.correction = corrections(physics, x)

    def prox(
        self, x: Tensor, y: Tensor, physics: LinearPhysics, *args: object, gamma: float = 1.0
    ) -> Tensor:
        r"""Returns the minimiser of :math:`\gamma \|A u - y\|^2 + \|u - x\|^2`."""
        return x + self.correction(y, x, float(gamma))


@method
def pnp_admm(
    given: Given,
    *,
    steps: int = 50,
    first_std: float = 1.0,
    last_std: float = 0.1,
    weight: float = 1.0,
) -> Tensor:
    r"""Returns images (B, ...) by PnP-ADMM, which draws nothing and starts from A^T y.

    Args:
        first_std, last_std: :math:`\sigma` in the first and last iteration, above 0.
        weight: :math:`\lambda`, above 0.
    """
    physics, noise_std = require_linear(given.physics), given.noise_std
    check_steps(steps=steps)
    check_above(0, noise_std=noise_std, first_std=first_std, last_std=last_std, weight=weight)
    first, last = torch.tensor([first_std, last_std], dtype=torch.float64).log().tolist()
    levels = torch.linspace(first, last, steps, dtype=torch.float64).exp()
    solver = ADMM(
        data_fidelity=ImageByImage(physics, given.x),
        prior=PnP(NoiseLevelDenoiser(given.prior)),
        g_param=levels.tolist(),
        stepsize=(weight * levels**2 / noise_std**2).tolist(),
        max_iter=steps,
    )
    return solver(given.y, physics)


METHOD = Method(
    "PnP-ADMM",
    pnp_admm,
    one_a_step,
    no_products,
    # From 0.7 the box diverges.
    tuned={"weight": (0.3, 1.0, 3.0, 10.0), "first_std": (0.4, 0.7)},
)
