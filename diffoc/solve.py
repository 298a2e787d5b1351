r"""One entry point: steer a prior's reverse process so that its image explains a measurement.

An iteration costs :math:`T (F + (1 + k) B)` with the activations kept, F being one evaluation of
the denoiser, B one vector-Jacobian product, k the rank of the terminal Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from azula.noise import Schedule
from torch import Tensor
from tqdm.auto import tqdm

from diffoc.checks import check_tensor, evaluating
from diffoc.costs import ControlCost
from diffoc.damping import Damping
from diffoc.ilqr import Result, ilqr
from diffoc.lowrank import MatrixFree
from diffoc.process import ReverseProcess
from diffoc.rules import Adam, Rule
from diffoc.system import ControlProblem, Derivatives


def solve(
    process: ReverseProcess,
    cost: Callable[[Tensor], Tensor],
    x: Tensor,
    controls: Tensor | None = None,
    *,
    control_cost: ControlCost | float = 1.0,
    rank: int = 1,
    iterations: int = 50,
    rule: Rule = Adam(),
    regularization: Damping | float | Tensor = 0.0,
    feedback: bool = True,
    residual: Callable[[Tensor], Tensor] | None = None,
    noise_level: float | None = None,
    budget: int | None = None,
    keep_activations: bool = True,
    derivatives: Derivatives | None = None,
    precision: str | None = None,
    progress: bool = False,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Result:
    r"""Minimises the terminal cost of the process's image, plus the controls' own cost.

    Args:
        process: of any azula prior, in "input" or "output" mode.
        cost: maps images (B, C, H, W) to costs (B,), such as a
            :class:`diffoc.costs.GaussianLikelihood`.
        x: initial states at time 1, (B, C, H, W), as :meth:`ReverseProcess.initial_state` draws
            them; their dtype and device are those of the computation.
        controls: the first guess, (T, B, C, H, W), such as :func:`diffoc.greedy.greedy_controls`;
            zeros by default.
        control_cost: weights of :math:`\frac12 r_i \|u_i\|^2`.
        rank: k of the terminal Hessian, at least 0, which is the first order.
        iterations: at most so many, at least 0.
        rule: Adam (Eq. 80), L-BFGS, or a backtracking line search.
        regularization: Tikhonov's constant, or one for each step, (T,), or a schedule.
        feedback: whether to use the gains K.
        residual, noise_level: where the mean of the squared `residual` of the images (B, ...)
            falls below `noise_level` squared, a problem is stopped (the discrepancy principle).
        budget: of evaluations by each problem, see :func:`diffoc.ilqr.ilqr`; None for no limit.
        keep_activations: of the forward sweep, for speed; otherwise they are recomputed, for
            memory.
        derivatives: how they are represented: None for `MatrixFree(keep_activations)`, or such as
            `MatrixFree(hessian="gauss_newton")` or the paper's projections.
        precision: "bfloat16" for autocast of the process's steps, or None.
        progress: whether to show a bar.
        callback: called after each iteration with its number, the costs (B,) and the images
            (B, C, H, W); if it raises StopIteration, the run ends there.

    Raises:
        ValueError: if an argument is wrong.
        diffoc.ilqr.DivergenceError: if the cost is not finite any more; it has the best iterate.
    """
    if not isinstance(control_cost, ControlCost):
        control_cost = ControlCost(control_cost)
    if precision not in (None, "bfloat16"):
        raise ValueError(f"precision is {precision!r}, expected None or 'bfloat16'")
    if derivatives is None:
        derivatives = MatrixFree(keep_activations=keep_activations)
    elif not keep_activations:
        raise ValueError("keep_activations is False, but derivatives is given: it decides")
    if (residual is None) != (noise_level is None):
        raise ValueError("residual and noise_level belong together: give both, or neither")
    if noise_level is not None and not 0 < noise_level < math.inf:
        raise ValueError(f"noise_level is {noise_level}, expected finite and above 0")
    check_tensor("x", x)
    process.check_noise(x)
    if controls is not None and controls.shape != (process.horizon, *x.shape):
        raise ValueError(
            f"controls has shape {tuple(controls.shape)}, expected {(process.horizon, *x.shape)}"
        )
    weights = torch.as_tensor(control_cost.weights)
    if weights.ndim and len(weights) != process.horizon:
        raise ValueError(f"control_cost has {len(weights)} weights, expected {process.horizon}")

    def dynamics(i: int, x: Tensor, u: Tensor) -> Tensor:
        # Not every device that can run the rest has autocast.
        half = precision == "bfloat16"
        with torch.autocast(x.device.type, torch.bfloat16) if half else nullcontext():
            return process.step(i, x, u).to(x.dtype)

    bar = tqdm(total=iterations, disable=not progress, leave=False, unit="iteration")

    def report(iteration: int, costs: Tensor, x0: Tensor) -> None:
        bar.update()
        bar.set_postfix(cost=f"{costs.mean().item():.4g}")
        if callback:
            callback(iteration, costs, x0)

    with bar, evaluating(process.denoiser, cost):
        result = ilqr(
            ControlProblem(dynamics, control_cost, cost, process.horizon),
            x,
            controls,
            derivatives=derivatives,
            regularization=regularization,
            rank=rank,
            rule=rule,
            feedback=feedback,
            iterations=iterations,
            gradient_tolerance=0.0,
            budget=budget,
            stop=_small(residual, noise_level) if residual and noise_level else None,
            callback=report,
        )
    return replace(result, gains=[])  # they take memory


def _small(residual: Callable[[Tensor], Tensor], noise_level: float) -> Callable[[Tensor], Tensor]:
    """Says of images (B, ...) which have a residual as small as the noise, (B,)."""
    return lambda x0: residual(x0).flatten(1).square().mean(dim=1) < noise_level**2


def image_units(schedule: Schedule, times: Tensor) -> tuple[float, ...]:
    r"""The image's scale :math:`\alpha_i` in the states that controls act on, T numbers.

    As the units of :class:`diffoc.rules.LBFGS` they make controls of all steps changes of the
    image, which takes fewer iterations than the states' own units: of a portrait's linear tasks
    some two fifths.

    Args:
        schedule: of the prior.
        times: of the process, (T + 1,).
    """
    return tuple(schedule(times[:-1])[0].tolist())
