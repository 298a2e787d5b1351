r"""The controller as the tables run it: recipes by name, with the settings that a row may change.

Each function puts a row's settings into one of the named recipes of :mod:`diffoc.reconstruct`,
:mod:`diffoc.baselines.paper` and :mod:`diffoc.baselines.released`, and runs that. They have the
signature that :mod:`diffoc.baselines` describes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from azula.denoise import Denoiser
from deepinv.physics import Physics
from torch import Tensor

from diffoc.baselines import method
from diffoc.baselines.paper import PAPER, guidance_regularization
from diffoc.baselines.released import RELEASED, released_process
from diffoc.lowrank import MatrixFree
from diffoc.reconstruct import (
    COLD,
    OURS,
    STOPPED,
    Problem,
    Recipe,
    constant,
    reconstruct,
    snr_squared,
)
from diffoc.rules import Adam
from diffoc.theory.projected import Projected

STEPS, ITERATIONS = 10, 80
"""Of the controller, for 1000 evaluations: its line search may try nineteen times more.

On the tuning faces ten steps and twice the iterations blur less than twenty steps."""


def iterations_within(budget: int, steps: int) -> int:
    """The iterations of T steps that a budget of evaluations allows, at least 1.

    Some 15 % of it are left for the first rollout and for the line search, which may take more.
    """
    return max(1, 17 * budget // (20 * steps))


@method
def cold(
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
    """Images (B, ...) by :data:`diffoc.reconstruct.COLD`: no guess, the discrepancy principle.

    Args:
        noise_std: of the measurements.
        steps: T, at least 1.
        iterations: at most; fewer by the discrepancy principle. With the line search's
            trials, evaluations are T (1 + iterations) or some more, products T iterations.
        control_cost: r, positive.
        from_noise: whether to start from `x`, and not from zero.
        greedy: whether there is a guess after all, T evaluations more.
    """
    recipe = replace(COLD, steps=steps, iterations=iterations, weight=control_cost, guess=greedy)
    return _run(recipe, prior, physics, y, x if from_noise else 0 * x, generator, noise_std)


@method
def stopped(
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
    """Images (B, ...) by :data:`diffoc.reconstruct.STOPPED`.

    Args:
        noise_std: of the measurements.
        steps: T, at least 1.
        budget: of evaluations, at least 4 T.

    Raises:
        ValueError: for a smaller budget.
    """
    recipe = replace(STOPPED, steps=steps, budget=budget)
    return _run(recipe, prior, physics, y, 0 * x, generator, noise_std)


@method
def ours(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    budget: int,
    steps: int = OURS.steps,
    weight: float = OURS.weight,
    weighted: bool = True,
    in_units: bool = True,
    stopped: bool = False,
) -> Tensor:
    r"""Images (B, ...) by :data:`diffoc.reconstruct.OURS`.

    Args:
        noise_std: of the measurements.
        budget: of evaluations by each image, at least 4 T; the last iteration's line search may go
            beyond it.
        steps: T, at least 1.
        weight: w, positive.
        weighted: whether the cost is :math:`w \alpha_i^2 / \sigma_i^2`; without, it is w.
        in_units: whether L-BFGS measures in units of the image; without, in those of the state.
        stopped: whether the discrepancy principle ends it all the same. These three are there to
            see what each is worth, see :func:`diffoc.experiments.ablations.parts`.

    Raises:
        ValueError: for a smaller budget, or a weight that is not positive.
    """
    if not 0 < weight < math.inf:
        raise ValueError(f"weight is {weight}, expected finite and positive")
    recipe = replace(
        OURS,
        budget=budget,
        steps=steps,
        weight=weight,
        weights=snr_squared if weighted else constant,
        preconditioned=in_units,
        stopped=stopped,
    )
    return _run(recipe, prior, physics, y, 0 * x, generator, noise_std)


@method
def paper(
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
    """Images (B, ...) by :data:`diffoc.baselines.paper.PAPER`.

    With rank 0 the gains are :math:`-Q_u / (r_i + a)`, and Adam, which divides every number by its
    own size, undoes the factor: a constant a changes nothing then.

    Args:
        noise_std: of the measurements.
        steps, iterations: T and their number: evaluations are T (1 + 2 iterations), products
            T (1 + rank) iterations.
        rank: k of the terminal Hessian.
        rate: of Adam.
        weight_scale: of the control cost, see :func:`diffoc.baselines.paper.snr_weights`.
        regularization: Tikhonov's constant a, or "lemma_4_2" for that of
            :func:`diffoc.baselines.paper.guidance_regularization`.
        projected: whether Jacobians too are of that rank, by the projections of Appendix D.1 as
            the paper writes them, see :mod:`diffoc.theory.projected`. Its Jacobian-vector products,
            T rank iterations of them, count as one evaluation for each step and iteration.

    Raises:
        ValueError: for another word than "lemma_4_2".
        diffoc.riccati.SingularControlHessianError: if `regularization` is too small.
    """
    if isinstance(regularization, str) and regularization != "lemma_4_2":
        raise ValueError(f"regularization is {regularization!r}, expected a number or 'lemma_4_2'")
    recipe = replace(
        PAPER,
        steps=steps,
        iterations=iterations,
        rank=rank,
        rule=Adam(rate),
        weight=weight_scale,
        regularization=guidance_regularization
        if isinstance(regularization, str)
        else regularization,
        derivatives=Projected(rank, hessian="gauss_newton") if projected else PAPER.derivatives,
    )
    return _run(recipe, prior, physics, y, x, generator, noise_std)


@method
def released(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int = RELEASED.steps,
    iterations: int = 50,
    rate: float = 5e-3,
    weight_scale: float = RELEASED.weight,
    learned_variance: bool = False,
    keep_activations: bool = True,
) -> Tensor:
    r"""Images (B, ...) by :data:`diffoc.baselines.released.RELEASED`.

    Args:
        noise_std: of the measurements, which the released code does not use.
        steps: T, 2 to 1000; at most 22 where the prior's schedule ends at 100 times as much noise
            as image.
        iterations: their number: evaluations are (T - 1)(1 + iterations), products (T - 1)
            iterations.
        rate: of AdamW.
        weight_scale: of the control cost.
        learned_variance: whether a step's variance is that of the prior's own head.
        keep_activations: for speed; otherwise they are recomputed, for memory.
    """
    _, sigma = prior.schedule(torch.ones((), dtype=torch.float64))
    recipe = replace(
        RELEASED,
        steps=steps,
        iterations=iterations,
        rule=Adam(rate, weight_decay=0.01, keeps_best=False),
        weight=weight_scale,
        process=partial(released_process, learned_variance=learned_variance),
        derivatives=MatrixFree(keep_activations=keep_activations),
    )
    # Its states have unit variance at every level.
    return _run(recipe, prior, physics, y, x / sigma.item(), generator, noise_std)


def _run(
    recipe: Recipe,
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    noise_std: float,
) -> Tensor:
    problem = Problem(physics, y, noise_std)
    return reconstruct(problem, prior, recipe, x=x, generator=generator).x0
