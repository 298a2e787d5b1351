"""What a run of the controller returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffoc.system import StepGains


@dataclass(frozen=True)
class History:
    """Holds a row per iteration and a column per problem: lists of (B,) tensors of equal length.

    Attributes:
        cost: J before the iteration.
        terminal: the terminal cost's part of J.
        gradient: the largest absolute derivative of J in a control, before the iteration; NaN
            with projections, which do not know it.
        expected: the decrease expected of a full step.
        regularization: the largest of Tikhonov's constants in the gains.
        step: the size of the step taken, 0 where none was (converged, or refused).
    """

    cost: list[Tensor] = field(default_factory=list)
    terminal: list[Tensor] = field(default_factory=list)
    gradient: list[Tensor] = field(default_factory=list)
    expected: list[Tensor] = field(default_factory=list)
    regularization: list[Tensor] = field(default_factory=list)
    step: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """Holds what the controller ends with, and how it got there.

    Attributes:
        states: the trajectory, (T + 1, B, ...).
        controls: the controls of every step, (T, B, ...).
        cost: the total cost J, (B,).
        gains: the gains of the batch's last backward sweep, around the trajectories before the last
            step.
        status: why each problem ended: "gradient" or "cost" (converged by that test), "stalled" (no
            descent at the largest regularization), "stopped" (by `stop` or `callback`), "budget"
            (another iteration would exceed it) or "iterations" (there are no more).
        history: what every iteration was like.
        evaluations: the number of evaluations of the dynamics by each problem, (B,). Where a rule
            keeps the cheapest iterate and that is not the last, its trajectory is made once more at
            the end, which is not counted.
        products: the number of their vector-Jacobian products, (B,).
        tangents: the number of their Jacobian-vector products, (B,).
        residual_over_noise: the root mean square of the residual over the noise's, (B,), where
            :func:`diffoc.reconstruct` was called; else None.
        log_weights: the log-weights of draws in the plans' place, (B,), see
            :class:`diffoc.theory.riccati_draws.Draws`; None where there are none.
    """

    states: Tensor
    controls: Tensor
    cost: Tensor
    gains: list[StepGains]
    status: list[str]
    history: History
    evaluations: Tensor
    products: Tensor
    tangents: Tensor
    residual_over_noise: Tensor | None = None
    log_weights: Tensor | None = None

    @property
    def x0(self) -> Tensor:
        """Returns the final states, which are a process's images, (B, ...)."""
        return self.states[-1]

    @property
    def costs(self) -> Tensor:
        """Returns the total costs before every iteration, (iterations, B)."""
        return self._rows(self.history.cost)

    @property
    def terminal_costs(self) -> Tensor:
        """Returns the terminal cost's part of `costs`, (iterations, B)."""
        return self._rows(self.history.terminal)

    def _rows(self, rows: list[Tensor]) -> Tensor:
        return torch.stack(rows) if rows else self.cost.new_zeros(0, len(self.cost))


class DivergenceError(RuntimeError):
    """A trajectory left the finite numbers; `result` has the best one before."""

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result
