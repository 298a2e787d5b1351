r"""A controlled system, its trajectories, and the two sweeps of an iteration of iLQR.

The backward sweep turns expansions into gains, the forward sweep gains into a new trajectory,
Eqs. 15 and 16. Neither knows how derivatives are represented: :class:`diffoc.riccati.Dense` has
matrices, :class:`diffoc.lowrank.MatrixFree` products only, and
:class:`diffoc.theory.projected.Projected` the paper's projections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from diffoc.checks import check_kind, check_size

StepFunction = Callable[[int, Tensor, Tensor], Tensor]
"""A differentiable function of a step's number i, of states x and of controls u, (B, ...) each."""


@dataclass(frozen=True)
class ControlProblem:
    """A controlled system with costs; every callable is batched and differentiable.

    Attributes:
        dynamics: the function of (i, x, u) that returns the next states.
        running_cost: the function of (i, x, u) that returns costs (B,); it need not depend on x.
        terminal_cost: the function of final states that returns costs (B,).
        horizon: the number T of steps.
    """

    dynamics: StepFunction
    running_cost: StepFunction
    terminal_cost: Callable[[Tensor], Tensor]
    horizon: int

    def rollout(self, x: Tensor, controls: Sequence[Tensor] | Tensor) -> Tensor:
        """Returns the states (T + 1, B, ...) from x (B, ...) under controls (T, B, ...)."""
        states = [x]
        for i in range(self.horizon):
            states.append(self.dynamics(i, states[-1], controls[i]))
        return torch.stack(states)

    def cost(
        self, states: Sequence[Tensor] | Tensor, controls: Sequence[Tensor] | Tensor
    ) -> Tensor:
        """Returns the total cost J (B,), Eq. 10, of states (T + 1, B, ...) and controls."""
        running, terminal = self.parts(states, controls)
        return running + terminal

    def parts(
        self, states: Sequence[Tensor] | Tensor, controls: Sequence[Tensor] | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the running costs' sum and the terminal cost, (B,) each."""
        terminal = _costs("terminal cost", self.terminal_cost(states[-1]), states[-1])
        running = (
            _costs("running cost", self.running_cost(i, states[i], controls[i]), states[i])
            for i in range(self.horizon)
        )
        return sum(running, torch.zeros_like(terminal)), terminal


def _costs(name: str, costs: Tensor, x: Tensor) -> Tensor:
    """Returns costs, once there is one for each state, of its precision."""
    check_kind(Tensor, **{f"the {name}": costs})
    if costs.shape != (len(x),) or costs.dtype != x.dtype:
        raise ValueError(
            f"the {name} is {costs.dtype} of shape {tuple(costs.shape)}, expected {x.dtype} of "
            f"shape ({len(x)},)"
        )
    return costs


@dataclass
class Counts:
    """The work done by a batch, in units of one problem.

    These are evaluations of the dynamics, their vector-Jacobian products, and, as tangents, their
    Jacobian-vector products, which only :class:`diffoc.theory.projected.Projected` takes.
    """

    evaluations: int = 0
    products: int = 0
    tangents: int = 0


@dataclass(frozen=True)
class StepGains:
    r"""The locally optimal control of one step, :math:`\delta u = \epsilon k + K \delta x`.

    Attributes:
        k: the feedforward gain, (B, m).
        slope: :math:`k^T Q_u`, (B,), the factor of :math:`\epsilon` in the change of the cost that
            is expected of this step.
        curvature: :math:`k^T Q_{uu} k`, (B,), the factor of :math:`\epsilon^2 / 2` in it.
        definite: whether Quu + a I was positive definite, (B,) bool; where it was not, k and K
            are zero.
    """

    k: Tensor
    slope: Tensor
    curvature: Tensor
    definite: Tensor

    def feedback(self, dx: Tensor) -> Tensor:
        """Returns K dx for flat deviations dx, (B, n)."""
        raise NotImplementedError


class Value(Protocol):
    """The value function at one state, such as :class:`diffoc.riccati.DenseValue`."""

    def step_back(self, e: Any, a: Tensor, update: str) -> tuple[StepGains, Value]:
        """Returns the gains of a step with the expansion `e`, and the value at its state."""


@dataclass(frozen=True, kw_only=True)
class Derivatives:
    """How derivatives are represented; the counts are those of the work done with this object.

    The controller only passes on what the methods return: steps, expansions and values.
    """

    counts: Counts = field(default_factory=Counts)

    def step(
        self, problem: ControlProblem, i: int, x: Tensor, u: Tensor
    ) -> tuple[Tensor, Callable[..., Any]]:
        """Returns the next states, and a function that expands this step, for `expand` to call."""
        raise NotImplementedError

    def terminal(self, problem: ControlProblem, x: Tensor, rank: int | None) -> Any:
        """Returns the :class:`Value` at the final states, its Hessian truncated to a rank."""
        raise NotImplementedError

    def expand(self, steps: list[Callable[..., Any]], value: Any) -> list[Any]:
        """Returns the trajectory's expansions from its steps and the value at its end."""
        return [step() for step in steps]

    def gradients(self, expansions: list[Any], value: Any) -> list[Tensor]:
        """Returns the derivatives of the total cost in the controls of every step, (B, m) each."""
        raise NotImplementedError


@dataclass(frozen=True)
class Trajectory:
    """A trajectory and how to expand each of its steps.

    Attributes:
        x: the T + 1 states (B, ...): a list, because to stack them takes their memory twice.
        u: the T controls (B, ...).
        steps: T functions, each of which returns the expansion of a step; where only products are
            taken, it can be called once.
    """

    x: list[Tensor]
    u: list[Tensor]
    steps: list[Callable[..., Any]]

    @property
    def states(self) -> Tensor:
        """Returns a copy of the states, (T + 1, B, ...)."""
        return torch.stack(self.x)

    @property
    def controls(self) -> Tensor:
        """Returns a copy of the controls, (T, B, ...)."""
        return torch.stack(self.u)

    def advance(self, problem: ControlProblem, u: Tensor, derivatives: Derivatives) -> None:
        """Appends the control `u` and the state that it leads to."""
        x = self.x[-1]
        y, step = derivatives.step(problem, len(self.u), x, u)
        check_size(x.shape, **{"what the dynamics make": y})
        if y.dtype != x.dtype:
            raise ValueError(f"what the dynamics make is {y.dtype}, but x is {x.dtype}")
        self.u.append(u)
        self.x.append(y)
        self.steps.append(step)


def backward_sweep(
    expansions: Sequence[Any], value: Value, a: Tensor, update: str = "full"
) -> tuple[list[StepGains], Value]:
    """Returns the gains of all steps and the value at the initial state.

    `value` is the one at the final state, `a` has Tikhonov's constants, (T, B), and `update` is as
    for :meth:`diffoc.riccati.DenseValue.step_back`.
    """
    gains: list[StepGains] = []
    for e, a_i in zip(reversed(expansions), a.flip(0), strict=True):
        step_gains, value = value.step_back(e, a_i, update)
        gains.append(step_gains)
    return gains[::-1], value


def forward_sweep(
    problem: ControlProblem,
    nominal: Trajectory,
    gains: Sequence[StepGains],
    step: Tensor,
    derivatives: Derivatives,
) -> Trajectory:
    r"""Returns the trajectory under the new controls, Eqs. 15 and 16.

    .. math:: u_i^* = u_i + \epsilon k_i + K_i (x_i^* - x_i) , \quad x_{i+1}^* = f(i, x_i^*, u_i^*)

    The gains belong to the `nominal` trajectory; each problem has a step of its own, (B,).
    """
    new = Trajectory([nominal.x[0]], [], [])
    for i, (u, g) in enumerate(zip(nominal.u, gains, strict=True)):
        du = step[:, None] * g.k + g.feedback((new.x[i] - nominal.x[i]).flatten(1))
        new.advance(problem, u + du.reshape(u.shape), derivatives)
    return new


def roll_out(
    problem: ControlProblem,
    x: Tensor,
    controls: Sequence[Tensor] | Tensor,
    derivatives: Derivatives,
) -> Trajectory:
    """Returns the trajectory from x (B, ...) under controls (T, B, ...)."""
    new = Trajectory([x], [], [])
    for u in controls:
        new.advance(problem, u, derivatives)
    return new
