"""The controller on images: it steers a reverse process so that its image explains something."""

from collections.abc import Callable
from dataclasses import replace

import torch
from azula.noise import Schedule
from torch import Tensor
from tqdm.auto import tqdm

from diffoc.checks import check_kind, check_networks, check_size, check_tensor, evaluating
from diffoc.costs import ControlCost
from diffoc.ilqr import ilqr
from diffoc.lowrank import MatrixFree
from diffoc.process import ReverseProcess
from diffoc.result import Result
from diffoc.rules import LBFGS, Damping, Rule
from diffoc.system import ControlProblem, Derivatives


def solve(
    process: ReverseProcess,
    cost: Callable[[Tensor], Tensor],
    x: Tensor,
    controls: Tensor | None = None,
    *,
    control_cost: ControlCost | float = 1.0,
    derivatives: Derivatives = MatrixFree(),
    rank: int = 0,
    iterations: int,
    rule: Rule = LBFGS(),
    regularization: Damping | float | Tensor = 0.0,
    budget: int | None = None,
    stop: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Result:
    """Minimises the terminal cost of the process's image, plus the controls' own cost.

    >>> process = ReverseProcess(prior, 10)
    >>> x = process.initial_state((1, 3, 64, 64), generator).float()
    >>> solve(process, GaussianLikelihood(operator, y, 0.05), x, iterations=20).x0

    Defaults are those of a :class:`diffoc.recipe.Recipe`. The result is without the gains, which
    take memory. What is not listed, errors included, is as in :func:`diffoc.ilqr.ilqr`.

    Args:
        process: the reverse process of any azula prior, in "input" or "output" mode.
        cost: the terminal cost, a function of images (B, C, H, W) that returns (B,), such as a
            :class:`diffoc.costs.GaussianLikelihood`.
        x: the initial states at time 1, (B, C, H, W), as :meth:`ReverseProcess.initial_state` draws
            them; their dtype and device are those of the computation.
        controls: the first controls, (T, B, C, H, W), zeros by default, or a guess such as
            :func:`diffoc.greedy.greedy_controls` makes.
        control_cost: a :class:`diffoc.costs.ControlCost`, or its weights.
        derivatives: how derivatives are represented; `MatrixFree(keep_activations=False)` needs
            less memory, and more time.
        progress: whether to show a bar.
    """
    check_kind(ReverseProcess, process=process)
    check_kind(Callable, cost=cost)
    check_networks(process=process.denoiser, cost=cost)
    check_tensor("x", x)
    if not isinstance(control_cost, ControlCost):
        control_cost = ControlCost(control_cost)
    process.check_noise(x)
    if controls is not None:
        check_size((process.horizon, *x.shape), controls=controls)
    weights = torch.as_tensor(control_cost.weights)
    if weights.ndim and len(weights) != process.horizon:
        raise ValueError(f"control_cost has {len(weights)} weights, expected {process.horizon}")
    bar = tqdm(total=iterations, disable=not progress, leave=False, unit="iteration")

    def report(iteration: int, costs: Tensor, x0: Tensor) -> None:
        bar.update()
        bar.set_postfix(cost=f"{costs.mean().item():.4g}")
        if callback:
            callback(iteration, costs, x0)

    problem = ControlProblem(process.step, control_cost, cost, process.horizon)
    with bar, evaluating(process.denoiser, cost):
        result = ilqr(
            problem,
            x,
            controls,
            derivatives=derivatives,
            regularization=regularization,
            rank=rank,
            rule=rule,
            iterations=iterations,
            gradient_tolerance=0.0,
            budget=budget,
            stop=stop,
            callback=report,
        )
    return replace(result, gains=[])


def image_units(schedule: Schedule, times: Tensor) -> tuple[float, ...]:
    r"""Returns the image's scale :math:`\alpha_i` in the T states that controls act on.

    Beside the image in its state a control :math:`u_i` is as large as :math:`u_i / \alpha_i` beside
    the image itself. As the units of :class:`diffoc.rules.LBFGS` they let late controls take larger
    steps than early ones. That may take fewer iterations: of a portrait's linear tasks some two
    fifths. It does not make all controls move the final image alike. The T + 1 times are those of
    the process, the schedule is the prior's.
    """
    return tuple(schedule(times[:-1])[0].tolist())
