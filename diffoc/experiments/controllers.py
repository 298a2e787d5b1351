r"""The controller as the tables run it: ours, the paper's settings of it, and its released code's.

It minimises over the controls of the reverse process

.. math:: \frac{\|A(x_0) - y\|^2}{2 s^2} + \frac12 \sum_i r_i \|u_i\|^2 ,

the released code the norm :math:`\|A(x_0) - y\|` in place of the first term.
The functions have the signature that :mod:`diffoc.baselines` describes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from azula.denoise import Denoiser
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor

from diffoc.ancestral import AncestralProcess, released_weights
from diffoc.baselines import method
from diffoc.costs import ControlCost, ResidualNorm
from diffoc.greedy import greedy_controls
from diffoc.lowrank import MatrixFree
from diffoc.priors.counting import CountedPrior
from diffoc.problems.tasks import likelihood, noise_level
from diffoc.process import ReverseProcess, draw_noise
from diffoc.rules import LBFGS, Adam
from diffoc.solve import guidance_regularization, image_units, snr_weights, solve
from diffoc.theory.projected import Projected

STEPS, ITERATIONS = 10, 80
"""Of the controller, for 1000 evaluations: its line search may try nineteen times more.

On the tuning faces ten steps and twice the iterations blur less than twenty steps."""

UNSTOPPED_STEPS = 15
"""Of the controller that is not stopped: on the tuning faces the best for all tasks together."""

FIRST_FROM_GUESS = 1e-4
"""L-BFGS's first change from a greedy guess: one of the usual length would undo the guess."""


def iterations_within(budget: int, steps: int) -> int:
    """The iterations of T steps that a budget of evaluations allows, at least 1.

    Some 15 % of it are left for the first rollout and for the line search, which may take more.
    """
    return max(1, 17 * budget // (20 * steps))


@method
def control(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int = STEPS,
    iterations: int = ITERATIONS,
    control_cost: float = 1.0,
    from_noise: bool = False,
    greedy: bool = False,
) -> Tensor:
    """Images (B, ...) by the controller, with L-BFGS and the discrepancy principle.

    It starts from zero, the most probable noise, because a random start would only add the texture
    of a sample.

    Args:
        noise_std: of the measurements.
        steps: T, at least 1.
        iterations: at most; fewer by the discrepancy principle. With the line search's
            trials, evaluations are T (1 + iterations) or some more, products T iterations.
        control_cost: r, not negative.
        from_noise: whether to start from `x` all the same.
        greedy: whether the first guess of the controls is the greedy one, T evaluations more; of
            a linear task, of others it is zero.
    """
    process = ReverseProcess(prior, steps)
    start = x if from_noise else torch.zeros_like(x)
    guess = None
    if greedy and isinstance(physics, LinearPhysics):
        guess = greedy_controls(process, physics, y, start, noise_std)
    return solve(
        process,
        likelihood(physics, y, noise_std),
        start,
        guess,
        control_cost=control_cost,
        rank=0,
        iterations=iterations,
        rule=LBFGS() if guess is None else LBFGS(first=FIRST_FROM_GUESS),
        residual=lambda x0: physics.A(x0) - y,
        noise_level=noise_level(physics, y, noise_std),
    ).x0


@method
def control_planned(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int,
    budget: int,
) -> Tensor:
    """Images (B, ...) by :func:`control` from the greedy guess, with as many steps as are tuned.

    Args:
        noise_std: of the measurements.
        steps: T, at least 1.
        budget: of evaluations, at least 4 T.

    Raises:
        ValueError: for a smaller budget.
    """
    _check_budget(steps, budget)
    return control(
        prior,
        physics,
        y,
        x,
        generator,
        noise_std=noise_std,
        steps=steps,
        # The guess and the first rollout take T evaluations each.
        iterations=iterations_within(budget - 2 * steps, steps),
        control_cost=0.3,
        greedy=True,
    )


@method
def control_unstopped(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    budget: int,
    steps: int = UNSTOPPED_STEPS,
    weight: float = 4.0,
    weighted: bool = True,
    in_units: bool = True,
    stopped: bool = False,
) -> Tensor:
    r"""Images (B, ...) by the controller from zero and the greedy guess, until the budget is spent.

    What keeps most of the noise from being fitted is the control cost in place of the discrepancy
    principle: :math:`r_i = w\, \alpha_i^2 / \sigma_i^2`, the precision to which the state that a
    control acts on knows the image, times w. L-BFGS measures controls in units of the image,
    :math:`\alpha_i`, see :func:`diffoc.solve.image_units`. The minimum itself fits much of the
    noise unless w is large, so that w belongs to the budget: for 1000 evaluations it is one to
    sixteen times that for 300, and the image hardly better, see notebook 09.

    Args:
        noise_std: of the measurements.
        budget: of evaluations, at least 4 T; the last iteration's line search may go beyond it.
        steps: T, at least 1.
        weight: w, positive.
        weighted: whether the cost is that; without, w is the cost of every control.
        in_units: whether L-BFGS measures in units of the image; without, in those of the state.
        stopped: whether the discrepancy principle ends it all the same. These three are there to
            see what each is worth, see :func:`diffoc.experiments.ablations.parts`.

    Raises:
        ValueError: for a smaller budget, or a weight that is not positive.
    """
    _check_budget(steps, budget)
    if not 0 < weight < math.inf:
        raise ValueError(f"weight is {weight}, expected finite and positive")
    counted = CountedPrior(prior)
    process = ReverseProcess(counted, steps)
    alpha, sigma = prior.schedule(process.times[:-1])
    start = torch.zeros_like(x)
    guess = None
    if isinstance(physics, LinearPhysics):
        guess = greedy_controls(process, physics, y, start, noise_std)

    if in_units:
        update = LBFGS(units=image_units(prior.schedule, process.times))
    else:
        update = LBFGS() if guess is None else LBFGS(first=FIRST_FROM_GUESS)
    principle: dict[str, Any] = {}
    if stopped:
        principle["residual"] = lambda x0: physics.A(x0) - y
        principle["noise_level"] = noise_level(physics, y, noise_std)

    def spare(iteration: int, costs: Tensor, x0: Tensor) -> None:
        if counted.evaluations + steps * len(x) > budget * len(x):
            raise StopIteration

    return solve(
        process,
        likelihood(physics, y, noise_std),
        start,
        guess,
        control_cost=ControlCost(weight * (alpha / sigma).square()) if weighted else weight,
        rank=0,
        iterations=budget // steps,
        rule=update,
        callback=spare,
        **principle,
    ).x0


def _check_budget(steps: int, budget: int) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    if budget < 4 * steps:
        raise ValueError(f"budget is {budget}, expected at least 4 times the {steps} steps")


@method
def control_paper(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int,
    iterations: int,
    rank: int,
    rate: float,
    weight_scale: float,
    regularization: float | str,
    projected: bool = False,
) -> Tensor:
    """Images (B, ...) by the controller as the paper describes it, Section 6 and Appendix D.

    Adam in input mode along the deterministic process from a random state, with the likelihood as
    terminal cost. Activations are recomputed: those of 50 steps at 256 x 256 fit no GPU.

    With rank 0 the gains are :math:`-Q_u / (r_i + a)`, and Adam, which divides every number by its
    own size, undoes the factor: a constant a changes nothing then.

    Args:
        noise_std: of the measurements.
        steps, iterations: T and their number: evaluations are T (1 + 2 iterations), products
            T (1 + rank) iterations.
        rank: k of the terminal Hessian.
        rate: of Adam.
        weight_scale: of the control cost, see :func:`diffoc.solve.snr_weights`.
        regularization: Tikhonov's constant a, or "lemma_4_2" for that of
            :func:`diffoc.solve.guidance_regularization`.
        projected: whether Jacobians too are of that rank, by the projections of Appendix D.1 as
            the paper writes them, see :mod:`diffoc.theory.projected`. Its Jacobian-vector products,
            T rank iterations of them, count as one evaluation for each step and iteration.

    Raises:
        ValueError: for another word than "lemma_4_2".
        diffoc.riccati.SingularControlHessianError: if `regularization` is too small.
    """
    process = ReverseProcess(prior, steps)
    constant: float | Tensor
    if regularization == "lemma_4_2":
        constant = guidance_regularization(prior.schedule, process.times)
    elif isinstance(regularization, str):
        raise ValueError(f"regularization is {regularization!r}, expected a number or 'lemma_4_2'")
    else:
        constant = regularization
    weights = snr_weights(prior.schedule, process.times, weight_scale)
    return solve(
        process,
        likelihood(physics, y, noise_std),
        x,
        control_cost=ControlCost(weights),
        rank=rank,
        iterations=iterations,
        rule=Adam(rate),
        regularization=constant,
        derivatives=Projected(rank, hessian="gauss_newton")
        if projected
        else MatrixFree(keep_activations=False, hessian="gauss_newton"),
    ).x0


@method
def released(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int = 20,
    iterations: int = 50,
    rate: float = 5e-3,
    weight_scale: float = 1e-6,
    learned_variance: bool = False,
    keep_activations: bool = True,
) -> Tensor:
    r"""Images (B, ...) by what the authors' released code does by default; the paper differs.

    =============  ===================================  =========================================
    .              the paper                            the released code
    =============  ===================================  =========================================
    process        T deterministic steps                T - 1 ancestral ones with frozen noise and
                                                        clipped image
    terminal cost  half the squared residual over s^2   the norm of the residual
    control cost   none (Eq. 28)                        :func:`diffoc.ancestral.released_weights`
    derivatives    rank 1                               rank 0, so that all feedback vanishes
    update         Adam on the gains                    AdamW on the gains, weight decay 0.01
    result         not said                             the last iterate
    =============  ===================================  =========================================

    A step's gain is :math:`k = -Q_u / (r + 0.001)`; Adam divides it by its own size, so that only
    the direction of :math:`Q_u = r u + f_u^T p` counts. The released code inverts the matrix
    :math:`r I` of rank 0 by Woodbury's identity with 0 + 0.001 I for the part of rank 16, on a
    random subspace of that dimension: there it takes from the gain the share

    .. math:: \Big(1 + \frac{\rho}{0.001} + 0.001 \rho\Big)^{-1}, \qquad \rho = r + 0.001 ,

    a fifth in the first step and a fourteenth in the last of T = 20. This is left out here.

    Args:
        noise_std: of the measurements, which the released code does not use.
        steps: T, 2 to 1000; at most 22 where the prior's schedule ends at 100 times as much noise
            as image, as the usual one does.
        iterations: their number, at least 0: evaluations are (T - 1)(1 + iterations), products
            (T - 1) iterations. The released code evaluates the prior three times an iteration.
        rate: of AdamW.
        weight_scale: of the control cost.
        learned_variance: of the steps, see :class:`diffoc.ancestral.AncestralProcess`.
        keep_activations: as for :func:`diffoc.solve.solve`.

    Source: github.com/lihenryhfl/diffusion_optimal_control, commit f20ebff.
    """
    weights = released_weights(steps, weight_scale)
    noise = draw_noise(steps - 1, x.shape, generator).to(x)
    _, sigma = prior.schedule(torch.ones((), dtype=torch.float64))
    return solve(
        AncestralProcess(prior, steps, noise, learned_variance),
        ResidualNorm(physics.A, y),
        x / sigma.item(),
        control_cost=ControlCost(weights),
        rank=0,
        iterations=iterations,
        rule=Adam(rate, weight_decay=0.01, keeps_best=False),
        regularization=1e-3,
        feedback=False,
        keep_activations=keep_activations,
    ).x0
