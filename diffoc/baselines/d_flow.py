r"""D-Flow: the initial noise as the only control. Ben-Hamu et al. 2024, arXiv:2402.14017.

With :math:`x_0 = F(x_1)` the end of the probability flow, solved by T steps of DDIM, L-BFGS
minimises over :math:`x_1`

.. math:: \tfrac12 \|A(F(x_1)) - y\|^2 - \lambda \log p(\|x_1\|), \qquad
          -\log p(r) = r^2 / (2 \sigma_1^2) - (n - 1) \log r + \text{const} ,

the second term to keep the norm of :math:`x_1` one of noise. It starts from a blend of noise z
with the noise that the flow makes of a first image,

.. math:: x_1 = \sqrt\beta \, F^{-1}(A^\dagger y) + \sqrt{1 - \beta} \, z .

Terms, blend and six steps were compared with the implementation in the benchmark of PnP-Flow,
because no code of the authors was at hand. Deliberately ours are: DDIM at the times that all
methods share, for the midpoint rule; :math:`A^\dagger`, for the adjoint; half the squared residual,
so that its :math:`\lambda = 0.01` is 0.005 here. It adds :math:`\lambda \log p` to the cost; ours
subtracts it, as a prior's.

All problems of a batch take their own steps at once, for L-BFGS of each with the strong Wolfe
conditions: each of the N iterations is one rollout and one gradient, with which a problem either
accepts its trial, or halves the step to it.
"""

from itertools import pairwise

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from diffoc.baselines import Given, Method, method
from diffoc.baselines.decomposition import pseudo_inverse
from diffoc.checks import check_at_least, check_steps, check_whole, check_within
from diffoc.process import ReverseProcess
from diffoc.rules import LBFGS, LBFGSMemory


@method
def d_flow(
    given: Given,
    *,
    steps: int = 6,
    iterations: int = 50,
    regularization: float = 0.0,
    blend: float = 0.1,
) -> Tensor:
    r"""Returns images (B, ...) by D-Flow; N or :math:`\lambda` has to be tuned to the noise.

    Args:
        iterations: the number N of L-BFGS's iterations, at least 1.
        regularization: the weight :math:`\lambda` of the norm's density, not negative.
        blend: the share :math:`\beta` of the inverted image, in [0, 1]. Where it is above 0 and the
            operator is linear, the inversion costs T evaluations more; else there is none.
    """
    check_steps(steps=steps)
    check_whole(1, iterations=iterations)
    check_at_least(0, regularization=regularization)
    check_within(0, 1, blend=blend)
    prior, physics, y, x = given.prior, given.physics, given.y, given.x
    process = ReverseProcess(prior, steps)
    variance = prior.schedule(process.times[0])[1].item() ** 2
    if blend > 0 and isinstance(physics, LinearPhysics):
        x = blend**0.5 * _inversion(process, pseudo_inverse(physics, y)) + (1 - blend) ** 0.5 * x

    def evaluate(flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns costs (B,), their gradients (B, n) and the images (B, ...)."""
        flat = flat.detach().requires_grad_()
        with torch.enable_grad():
            x0 = process.rollout(flat.view_as(x))[-1]
            cost = (physics.A(x0) - y).flatten(1).square().sum(dim=1) / 2
            square = flat.square().sum(dim=1)
            typical = (square / variance - (flat.shape[1] - 1) * square.log()) / 2
            cost = cost + regularization * typical
        return cost.detach(), torch.autograd.grad(cost.sum(), flat)[0], x0.detach()

    state = LBFGSMemory(LBFGS(first=0.1))
    at = x.flatten(1)
    cost, gradient, x0 = evaluate(at)
    step = torch.ones_like(cost)
    direction = state.direction(gradient, at)
    for _ in range(iterations - 1):
        trial = at + step[:, None] * direction
        new_cost, new_gradient, new_x0 = evaluate(trial)
        expected = step * (gradient * direction).sum(dim=1)
        accepted = new_cost <= cost + 1e-4 * expected
        at = torch.where(accepted[:, None], trial, at)
        gradient = torch.where(accepted[:, None], new_gradient, gradient)
        cost = torch.where(accepted, new_cost, cost)
        x0 = torch.where(accepted.reshape(-1, *[1] * (x.ndim - 1)), new_x0, x0)
        step = torch.where(accepted, 1, step / 2)
        stuck = step < 2.0**-8
        state.forget(stuck)
        step = torch.where(stuck, 1, step)
        direction = state.direction(gradient, at)
    return x0


@torch.no_grad()
def _inversion(process: ReverseProcess, x: Tensor) -> Tensor:
    """Returns the noise at time 1 of images x, by DDIM from time 0 up."""
    prior, times = process.denoiser, process.times.to(x).flip(0)
    for t, s in pairwise(times):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = prior.schedule(t), prior.schedule(s)
        mean = prior(x, t).mean
        x = alpha_s * mean + sigma_s / sigma_t * (x - alpha_t * mean)
    return x


METHOD = Method(
    "D-Flow",
    d_flow,
    lambda task, nfe: {"steps": 6, "iterations": max(1, nfe // 6 - 1)},
    lambda s: (s["steps"] * (s["iterations"] + 1), s["steps"] * s["iterations"]),
    tuned={"blend": (0.03, 0.1, 0.3, 1.0), "regularization": (0.0, 0.01)},
    largest={"blend": 1.0},
)
