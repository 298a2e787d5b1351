r"""How a problem is solved: with how many steps, by which rule, from which guess, until when.

The controls of the reverse process minimise

.. math:: \frac{\|A(x_0) - y\|^2}{2 s^2} + \frac12 \sum_i r_i \|u_i\|^2 ,

or what else a recipe takes for the first term.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from azula.denoise import Denoiser
from azula.noise import Schedule
from torch import Tensor

from diffoc.checks import (
    check_at_least,
    check_callable,
    check_kind,
    check_member,
    check_steps,
    check_whole,
)
from diffoc.costs import GaussianLikelihood
from diffoc.lowrank import MatrixFree
from diffoc.problem import Problem
from diffoc.process import ReverseProcess
from diffoc.result import Result
from diffoc.rules import LBFGS, Damping, Rule
from diffoc.system import ControlProblem, Derivatives

TASKS = (
    "super_resolution",
    "random_inpainting",
    "box_inpainting",
    "gaussian_blur",
    "motion_blur",
    "nonlinear_blur",
    "phase_retrieval",
)
"""The names of the tasks of :data:`diffoc.problems.tasks.TASKS`, which is slow to import."""


def snr_squared(schedule: Schedule, times: Tensor) -> Tensor:
    r"""Returns the precision :math:`\alpha_i^2 / \sigma_i^2` to which states know x_0, (T,).

    The schedule is the prior's, the T + 1 times are the process's.
    """
    alpha, sigma = schedule(times[:-1])
    return (alpha / sigma).square()


def constant(schedule: Schedule, times: Tensor) -> Tensor:
    """Returns ones, (T,); arguments as for :func:`snr_squared`."""
    return torch.ones(len(times) - 1, dtype=torch.float64)


def likelihood(problem: Problem) -> GaussianLikelihood:
    """Returns the terminal cost -log p(y | x_0)."""
    return GaussianLikelihood(problem.operator, problem.y, problem.noise_std)


def deterministic(
    prior: Denoiser, steps: int, x: Tensor, generator: torch.Generator
) -> ReverseProcess:
    """Returns the process of DDIM's steps, uniform in time; it draws nothing."""
    return ReverseProcess(prior, steps)


def dense_near_image(
    prior: Denoiser, steps: int, x: Tensor, generator: torch.Generator
) -> ReverseProcess:
    """Returns the process of DDIM's steps at the times (1 - i/T)^1.5; it draws nothing.

    Most of an image is settled at small noise, where these steps are short.
    """
    return ReverseProcess(prior, torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** 1.5)


def per_step(iterations: int | None) -> int:
    """Returns the evaluations that a budget needs for each step: 2 for a guess, 4 for a plan.

    Args:
        iterations: of the plan, at most; with 0 there is the guess alone, None is no limit.
    """
    return 2 if iterations == 0 else 4


@dataclass(frozen=True)
class Recipe:
    r"""How a problem is solved; a frozen value with a name.

    Attributes:
        steps: the number T of the process's steps, at least 1.
        budget: the largest number of evaluations of the prior by each image, those of the guess
            included; None for no limit.
        iterations: the largest number of iterations; None for as many as the budget allows.
        spare: the share of the budget that is left for the line search's trials, and not planned
            for iterations.
        rule: how a step is made and how far it goes, see :mod:`diffoc.rules`.
        preconditioned: whether L-BFGS measures controls in units of the image, see
            :func:`diffoc.solve.image_units`.
        rank: the rank of the terminal Hessian.
        derivatives: how derivatives are represented.
        regularization: Tikhonov's constant or schedule, or a function of the prior's schedule and
            the process's times, as :func:`snr_squared` is.
        weight: the factor w of the control cost's weights :math:`r_i = w\, \rho_i`, at least 0;
            where it is 0, Quu has to be kept positive by `regularization`.
        weights: the function that returns :math:`\rho_i`, such as :func:`snr_squared` or
            :func:`constant`.
        guess: whether the first controls of a linear problem are the greedy ones, see
            :mod:`diffoc.greedy`; otherwise they are zero.
        smoothness: the smoothness, at least 0, of the errors that the guess takes the prior's
            estimate to have, see :func:`diffoc.greedy.image_spectrum`; it is 0 for states that are
            not (B, C, H, W).
        coloured: whether it takes them to be mostly grey, see :data:`diffoc.greedy.COLOURS`; it has
            no effect on states that are not (B, 3, H, W).
        from_noise: whether the process starts from random noise. The default, zero, is the most
            probable noise; a random start would only add the texture of a sample.
        stopped: whether an image is left where its residual is as small as the noise (the
            discrepancy principle).
        process: the function that makes the reverse process.
        cost: the function that makes the terminal cost of a problem.
        draw: a function of the controlled system and the plans that returns a result in their
            place, in at most 2 T evaluations, as
            :func:`diffoc.theory.riccati_draws.draw_around` does; None keeps the plans.
        by_task: the changes that were tuned for a (task, budget).
        untuned: the values that `by_task` changes, as they were before. A recipe in which one of
            them is another is tuned for nothing.
    """

    name: str
    steps: int
    budget: int | None = None
    iterations: int | None = None
    spare: float = 0.0
    rule: Rule = field(default_factory=LBFGS)
    preconditioned: bool = False
    rank: int = 0
    derivatives: Derivatives = field(default_factory=MatrixFree)
    regularization: Damping | float | Callable[[Schedule, Tensor], Tensor] = 0.0
    weight: float = 1.0
    weights: Callable[[Schedule, Tensor], Tensor] = constant
    guess: bool = False
    smoothness: float = 0.0
    coloured: bool = False
    from_noise: bool = False
    stopped: bool = False
    process: Callable[[Denoiser, int, Tensor, torch.Generator], ReverseProcess] = deterministic
    cost: Callable[[Problem], Callable[[Tensor], Tensor]] = likelihood
    draw: Callable[[ControlProblem, Result, Recipe, torch.Generator], Result] | None = None
    by_task: Mapping[tuple[str, int], Mapping[str, Any]] = field(default_factory=dict)
    untuned: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_steps(steps=self.steps)
        check_whole(0, budget=self.budget, iterations=self.iterations, rank=self.rank)
        check_at_least(0, weight=self.weight, spare=self.spare, smoothness=self.smoothness)
        check_kind(str, name=self.name)
        check_kind(Derivatives, derivatives=self.derivatives)
        check_kind(Rule, rule=self.rule)
        check_kind(Callable, process=self.process, cost=self.cost, weights=self.weights)
        check_callable(draw=self.draw)
        check_kind(Mapping, by_task=self.by_task, untuned=self.untuned)
        if self.spare >= 1:
            raise ValueError(f"spare is {self.spare}, expected a share below 1")
        if self.budget is None and self.iterations is None:
            raise ValueError("budget and iterations are both None: give at least one")
        needed = self._per_step(self.iterations)
        if self.budget is not None and self.budget < needed * self.steps:
            raise ValueError(
                f"budget is {self.budget}, expected at least {needed} times the {self.steps} steps"
            )

    def at(self, task: str | None, budget: int | None = None) -> Recipe:
        """Returns the recipe as tuned for a task at the nearest budget below, or else above.

        A task that is not in `by_task`, and None, change nothing, nor does a task where one of the
        recipe's `untuned` values was changed. The budget of evaluations is the recipe's own by
        default, and bounds the steps, see :func:`per_step`.
        """
        if task is not None:
            check_member([*TASKS, *(own for own, _ in self.by_task if own not in TASKS)], task=task)
        most = budget or self.budget or sys.maxsize
        budgets = sorted(each for name, each in self.by_task if name == task)
        changed = any(getattr(self, key) != value for key, value in self.untuned.items())
        if not budgets or changed:
            return replace(self, by_task={})
        fitting = [each for each in budgets if each <= most]
        changes = dict(self.by_task[str(task), fitting[-1] if fitting else budgets[0]])
        room = most // self._per_step(changes.get("iterations", self.iterations))
        changes["steps"] = min(changes.get("steps", self.steps), max(1, room))
        return replace(self, **changes, by_task={})

    def _per_step(self, iterations: int | None) -> int:
        return per_step(iterations if self.draw is None else None)  # a draw takes as much as a plan

    @property
    def planned(self) -> int:
        """Returns how many iterations there are at most."""
        most = sys.maxsize if self.iterations is None else self.iterations
        if self.budget is None:
            return most
        if not self.spare:
            return min(most, self.budget // self.steps)
        left = self.budget - 2 * self.steps * self.guess
        return min(most, max(1, math.floor((1 - self.spare) * left / self.steps + 1e-9)))


UNTUNED: dict[str, Any] = {"steps": 15, "smoothness": 3.0, "iterations": None}
"""What the trials of a task change: a plan, from the guess in few steps."""

OURS = Recipe(
    "ours",
    budget=300,
    preconditioned=True,
    weight=4.0,
    weights=snr_squared,
    guess=True,
    coloured=True,
    process=dense_near_image,
    **UNTUNED,
    untuned=UNTUNED,
    by_task={
        ("super_resolution", 20): {"steps": 10, "smoothness": 2.0, "iterations": 0},
        ("super_resolution", 50): {"steps": 25, "smoothness": 2.0, "iterations": 0},
        ("super_resolution", 100): {"steps": 30, "smoothness": 2.0, "iterations": 0},
        ("super_resolution", 200): {"steps": 15, "smoothness": 2.0, "iterations": 20},
        ("super_resolution", 300): {"steps": 15, "smoothness": 3.5, "iterations": 20},
        ("random_inpainting", 20): {"steps": 10, "smoothness": 3.0, "iterations": 0},
        ("random_inpainting", 50): {"steps": 25, "smoothness": 3.0, "iterations": 0},
        ("random_inpainting", 100): {"steps": 15, "smoothness": 3.0, "iterations": 20},
        ("random_inpainting", 200): {"steps": 15, "smoothness": 3.0, "iterations": 20},
        ("random_inpainting", 300): {"steps": 15, "smoothness": 3.0, "iterations": 20},
        ("box_inpainting", 300): {"steps": 30, "smoothness": 2.5, "iterations": 0},
        ("gaussian_blur", 300): {"steps": 30, "smoothness": 3.0, "iterations": 0},
        ("motion_blur", 300): {"steps": 15, "smoothness": 2.0, "iterations": 20},
    },
)
r"""The default: a greedy guess, improved by L-BFGS in units of the image until the budget is spent.

The guess's errors are smooth and mostly grey, and steps are dense near the image. What keeps most
of the noise from being fitted is the control cost :math:`w \alpha_i^2 / \sigma_i^2`. For the tasks
of Table 1 there is what the trials on eight colour faces chose: a plan of 15 steps, or the guess in
30 steps alone; for two tasks at smaller budgets, too. A problem without a task has the plan.
"""

QUICK = replace(
    OURS,
    name="quick",
    budget=None,
    steps=20,
    iterations=0,
    untuned={"smoothness": UNTUNED["smoothness"]},
    by_task={
        ("super_resolution", 300): {"smoothness": 2.0},
        ("random_inpainting", 300): {"smoothness": 3.25},
        ("box_inpainting", 300): {"smoothness": 2.5},
        ("gaussian_blur", 300): {"smoothness": 2.75},
        ("motion_blur", 300): {"smoothness": 2.25},
    },
)
"""The guess of `OURS` alone, in 40 evaluations, for linear problems.

Its smoothness is what the trials on eight colour faces chose, with the 300 evaluations of the
tables as the limit."""

STOPPED = Recipe("stopped", steps=10, budget=300, spare=0.15, weight=0.3, guess=True, stopped=True)
"""L-BFGS from the greedy guess, ended by the discrepancy principle."""

COLD = replace(STOPPED, name="cold", iterations=25, budget=None, weight=1.0, guess=False)
"""As `STOPPED`, from controls of zero: without the guess, which the paper does not have."""
