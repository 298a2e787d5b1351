r"""Plug-and-play restoration (DiffPIR): Zhu et al. 2023, arXiv:2305.08995.

The posterior mean is moved towards the measurements, then noise is predicted and partly renewed:

.. math::
    \hat x_0 &= \arg\min_x \|y - A x\|^2 + \rho_t \|x - m(x_t, t)\|^2, \qquad
        \rho_t = \lambda \, s^2 \alpha_t^2 / \sigma_t^2 \\
    x_s &= \alpha_s \hat x_0 + \sigma_s \big(\sqrt{1 - \zeta} \, \hat z + \sqrt\zeta \,
        \varepsilon\big), \qquad \hat z = (x_t - \alpha_t \hat x_0) / \sigma_t .

Times are :math:`1 - \sqrt{i / T}`, the "quad" sequence of the released code: with few of them where
there is mostly noise, and half below 0.3.

The released code measures s on images in [0, 1], but :math:`\sigma_t` on images in [-1, 1]: its
:math:`\lambda = 1` is 1/4 here. Two things of it are left out, so that the method starts from the
same noise as all others and fits priors of any range: measurements as the mean of the first state,
of which the noise leaves a hundredth, and means that are clipped to [-1, 1].
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffoc.baselines import Given, Method, method, no_products
from diffoc.baselines.decomposition import corrections, require_linear
from diffoc.checks import check_above, check_steps, check_within


@method
@torch.no_grad()
def diffpir(
    given: Given, *, steps: int = 100, strength: float = 0.25, renewal: float = 0.1
) -> Tensor:
    r"""Returns images (B, ...) by DiffPIR, for a noise above 0.

    Args:
        strength: the weight :math:`\lambda` of the prior, above 0; 0.25 in the released code.
        renewal: the share :math:`\zeta` of the noise that is drawn anew, in [0, 1]; in the
            released code 0.1 for deblurring and super-resolution, and 1 for inpainting, where
            predicted noise would keep what was dropped as it was guessed first.
    """
    require_linear(given.physics)
    check_above(0, noise_std=given.noise_std, strength=strength)
    check_steps(steps=steps)
    check_within(0, 1, renewal=renewal)
    correction = corrections(given.physics, given.x)

    def correct(mean: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        rho = strength * (given.noise_std * alpha / sigma).item() ** 2
        return correction(given.y, mean, 1 / rho)

    return corrected_samples(given, steps, renewal, correct)


def corrected_samples(
    given: Given, steps: int, renewal: float, correct: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    r"""Returns images (B, ...) whose means are corrected in every step, and noised again.

    `correct` returns what is added to a mean, from that, :math:`\alpha_t` and :math:`\sigma_t`.
    """
    prior, x = given.prior, given.x
    times = 1 - torch.linspace(0, 1, steps + 1, dtype=x.dtype, device=x.device).sqrt()
    for t, s in pairwise(times):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = prior.schedule(t), prior.schedule(s)
        mean = prior(x, t).mean
        x0 = mean + correct(mean, alpha_t, sigma_t)
        predicted = (x - alpha_t * x0) / sigma_t
        noise = (1 - renewal) ** 0.5 * predicted + renewal**0.5 * given.noise()
        x = alpha_s * x0 + sigma_s * noise
    return x


def _settings(task: str, nfe: int) -> dict:
    return {"steps": nfe, "renewal": 1.0 if task.endswith("inpainting") else 0.1}


METHOD = Method(
    "DiffPIR",
    diffpir,
    _settings,
    no_products,
    tuned={"strength": (0.1, 0.25, 0.8, 2.0), "renewal": (0.1, 1.0)},
    largest={"renewal": 1.0},
)
