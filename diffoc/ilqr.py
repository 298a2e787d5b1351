r"""The iterative linear quadratic regulator, Appendix B: one controller for everything.

A problem is a discrete-time system :math:`x_{i+1} = f(i, x_i, u_i)` with the cost (Eq. 10)

.. math:: J(u) = \sum_{i=0}^{T-1} \ell(i, x_i, u_i) + \ell_T(x_T) .

An iteration expands it around the nominal trajectory, sweeps backward for the gains
(:mod:`diffoc.riccati`) and forward for the new trajectory (Eqs. 15 and 16)

.. math:: u_i^* = u_i + \epsilon k_i + K_i (x_i^* - x_i) , \quad x_{i+1}^* = f(i, x_i^*, u_i^*) .

The loop knows neither how derivatives are represented, as dense matrices
(:class:`diffoc.riccati.Dense`), by products only (:class:`diffoc.lowrank.MatrixFree`) or by the
paper's projections (:class:`diffoc.theory.projected.Projected`), nor which rule
(:mod:`diffoc.rules`) or damping (:mod:`diffoc.damping`) is used. Each problem of a batch is
searched, damped, counted and stopped on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffoc.checks import check_alike, check_tensor
from diffoc.damping import Constant, Damping, Tikhonov
from diffoc.result import DivergenceError, History, Result
from diffoc.riccati import VALUE_UPDATES, Dense, SingularControlHessianError
from diffoc.rules import Direction, LineSearch, Rule
from diffoc.system import (
    ControlProblem,
    Derivatives,
    StepGains,
    Trajectory,
    backward_sweep,
    forward_sweep,
    roll_out,
)

SCHEDULE = Tikhonov()


@dataclass(frozen=True)
class Method:
    """How a problem is solved; see :func:`ilqr` for the meaning of its fields."""

    derivatives: Derivatives
    regularization: Damping
    value_update: str
    rank: int | None
    rule: Rule
    feedback: bool
    iterations: int
    gradient_tolerance: float
    budget: int | None
    stop: Callable[[Tensor], Tensor] | None
    callback: Callable[[int, Tensor, Tensor], None] | None


@dataclass
class State:
    """Where a run is.

    Attributes:
        nominal: the trajectory.
        cost, terminal: its total cost and the terminal cost's part, (B,).
        a, delta: Tikhonov's constants, (T, B), and the factor of their next change, (B,).
        memory: of the rule.
        work: done so far, of each kind, by problem, (B,) int64.
        active: the problems that go on, (B,) bool.
        status: see :class:`Result`.
        best: the cheapest iterate's controls and cost, for a rule that keeps it.
        value, expansions: of the trajectory; the second is empty where it is not known, or not
            needed any more.
        gradients: of the total cost in the controls of every step, (B, m) each.
        gradient: the largest absolute number of those, (B,).
        gains: of the last backward sweep.
        history: of the iterations.
    """

    nominal: Trajectory
    cost: Tensor
    terminal: Tensor
    a: Tensor
    delta: Tensor
    memory: Any
    work: dict[str, Tensor]
    active: Tensor
    status: list[str]
    best: tuple[list[Tensor], Tensor]
    gradient: Tensor
    value: Any = None
    expansions: list[Any] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    gains: list[StepGains] = field(default_factory=list)
    history: History = field(default_factory=History)

    def retire(self, done: Tensor, reason: str) -> None:
        """Ends the active problems that are `done`, (B,) bool, and writes down why."""
        for b in (self.active & done).nonzero().flatten().tolist():
            self.status[b] = reason
        self.active = self.active & ~done


@torch.no_grad()
def ilqr(
    problem: ControlProblem,
    x: Tensor,
    controls: Tensor | None = None,
    *,
    derivatives: Derivatives = Dense(),
    regularization: Damping | float | Tensor = SCHEDULE,
    value_update: str = "full",
    rank: int | None = None,
    rule: Rule = LineSearch(),
    feedback: bool = True,
    iterations: int = 100,
    gradient_tolerance: float = 1e-8,
    budget: int | None = None,
    stop: Callable[[Tensor], Tensor] | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Result:
    r"""Minimises the total cost over the controls.

    A problem is converged when no derivative of J in a control exceeds `gradient_tolerance`, or
    when the expected decrease is below the rounding of J. Its trajectory is kept from then on.

    Args:
        problem: the system and its costs.
        x: initial states, (B, ...), float32 or float64.
        controls: the initial guess, (T, B, ...); zeros of the states' shape by default.
        derivatives: dense matrices, or products only for large states
            (:class:`diffoc.lowrank.MatrixFree`), or projections.
        regularization: a :class:`diffoc.damping.Tikhonov` schedule, or a constant: a number, or
            one per step, (T,).
        value_update: "full", or "paper" for Eqs. 48 and 49.
        rank: truncates the terminal Hessian, see :func:`diffoc.riccati.terminal_value`.
        rule: a line search, Adam, L-BFGS, or :class:`diffoc.rules.FullStep`.
        feedback: whether to use the feedback gains K.
        iterations: at most so many, at least 0.
        gradient_tolerance: not negative; zero for no such test, which saves the memory of the
            gains while those of the next iteration are computed.
        budget: of evaluations of the dynamics by each problem: a problem ends before an iteration
            that would exceed it if its first trial is accepted. None for no limit.
        stop: maps final states to the problems that are good enough, (B,) bool.
        callback: called after each iteration with its number, copies of the costs (B,) and of the
            final states (B, ...); if it raises StopIteration, all problems are stopped there.

    Returns:
        The best trajectory and how it was found.

    Raises:
        ValueError: if an argument is wrong, or the initial trajectory is not finite.
        SingularControlHessianError: if Quu + a I of a step is not positive definite for the
            constant a, or for the schedule's largest.
        DivergenceError: if a rule without a line search leads to a cost that is not finite.
    """
    if controls is None:
        controls = x.new_zeros(()).expand(problem.horizon, *x.shape)  # takes no memory
    if not isinstance(regularization, Damping):
        regularization = Constant(regularization)
    method = Method(
        derivatives.fresh(),
        regularization,
        value_update,
        rank,
        rule,
        feedback,
        iterations,
        gradient_tolerance,
        budget,
        stop,
        callback,
    )
    _check(problem, x, controls, method)
    state = init(problem, x, controls, method)
    for iteration in range(iterations):
        if terminate(state, method):
            break
        expand(problem, state, method)
        if converged(state, method):
            break
        step(problem, state, method, iteration)
    terminate(state, method)
    return result(problem, state, method)


def init(problem: ControlProblem, x: Tensor, controls: Tensor, method: Method) -> State:
    """The state of a run before its first iteration."""
    batch, T = len(x), problem.horizon
    memory = method.rule.start(T, method.iterations)
    a, delta = method.regularization.start(T, x)
    nominal = roll_out(problem, x, controls, method.derivatives)
    running, terminal = problem.parts(nominal.x, nominal.u)
    cost = running + terminal
    if terminal.shape != (batch,):
        raise ValueError(
            f"the terminal cost has shape {tuple(terminal.shape)}, expected ({batch},)"
        )
    if not cost.isfinite().all():
        raise ValueError(
            "controls lead to a trajectory whose cost is not finite: lower them, or see whether "
            "the terminal cost is finite at all"
        )
    none = torch.zeros(batch, dtype=torch.int64, device=x.device)
    state = State(
        nominal,
        cost,
        terminal,
        a,
        delta,
        memory,
        dict.fromkeys(("evaluations", "products", "tangents"), none),
        torch.ones(batch, dtype=torch.bool, device=x.device),
        ["iterations"] * batch,
        (nominal.u, cost),
        torch.full_like(cost, torch.nan),
    )
    _charge(state, method, state.active)
    return state


def terminate(state: State, method: Method) -> bool:
    """Ends the problems that are good enough or out of budget; true if none goes on."""
    if method.stop:
        state.retire(method.stop(state.nominal.x[-1]), "stopped")
    if method.budget is not None:
        state.retire(state.work["evaluations"] + len(state.nominal.u) > method.budget, "budget")
    return not state.active.any()


def expand(problem: ControlProblem, state: State, method: Method) -> None:
    """Takes the derivatives of the trajectory, unless it has not changed since they were taken."""
    if state.expansions:
        return
    if not method.gradient_tolerance:
        state.gains = []  # nothing can end before the next ones, and they take memory
    derivatives = method.derivatives
    state.value = derivatives.terminal(problem, state.nominal.x[-1], method.rank)
    state.expansions = derivatives.expand(state.nominal.steps, state.value)
    state.gradients = derivatives.gradients(state.expansions, state.value)
    state.gradient = torch.stack([g.abs().amax(-1) for g in state.gradients]).amax(dim=0)
    if not method.rule.adapts:
        state.gradients = []  # they take memory
    _charge(state, method, state.active)


def converged(state: State, method: Method) -> bool:
    """Ends the problems without a gradient; true if none goes on."""
    if method.gradient_tolerance > 0:
        state.retire(state.gradient <= method.gradient_tolerance, "gradient")
    return not state.active.any()


def step(problem: ControlProblem, state: State, method: Method, iteration: int) -> None:
    """One iteration: gains, a direction, its trials, and what they teach."""
    rule, damping = method.rule, method.regularization
    direction = rule.direction(
        state.memory, _sweep(state, method), state.gradients, state.nominal.u
    )
    if not (damping.adapts or rule.adapts):
        # Only another constant or direction would need them again, and they take memory.
        state.expansions, state.gradients = [], []
    pairs = zip(state.gains, direction.change, strict=True)
    state.gains = [replace(gains, k=k) for gains, k in pairs]
    # The cost is a sum of squares of states, computed with relative errors of some eps.
    rounding = 16 * torch.finfo(state.cost.dtype).eps
    negligible = direction.decrease(1) <= rounding * state.cost.abs()
    _record(state, direction)

    taken = _search(problem, state, method, direction, negligible)
    state.history.step.append(taken)
    moved = taken > 0
    if moved.any():
        state.expansions = []
    if not rule.searches and not moved[state.active].all():
        raise DivergenceError(
            f"the cost is not finite in iteration {iteration}: take smaller steps (rule is "
            f"{rule}), or raise regularization; the best iterate is in the error's `result`",
            result(problem, state, method),
        )
    if rule.keeps_best:
        better = state.cost < state.best[1]
        best = torch.where(better, state.cost, state.best[1])
        state.best = choose(better, state.nominal.u, state.best[0]), best
    if rule.searches:
        state.retire(negligible, "cost")
    refused = state.active & ~moved
    hopeless = rule.retry(state.memory, refused) & damping.exhausted(state.a)
    _damp(state, state.active & moved, damping.shrink)
    _damp(state, refused, damping.grow)
    state.retire(hopeless, "stalled")
    if method.callback:
        try:
            method.callback(iteration, state.cost.clone(), state.nominal.x[-1].clone())
        except StopIteration:
            state.retire(state.active, "stopped")


def result(problem: ControlProblem, state: State, method: Method) -> Result:
    """What a run has found: the last iterate, or the cheapest one if the rule keeps that."""
    nominal, cost = state.nominal, state.cost
    better = ~(cost <= state.best[1])  # also where the cost is not a number
    # Who was stopped is good enough where it is, though perhaps not cheapest.
    better &= torch.tensor([reason != "stopped" for reason in state.status], device=cost.device)
    if method.rule.keeps_best and better.any():
        chosen = choose(better, state.best[0], nominal.u)
        cost = torch.where(better, state.best[1], cost)
        states = problem.rollout(nominal.x[0], chosen)
        controls = torch.stack(chosen)  # not before: both are as large as the trajectory
    else:
        states, controls = nominal.states, nominal.controls
    return Result(
        states,
        controls,
        cost,
        state.gains,
        state.status,
        state.history,
        **state.work,
    )


def choose(mask: Tensor, yes: list[Tensor], no: list[Tensor]) -> list[Tensor]:
    """Chooses by problem, of tensors (B, ...) for every step."""
    if mask.all():
        return yes  # without a copy
    mask = mask.reshape(-1, *[1] * (yes[0].ndim - 1))
    return [torch.where(mask, *pair) for pair in zip(yes, no, strict=True)]


def _sweep(state: State, method: Method) -> Direction:
    """The gains, with constants that make Quu + a I positive definite, and their full step."""
    damping = method.regularization
    while True:
        state.gains, _ = backward_sweep(state.expansions, state.value, state.a, method.value_update)
        definite = torch.stack([g.definite for g in state.gains])
        failed = state.active & ~definite.all(dim=0)
        if not failed.any():
            break
        if (failed & damping.exhausted(state.a)).any():
            raise _singular(definite, failed, state.a)
        _damp(state, failed, damping.grow)
    return Direction(
        [g.k for g in state.gains],
        torch.stack([g.slope for g in state.gains]).sum(dim=0),
        torch.stack([g.curvature for g in state.gains]).sum(dim=0),
    )


def _search(
    problem: ControlProblem,
    state: State,
    method: Method,
    direction: Direction,
    negligible: Tensor,
) -> Tensor:
    """Tries smaller and smaller steps until every active problem has accepted one.

    A problem that has accepted repeats its own step in the trials of the others, and one that is
    not active stays where it is, so that the last forward sweep holds everybody's trajectory.
    Returns the steps taken, (B,), zero for those who refused all.
    """
    rule, nominal = method.rule, state.nominal
    taken, trial = torch.zeros_like(state.cost), 1.0
    for _ in range(rule.trials):
        waiting = state.active & (taken == 0)
        if not waiting.any():
            break
        size = torch.where(waiting, trial, taken)
        new = nominal  # lets go of the last trial's activations
        new = forward_sweep(
            problem, nominal, state.gains, size, method.derivatives, method.feedback
        )
        _charge(state, method, waiting)
        running, terminal = problem.parts(new.x, new.u)
        cost = running + terminal
        accepted = rule.accept(state.cost - cost, direction.decrease(trial), negligible)
        taken = torch.where(waiting & accepted, size, taken)
        trial *= rule.contraction
    moved = taken > 0
    if not moved.any():
        return taken
    if (refused := (size > 0) & ~moved).any():
        # Their last trial is in the new trajectory: roll out once more, without them.
        controls = choose(refused, nominal.u, new.u)
        new = nominal
        new = roll_out(problem, nominal.x[0], controls, method.derivatives)
        _charge(state, method, refused)
    state.nominal = new
    state.cost = torch.where(moved, cost, state.cost)
    state.terminal = torch.where(moved, terminal, state.terminal)
    return taken


def _charge(state: State, method: Method, who: Tensor) -> None:
    """Adds the work since the last charge to the account of the problems that asked for it."""
    counts = method.derivatives.counts
    state.work = {kind: before + who * getattr(counts, kind) for kind, before in state.work.items()}
    counts.evaluations = counts.products = counts.tangents = 0


def _damp(
    state: State, who: Tensor, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    """Lets some problems' constants grow or shrink."""
    a, delta = change(state.a, state.delta)
    state.a, state.delta = torch.where(who, a, state.a), torch.where(who, delta, state.delta)


def _record(state: State, direction: Direction) -> None:
    """Adds a row to the history, but for the step."""
    history = state.history
    history.cost.append(state.cost)
    history.terminal.append(state.terminal)
    history.gradient.append(state.gradient)
    history.expected.append(direction.decrease(1))
    history.regularization.append(state.a.amax(dim=0))


def _singular(definite: Tensor, failed: Tensor, a: Tensor) -> SingularControlHessianError:
    problem = int(failed.nonzero()[0])
    step = int((~definite[:, problem]).nonzero()[-1])
    return SingularControlHessianError(
        f"Quu is not positive definite at step {step} of problem {problem} with the "
        f"regularization {a[step, problem]:g}: raise regularization, or add a control cost"
    )


def _check(problem: ControlProblem, x: Tensor, controls: Tensor, method: Method) -> None:
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
    if method.value_update not in VALUE_UPDATES:
        raise ValueError(
            f"value_update is {method.value_update!r}, expected one of {', '.join(VALUE_UPDATES)}"
        )
    if not isinstance(method.rule, Rule):
        raise ValueError(
            f"rule is {method.rule!r}, expected such as LineSearch(), Adam(), LBFGS() or FullStep()"
        )
    if method.iterations < 0:
        raise ValueError(f"iterations is {method.iterations}, expected at least 0")
    if not method.gradient_tolerance >= 0:
        raise ValueError(f"gradient_tolerance is {method.gradient_tolerance}, expected at least 0")
