r"""The iterative linear quadratic regulator, Appendix B: one controller for everything.

A problem is a discrete-time system :math:`x_{i+1} = f(i, x_i, u_i)` with the cost (Eq. 10)

.. math:: J(u) = \sum_{i=0}^{T-1} \ell(i, x_i, u_i) + \ell_T(x_T) .

An iteration expands it around the nominal trajectory, sweeps backward for the gains
(:mod:`diffoc.riccati`) and forward for the new trajectory (Eqs. 15 and 16)

.. math:: u_i^* = u_i + \epsilon k_i + K_i (x_i^* - x_i) , \quad x_{i+1}^* = f(i, x_i^*, u_i^*) ,

with a backtracking line search on :math:`\epsilon` (or Adam, Eq. 80) and Tikhonov regularisation
of Quu, both of each problem of the batch on its own. How derivatives are represented, as dense
matrices (:class:`diffoc.riccati.Dense`), by products only
(:class:`diffoc.lowrank.MatrixFree`) or by the paper's projections
(:class:`diffoc.theory.projected.Projected`), the controller does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffoc.checks import check_alike, check_tensor
from diffoc.riccati import VALUE_UPDATES, Dense, SingularControlHessianError
from diffoc.rules import LBFGS, Adam, AdamState, LBFGSState, LineSearch, Tikhonov
from diffoc.search import acceptance, choose, search_step, select
from diffoc.system import ControlProblem, Derivatives, StepGains, backward_sweep, roll_out


class DivergenceError(RuntimeError):
    """A trajectory left the finite numbers; `result` is the best one before.

    Attributes:
        result: an :class:`ILQRResult`.
    """

    def __init__(self, message: str, result: ILQRResult) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class History:
    """One row per iteration, one column per problem: lists of (B,) tensors of equal length.

    Attributes:
        cost: J before the iteration.
        terminal: the terminal cost's part of it.
        gradient: the largest absolute derivative of J in a control, before the iteration; NaN
            with projections, which do not know it.
        expected: the decrease expected of a full step.
        step: the step taken, 0 where none was (converged, or refused).
        regularization: the constant of the gains.
    """

    cost: list[Tensor] = field(default_factory=list)
    terminal: list[Tensor] = field(default_factory=list)
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
            descent at the largest regularisation), "stopped" (by `stop` or `callback`) or
            "iterations" (by their number).
        history: of the iterations.
    """

    states: Tensor
    controls: Tensor
    cost: Tensor
    gains: list[StepGains]
    status: list[str]
    history: History


@torch.no_grad()
def ilqr(
    problem: ControlProblem,
    x: Tensor,
    controls: Tensor | None = None,
    *,
    derivatives: Derivatives = Dense(),
    regularization: Tikhonov | float | Tensor | None = None,
    value_update: str = "full",
    hessian_rank: int | None = None,
    line_search: LineSearch | Adam | LBFGS | None = LineSearch(),
    feedback: bool = True,
    max_iterations: int = 100,
    gradient_tolerance: float = 1e-8,
    stop: Callable[[Tensor], Tensor] | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> ILQRResult:
    r"""Minimises the total cost over the controls.

    A problem is converged when no derivative of J in a control exceeds `gradient_tolerance`, or
    when the expected decrease is below the rounding of J. Its trajectory is kept from then on.

    Args:
        problem: the system and its costs.
        x: initial states, (B, ...), float32 or float64.
        controls: the initial guess, (T, B, ...); zeros of the states' shape by default.
        derivatives: dense matrices, or products only for large states
            (:class:`diffoc.lowrank.MatrixFree`), or projections.
        regularization: a :class:`Tikhonov` schedule (the default), or a fixed constant: a
            number, or one per step, (T,).
        value_update: "full", or "paper" for Eqs. 48 and 49.
        hessian_rank: truncates the terminal Hessian, see
            :func:`diffoc.riccati.terminal_value`.
        line_search: its parameters; or Adam or L-BFGS in its place; or None to take every full
            step, whatever it costs.
        feedback: whether to use the feedback gains K.
        max_iterations: at least 0.
        gradient_tolerance: not negative; zero for no such test, which saves the memory of the
            gains while those of the next iteration are computed.
        stop: maps final states to the problems that are good enough, (B,) bool.
        callback: called after each iteration with its number, the costs (B,) and the final states
            (B, ...); if it raises StopIteration, all problems are stopped there.

    Returns:
        The best trajectory and how it was found.

    Raises:
        ValueError: if an argument is wrong, or the initial trajectory is not finite.
        SingularControlHessianError: if Quu + a I of a step is not positive definite for the
            fixed constant a, or for the schedule's largest.
        DivergenceError: if Adam leads to a cost that is not finite.
    """
    if controls is None:
        controls = x.new_zeros(()).expand(problem.horizon, *x.shape)  # takes no memory
    schedule = Tikhonov() if regularization is None else regularization
    _check(problem, x, controls, schedule, value_update, max_iterations, gradient_tolerance)
    batch, T = len(x), problem.horizon
    units = line_search.units if isinstance(line_search, LBFGS) else None
    if units is not None and len(units) != T:
        raise ValueError(f"line_search has {len(units)} units, expected {T}")
    tikhonov = schedule if isinstance(schedule, Tikhonov) else None
    if tikhonov:
        a, delta = x.new_full((batch,), tikhonov.initial), x.new_ones(batch)
    else:
        fixed = torch.as_tensor(schedule, dtype=x.dtype, device=x.device).reshape(-1, 1)
        a_steps = fixed.expand(T, batch)
        a = a_steps[0]

    nominal = roll_out(problem, x, controls, derivatives)
    running, terminal = problem.parts(nominal.x, nominal.u)
    cost = running + terminal
    if cost.shape != (batch,):
        raise ValueError(f"the terminal cost has shape {tuple(cost.shape)}, expected ({batch},)")
    if not cost.isfinite().all():
        raise ValueError(
            "controls lead to a trajectory whose cost is not finite: lower them, or see whether "
            "the terminal cost is finite at all"
        )
    # The cost is a sum of squares of states, computed with relative errors of some eps.
    rounding = 16 * torch.finfo(x.dtype).eps
    history = History()
    gains: list[StepGains] = []
    status = ["iterations"] * batch
    active = torch.ones(batch, dtype=torch.bool, device=x.device)
    adam = AdamState(line_search, max_iterations) if isinstance(line_search, Adam) else None
    lbfgs = LBFGSState(line_search) if isinstance(line_search, LBFGS) else None
    rule = line_search.search if isinstance(line_search, LBFGS) else line_search
    backtracking = rule if isinstance(rule, LineSearch) else None
    best = nominal.u, cost  # Adam's costs go up and down
    expansions: list[Any] = []

    def result() -> ILQRResult:
        better = ~(cost <= best[1])  # also where the cost is not a number
        # Who was stopped is good enough where it is, though perhaps not cheapest.
        better &= torch.tensor([reason != "stopped" for reason in status], device=x.device)
        if adam and better.any():
            chosen = choose(better, best[0], nominal.u)
            found = torch.where(better, best[1], cost)
            states = problem.rollout(x, chosen)
            controls = torch.stack(chosen)  # not before: both are as large as the trajectory
        else:
            states, controls, found = nominal.states, nominal.controls, cost
        return ILQRResult(states, controls, found, gains, status, history)

    for iteration in range(max_iterations + 1):
        if stop:
            active = _retire(active, stop(nominal.x[-1]), status, "stopped")
        if not expansions and active.any() and iteration < max_iterations:
            if not gradient_tolerance:
                gains = []  # nothing can end before the next ones, and they take memory
            value = derivatives.terminal(problem, nominal.x[-1], hessian_rank)
            expansions = derivatives.expand(nominal.steps, value)
            gradients = derivatives.gradients(expansions, value)
            gradient = torch.stack([g.abs().amax(-1) for g in gradients]).amax(dim=0)
            if not lbfgs:
                gradients = []  # they take memory
        if expansions and gradient_tolerance:
            active = _retire(active, gradient <= gradient_tolerance, status, "gradient")
        if not active.any() or iteration == max_iterations:
            break

        while True:
            if tikhonov:
                a_steps = a.expand(T, batch)
            gains, _ = backward_sweep(expansions, value, a_steps, value_update)
            definite = torch.stack([g.definite for g in gains])
            failed = active & ~definite.all(dim=0)
            if not failed.any():
                break
            if not tikhonov or (a[failed] >= tikhonov.maximum).any():
                raise _singular(definite, failed, a_steps)
            a, delta = select(failed, tikhonov.grow(a, delta), (a, delta))
        if not tikhonov and not lbfgs:
            expansions = []  # only another constant or direction would need them again

        slope = torch.stack([g.slope for g in gains]).sum(dim=0)
        curvature = torch.stack([g.curvature for g in gains]).sum(dim=0)
        if lbfgs:
            if gradient.isnan().any():
                raise ValueError(
                    "line_search is LBFGS, which needs the gradient: derivatives must be Dense or "
                    "MatrixFree"
                )
            flat = torch.cat([u.flatten(1) for u in nominal.u], dim=1)
            change = lbfgs.direction(torch.cat(gradients, dim=1), flat)
            slope, curvature = (torch.cat(gradients, dim=1) * change).sum(-1), 0 * curvature
            parts = change.split([g.k.shape[1] for g in gains], dim=1)
            gains = [replace(g, k=k) for g, k in zip(gains, parts, strict=True)]
        expected = -(slope + curvature / 2)
        negligible = expected <= rounding * cost.abs()
        history.cost.append(cost)
        history.terminal.append(terminal)
        history.gradient.append(gradient)
        history.expected.append(expected)
        history.regularization.append(a_steps.amax(dim=0))

        if adam:
            changes = adam.precondition([g.k for g in gains])
            gains = [replace(g, k=k) for g, k in zip(gains, changes, strict=True)]
        accept = acceptance(backtracking, slope, curvature, cost, negligible)
        nominal, (cost, terminal), step = search_step(
            (problem, gains, derivatives, feedback),
            nominal,
            (cost, terminal),
            active,
            accept,
            backtracking,
        )
        history.step.append(step)
        moved = step > 0
        if adam:
            if not moved[active].all():
                raise DivergenceError(
                    f"the cost is not finite in iteration {iteration}: lower Adam's rate, "
                    f"{adam.rule.rate:g}, or raise regularization; the best iterate is in the "
                    "error's `result`",
                    result(),
                )
            better = cost < best[1]
            best = choose(better, nominal.u, best[0]), torch.where(better, cost, best[1])
        if moved.any():
            expansions = []
        if backtracking:
            active = _retire(active, negligible, status, "cost")
        if tikhonov:
            stuck = ~moved & (a >= tikhonov.maximum)
            if lbfgs:
                lbfgs.forget(active & ~moved)
            grown = select(active, tikhonov.grow(a, delta), (a, delta))
            a, delta = select(moved, tikhonov.shrink(a, delta), grown)
        else:
            stuck = lbfgs.forget(active & ~moved) if lbfgs else ~moved
        active = _retire(active, stuck, status, "stalled")
        if callback:
            try:
                callback(iteration, cost, nominal.x[-1])
            except StopIteration:
                active = _retire(active, active, status, "stopped")

    return result()


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
    check_tensor("x", x)
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, ...)")
    T, batch = problem.horizon, len(x)
    if T < 1:
        raise ValueError(f"horizon is {T}, expected at least 1")
    if controls.ndim < 3 or controls.shape[:2] != (T, batch):
        raise ValueError(
            f"controls has shape {tuple(controls.shape)}, expected ({T}, {batch}, ...)"
        )
    check_alike(x=x, controls=controls)
    check_tensor("controls", controls)
    if value_update not in VALUE_UPDATES:
        raise ValueError(
            f"value_update is {value_update!r}, expected one of {', '.join(VALUE_UPDATES)}"
        )
    if not isinstance(regularization, Tikhonov):
        constant = torch.as_tensor(regularization, dtype=torch.float64)
        check_tensor("regularization", constant)
        if constant.numel() not in (1, T) or not (constant >= 0).all():
            raise ValueError(f"regularization must be 1 or {T} numbers, and not negative")
    if max_iterations < 0:
        raise ValueError(f"max_iterations is {max_iterations}, expected at least 0")
    if not gradient_tolerance >= 0:
        raise ValueError(f"gradient_tolerance is {gradient_tolerance}, expected at least 0")
