r"""The Riccati sampler: draws around a plan, where a controller gives its optimum.

Read as a density of controls, :math:`e^{-J}` says that they were drawn from :math:`N(0, 1 / r_i)`
and that the image which they make was then measured. Around a plan J is a quadratic, and the
backward sweep that gives LQR's gains also gives the law of every control given the state,

.. math:: u_i \sim N\big(u_i^* + K_i (x_i - x_i^*), \; Q_{uu,i}^{-1}\big) ,

so that one forward sweep with fresh noise is a draw from :math:`e^{-J}`: exactly where the steps
are affine, the terminal cost is quadratic and the rank is that of its Hessian. If the process is
the mean of an ancestral one and :math:`r_i = 1 / c_i^2` is the price of its noise, the controls
without measurement are the noise, and the draws are those of the posterior. Elsewhere the draw is
an approximation, which :math:`w = e^{-J(u)} / q(u)`, with q the law that it was drawn from,
corrects.

Meng, Zou, Darbon & Karniadakis 2024 (arXiv:2409.09614) have a Riccati variant of their sampler for
stochastic differential equations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from azula.denoise import Denoiser
from azula.noise import Schedule
from torch import Tensor

from diffoc.checks import check_kind
from diffoc.lowrank import MatrixFree
from diffoc.process import METHODS, ReverseProcess, draw_noise
from diffoc.recipe import Recipe
from diffoc.result import Result
from diffoc.rules import LineSearch
from diffoc.system import ControlProblem, Counts, Derivatives, roll_out


def noise_price(schedule: Schedule, times: Tensor) -> Tensor:
    """Returns :math:`1 / c_i^2`, (T,), of DDPM's noise by the prior's schedule at T + 1 times."""
    return METHODS["ddpm"](schedule, times[:-1], times[1:])[2] ** -2.0


def ancestral_mean(
    prior: Denoiser, steps: int | Tensor, x: Tensor, generator: torch.Generator
) -> ReverseProcess:
    """Returns the process of DDPM's means, to which the controls add what noise there is."""
    horizon = steps if isinstance(steps, int) else len(steps) - 1
    return ReverseProcess(prior, steps, "ddpm", "output", x.new_zeros(horizon, *x.shape))


@dataclass(frozen=True)
class Draws:
    r"""Trajectories of the Riccati sampler.

    Attributes:
        states: the trajectories, (T + 1, B, ...).
        controls: the plan's, the feedback's and the noise's part together, (T, B, ...).
        cost: the total cost J, (B,).
        log_weights: the logarithm of the density :math:`e^{-J} \prod_i (r_i / 2 \pi)^{m / 2}` of
            the controls over that which they were drawn from, (B,): all equal where the sampler is
            exact, and then log p(y | x_T) up to the constant that the terminal cost leaves out.
    """

    states: Tensor
    controls: Tensor
    cost: Tensor
    log_weights: Tensor


@torch.no_grad()
def riccati_draws(
    problem: ControlProblem,
    x: Tensor,
    controls: Tensor,
    noise: Tensor,
    derivatives: Derivatives,
    rank: int,
) -> Draws:
    """Returns draws around plans by products only, one for each start, for states of any size.

    The value is that of rank k around each plan: :math:`1 + k` products a step, and no matrices of
    n columns. It is quadratic around the plan only, so that the draws are as good as the plan. What
    the sweep would change in the plan itself, :math:`k_i`, is left out: in directions that the rank
    does not know it is a full step along the gradient, far beyond the optimum.

    The running cost is a :class:`diffoc.costs.ControlCost` of weights above 0. The starts x are
    (B, ...), the controls of plans by :func:`diffoc.ilqr.ilqr` and the standard normal
    noise (T, B, ...). The derivatives, a :class:`diffoc.lowrank.MatrixFree`, count the work. Of
    rank 0 there is no feedback.
    """
    check_kind(MatrixFree, derivatives=derivatives)
    plan = roll_out(problem, x, controls, derivatives)
    value = derivatives.terminal(problem, plan.x[-1], rank)
    expansions = derivatives.expand(plan.steps, value)
    undamped = x.new_zeros(problem.horizon, len(x))
    gains, middles = [], []
    for e, a in zip(reversed(expansions), undamped, strict=True):
        middles.append(value.S)  # of Quu = r I + U S U^T
        step_gains, value = value.step_back(e, a, "full")
        gains.append(step_gains)
    states, drawn, log_ratio = [x], [], x.new_zeros(len(x))
    for i, (e, g, S) in enumerate(zip(expansions, gains[::-1], middles[::-1], strict=True)):
        # u = u* + K (x - x*) + Quu^(-1/2) z
        z = noise[i].to(x).flatten(1)
        spread, log_det = low_rank_draw(e.U, S, e.r, z)
        du = g.feedback((states[i] - plan.x[i]).flatten(1)) + spread
        drawn.append(controls[i] + du.reshape(controls[i].shape))
        states.append(problem.dynamics(i, states[i], drawn[i]))
        derivatives.counts.evaluations += 1
        log_ratio = log_ratio + z.square().sum(1) / 2 - log_det / 2
    cost = problem.cost(states, drawn)
    return Draws(torch.stack(states), torch.stack(drawn), cost, log_ratio - cost)


def low_rank_draw(U: Tensor, S: Tensor, r: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns draws (B, m) from N(0, Quu^-1) and log det(Quu / r), (B,), for Quu = r I + U S U^T.

    With :math:`U = Q R` and the eigenvalues :math:`\lambda` and eigenvectors of :math:`R S R^T`,
    turned by Q into columns W,

    .. math:: Q_{uu}^{-1/2} = r^{-1/2} \big(I - W (I - (1 + \Lambda / r)^{-1/2}) W^T\big) .

    U, (B, m, k) with k at most m, may have dependent columns; S, (B, k, k), is symmetric. They are
    those of :class:`diffoc.lowrank.LowRankExpansion` and :class:`diffoc.lowrank.LowRankValue`. The
    weight r of the control cost is above 0, the noise, (B, m), standard normal.
    """
    Q, R = torch.linalg.qr(U)
    values, vectors = torch.linalg.eigh(R @ S @ R.mT)
    if not r > 0 or not (values > -r).all():
        raise ValueError(
            "the terminal Hessian makes r I + U S U^T indefinite: raise r, or use "
            "MatrixFree(hessian='gauss_newton') or MatrixFree(convex=True)"
        )
    W = Q @ vectors
    inside = (W.mT @ noise.unsqueeze(-1)).squeeze(-1)
    kept = 1 - (1 + values / r).rsqrt()
    draws = (noise - (W @ (kept * inside).unsqueeze(-1)).squeeze(-1)) / r**0.5
    return draws, (1 + values / r).log().sum(-1)


def draw_around(
    problem: ControlProblem, plan: Result, recipe: Recipe, generator: torch.Generator
) -> Result:
    """Returns a draw around each plan in its place, and the work of both."""
    x, counts = plan.states[0], Counts()
    noise = draw_noise(problem.horizon, x.shape, generator).to(x)
    derivatives = replace(recipe.derivatives, counts=counts)
    draws = riccati_draws(problem, x, plan.controls, noise, derivatives, recipe.rank)
    work = {name: getattr(plan, name) + count for name, count in vars(counts).items()}
    return replace(plan, **vars(draws), **work)


RICCATI = Recipe(
    "riccati",
    steps=20,
    iterations=3,
    rule=LineSearch(),
    rank=32,
    derivatives=MatrixFree(hessian="gauss_newton"),
    weights=noise_price,
    from_noise=True,
    process=ancestral_mean,
    draw=draw_around,
)
"""Draws from the posterior of DDPM's chain: as many as `starts`, each around its own plan.

They are exact where the prior is Gaussian, A linear and the rank that of A; elsewhere the result's
`log_weights` correct them. What is measured in more directions than the rank is planned, but not
narrowed.
"""
