r"""DiffPIR with the smooth errors of our first guess: what a rival gains by that idea.

:mod:`diffoc.baselines.diffpir` with another prior in its correction. There the errors of the
posterior mean are independent; here they are those of images, :mod:`diffoc.greedy`:

.. math::
    \hat x_0 = m + \arg\min_d \frac{\|y - A (m + d)\|^2}{s^2}
        + d^T \Big(\lambda \frac{\alpha_t^2}{\sigma_t^2} + V^{-1}\Big) d .

Without :math:`V^{-1}` this is DiffPIR. All noise is renewed, as the trials of DiffPIR chose on
every task.
"""

import torch
from torch import Tensor

from diffoc.baselines import Given, Method, method, no_products, one_a_step
from diffoc.baselines.decomposition import require_linear
from diffoc.baselines.diffpir import corrected_samples
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
    physics = require_linear(given.physics)
    check_above(0, noise_std=given.noise_std, strength=strength)
    check_at_least(0, smoothness=smoothness)
    check_steps(steps=steps)
    correction = image_correction(physics, given.y, given.x, given.noise_std, smoothness)

    def correct(mean: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return correction(mean, strength * (alpha / sigma) ** 2)

    return corrected_samples(given, steps, 1.0, correct)


METHOD = Method(
    "DiffPIR, smooth",
    diffpir_smooth,
    one_a_step,
    no_products,
    tuned={"strength": (0.1, 0.25, 0.8, 2.0), "smoothness": (1.5, 3.0)},
)
