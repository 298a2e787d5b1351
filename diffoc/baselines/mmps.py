r"""Moment matching posterior sampling, azula's: Rozet et al. 2024, arXiv:2405.13712.

With :math:`x_0 \mid x_t` taken for a Gaussian of the right mean and, by Tweedie's formula, the
right covariance :math:`C_t = (\sigma_t^2 / \alpha_t) \, \partial m / \partial x_t`, the posterior
mean given the measurements too is

.. math:: m + C_t A^T (A C_t A^T + s^2 I)^{-1} (y - A m),

which is exact for a Gaussian prior and a linear operator. Products with :math:`C_t` are
vector-Jacobian products of the network, and the inverse is a few iterations of GMRES, since a
network's Jacobian is not symmetric. Operators that are not linear are linearised at m. DDIM with
this mean in the place of the prior's samples the posterior.
"""

from __future__ import annotations

import torch
from azula.denoise import Denoiser
from azula.guidance import MMPSDenoiser
from azula.linalg.covariance import IsotropicCovariance
from azula.sample import DDIMSampler
from deepinv.physics import Physics
from torch import Tensor

from diffoc.baselines import Method, Share, global_generator, method


@method
def mmps(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int = 100,
    iterations: int = 3,
    eta: float = 1.0,
) -> Tensor:
    r"""Images (B, ...) by MMPS; see :mod:`diffoc.baselines` for the arguments that all share.

    Args:
        noise_std: s, above 0.
        steps: at least 1; each costs an evaluation and `iterations` + 1 products.
        iterations: of GMRES, at least 1.
        eta: the noise of DDIM in [0, 1].

    Raises:
        ValueError: if an argument is out of its range.
    """
    if not noise_std > 0:
        raise ValueError(f"noise_std is {noise_std}, expected above 0")
    if steps < 1 or iterations < 1:
        raise ValueError(f"steps and iterations are {steps} and {iterations}, expected at least 1")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected in [0, 1]")
    conditioned = MMPSDenoiser(
        prior,
        y.flatten(1),  # azula solves along the last dimension
        lambda x0: physics.A(x0).flatten(1),
        IsotropicCovariance(y.new_tensor(noise_std**2)),
        iterations=iterations,
    )
    sampler = DDIMSampler(conditioned, eta=eta, steps=steps, silent=True, dtype=x.dtype)
    with global_generator(generator):
        return sampler(x)


METHOD = Method(
    "MMPS",
    mmps,
    # One iteration of GMRES, as in the paper: two products.
    lambda task, nfe: {"steps": nfe, "iterations": 1},
    lambda settings: (settings["steps"], 2 * settings["steps"]),
    tuned={"eta": (0.0, 0.3, 0.6, 1.0), "steps": (Share(1 / 3), Share(1))},
    largest=1.0,
)
