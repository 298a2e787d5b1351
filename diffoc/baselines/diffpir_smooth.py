r"""DiffPIR with the smooth errors of our first guess: what a rival gains by that idea.

:mod:`diffoc.baselines.diffpir` with another prior in its correction. There the errors of the
posterior mean are independent; here they are those of images, :mod:`diffoc.greedy`:

.. math::
    \hat x_0 = m + \arg\min_d \frac{\|y - A (m + d)\|^2}{s^2}
        + d^T \Big(\lambda \frac{\alpha_t^2}{\sigma_t^2} + V^{-1}\Big) d .

With white V, as large as may be, that is DiffPIR. All noise is renewed, as the trials of DiffPIR
chose on every task.
"""

from itertools import pairwise

import torch
from torch import Tensor

from diffoc.baselines import Given, Method, method, no_products, one_a_step
from diffoc.baselines.decomposition import require_linear
from diffoc.checks import check_above, check_at_least, check_steps
from diffoc.greedy import image_correction


@method
@torch.no_grad()
def diffpir_smooth(
    given: Given, *, steps: int = 100, strength: float = 0.25, smoothness: float = 2.0
) -> Tensor:
    r"""Returns images (B, C, H, W), or (B, ...) with smoothness 0, for a noise above 0.

    Args:
        strength: the weight :math:`\lambda` of the prior, above 0.
        smoothness: that of the errors, at least 0, see :func:`diffoc.greedy.image_spectrum`.
    """
    physics, prior, x = require_linear(given.physics), given.prior, given.x
    check_above(0, noise_std=given.noise_std, strength=strength)
    check_at_least(0, smoothness=smoothness)
    check_steps(steps=steps)
    correct = image_correction(physics, given.y, x, given.noise_std, smoothness)
    times = 1 - torch.linspace(0, 1, steps + 1, dtype=x.dtype, device=x.device).sqrt()
    for t, s in pairwise(times):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = prior.schedule(t), prior.schedule(s)
        mean = prior(x, t).mean
        x0 = mean + correct(mean, strength * (alpha_t / sigma_t) ** 2)
        x = alpha_s * x0 + sigma_s * given.noise()
    return x


METHOD = Method(
    "DiffPIR, smooth",
    diffpir_smooth,
    one_a_step,
    no_products,
    tuned={"strength": (0.1, 0.25, 0.8, 2.0), "smoothness": (1.5, 3.0)},
)
