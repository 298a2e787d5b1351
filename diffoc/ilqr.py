r"""The iterative linear quadratic regulator, Appendix B: one controller for everything.

A problem is a discrete-time system :math:`x_{i+1} = f(i, x_i, u_i)` with the cost (Eq. 10)

.. math:: J(u) = \sum_{i=0}^{T-1} \ell(i, x_i, u_i) + \ell_T(x_T) .

An iteration expands it around the nominal trajectory, sweeps backward for the gains
(:mod:`diffoc.riccati`) and forward for the new trajectory (Eqs. 15 and 16)

.. math:: u_i^* = u_i + \epsilon k_i + K_i (x_i^* - x_i) , \quad x_{i+1}^* = f(i, x_i^*, u_i^*) ,

with a backtracking line search on :math:`\epsilon` and Tikhonov regularisation of Quu, both of
each problem of the batch on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffoc.riccati import (
    VALUE_UPDATES,
    DenseValue,
    Expansion,
    Gains,
    SingularControlHessianError,
    control_gradient,
    expand_step,
    terminal_value,
)


@dataclass(frozen=True)
class ControlProblem:
    """A controlled system with costs; every callable is batched and differentiable.

    Attributes:
        dynamics: maps (i, x, u) to the next states; x is (B, ...), u is (B, ...).
        running_cost: maps (i, x, u) to costs (B,), not necessarily dependent on x.
        terminal_cost: maps final states to costs (B,).
        horizon: the number T of steps.
    """

    dynamics: Callable[[int, Tensor, Tensor], Tensor]
    running_cost: Callable[[int, Tensor, Tensor], Tensor]
    terminal_cost: Callable[[Tensor], Tensor]
    horizon: int

    def rollout(self, x: Tensor, controls: Tensor) -> Tensor:
        """The states (T + 1, B, ...) from x (B, ...) under controls (T, B, ...)."""
        states = [x]
        for i in range(self.horizon):
            states.append(self.dynamics(i, states[-1], controls[i]))
        return torch.stack(states)

    def cost(self, states: Tensor, controls: Tensor) -> Tensor:
        """The total cost J, Eq. 10, (B,)."""
        running = (self.running_cost(i, states[i], controls[i]) for i in range(self.horizon))
        return sum(running, self.terminal_cost(states[-1]))


@dataclass(frozen=True)
class Tikhonov:
    """The quadratic schedule of Tassa et al. 2012 (doi:10.1109/IROS.2012.6386025, Sec. II-F).

    After a success the constant shrinks faster and faster, to zero below `minimum`; after a
    failed factorisation or line search it grows faster and faster, up to `maximum`.
    """

    initial: float = 0.0
    minimum: float = 1e-8
    maximum: float = 1e12
    factor: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.maximum or not 0 < self.minimum <= self.maximum:
            raise ValueError(
                f"initial, minimum and maximum are {self.initial}, {self.minimum} and "
                f"{self.maximum}: expected 0 <= initial <= maximum and 0 < minimum <= maximum"
            )
        if not self.factor > 1:
            raise ValueError(f"factor is {self.factor}, expected above 1")

    def shrink(self, a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The next constant and its factor, after a success; (B,) each."""
        delta = (delta / self.factor).clamp(max=1 / self.factor)
        a = a * delta
        return torch.where(a >= self.minimum, a, 0), delta

    def grow(self, a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The next constant and its factor, after a failure; (B,) each."""
        delta = (delta * self.factor).clamp(min=self.factor)
        return (a * delta).clamp(self.minimum, self.maximum), delta


@dataclass(frozen=True)
class LineSearch:
    """Backtracking: the first step, from 1 down, whose decrease is a fraction of the expected.

    Attributes:
        sufficient: the fraction, in ]0, 1/2[.
        contraction: the ratio of a step to the one before, in ]0, 1[.
        trials: the number of steps tried.
    """

    sufficient: float = 1e-4
    contraction: float = 0.5
    trials: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.sufficient < 0.5:
            raise ValueError(f"sufficient is {self.sufficient}, expected in ]0, 1/2[")
        if not 0 < self.contraction < 1:
            raise ValueError(f"contraction is {self.contraction}, expected in ]0, 1[")
        if self.trials < 1:
            raise ValueError(f"trials is {self.trials}, expected at least 1")


@dataclass(frozen=True)
class History:
    """One row per iteration, one column per problem: lists of (B,) tensors of equal length.

    Attributes:
        cost: J before the iteration.
        gradient: the largest absolute derivative of J in a control, before the iteration.
        expected: the decrease expected of a full step.
        step: the step taken, 0 where none was (converged, or refused).
        regularization: the constant of the gains.
    """

    cost: list[Tensor] = field(default_factory=list)
    gradient: list[Tensor] = field(default_factory=list)
    expected: list[Tensor] = field(default_factory=list)
    step: list[Tensor] = field(default_factory=list)
    regularization: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class ILQRResult:
    """What the controller found.

    Attributes:
        states: (T + 1, B, ...).
        controls: (T, B, ...).
        cost: J, (B,).
        gains: of the batch's last backward sweep, around the trajectories before the last step.
        status: of each problem "gradient" or "cost" (converged by that test), "stalled" (no
            descent at the largest regularisation) or "iterations" (stopped by their number).
        history: of the iterations.
    """

    states: Tensor
    controls: Tensor
    cost: Tensor
    gains: list[Gains]
    status: list[str]
    history: History


def backward_sweep(
    expansions: list[Expansion], value: DenseValue, a: Tensor, update: str
) -> tuple[list[Gains], DenseValue]:
    """Gains of all steps and the value at the initial state.

    The sweep knows nothing of how the value represents its Hessian: it only asks it to step back.

    Args:
        expansions: of the steps 0 to T - 1.
        value: at the final state.
        a: Tikhonov's constant of every step and problem, (T, B).
        update: a member of :data:`diffoc.riccati.VALUE_UPDATES`.
    """
    gains = []
    for i in reversed(range(len(expansions))):
        step_gains, value = value.step_back(expansions[i], a[i], update)
        gains.append(step_gains)
    return gains[::-1], value


def forward_sweep(
    problem: ControlProblem, states: Tensor, controls: Tensor, gains: list[Gains], step: Tensor
) -> tuple[Tensor, Tensor]:
    """The trajectory under the new controls, Eqs. 15 and 16.

    Args:
        problem: the system.
        states: nominal, (T + 1, B, ...).
        controls: nominal, (T, B, ...).
        gains: of every step.
        step: of every problem, (B,).

    Returns:
        States and controls, shaped as the nominal ones.
    """
    x, new_states, new_controls = states[0], [states[0]], []
    for i, g in enumerate(gains):
        du = step[:, None] * g.k + g.feedback((x - states[i]).flatten(1))
        new_controls.append(controls[i] + du.reshape(controls[i].shape))
        x = problem.dynamics(i, x, new_controls[-1])
        new_states.append(x)
    return torch.stack(new_states), torch.stack(new_controls)


@torch.no_grad()
def ilqr(
    problem: ControlProblem,
    x: Tensor,
    controls: Tensor | None = None,
    *,
    regularization: Tikhonov | float | Tensor | None = None,
    value_update: str = "full",
    hessian_rank: int | None = None,
    line_search: LineSearch | None = LineSearch(),
    max_iterations: int = 100,
    gradient_tolerance: float = 1e-8,
    callback: Callable[[int, Tensor], None] | None = None,
) -> ILQRResult:
    r"""Minimises the total cost over the controls, with dense derivatives.

    A problem is converged when no derivative of J in a control exceeds `gradient_tolerance`, or
    when the expected decrease is below the rounding of J. Its trajectory is kept from then on.

    Args:
        problem: the system and its costs.
        x: initial states, (B, ...), float32 or float64.
        controls: the initial guess, (T, B, ...); zeros of the states' shape by default.
        regularization: a :class:`Tikhonov` schedule (the default), or a fixed constant: a
            number, or one per step, (T,).
        value_update: "full", or "paper" for Eqs. 48 and 49.
        hessian_rank: truncates the terminal Hessian, see
            :func:`diffoc.riccati.terminal_value`.
        line_search: its parameters, or None to take every full step, whatever it costs.
        max_iterations: at least 0.
        gradient_tolerance: not negative.
        callback: called after each iteration with its number and the costs (B,).

    Returns:
        The best trajectory and how it was found.

    Raises:
        ValueError: if an argument is wrong, or the initial trajectory is not finite.
        SingularControlHessianError: if Quu + a I of a step is not positive definite for the
            fixed constant a, or for the schedule's largest.
    """
    if controls is None:
        controls = x.new_zeros(problem.horizon, *x.shape)
    schedule = Tikhonov() if regularization is None else regularization
    _check(problem, x, controls, schedule, value_update, max_iterations, gradient_tolerance)
    batch, T = len(x), problem.horizon
    adaptive = isinstance(schedule, Tikhonov)
    if adaptive:
        a, delta = x.new_full((batch,), schedule.initial), x.new_ones(batch)
    else:
        fixed = torch.as_tensor(schedule, dtype=x.dtype, device=x.device).reshape(-1, 1)
        a_steps = fixed.expand(T, batch)
        a = a_steps[0]

    states = problem.rollout(x, controls)
    cost = problem.cost(states, controls)
    if not cost.isfinite().all():
        raise ValueError("controls lead to a trajectory whose cost is not finite: lower them")
    # The cost is a sum of squares of states, computed with relative errors of some eps.
    rounding = 16 * torch.finfo(x.dtype).eps
    history, gains = History(), []
    status = ["iterations"] * batch
    active = torch.ones(batch, dtype=torch.bool, device=x.device)
    expansions = None

    for iteration in range(max_iterations + 1):
        if expansions is None:
            expansions = [
                expand_step(problem.dynamics, problem.running_cost, i, states[i], controls[i])
                for i in range(T)
            ]
            value = terminal_value(problem.terminal_cost, states[-1], hessian_rank)
            gradient = control_gradient(expansions, value.Vx).abs().amax(dim=(0, 2))
        active = _retire(active, gradient <= gradient_tolerance, status, "gradient")
        if not active.any() or iteration == max_iterations:
            break

        while True:
            if adaptive:
                a_steps = a.expand(T, batch)
            gains, _ = backward_sweep(expansions, value, a_steps, value_update)
            definite = torch.stack([g.definite for g in gains])
            failed = active & ~definite.all(dim=0)
            if not failed.any():
                break
            if not adaptive or (a[failed] >= schedule.maximum).any():
                raise _singular(definite, failed, a_steps)
            a, delta = _select(failed, schedule.grow(a, delta), (a, delta))

        slope = torch.stack([g.slope for g in gains]).sum(dim=0)
        curvature = torch.stack([g.curvature for g in gains]).sum(dim=0)
        expected = -(slope + curvature / 2)
        negligible = expected <= rounding * cost.abs()
        history.cost.append(cost)
        history.gradient.append(gradient)
        history.expected.append(expected)
        history.regularization.append(a_steps.amax(dim=0))

        accept = _acceptance(line_search, slope, curvature, cost, negligible)
        states, controls, cost, step = _search(
            problem, states, controls, cost, gains, active, accept, line_search
        )
        history.step.append(step)
        moved = step > 0
        if moved.any():
            expansions = None
        if line_search:
            active = _retire(active, negligible, status, "cost")
        if adaptive:
            stuck = ~moved & (a >= schedule.maximum)
            grown = _select(active, schedule.grow(a, delta), (a, delta))
            a, delta = _select(moved, schedule.shrink(a, delta), grown)
        else:
            stuck = ~moved
        active = _retire(active, stuck, status, "stalled")
        if callback:
            callback(iteration, cost)

    return ILQRResult(states, controls, cost, gains, status, history)


def _acceptance(
    line_search: LineSearch | None,
    slope: Tensor,
    curvature: Tensor,
    cost: Tensor,
    negligible: Tensor,
) -> Callable[[float, Tensor], Tensor]:
    """Says of a trial step and the costs it led to (B,), which problems may take it."""
    if line_search is None:
        return lambda trial, new_cost: new_cost.isfinite()

    def accept(trial: float, new_cost: Tensor) -> Tensor:
        expected = -(trial * slope + trial**2 * curvature / 2)
        enough = cost - new_cost >= line_search.sufficient * expected
        # Where the whole expected decrease drowns in rounding, no increase is enough.
        return (enough | negligible) & (new_cost <= cost)

    return accept


def _search(
    problem: ControlProblem,
    states: Tensor,
    controls: Tensor,
    cost: Tensor,
    gains: list[Gains],
    active: Tensor,
    accept: Callable[[float, Tensor], Tensor],
    line_search: LineSearch | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tries smaller and smaller steps until every active problem has accepted one.

    A problem that has accepted repeats its own step in the trials of the others, so that the
    last forward sweep holds everybody's trajectory. Returns the states, controls, costs and the
    steps taken, (B,), zero for those who refused all.
    """
    step, trial = torch.zeros_like(cost), 1.0
    for _ in range(line_search.trials if line_search else 1):
        waiting = active & (step == 0)
        if not waiting.any():
            break
        size = torch.where(waiting, trial, step)
        new_states, new_controls = forward_sweep(problem, states, controls, gains, size)
        new_cost = problem.cost(new_states, new_controls)
        step = torch.where(waiting & accept(trial, new_cost), size, step)
        trial *= line_search.contraction if line_search else 1.0
    moved = step > 0
    if not moved.any():
        return states, controls, cost, step
    return (
        torch.where(moved.reshape(-1, *[1] * (states.ndim - 2)), new_states, states),
        torch.where(moved.reshape(-1, *[1] * (controls.ndim - 2)), new_controls, controls),
        torch.where(moved, new_cost, cost),
        step,
    )


def _select(
    mask: Tensor, yes: tuple[Tensor, Tensor], no: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    return torch.where(mask, yes[0], no[0]), torch.where(mask, yes[1], no[1])


def _retire(active: Tensor, done: Tensor, status: list[str], reason: str) -> Tensor:
    """Writes the reason for the active problems that are done, and returns the rest."""
    for b in (active & done).nonzero().flatten().tolist():
        status[b] = reason
    return active & ~done


def _singular(definite: Tensor, failed: Tensor, a: Tensor) -> SingularControlHessianError:
    problem = int(failed.nonzero()[0])
    step = int((~definite[:, problem]).nonzero()[-1])
    return SingularControlHessianError(
        f"Quu is not positive definite at step {step} of problem {problem} with the "
        f"regularization {a[step, problem]:g}: raise regularization, or add a control cost"
    )


def _check(
    problem: ControlProblem,
    x: Tensor,
    controls: Tensor,
    regularization: Tikhonov | float | Tensor,
    value_update: str,
    max_iterations: int,
    gradient_tolerance: float,
) -> None:
    if x.ndim < 2 or not x.is_floating_point() or not x.isfinite().all():
        raise ValueError("x must be finite, floating point and of shape (B, ...)")
    T, batch = problem.horizon, len(x)
    if controls.ndim < 3 or controls.shape[:2] != (T, batch):
        raise ValueError(
            f"controls has shape {tuple(controls.shape)}, expected ({T}, {batch}, ...)"
        )
    if controls.dtype != x.dtype or controls.device != x.device:
        raise ValueError(
            f"controls is {controls.dtype} on {controls.device}, x {x.dtype} on {x.device}"
        )
    if not controls.isfinite().all():
        raise ValueError("controls must be finite")
    if value_update not in VALUE_UPDATES:
        raise ValueError(
            f"value_update is {value_update!r}, expected one of {', '.join(VALUE_UPDATES)}"
        )
    if not isinstance(regularization, Tikhonov):
        constant = torch.as_tensor(regularization)
        if constant.numel() not in (1, T) or not (constant >= 0).all():
            raise ValueError(f"regularization must be 1 or {T} numbers, and not negative")
    if max_iterations < 0:
        raise ValueError(f"max_iterations is {max_iterations}, expected at least 0")
    if not gradient_tolerance >= 0:
        raise ValueError(f"gradient_tolerance is {gradient_tolerance}, expected at least 0")
