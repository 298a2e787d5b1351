r"""Diffusion posterior sampling, azula's: arXiv:2209.14687.

A DDPM step, and then one along the gradient of the residual of Tweedie's estimate:

.. math:: x_s = \text{DDPM}(x_t) - \zeta \, \nabla_{x_t} \|y - A(m(x_t, t))\|
"""

from azula.guidance import DPSSampler
from torch import Tensor

from diffoc.baselines import (
    Given,
    Method,
    Share,
    global_generator,
    method,
    one_a_step,
    product_a_step,
)
from diffoc.checks import check_at_least, check_steps


@method
def dps(given: Given, *, steps: int = 1000, guidance: float = 1.0) -> Tensor:
    r"""Returns images by DPS; `guidance`, :math:`\zeta \geq 0`, has to be tuned to the noise."""
    sampler = dps_sampler(given, steps, guidance)
    with global_generator(given.generator):
        return sampler(given.x)


def dps_sampler(given: Given, steps: int, guidance: float, **options: object) -> DPSSampler:
    """Returns azula's sampler with the arguments of :func:`dps`, and azula's `options`."""
    check_steps(steps=steps)
    check_at_least(0, guidance=guidance)

    def distances(x0: Tensor) -> Tensor:
        # azula takes one norm of everything: as it is of one number here, the images' norms add up
        # and do not influence each other.
        return (given.physics.A(x0) - given.y).flatten(1).norm(dim=1).sum().reshape(1)

    zero = given.y.new_zeros(1)
    return DPSSampler(
        given.prior, zero, distances, zeta=guidance, steps=steps, silent=True, **options
    )


METHOD = Method(
    "DPS",
    dps,
    one_a_step,
    product_a_step,
    tuned={"guidance": (1.0, 3.0, 10.0, 30.0), "steps": (Share(1 / 18), Share(1 / 6), Share(1))},
)
