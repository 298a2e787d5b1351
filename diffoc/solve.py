r"""One entry point: steer a prior's reverse process so that its image explains a measurement.

An iteration costs :math:`T (F + (1 + k) B)` with the activations kept, F being one evaluation of
the denoiser, B one vector-Jacobian product, k the rank of the terminal Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from azula.noise import Schedule
from torch import Tensor
from tqdm.auto import tqdm

from diffoc.checks import check_tensor
from diffoc.costs import ControlCost
from diffoc.ilqr import ILQRResult, ilqr
from diffoc.lowrank import Counts, MatrixFree
from diffoc.process import ReverseProcess, drift_and_diffusion
from diffoc.rules import LBFGS, Adam, LineSearch, Tikhonov
from diffoc.system import ControlProblem
from diffoc.theory.projected import Projected


@dataclass(frozen=True)
class Result:
    """What :func:`solve` found.

    Attributes:
        x0: the images, (B, C, H, W).
        controls: (T, B, C, H, W).
        states: (T + 1, B, C, H, W), or None if they were not asked for.
        cost: the total cost of `x0` and `controls`, (B,).
        costs: before every iteration, (iterations, B).
        terminal_costs: the terminal cost's part of `costs`.
        status: of each problem, see :class:`diffoc.ilqr.ILQRResult`.
        evaluations: of the denoiser, for each image.
        products: vector-Jacobian products of the process's steps, for each image.
        tangents: Jacobian-vector products of them, for each image.
    """

    x0: Tensor
    controls: Tensor
    states: Tensor | None
    cost: Tensor
    costs: Tensor
    terminal_costs: Tensor
    status: list[str]
    evaluations: int
    products: int
    tangents: int


def solve(
    process: ReverseProcess,
    cost: Callable[[Tensor], Tensor],
    x: Tensor,
    controls: Tensor | None = None,
    *,
    control_cost: ControlCost | float = 1.0,
    rank: int = 1,
    iterations: int = 50,
    update: Adam | LBFGS | LineSearch = Adam(),
    regularization: Tikhonov | float | Tensor = 0.0,
    feedback: bool = True,
    residual: Callable[[Tensor], Tensor] | None = None,
    noise_level: float | None = None,
    keep_activations: bool = True,
    derivatives: MatrixFree | Projected | None = None,
    precision: str | None = None,
    keep_states: bool = False,
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
        control_cost: weights of :math:`\frac12 r_i \|u_i\|^2`; see also :func:`snr_weights`.
        rank: k of the terminal Hessian, at least 0, which is the first order.
        iterations: at least 0.
        update: Adam (Eq. 80), L-BFGS, or a backtracking line search.
        regularization: Tikhonov's constant, or one for each step, (T,), or a schedule.
        feedback: whether to use the gains K.
        residual, noise_level: where the mean of the squared `residual` of the images (B, ...)
            falls below `noise_level` squared, a problem is stopped (the discrepancy principle).
        keep_activations: of the forward sweep, for speed; otherwise they are recomputed, for
            memory.
        derivatives: how they are represented: None for `MatrixFree(keep_activations)`, or such as
            `MatrixFree(hessian="gauss_newton")` or the paper's `Projected(rank)`. The object is
            not changed: its counts are in the result.
        precision: "bfloat16" for autocast of the process's steps; "tf32" for float32 products
            in TF32, where the GPU has it.
        keep_states: whether the result has the trajectory.
        progress: whether to show a bar.
        callback: called after each iteration with its number, the costs (B,) and the images
            (B, C, H, W); if it raises StopIteration, the run ends there.

    Raises:
        ValueError: if an argument is wrong.
        diffoc.ilqr.DivergenceError: if the cost is not finite any more; it has the best iterate.
    """
    if not isinstance(control_cost, ControlCost):
        control_cost = ControlCost(control_cost)
    if precision not in (None, "bfloat16", "tf32"):
        raise ValueError(f"precision is {precision!r}, expected None, 'bfloat16' or 'tf32'")
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

    counts = Counts()
    bar = tqdm(total=iterations, disable=not progress, leave=False, unit="iteration")

    def report(iteration: int, costs: Tensor, x0: Tensor) -> None:
        bar.update()
        bar.set_postfix(cost=f"{costs.mean().item():.4g}")
        if callback:
            callback(iteration, costs, x0)

    with bar, _tensor_float() if precision == "tf32" else nullcontext():
        found = ilqr(
            ControlProblem(dynamics, control_cost, cost, process.horizon),
            x,
            controls,
            derivatives=replace(derivatives, counts=counts),
            hessian_rank=rank,
            regularization=regularization,
            line_search=update,
            feedback=feedback,
            max_iterations=iterations,
            gradient_tolerance=0.0,
            stop=_small(residual, noise_level) if residual and noise_level else None,
            callback=report,
        )
    return _as_result(found, counts, keep_states)


def _small(residual: Callable[[Tensor], Tensor], noise_level: float) -> Callable[[Tensor], Tensor]:
    """Says of images (B, ...) which have a residual as small as the noise, (B,)."""
    return lambda x0: residual(x0).flatten(1).square().mean(dim=1) < noise_level**2


@contextmanager
def _tensor_float() -> Iterator[None]:
    """Lets a GPU take matrix products and convolutions of float32 in TF32, for a while."""
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # made when torch is imported
    places = (torch.backends.cuda.matmul, conv)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32"
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def _as_result(found: ILQRResult, counts: Counts, keep_states: bool) -> Result:
    empty = found.cost.new_zeros(0, len(found.cost))
    history = found.history
    return Result(
        x0=found.states[-1],
        controls=found.controls,
        states=found.states if keep_states else None,
        cost=found.cost,
        costs=torch.stack(history.cost) if history.cost else empty,
        terminal_costs=torch.stack(history.terminal) if history.terminal else empty,
        status=found.status,
        evaluations=counts.evaluations,
        products=counts.products,
        tangents=counts.tangents,
    )


def snr_weights(schedule: Schedule, times: Tensor, scale: float = 1e-6) -> Tensor:
    r"""Weights of the control cost as in the authors' released code, (T,).

    .. math:: r_i = s \, \frac{\alpha_i}{\sigma_i} \frac{1}{dt^2}, \qquad dt = 1 / T

    The signal-to-noise ratio is the one at the state that the control acts on, `times[i]`.

    Args:
        schedule: of the prior.
        times: of the process, (T + 1,).
        scale: s.
    """
    alpha, sigma = schedule(times[:-1])
    steps = len(times) - 1
    return scale * alpha / sigma * steps**2


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


def guidance_regularization(schedule: Schedule, times: Tensor) -> Tensor:
    r"""Tikhonov's constants that make the first-order gains those of guidance, Lemma 4.2, (T,).

    .. math:: a_i = \frac{2}{g(t_i)^2 \, dt_i}

    Args:
        schedule: of the prior.
        times: of the process, (T + 1,).
    """
    _, g2 = drift_and_diffusion(schedule, times[:-1])
    return 2 / (g2 * -times.diff())
