r"""What users call: a problem and a recipe give a result.

>>> prior = diffoc.load_prior("faces64")
>>> problem = diffoc.Problem(super_resolution(4), y, noise_std=0.05)
>>> result = diffoc.reconstruct(problem, prior)

The controls of the reverse process minimise

.. math:: \frac{\|A(x_0) - y\|^2}{2 s^2} + \frac12 \sum_i r_i \|u_i\|^2 ,

and a :class:`Recipe` says how: with how many steps, by which rule, from which guess, at which
control cost, and until when. `OURS` is the default everywhere.
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
    check_above,
    check_alike,
    check_at_least,
    check_callable,
    check_kind,
    check_member,
    check_tensor,
    check_whole,
    evaluating,
    one_line,
    shown,
)
from diffoc.costs import ControlCost, GaussianLikelihood
from diffoc.greedy import greedy_controls
from diffoc.ilqr import Result
from diffoc.lowrank import MatrixFree
from diffoc.process import ReverseProcess
from diffoc.rules import LBFGS, Damping, Rule
from diffoc.solve import image_units, solve
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

FIRST_FROM_GUESS = 1e-4
"""L-BFGS's first change from a greedy guess: one of the usual length would undo the guess."""


@dataclass(frozen=True)
class Problem:
    """A measurement y = A(x_0) + noise, and what is known of it.

    Attributes:
        physics: a deepinv physics, or any differentiable callable A that maps images (B, C, H, W)
            to measurements (B, ...), no image having a part in another's.
        y: the measurements, (B, ...), finite.
        noise_std: standard deviation of the Gaussian noise, above 0.
        task: one of :data:`TASKS`, or of the recipe's own, for recipes that were tuned for it; None
            for any other problem.

    Raises:
        TypeError: if `physics` cannot be called, or `y` is no tensor.
        ValueError: if `y` or `noise_std` is out of its range.
    """

    physics: Any
    y: Tensor
    noise_std: float
    task: str | None = None

    def __post_init__(self) -> None:
        if not callable(self.physics) or isinstance(self.physics, type):
            raise TypeError(
                f"physics is {shown(self.physics)}, expected a deepinv physics or a callable"
            )
        if self.task is not None:
            check_kind(str, task=self.task)
        check_tensor("y", self.y)
        if self.y.ndim < 2:
            raise ValueError(
                f"y has shape {tuple(self.y.shape)}, expected (B, ...): give y[:, None]"
            )
        check_above(0, noise_std=self.noise_std)

    @property
    def operator(self) -> Callable[[Tensor], Tensor]:
        """A, without noise."""
        return self.physics.A if self._is("Physics") else self.physics

    @property
    def linear(self) -> bool:
        """Whether A is known to be linear, with an adjoint."""
        return self._is("LinearPhysics")

    @property
    def noise_level(self) -> Tensor:
        """The root mean square of each true image's residual, (B,).

        Where inpainting has dropped pixels, and `y` is zero, there is no noise.
        """
        mask = self.physics.mask.to(self.y) if self._is("Inpainting") else 1
        noisy = (self.y != 0) | (mask * torch.ones_like(self.y) != 0)
        share = noisy.to(self.y).flatten(1).mean(dim=1)
        return (self.noise_std * share.sqrt().double()).to(self.y)

    def residual_over_noise(self, x0: Tensor) -> Tensor:
        """Returns the root mean square of A(x_0) - y over the noise's, (B,)."""
        residual = self.operator(x0) - self.y
        return residual.flatten(1).square().mean(dim=1).sqrt() / self.noise_level

    def explained(self, x0: Tensor) -> Tensor:
        """Returns which images have a residual as small as the noise, (B,) bool."""
        return self.residual_over_noise(x0) < 1

    def _is(self, kind: str) -> bool:
        # Whoever has a physics has imported deepinv; who has none need not wait for it.
        physics = sys.modules.get("deepinv.physics")
        return physics is not None and isinstance(self.physics, getattr(physics, kind))


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


@dataclass(frozen=True)
class Recipe:
    r"""How a problem is solved; a frozen value with a name.

    Attributes:
        name: of the recipe.
        steps: T, at least 1.
        budget: of evaluations of the prior by each image, the guess included; None for no limit.
        iterations: at most so many; None for as many as the budget allows.
        spare: the share of the budget that is left for the line search's trials, and not planned
            for iterations.
        rule: see :mod:`diffoc.rules`.
        preconditioned: whether L-BFGS measures controls in units of the image, see
            :func:`diffoc.solve.image_units`.
        rank: of the terminal Hessian.
        derivatives: how they are represented.
        regularization: Tikhonov's constant or schedule, or a function of the prior's schedule and
            the process's times, as :func:`snr_squared` is.
        weight: w of the control cost's weights :math:`r_i = w\, \rho_i`, at least 0; without one,
            Quu has to be kept positive by `regularization`.
        weights: gives :math:`\rho_i`, such as :func:`snr_squared` or :func:`constant`.
        guess: whether the first controls of a linear problem are the greedy ones, see
            :mod:`diffoc.greedy`; otherwise they are zero.
        smoothness: of the errors that the guess takes the prior's estimate to have, at least 0: see
            :func:`diffoc.greedy.image_spectrum`.
        from_noise: whether the process starts from random noise. The default, zero, is the most
            probable noise; a random start would only add the texture of a sample.
        stopped: whether an image is left where its residual is as small as the noise (the
            discrepancy principle).
        process: makes the reverse process.
        cost: makes the terminal cost.
        draw: makes, of the controlled system and the plans, a result in their place in at most 2 T
            evaluations, as :func:`diffoc.theory.riccati_draws.draw_around` does; None keeps the
            plans.
        by_task: changes for (task, budget): what was tuned for them.
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
    from_noise: bool = False
    stopped: bool = False
    process: Callable[[Denoiser, int, Tensor, torch.Generator], ReverseProcess] = deterministic
    cost: Callable[[Problem], Callable[[Tensor], Tensor]] = likelihood
    draw: Callable[[ControlProblem, Result, Recipe, torch.Generator], Result] | None = None
    by_task: Mapping[tuple[str, int], Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_whole(1, steps=self.steps)
        check_whole(0, budget=self.budget, iterations=self.iterations, rank=self.rank)
        check_at_least(0, weight=self.weight, spare=self.spare, smoothness=self.smoothness)
        check_kind(Derivatives, derivatives=self.derivatives)
        if self.spare >= 1:
            raise ValueError(f"spare is {self.spare}, expected a share below 1")
        if self.budget is None and self.iterations is None:
            raise ValueError("budget and iterations are both None: give at least one")
        if self.budget is not None and self.budget < 4 * self.steps:
            raise ValueError(
                f"budget is {self.budget}, expected at least 4 times the {self.steps} steps"
            )

    def at(self, task: str | None, budget: int | None = None) -> Recipe:
        """Returns the recipe as tuned for a task at the nearest budget below, or else above.

        A task that is not in `by_task`, and None, change nothing; the budget of evaluations is the
        recipe's own by default. A ValueError refuses a task that is neither there nor in
        :data:`TASKS`.
        """
        if task is not None:
            check_member([*TASKS, *(own for own, _ in self.by_task if own not in TASKS)], task=task)
        most = budget or self.budget or sys.maxsize
        budgets = sorted(each for name, each in self.by_task if name == task)
        if not budgets:
            return self
        fitting = [each for each in budgets if each <= most]
        changes = self.by_task[str(task), fitting[-1] if fitting else budgets[0]]
        return replace(self, **changes, by_task={})

    @property
    def planned(self) -> int:
        """How many iterations there are at most."""
        most = sys.maxsize if self.iterations is None else self.iterations
        if self.budget is None:
            return most
        if not self.spare:
            return min(most, self.budget // self.steps)
        left = self.budget - 2 * self.steps * self.guess
        return min(most, max(1, math.floor((1 - self.spare) * left / self.steps + 1e-9)))


OURS = Recipe(
    "ours",
    steps=15,
    budget=300,
    preconditioned=True,
    weight=4.0,
    weights=snr_squared,
    guess=True,
    by_task={
        ("super_resolution", 300): {"weight": 16.0},
        ("random_inpainting", 300): {"weight": 4.0},
        ("box_inpainting", 300): {"weight": 16.0},
        ("gaussian_blur", 300): {"weight": 4.0},
        ("motion_blur", 300): {"weight": 4.0},
        ("super_resolution", 1000): {"weight": 64.0},
        ("random_inpainting", 1000): {"weight": 64.0},
        ("box_inpainting", 1000): {"weight": 16.0},
        ("gaussian_blur", 1000): {"weight": 16.0},
        ("motion_blur", 1000): {"weight": 16.0},
    },
)
r"""The default: L-BFGS in units of the image from the greedy guess, until the budget is spent.

What keeps most of the noise from being fitted is the control cost :math:`w \alpha_i^2 /
\sigma_i^2`. Its minimum fits much of the noise unless w is large, so that w belongs to the budget.
"""

STOPPED = Recipe("stopped", steps=10, budget=300, spare=0.15, weight=0.3, guess=True, stopped=True)
"""L-BFGS from the greedy guess, ended by the discrepancy principle."""

COLD = replace(STOPPED, name="cold", iterations=25, budget=None, weight=1.0, guess=False)
"""As `STOPPED`, from controls of zero: without the guess, which the paper does not have."""


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
    """Reconstructs the images of a problem.

    Args:
        problem: what was measured.
        prior: an azula denoiser on images in [-1, 1], such as :func:`diffoc.load_prior` returns.
        recipe: how; `recipe.at(problem.task)` is what runs.
        x: initial states, (B, C, H, W), for a prior without `image_shape`, or a start of one's own;
            by default zeros, or noise if the recipe starts from noise.
        generator: of what is random, on the CPU; by default one with the seed 0.
        starts: from how many states each problem is solved, the first as above, the others random:
            where the solution is not unique, as in phase retrieval, they end in different images.
            The result's problems are those of the first start, then those of the second, ...; the
            cheapest explains the measurement best.
        progress: whether to show a bar.
        callback: see :func:`diffoc.solve`.

    Returns:
        The result, whose evaluations include those of the guess.

    Raises:
        ValueError: if the operator, the measurements and the prior do not fit each other, or an
            argument is out of its range.
    """
    check_whole(1, starts=starts)
    check_kind(Recipe, recipe=recipe)
    check_kind(Denoiser, prior=prior)
    check_callable(callback=callback)
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
            guess = greedy_controls(
                process, problem.physics, problem.y, x, problem.noise_std, recipe.smoothness
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
    """Returns the recipe's rule, where it is L-BFGS with what belongs to the process or a guess."""
    rule = recipe.rule
    if isinstance(rule, LBFGS) and recipe.preconditioned:
        return replace(rule, units=image_units(process.denoiser.schedule, process.times))
    if isinstance(rule, LBFGS) and guessed:
        return replace(rule, first=FIRST_FROM_GUESS)
    return rule


def _start(problem: Problem, prior: Denoiser, x: Tensor | None, starts: int) -> Tensor:
    """Returns the initial states, zeros by default, once operator, measurements and prior fit."""
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


def check_operator(problem: Problem, x: Tensor) -> None:
    """Raises an error unless the operator measures each of the images, which are like `x`, alone.

    It is tried on random images, the others of a batch being changed for a second trial.
    """
    check_alike(y=problem.y, x=x)
    y, images, measured = problem.y, tuple(x.shape), tuple(problem.y.shape)
    generator = torch.Generator().manual_seed(0)
    tried = (1.8 * torch.rand(images, generator=generator) - 0.9).to(x).requires_grad_()
    changes = torch.ones(len(x), *[1] * (x.ndim - 1)).to(x)
    changes[1:] = -0.5
    try:
        with torch.enable_grad():
            found, again = problem.operator(tried), problem.operator(tried.detach() * changes)
    except Exception as error:  # an operator of the user's fails anywhere
        raise ValueError(
            f"physics cannot measure images of shape {images}, the prior's: "
            f"{one_line(error) or type(error).__name__}"
        ) from error
    check_kind(Tensor, **{"what physics makes": found})
    if tuple(found.shape) != measured:
        raise ValueError(
            f"y has shape {measured}, but physics makes {tuple(found.shape)} of images of shape "
            f"{images}"
        )
    check_alike(y=y, **{"what physics makes": found})
    check_tensor("what physics makes of images in [-1, 1]", found)
    if not torch.allclose(found[0], again[0], rtol=1e-3, atol=1e-3 * found[0].abs().max().item()):
        raise ValueError(
            "physics measures an image otherwise beside other images, or each time otherwise: it "
            "must mix none, and add no noise"
        )
    if not found.requires_grad:
        raise ValueError("physics makes y without derivatives in the image: leave out its detach()")
    weights = torch.linspace(1, 2, found.numel()).to(found).reshape(measured)
    (slope,) = torch.autograd.grad(found, tried, weights, allow_unused=True)
    if slope is None or not slope.flatten(1).any(dim=1).all():
        raise ValueError(
            "physics makes y that does not change with each image, as where a mask keeps no pixel"
        )
    if problem.linear and (back := tuple(problem.physics.A_adjoint(y).shape)) != images:
        raise ValueError(
            f"physics has an adjoint that makes {back} of y, where images have shape {images}: "
            "the operator does not fit images of this size"
        )


def check_precision(prior: Denoiser, x: Tensor) -> None:
    """Raises a ValueError if all of the prior's weights are of another kind, and it minds."""
    found = [w for w in (*prior.parameters(), *prior.buffers()) if w.is_floating_point()]
    if not found or any((w.dtype, w.device) == (x.dtype, x.device) for w in found):
        return
    weights = found[0]
    try:
        with torch.no_grad():
            prior(x[:1], torch.ones((), dtype=x.dtype, device=x.device))
    except RuntimeError as error:
        raise ValueError(
            f"y is {x.dtype} on {x.device}, but the prior's weights are {weights.dtype} on "
            f"{weights.device}: convert one of them with .to(...)"
        ) from error
