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

from __future__ import annotations

import torch
from azula.denoise import Denoiser
from azula.guidance import PGDMSampler
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor

from diffoc.baselines import Method, global_generator, method, one_a_step, product_a_step
from diffoc.baselines.decomposition import decompose
from diffoc.greedy import correction
from diffoc.problems.tasks import UnsupportedTask


@method
def pgdm(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int = 100,
    eta: float = 1.0,
    guidance: float = 1.0,
) -> Tensor:
    r"""Images (B, ...) by PiGDM; see :mod:`diffoc.baselines` for the arguments that all share.

    Args:
        noise_std: s, above 0.
        steps: at least 1; each costs an evaluation and a product.
        eta: the noise of DDIM in [0, 1]; 1 in the paper.
        guidance: a factor of :math:`g_t`, not negative; 1 in the paper.

    Raises:
        UnsupportedTask: if `physics` is not linear.
        ValueError: if an argument is out of its range.
    """
    if not isinstance(physics, LinearPhysics):
        raise UnsupportedTask("PiGDM inverts the operator, which must be linear")
    if not noise_std > 0:
        raise ValueError(f"noise_std is {noise_std}, expected above 0")
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected in [0, 1]")
    if not guidance >= 0:
        raise ValueError(f"guidance is {guidance}, expected at least 0")
    sampler = _NoisySampler(prior, physics, y, noise_std, guidance, eta=eta, steps=steps, like=x)
    with global_generator(generator):
        return sampler(x)


class _NoisySampler(PGDMSampler):
    """azula's sampler, whose inverse is told the time."""

    def __init__(
        self,
        prior: Denoiser,
        physics: LinearPhysics,
        y: Tensor,
        noise_std: float,
        guidance: float,
        *,
        eta: float,
        steps: int,
        like: Tensor,
    ) -> None:
        # azula inverts y and A(x_0) one after the other; here it is one system, of the residual.
        super().__init__(
            prior,
            torch.zeros_like(y),
            lambda x0: physics.A(x0) - y,
            self.inverse,
            eta=eta,
            steps=steps,
            silent=True,
            dtype=like.dtype,
        )
        self.physics, self.noise_std, self.guidance = physics, noise_std, guidance
        self.like = like
        try:
            self.svd = decompose(physics, like)
        except UnsupportedTask:
            self.svd = None

    def step(self, x_t: Tensor, t: Tensor, s: Tensor, **kwargs: object) -> Tensor:
        alpha, sigma = self.denoiser.schedule(t)
        self.variance = (sigma**2 / (alpha**2 + sigma**2)).item()
        return super().step(x_t, t, s, **kwargs)

    def inverse(self, y: Tensor) -> Tensor:
        # (A^T A + 1 / r)^-1 A^T y, the same by the push-through identity.
        ratio = self.variance / self.noise_std**2
        if self.svd:
            gain = self.svd.mask / (self.svd.mask**2 + 1 / ratio)
            return self.guidance * self.svd.V(gain * self.svd.U_adjoint(y))
        zero = torch.zeros_like(self.like)
        return self.guidance * correction(self.physics, y, zero, ratio, 100, 1e-5)


METHOD = Method(
    "PiGDM",
    pgdm,
    one_a_step,
    product_a_step,
    tuned={"guidance": (0.25, 0.5, 1.0, 2.0), "eta": (0.0, 1.0)},
)
