"""What users call: a problem and a recipe give a result.

>>> prior = diffoc.load_prior("faces64")
>>> problem = diffoc.Problem(super_resolution(4), y, noise_std=0.05)
>>> result = diffoc.reconstruct(problem, prior)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from azula.denoise import Denoiser
from torch import Tensor

from diffoc.checks import (
    check_callable,
    check_kind,
    check_networks,
    check_precision,
    check_tensor,
    check_whole,
    evaluating,
)
from diffoc.costs import ControlCost
from diffoc.greedy import greedy_controls
from diffoc.problem import Problem, check_operator
from diffoc.process import ReverseProcess
from diffoc.recipe import OURS, Recipe
from diffoc.result import Result
from diffoc.rules import LBFGS, Rule
from diffoc.solve import image_units, solve
from diffoc.system import ControlProblem

FIRST_FROM_GUESS = 1e-4
"""L-BFGS's first change from a greedy guess: one of the usual length would undo the guess."""


def reconstruct(
    problem: Problem,
    prior: Denoiser,
    recipe: Recipe = OURS,
    *,
    x: Tensor | None = None,
    generator: torch.Generator | None = None,
    starts: int = 1,
    progress: bool = False,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Result:
    """Reconstructs the images of a problem; the result's evaluations include those of the guess.

    Args:
        problem: what was measured.
        prior: an azula denoiser on images in [-1, 1], such as :func:`diffoc.load_prior` returns.
        recipe: how the problem is solved; `recipe.at(problem.task)` is what runs.
        x: initial states, (B, C, H, W), for a prior without `image_shape`, or a start of one's own;
            by default zeros, or noise if the recipe starts from noise.
        generator: the source of what is random, on the CPU; by default one with the seed 0.
        starts: the number of states from which each problem is solved, the first as above, the
            others random: where the solution is not unique, as in phase retrieval, they end in
            different images. The result's problems are those of the first start, then those of the
            second, ...; the cheapest explains the measurement best.
        progress: whether to show a bar.
        callback: a function that is called after each iteration, see :func:`diffoc.ilqr.ilqr`.

    Raises:
        ValueError: if the operator, the measurements and the prior do not fit each other, or an
            argument is out of its range.
        torch.linalg.LinAlgError, DivergenceError: as of :func:`diffoc.ilqr.ilqr`, if one problem
            cannot be gone on with, for all of them: solve each alone to have the others.
    """
    check_whole(1, starts=starts)
    check_kind(Recipe, recipe=recipe)
    check_kind(Denoiser, prior=prior)
    check_callable(callback=callback)
    check_networks(prior=prior, physics=problem.physics)
    if generator is not None:
        check_kind(torch.Generator, generator=generator)
    recipe = recipe.at(problem.task)
    generator = generator or torch.Generator().manual_seed(0)
    with evaluating(prior, problem.physics):
        problem = replace(problem, y=problem.y.repeat(starts, *[1] * (problem.y.ndim - 1)))
        given, x = x is not None, _start(problem, prior, x, starts)
        process = recipe.process(prior, recipe.steps, x, generator)
        first = len(x) // starts if given or not recipe.from_noise else 0
        x[first:] = process.initial_state(x[first:].shape, generator).to(x)
        guess = None
        if recipe.guess and problem.linear:
            smoothness = recipe.smoothness if x.ndim == 4 else 0.0  # other states are no pictures
            coloured = recipe.coloured and x.ndim == 4 and x.shape[1] == 3
            guess = greedy_controls(
                process, problem.physics, problem.y, x, problem.noise_std, smoothness, coloured
            )
        if recipe.guess and not recipe.planned and (guess is None or recipe.steps < 2):
            # The first control of a guess is zero: no control would know the measurements.
            what = "a linear deepinv physics" if guess is None else "at least 2 steps"
            raise ValueError(
                f"recipe {recipe.name!r} has no iterations here, and a guess needs {what}: name "
                "another recipe, or give iterations"
            )
        spent = 0 if guess is None else recipe.steps
        reserved = spent + 2 * recipe.steps * (recipe.draw is not None)
        schedule, times = process.denoiser.schedule, process.times
        cost, damping = recipe.cost(problem), recipe.regularization
        control_cost = ControlCost(recipe.weight * recipe.weights(schedule, times))
        result = solve(
            process,
            cost,
            x,
            guess,
            control_cost=control_cost,
            derivatives=recipe.derivatives,
            rank=recipe.rank,
            iterations=recipe.planned,
            rule=_rule(recipe, process, guess is not None),
            regularization=damping(schedule, times) if callable(damping) else damping,
            budget=None if recipe.spare or recipe.budget is None else recipe.budget - reserved,
            stop=problem.explained if recipe.stopped else None,
            progress=progress,
            callback=callback,
        )
        if recipe.draw:
            system = ControlProblem(process.step, control_cost, cost, process.horizon)
            result = recipe.draw(system, result, recipe, generator)
        with torch.no_grad():
            residual = problem.residual_over_noise(result.x0)
    return replace(result, evaluations=result.evaluations + spent, residual_over_noise=residual)


def _rule(recipe: Recipe, process: ReverseProcess, guessed: bool) -> Rule:
    rule = recipe.rule
    if isinstance(rule, LBFGS) and recipe.preconditioned:
        return replace(rule, units=image_units(process.denoiser.schedule, process.times))
    if isinstance(rule, LBFGS) and guessed:
        return replace(rule, first=FIRST_FROM_GUESS)
    return rule


def _start(problem: Problem, prior: Denoiser, x: Tensor | None, starts: int) -> Tensor:
    y = problem.y
    if x is None:
        if not hasattr(prior, "image_shape"):
            raise ValueError("x is missing, and the prior has no image_shape: give one of them")
        x = torch.zeros(len(y) // starts, *prior.image_shape, dtype=y.dtype, device=y.device)
    check_tensor("x", x)
    x = x.repeat(starts, *[1] * (x.ndim - 1))
    check_operator(problem, x)
    check_precision(prior, x)
    return x
