r"""Score-SDE with a linear measurement: Song et al. 2021, arXiv:2011.13456, Sec. I.4.

Every ancestral step is followed by one towards the measurements, with as much noise as the state:

.. math::
    x_s' &= \text{DDPM}(x_t), \qquad y_s = \alpha_s y + \sigma_s A z \\
    x_s &= x_s' + \lambda \, A^T (y_s - A x_s') / \|A\|^2

where :math:`A A^T` is a multiple of the identity, as for inpainting, this is the projection
:math:`x_s' + \lambda A^+ (y_s - A x_s')` of the paper. Elsewhere :math:`A^+` would amplify noise
without bound, and this is one step of Landweber's iteration.
"""

import torch
from azula.sample import DDPMSampler
from torch import Tensor

from diffoc.baselines import Given, Method, Share, global_generator, method, no_products, one_a_step
from diffoc.baselines.decomposition import require_linear
from diffoc.checks import check_steps, check_within
from diffoc.problems.tasks import parts_of


@method
def score_sde(given: Given, *, steps: int = 1000, strength: float = 1.0) -> Tensor:
    r"""Returns images by Score-SDE, which takes measurements to be exact.

    The `strength` of the steps towards them is :math:`\lambda`, in [0, 1].
    """
    check_steps(steps=steps)
    sampler = DDPMSampler(given.prior, steps=steps, silent=True, dtype=given.x.dtype)
    return sample_projected(sampler, given, strength)


@torch.no_grad()
def sample_projected(sampler: DDPMSampler, given: Given, strength: float) -> Tensor:
    """Returns what a sampler makes of x, with a step towards y after each of its own."""
    physics = require_linear(given.physics)
    check_within(0, 1, strength=strength)
    x = given.x
    with global_generator(given.generator):
        norms = [
            part.compute_sqnorm(torch.randn_like(x[:1]), verbose=False)
            for part in parts_of(physics)
        ]
        norm = torch.stack(norms).reshape(-1, *[1] * (x.ndim - 1))
        for t, s in sampler.timesteps.to(x.device).unfold(0, 2, 1):
            x = sampler.step(x, t, s)
            alpha, sigma = sampler.denoiser.schedule(s)
            residual = alpha * given.y + physics.A(sigma * torch.randn_like(x) - x)
            x = x + strength / norm * physics.A_adjoint(residual)
    return x


METHOD = Method(
    "Score-SDE",
    score_sde,
    one_a_step,
    no_products,
    tuned={"strength": (0.1, 0.3, 0.6, 1.0), "steps": (Share(1 / 3), Share(1))},
    largest={"strength": 1.0},
)
