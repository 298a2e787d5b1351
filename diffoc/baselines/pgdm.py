r"""Pseudo-inverse guided diffusion (PiGDM) for noisy measurements: Song et al. 2023, ICLR,
openreview.net/forum?id=9_gsMA8MRKQ; azula's sampler.

With :math:`x_0 \mid x_t` taken for :math:`N(m, r_t^2 I)`, which has the right variance
:math:`r_t^2 = \sigma_t^2 / (\alpha_t^2 + \sigma_t^2)` for a standard normal :math:`x_0`, the
guidance of a linear operator A is, weighted by :math:`r_t^2` as in the paper,

.. math::
    g_t = \Big(\frac{\partial m(x_t, t)}{\partial x_t}\Big)^T
          A^T \Big(A A^T + \frac{s^2}{r_t^2} I\Big)^{-1} (y - A m(x_t, t)), \qquad
    x_s = \text{DDIM}(x_t) + \alpha_s \alpha_t \, g_t .

Without noise, s = 0, the inverse is the pseudo-inverse :math:`A^\dagger`, which at s = 0.05 would
amplify the noise in directions that are hardly measured. It is exact where the operator is
decomposed (see :mod:`diffoc.baselines.decomposition`), and by conjugate gradients elsewhere.
"""

import torch
from azula.guidance import PGDMSampler
from torch import Tensor

from diffoc.baselines import Given, Method, global_generator, method, one_a_step, product_a_step
from diffoc.baselines.decomposition import corrections, require_linear
from diffoc.checks import check_above, check_at_least, check_steps, check_within


@method
def pgdm(given: Given, *, steps: int = 100, eta: float = 1.0, guidance: float = 1.0) -> Tensor:
    r"""Returns images (B, ...) by PiGDM, for a noise above 0.

    Args:
        eta: how much noise DDIM adds, from 0 for none to 1 for DDPM's; 1 in the paper.
        guidance: the factor of :math:`g_t`, not negative; 1 in the paper.
    """
    require_linear(given.physics)
    check_above(0, noise_std=given.noise_std)
    check_steps(steps=steps)
    check_within(0, 1, eta=eta)
    check_at_least(0, guidance=guidance)
    sampler = _NoisySampler(given, guidance, eta=eta, steps=steps, dtype=given.x.dtype)
    with global_generator(given.generator):
        return sampler(given.x)


class _NoisySampler(PGDMSampler):
    """azula's sampler, whose inverse is told the time."""

    def __init__(self, given: Given, guidance: float, **options: object) -> None:
        def residual(x0: Tensor) -> Tensor:
            return given.physics.A(x0) - given.y

        # azula inverts y and A(x_0) one after the other; here it is one system, of the residual.
        super().__init__(
            given.prior, torch.zeros_like(given.y), residual, self.inverse, silent=True, **options
        )
        self.given, self.guidance = given, guidance
        self.correction = corrections(given.physics, given.x)

    def step(self, x_t: Tensor, t: Tensor, s: Tensor, **kwargs: object) -> Tensor:
        alpha, sigma = self.denoiser.schedule(t)
        self.variance = (sigma**2 / (alpha**2 + sigma**2)).item()
        return super().step(x_t, t, s, **kwargs)

    def inverse(self, y: Tensor) -> Tensor:
        # (A^T A + 1 / r)^-1 A^T y, the same by the push-through identity.
        ratio = self.variance / self.given.noise_std**2
        return self.guidance * self.correction(y, torch.zeros_like(self.given.x), ratio)


METHOD = Method(
    "PiGDM",
    pgdm,
    one_a_step,
    product_a_step,
    tuned={"guidance": (0.25, 0.5, 1.0, 2.0), "eta": (0.0, 1.0)},
    largest={"eta": 1.0},
)
