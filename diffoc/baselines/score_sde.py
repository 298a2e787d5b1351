r"""Score-SDE with a linear measurement: Song et al. 2021, arXiv:2011.13456, Sec. I.4.

Every ancestral step is followed by one towards the measurements, with as much noise as the state:

.. math::
    x_s' &= \text{DDPM}(x_t), \qquad y_s = \alpha_s y + \sigma_s A z \\
    x_s &= x_s' + \lambda \, A^T (y_s - A x_s') / \|A\|^2

where :math:`A A^T` is a multiple of the identity, as for inpainting, this is the projection
:math:`x_s' + \lambda A^+ (y_s - A x_s')` of the paper. Elsewhere :math:`A^+` would amplify noise
without bound, and this is one step of Landweber's iteration.
"""

from __future__ import annotations

import torch
from azula.denoise import Denoiser
from azula.sample import DDPMSampler
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor

from diffoc.baselines import Method, Share, global_generator, method, no_products, one_a_step
from diffoc.baselines.decomposition import require_linear
from diffoc.problems.tasks import parts_of


@method
def score_sde(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int = 1000,
    strength: float = 1.0,
) -> Tensor:
    r"""Images (B, ...) by Score-SDE; see :mod:`diffoc.baselines` for the arguments all share.

    Args:
        noise_std: not used, the method takes measurements to be exact.
        steps: at least 1; each costs an evaluation.
        strength: :math:`\lambda`, in [0, 1].

    Raises:
        UnsupportedTask: if the task is not linear.
        ValueError: if a setting is out of its range.
    """
    require_linear(physics)
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    sampler = DDPMSampler(prior, steps=steps, silent=True, dtype=x.dtype)
    return sample_projected(sampler, physics, y, x, generator, strength)


@torch.no_grad()
def sample_projected(
    sampler: DDPMSampler,
    physics: LinearPhysics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    strength: float,
) -> Tensor:
    r"""What a sampler makes of x, with a step towards the measurements after each of its own.

    Args:
        sampler: gives steps and times.
        strength: :math:`\lambda`, in [0, 1].
        physics, y, x, generator: see :mod:`diffoc.baselines`.

    Raises:
        ValueError: if `strength` is out of its range.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}, expected in [0, 1]")
    with global_generator(generator):
        norms = [
            part.compute_sqnorm(torch.randn_like(x[:1]), verbose=False)
            for part in parts_of(physics)
        ]
        norm = torch.stack(norms).reshape(-1, *[1] * (x.ndim - 1))
        for t, s in sampler.timesteps.to(x.device).unfold(0, 2, 1):
            x = sampler.step(x, t, s)
            alpha, sigma = sampler.denoiser.schedule(s)
            residual = alpha * y + physics.A(sigma * torch.randn_like(x) - x)
            x = x + strength / norm * physics.A_adjoint(residual)
    return x


METHOD = Method(
    "Score-SDE",
    score_sde,
    one_a_step,
    no_products,
    tuned={"strength": (0.1, 0.3, 0.6, 1.0), "steps": (Share(1 / 3), Share(1))},
    largest=1.0,
)
