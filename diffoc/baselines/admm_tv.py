r"""Total variation by ADMM, deepinv's: no diffusion at all.

.. math:: \min_x \; \tfrac{1}{2} \|A x - y\|^2 + \lambda \sum_p \|(D x)_p\|_2

with D the differences to the next pixels below and to the right. The iteration is that of
:mod:`diffoc.baselines.pnp_admm`, with the proximal map of total variation as denoiser.
"""

from deepinv.models import TVDenoiser
from deepinv.optim import ADMM
from deepinv.optim.prior import TVPrior
from torch import Tensor

from diffoc.baselines import Given, Method, method
from diffoc.baselines.decomposition import require_linear
from diffoc.baselines.pnp_admm import ImageByImage
from diffoc.checks import check_above, check_steps
from diffoc.problems.tasks import UnsupportedTask


@method
def admm_tv(given: Given, *, steps: int = 200, weight: float = 0.01) -> Tensor:
    r"""Returns images (B, C, H, W) by ADMM-TV, which uses no prior and draws nothing.

    Args:
        weight: the weight :math:`\lambda` of total variation, above 0, which has to be tuned to the
            noise.
    """
    physics, shape = require_linear(given.physics), tuple(given.x.shape)
    if len(shape) != 4:
        raise UnsupportedTask(f"x has shape {shape}, total variation needs (B, C, H, W)")
    check_steps(steps=steps)
    check_above(0, weight=weight)
    regularizer = TVPrior()
    # Its inner iterations go on where the last ones ended. A fixed number of them, because a
    # criterion would be taken over the batch; and longer steps than deepinv's, to need few.
    regularizer.TVModel = TVDenoiser(tau=0.25, n_it_max=10, crit=0)
    solver = ADMM(
        data_fidelity=ImageByImage(physics, given.x),
        prior=regularizer,
        lambda_reg=weight,
        stepsize=10.0,  # gamma, which only changes how fast the iteration converges
        max_iter=steps,
    )
    return solver(given.y, physics)


METHOD = Method(
    "ADMM-TV",
    admm_tv,
    lambda task, nfe: {},
    lambda settings: (0, 0),
    tuned={"weight": (0.001, 0.003, 0.006, 0.01, 0.02, 0.03, 0.06, 0.1)},
)
