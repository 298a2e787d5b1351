r"""Total variation by ADMM, deepinv's: no diffusion at all.

.. math:: \min_x \; \tfrac{1}{2} \|A x - y\|^2 + \lambda \sum_p \|(D x)_p\|_2

with D the differences to the next pixels below and to the right. The iteration is that of
:mod:`diffoc.baselines.pnp_admm`, with the proximal map of total variation as denoiser.
"""

from __future__ import annotations

import torch
from azula.denoise import Denoiser
from deepinv.models import TVDenoiser
from deepinv.optim import ADMM
from deepinv.optim.prior import TVPrior
from deepinv.physics import Physics
from torch import Tensor

from diffoc.baselines import Method, method
from diffoc.baselines.decomposition import require_linear
from diffoc.baselines.pnp_admm import ImageByImage
from diffoc.problems.tasks import UnsupportedTask


@method
def admm_tv(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int = 200,
    weight: float = 0.01,
    stepsize: float = 10.0,
) -> Tensor:
    r"""Images (B, C, H, W) by ADMM-TV; see :mod:`diffoc.baselines` for the shared arguments.

    Args:
        prior: not used, nor are the values of `x` and `generator`.
        noise_std: not used, the weight has to be tuned to it.
        steps: iterations, at least 1; none costs an evaluation.
        weight: :math:`\lambda`, above 0.
        stepsize: :math:`\gamma`, above 0; it only changes how fast the iteration converges.

    Raises:
        UnsupportedTask: if the task is not linear, or states are no images.
        ValueError: if a setting is out of its range.
    """
    require_linear(physics)
    if x.ndim != 4:
        raise UnsupportedTask(f"x has shape {tuple(x.shape)}, total variation needs (B, C, H, W)")
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    for name, value in (("weight", weight), ("stepsize", stepsize)):
        if not value > 0:
            raise ValueError(f"{name} is {value}, expected above 0")
    regularizer = TVPrior()
    # Its inner iterations go on where the last ones ended. A fixed number of them, because a
    # criterion would be taken over the batch; and longer steps than deepinv's, to need few.
    regularizer.TVModel = TVDenoiser(tau=0.25, n_it_max=10, crit=0)
    solver = ADMM(
        data_fidelity=ImageByImage(),
        prior=regularizer,
        lambda_reg=weight,
        stepsize=stepsize,
        max_iter=steps,
    )
    return solver(y, physics)


METHOD = Method(
    "ADMM-TV",
    admm_tv,
    lambda task, nfe: {},
    lambda settings: (0, 0),
    tuned={"weight": (0.001, 0.003, 0.006, 0.01, 0.02, 0.03, 0.06, 0.1)},
)
