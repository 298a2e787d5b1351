r"""The iterative linear quadratic regulator, Appendix B: one controller for everything.

A problem is a discrete-time system :math:`x_{i+1} = f(i, x_i, u_i)` with the cost (Eq. 10)

.. math:: J(u) = \sum_{i=0}^{T-1} \ell(i, x_i, u_i) + \ell_T(x_T) .

An iteration expands it around the nominal trajectory, sweeps backward for the gains
(:mod:`diffoc.riccati`) and forward for the new trajectory (:func:`diffoc.system.forward_sweep`).
The loop knows neither how derivatives are represented (:class:`diffoc.system.Derivatives`) nor
which rule or damping (:mod:`diffoc.rules`) is used. Each problem of a batch is searched, damped,
counted and stopped on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffoc.checks import (
    check_alike,
    check_at_least,
    check_callable,
    check_kind,
    check_size,
    check_steps,
    check_tensor,
    check_whole,
)
from diffoc.result import DivergenceError, History, Result
from diffoc.riccati import Dense, SingularControlHessianError
from diffoc.rules import Damping, Direction, LineSearch, Rule, Tikhonov
from diffoc.system import (
    ControlProblem,
    Counts,
    Derivatives,
    StepGains,
    Trajectory,
    backward_sweep,
    forward_sweep,
    roll_out,
)


@dataclass(frozen=True)
class Method:
    """How a problem is solved; see :func:`ilqr` for the meaning of its fields."""

    derivatives: Derivatives
    regularization: Damping
    rank: int | None
    rule: Rule
    iterations: int
    gradient_tolerance: float
    budget: int | None
    stop: Callable[[Tensor], Tensor] | None
    callback: Callable[[int, Tensor, Tensor], None] | None


@dataclass
class State:
    """Where a run is.

    Attributes:
        nominal: the current trajectory.
        cost: its total cost J, (B,).
        terminal: the terminal cost's part of J, (B,).
        a: Tikhonov's constants, (T, B).
        delta: the factor of their next change, (B,).
        memory: what the rule remembers.
        best: the cheapest iterate's controls and cost, for a rule that keeps it.
        active: the problems that go on, (B,) bool.
        status: why each of the others ended.
        gradient: the largest absolute derivative of J in a control, (B,).
        work: what each problem has spent so far, by the names of :class:`diffoc.system.Counts`.
        value: the value function at the final states.
        expansions: the expansions of the trajectory's steps; none where they are not known, or not
            needed any more.
        gradients: the derivatives of J in the controls of every step, (B, m) each.
        gains: the gains of the last backward sweep.
    """

    nominal: Trajectory
    cost: Tensor
    terminal: Tensor
    a: Tensor
    delta: Tensor
    memory: Any
    best: tuple[list[Tensor], Tensor]
    active: Tensor
    status: list[str]
    gradient: Tensor
    work: dict[str, Tensor] = field(default_factory=dict)
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

    def charge(self, derivatives: Derivatives, who: Tensor) -> None:
        """Adds the work since the last charge to the account of the problems that asked for it."""
        for kind, count in vars(derivatives.counts).items():
            self.work[kind] = self.work.get(kind, 0) + who * count
            setattr(derivatives.counts, kind, 0)

    def damp(self, who: Tensor, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        a, delta = change(self.a, self.delta)
        self.a, self.delta = torch.where(who, a, self.a), torch.where(who, delta, self.delta)


@torch.no_grad()
def ilqr(
    problem: ControlProblem,
    x: Tensor,
    controls: Tensor | None = None,
    *,
    derivatives: Derivatives = Dense(),
    regularization: Damping | float | Tensor = Tikhonov(),
    rank: int | None = None,
    rule: Rule = LineSearch(),
    iterations: int = 100,
    gradient_tolerance: float = 1e-8,
    budget: int | None = None,
    stop: Callable[[Tensor], Tensor] | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Result:
    """Minimises the total cost J over the controls.

    A problem is converged when no derivative of J in a control exceeds `gradient_tolerance`, or
    when the expected decrease is below the rounding of J. Its trajectory is kept from then on.

    >>> problem = ControlProblem(process.step, ControlCost(1.0), likelihood, process.horizon)
    >>> result = ilqr(problem, x)

    Args:
        x: initial states, (B, ...), float32 or float64.
        controls: the initial guess, (T, B, ...); zeros of the states' shape by default.
        derivatives: how derivatives are represented: by dense matrices, by products only for large
            states (:class:`diffoc.lowrank.MatrixFree`), or by projections.
        regularization: a :class:`diffoc.rules.Tikhonov` schedule, or a constant: a number, or
            one per step, (T,).
        rank: the rank to which the terminal Hessian is truncated, see
            :func:`diffoc.riccati.terminal_value`; None keeps all of it.
        rule: a line search, Adam, L-BFGS, or :class:`diffoc.rules.FullStep`.
        iterations: the largest number of iterations, at least 0.
        gradient_tolerance: the bound above, at least 0; without that test, for zero, the gains take
            no memory while those of the next iteration are computed.
        budget: the largest number of evaluations of the dynamics by each problem, None for no
            limit. A problem ends before the iteration, or the further trial, that would exceed it.
        stop: a function of the final states that returns which problems are good enough, (B,) bool.
        callback: a function that is called after each iteration with its number, copies of the
            costs (B,) and of the final states (B, ...); if it raises StopIteration, all problems
            are stopped there.

    Raises:
        ValueError: if an argument is wrong, or the initial trajectory is not finite.
        SingularControlHessianError: if Quu + a I of a step is not positive definite for the
            constant a, or for the schedule's largest.
        DivergenceError: if a rule without a line search leads to a cost that is not finite.
    """
    check_kind(ControlProblem, problem=problem)
    check_steps(horizon=problem.horizon)
    check_tensor("x", x)
    check_kind(Derivatives, derivatives=derivatives)
    if controls is None:
        controls = x.new_zeros(()).expand(problem.horizon, *x.shape)  # takes no memory
    if not isinstance(regularization, Damping):
        regularization = Damping(regularization)
    counted = replace(derivatives, counts=Counts())
    method = Method(
        counted, regularization, rank, rule, iterations, gradient_tolerance, budget, stop, callback
    )
    _check(problem, x, controls, method)
    # What was made in torch.inference_mode can have no derivatives.
    x, controls = (z.clone() if z.is_inference() else z for z in (x, controls))
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
    """Returns the state of a run before its first iteration."""
    memory = method.rule.start(problem.horizon)
    a, delta = method.regularization.start(problem.horizon, x)
    nominal = roll_out(problem, x, controls, method.derivatives)
    running, terminal = problem.parts(nominal.x, nominal.u)
    cost = running + terminal
    if not cost.isfinite().all():
        raise ValueError(
            "controls lead to a trajectory whose cost is not finite: lower them, or see whether "
            "the terminal cost is finite at all"
        )
    active = torch.ones(len(x), dtype=torch.bool, device=x.device)
    best, status = (nominal.u, cost), ["iterations"] * len(x)
    unknown = torch.full_like(cost, torch.nan)
    state = State(nominal, cost, terminal, a, delta, memory, best, active, status, unknown)
    state.charge(method.derivatives, active)
    return state


def terminate(state: State, method: Method) -> bool:
    """Ends the problems that are good enough or out of budget; true if none goes on."""
    if method.stop:
        enough, active = method.stop(state.nominal.x[-1].clone()), state.active
        check_size(active.shape, **{"what stop returns": enough})
        if (enough.dtype, enough.device) != (active.dtype, active.device):
            raise ValueError(
                f"what stop returns is {enough.dtype} on {enough.device}, expected {active.dtype} "
                f"on {active.device}"
            )
        state.retire(enough, "stopped")
    state.retire(~_affordable(state, method), "budget")
    return not state.active.any()


def _affordable(state: State, method: Method) -> Tensor:
    """Returns which problems may evaluate T steps once more, (B,) bool."""
    if method.budget is None:
        return torch.ones_like(state.active)
    return state.work["evaluations"] + len(state.nominal.u) <= method.budget


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
    state.charge(derivatives, state.active)


def converged(state: State, method: Method) -> bool:
    """Ends the problems without a gradient; true if none goes on."""
    if method.gradient_tolerance > 0:
        state.retire(state.gradient <= method.gradient_tolerance, "gradient")
    return not state.active.any()


def step(problem: ControlProblem, state: State, method: Method, iteration: int) -> None:
    """Takes one iteration: gains, a direction, its trials, and what they teach."""
    rule, damping = method.rule, method.regularization
    # The sweep's own direction has no name: where the rule makes another, it is let go of.
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
    expected = direction.decrease(1)
    negligible = expected <= rounding * state.cost.abs()
    row = (state.cost, state.terminal, state.gradient, expected, state.a.amax(dim=0))
    taken = _search(problem, state, method, direction, negligible)
    for column, entry in zip(vars(state.history).values(), (*row, taken), strict=True):
        column.append(entry)
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
    refused = state.active & ~moved & _affordable(state, method)
    hopeless = rule.retry(state.memory, refused) & damping.exhausted(state.a)
    state.damp(state.active & moved, damping.shrink)
    state.damp(refused, damping.grow)
    state.retire(hopeless, "stalled")
    if method.callback:
        try:
            method.callback(iteration, state.cost.clone(), state.nominal.x[-1].clone())
        except StopIteration:
            state.retire(state.active, "stopped")


def result(problem: ControlProblem, state: State, method: Method) -> Result:
    """Returns what a run ends with: the last iterate, or the cheapest one if the rule keeps it."""
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
    return Result(states, controls, cost, state.gains, state.status, state.history, **state.work)


def choose(mask: Tensor, yes: list[Tensor], no: list[Tensor]) -> list[Tensor]:
    """Chooses by problem, of tensors (B, ...) for every step."""
    if mask.all():
        return yes  # without a copy
    mask = mask.reshape(-1, *[1] * (yes[0].ndim - 1))
    return [torch.where(mask, *pair) for pair in zip(yes, no, strict=True)]


def _sweep(state: State, method: Method) -> Direction:
    """Returns the gains' full step, with constants that make Quu + a I positive definite."""
    damping = method.regularization
    while True:
        state.gains, _ = backward_sweep(state.expansions, state.value, state.a)
        definite = torch.stack([g.definite for g in state.gains])
        failed = state.active & ~definite.all(dim=0)
        if not failed.any():
            break
        if (failed & damping.exhausted(state.a)).any():
            b = int(failed.nonzero()[0])
            i = int((~definite[:, b]).nonzero()[-1])
            raise SingularControlHessianError(
                f"Quu is not positive definite at step {i} of problem {b} with the regularization "
                f"{state.a[i, b]:g}: raise regularization, or add a control cost"
            )
        state.damp(failed, damping.grow)
    return Direction(
        [g.k for g in state.gains],
        torch.stack([g.slope for g in state.gains]).sum(dim=0),
        torch.stack([g.curvature for g in state.gains]).sum(dim=0),
    )


def _search(
    problem: ControlProblem, state: State, method: Method, direction: Direction, negligible: Tensor
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
        if trial < 1:
            waiting &= _affordable(state, method)
        if not waiting.any():
            break
        size = torch.where(waiting, trial, taken)
        new = nominal  # lets go of the last trial's activations
        new = forward_sweep(problem, nominal, state.gains, size, method.derivatives)
        state.charge(method.derivatives, waiting)
        running, terminal = problem.parts(new.x, new.u)
        cost = running + terminal
        accepted = rule.accept(state.cost - cost, direction.decrease(trial), negligible)
        taken = torch.where(waiting & accepted, size, taken)
        trial *= rule.contraction
    moved = taken > 0
    if not moved.any():
        return taken
    if (refused := (size > 0) & ~moved).any():
        # Their last trial is in the new trajectory: roll out once more, without them, which no
        # problem alone would have to pay for.
        controls = choose(refused, nominal.u, new.u)
        new = nominal
        new = roll_out(problem, nominal.x[0], controls, method.derivatives)
        state.charge(method.derivatives, torch.zeros_like(refused))
    state.nominal = new
    state.cost = torch.where(moved, cost, state.cost)
    state.terminal = torch.where(moved, terminal, state.terminal)
    return taken


def _check(problem: ControlProblem, x: Tensor, controls: Tensor, method: Method) -> None:
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, ...)")
    T, batch = problem.horizon, len(x)
    check_kind(Tensor, controls=controls)
    if controls.ndim < 3 or controls.shape[:2] != (T, batch):
        raise ValueError(
            f"controls has shape {tuple(controls.shape)}, expected ({T}, {batch}, ...)"
        )
    check_alike(x=x, controls=controls)
    check_tensor("controls", controls)
    check_kind(Rule, rule=method.rule)
    check_whole(0, iterations=method.iterations, rank=method.rank)
    check_whole(1, budget=method.budget)
    check_at_least(0, gradient_tolerance=method.gradient_tolerance)
    check_callable(stop=method.stop, callback=method.callback)
