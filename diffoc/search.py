"""How far along its direction each problem of a batch goes: trials of the forward sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffoc.rules import LineSearch
from diffoc.system import (
    ControlProblem,
    Derivatives,
    StepGains,
    Trajectory,
    forward_sweep,
    roll_out,
)


def acceptance(
    linesearch_step: LineSearch | None,
    slope: Tensor,
    curvature: Tensor,
    cost: Tensor,
    negligible: Tensor,
) -> Callable[[float, Tensor], Tensor]:
    """Says of a trial step and the costs it led to (B,), which problems may take it."""
    if linesearch_step is None:
        return lambda trial, new_cost: new_cost.isfinite()

    def accept(trial: float, new_cost: Tensor) -> Tensor:
        expected = -(trial * slope + trial**2 * curvature / 2)
        enough = cost - new_cost >= linesearch_step.sufficient * expected
        # Where the whole expected decrease drowns in rounding, no increase is enough.
        return (enough | negligible) & (new_cost <= cost)

    return accept


def search_step(
    sweep: tuple[ControlProblem, Sequence[StepGains], Derivatives, bool],
    nominal: Trajectory,
    costs: tuple[Tensor, Tensor],
    active: Tensor,
    accept: Callable[[float, Tensor], Tensor],
    linesearch_step: LineSearch | None,
) -> tuple[Trajectory, tuple[Tensor, Tensor], Tensor]:
    """Tries smaller and smaller steps until every active problem has accepted one.

    A problem that has accepted repeats its own step in the trials of the others, and one that is
    not active stays where it is, so that the last forward sweep holds everybody's trajectory.
    Returns it, the costs and their terminal parts, and the steps taken, (B,), zero for those who
    refused all.
    """
    problem, gains, derivatives, feedback = sweep
    step, trial = torch.zeros_like(costs[0]), 1.0
    for _ in range(linesearch_step.trials if linesearch_step else 1):
        waiting = active & (step == 0)
        if not waiting.any():
            break
        size = torch.where(waiting, trial, step)
        new = nominal  # lets go of the last trial's activations
        new = forward_sweep(problem, nominal, gains, size, derivatives, feedback)
        running, terminal = problem.parts(new.x, new.u)
        new_cost = running + terminal
        step = torch.where(waiting & accept(trial, new_cost), size, step)
        trial *= linesearch_step.contraction if linesearch_step else 1.0
    moved = step > 0
    if not moved.any():
        return nominal, costs, step
    if (refused := (size > 0) & ~moved).any():
        # Their last trial is in the new trajectory: roll out once more, without them.
        controls = choose(refused, nominal.u, new.u)
        new = nominal
        new = roll_out(problem, nominal.x[0], controls, derivatives)
    return new, select(moved, (new_cost, terminal), costs), step


def choose(mask: Tensor, yes: list[Tensor], no: list[Tensor]) -> list[Tensor]:
    """Chooses by problem, of tensors (B, ...) for every step."""
    if mask.all():
        return yes  # without a copy
    mask = mask.reshape(-1, *[1] * (yes[0].ndim - 1))
    return [torch.where(mask, *pair) for pair in zip(yes, no, strict=True)]


def select(
    mask: Tensor, yes: tuple[Tensor, Tensor], no: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Chooses by problem, of pairs of tensors (B,)."""
    return torch.where(mask, yes[0], no[0]), torch.where(mask, yes[1], no[1])
