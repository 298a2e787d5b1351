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

from azula.guidance import MMPSDenoiser
from azula.linalg.covariance import IsotropicCovariance
from azula.sample import DDIMSampler
from torch import Tensor

from diffoc.baselines import Given, Method, Share, global_generator, method
from diffoc.checks import check_above, check_steps, check_whole, check_within


@method
def mmps(given: Given, *, steps: int = 100, iterations: int = 3, eta: float = 1.0) -> Tensor:
    r"""Returns images (B, ...) by MMPS, for a noise above 0.

    Args:
        iterations: the number of GMRES's iterations, at least 1; a step costs a product more.
        eta: how much noise DDIM adds, from 0 for none to 1 for DDPM's.
    """
    check_above(0, noise_std=given.noise_std)
    check_steps(steps=steps)
    check_whole(1, iterations=iterations)
    check_within(0, 1, eta=eta)
    conditioned = MMPSDenoiser(
        given.prior,
        given.y.flatten(1),  # azula solves along the last dimension
        lambda x0: given.physics.A(x0).flatten(1),
        IsotropicCovariance(given.y.new_tensor(given.noise_std**2)),
        iterations=iterations,
    )
    sampler = DDIMSampler(conditioned, eta=eta, steps=steps, silent=True, dtype=given.x.dtype)
    with global_generator(given.generator):
        return sampler(given.x)


METHOD = Method(
    "MMPS",
    mmps,
    # One iteration of GMRES, as in the paper: two products.
    lambda task, nfe: {"steps": nfe, "iterations": 1},
    lambda settings: (settings["steps"], 2 * settings["steps"]),
    tuned={"eta": (0.0, 0.3, 0.6, 1.0), "steps": (Share(1 / 3), Share(1))},
    largest={"eta": 1.0},
)
