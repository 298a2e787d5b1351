r"""A controlled system, its trajectories, and the two sweeps of an iteration of iLQR.

The backward sweep turns expansions into gains, the forward sweep gains into a new trajectory,
Eqs. 15 and 16. :mod:`diffoc.ilqr` decides what to do with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffoc.lowrank import LowRankGains
from diffoc.riccati import Counts, Gains, System

StepGains = Gains | LowRankGains
"""The locally optimal control of one step."""


class Value(Protocol):
    """The value function at one state, such as :class:`diffoc.riccati.DenseValue`."""

    def step_back(self, e: Any, a: Tensor, update: str) -> tuple[StepGains, Value]:
        """One Riccati step; `e` is an expansion that belongs to it."""


class Derivatives(Protocol):
    """How derivatives are represented: what the controller asks of :class:`diffoc.riccati.Dense`,
    :class:`diffoc.lowrank.MatrixFree` and :class:`diffoc.theory.projected.Projected`.

    It only passes on what they return, steps, expansions and values, each to the one it is from.
    """

    @property
    def counts(self) -> Counts:
        """Of the work done with this object."""

    def fresh(self) -> Derivatives:
        """The same, with counts of its own that begin at zero."""

    def step(
        self, problem: System, i: int, x: Tensor, u: Tensor
    ) -> tuple[Tensor, Callable[[], Any]]:
        """The next states, and what expands this step."""

    def terminal(self, problem: System, x: Tensor, rank: int | None) -> Any:
        """The :class:`Value` at the final states."""

    def expand(self, steps: list[Any], value: Any) -> list[Any]:
        """The trajectory's expansion, from its steps'."""

    def gradients(self, expansions: list[Any], value: Any) -> list[Tensor]:
        """The derivatives of the total cost in the controls of every step, (B, m) each."""


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

    def rollout(self, x: Tensor, controls: Sequence[Tensor] | Tensor) -> Tensor:
        """The states (T + 1, B, ...) from x (B, ...) under controls (T, B, ...)."""
        states = [x]
        for i in range(self.horizon):
            states.append(self.dynamics(i, states[-1], controls[i]))
        return torch.stack(states)

    def cost(
        self, states: Sequence[Tensor] | Tensor, controls: Sequence[Tensor] | Tensor
    ) -> Tensor:
        """The total cost J, Eq. 10, (B,), of states (T + 1, B, ...) and controls (T, B, ...)."""
        running, terminal = self.parts(states, controls)
        return running + terminal

    def parts(
        self, states: Sequence[Tensor] | Tensor, controls: Sequence[Tensor] | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The running costs' sum and the terminal cost, (B,) each."""
        terminal = self.terminal_cost(states[-1])
        running = (self.running_cost(i, states[i], controls[i]) for i in range(self.horizon))
        return sum(running, torch.zeros_like(terminal)), terminal


@dataclass(frozen=True)
class Trajectory:
    """A trajectory and how to expand each of its steps.

    Attributes:
        x: the T + 1 states (B, ...): a list, because to stack them takes their memory twice.
        u: the T controls (B, ...).
        steps: what gives the expansion of each step; for products only, it can be asked once.
    """

    x: list[Tensor]
    u: list[Tensor]
    steps: list[Callable[[], Any]]

    @property
    def states(self) -> Tensor:
        """(T + 1, B, ...), a copy."""
        return torch.stack(self.x)

    @property
    def controls(self) -> Tensor:
        """(T, B, ...), a copy."""
        return torch.stack(self.u)


def backward_sweep(
    expansions: Sequence[Any], value: Value, a: Tensor, update: str
) -> tuple[list[StepGains], Value]:
    """Gains of all steps and the value at the initial state.

    The sweep knows nothing of how the value represents its Hessian: it only asks it to step back.

    Args:
        expansions: of the steps 0 to T - 1, such as the value takes.
        value: at the final state.
        a: Tikhonov's constant of every step and problem, (T, B).
        update: a member of :data:`diffoc.riccati.VALUE_UPDATES`.
    """
    gains: list[StepGains] = []
    for i in reversed(range(len(expansions))):
        step_gains, value = value.step_back(expansions[i], a[i], update)
        gains.append(step_gains)
    return gains[::-1], value


def forward_sweep(
    problem: ControlProblem,
    nominal: Trajectory,
    gains: Sequence[StepGains],
    step: Tensor,
    derivatives: Derivatives,
    feedback: bool = True,
) -> Trajectory:
    """The trajectory under the new controls, Eqs. 15 and 16.

    Args:
        problem: the system.
        nominal: the trajectory that the gains belong to.
        gains: of every step.
        step: of every problem, (B,).
        derivatives: how the new trajectory will be expanded.
        feedback: whether to use the gains K, or k only.
    """
    new = Trajectory([nominal.x[0]], [], [])
    for i, g in enumerate(gains):
        du = step[:, None] * g.k
        if feedback:
            du = du + g.feedback((new.x[i] - nominal.x[i]).flatten(1))
        new.u.append(nominal.u[i] + du.reshape(nominal.u[i].shape))
        _advance(problem, new, derivatives)
    return new


def roll_out(
    problem: ControlProblem,
    x: Tensor,
    controls: Sequence[Tensor] | Tensor,
    derivatives: Derivatives,
) -> Trajectory:
    """The trajectory from x (B, ...) under controls (T, B, ...)."""
    new = Trajectory([x], [], [])
    for u in controls:
        new.u.append(u)
        _advance(problem, new, derivatives)
    return new


def _advance(problem: ControlProblem, trajectory: Trajectory, derivatives: Derivatives) -> None:
    """Appends the state that the last control leads to."""
    i = len(trajectory.u) - 1
    y, step = derivatives.step(problem, i, trajectory.x[i], trajectory.u[i])
    trajectory.x.append(y)
    trajectory.steps.append(step)
