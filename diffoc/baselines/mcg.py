r"""Manifold constrained gradients: Chung et al. 2022, arXiv:2206.00941.

:mod:`diffoc.baselines.score_sde` with a step along the gradient of the residual of Tweedie's
estimate before the one towards the measurements:

.. math:: x_s' = \text{DDPM}(x_t) - \zeta \, \nabla_{x_t} \|y - A m(x_t, t)\|

The gradient is that of the norm: the step of the paper, along the gradient of its square, is
divided by it there, too.
"""

from torch import Tensor

from diffoc.baselines import Given, Method, method, one_a_step, product_a_step
from diffoc.baselines.dps import dps_sampler
from diffoc.baselines.score_sde import sample_projected


@method
def mcg(given: Given, *, steps: int = 1000, guidance: float = 0.2, strength: float = 1.0) -> Tensor:
    r"""Returns images (B, ...) by MCG, which takes measurements to be exact.

    Args:
        guidance: :math:`\zeta`, not negative.
        strength: :math:`\lambda` of the step towards the measurements, in [0, 1].
    """
    sampler = dps_sampler(given, steps, guidance, dtype=given.x.dtype)
    return sample_projected(sampler, given, strength)


METHOD = Method(
    "MCG",
    mcg,
    one_a_step,
    product_a_step,
    tuned={"guidance": (0.03, 0.1, 0.3, 1.0), "strength": (0.1, 1.0)},
    largest={"strength": 1.0},
)
