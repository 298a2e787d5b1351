r"""The controller as the paper describes it, Section 6 and Appendix D, with Table 2's settings.

Adam (Eq. 80) in input mode along the deterministic process from a random state, with the likelihood
as terminal cost and a terminal Hessian of rank 1. Where the text is silent, on Adam's rate and the
control cost, the numbers are those of the released code; by Table 5 any regularization does but
none, and ours is well above the rounding of 1 / s^2 = 400. What that code does otherwise is told in
:mod:`diffoc.baselines.released`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from azula.noise import Schedule
from torch import Tensor

from diffoc.baselines import Given, Method, method
from diffoc.checks import check_at_least
from diffoc.lowrank import MatrixFree
from diffoc.process import drift_and_diffusion
from diffoc.recipe import TASKS, Recipe
from diffoc.rules import Adam
from diffoc.theory.projected import Projected


def snr_weights(schedule: Schedule, times: Tensor) -> Tensor:
    r"""Returns weights of the control cost by the signal-to-noise ratio, (T,), for T + 1 times.

    .. math:: r_i = \frac{\alpha_i}{\sigma_i} \frac{1}{dt^2}, \qquad dt = 1 / T

    The ratio is the one at the state that the control acts on, `times[i]`; compare
    :func:`diffoc.baselines.released.released_weights`.
    """
    alpha, sigma = schedule(times[:-1])
    return alpha / sigma * (len(times) - 1) ** 2


def guidance_regularization(schedule: Schedule, times: Tensor) -> Tensor:
    r"""Returns Tikhonov's constants (T,) that make first-order gains those of guidance, Lemma 4.2.

    .. math:: a_i = \frac{2}{g(t_i)^2 \, dt_i}
    """
    _, g2 = drift_and_diffusion(schedule, times[:-1])
    return 2 / (g2 * -times.diff())


PAPER = Recipe(
    "paper",
    steps=50,
    iterations=100,
    rule=Adam(5e-3),
    rank=1,
    derivatives=MatrixFree(keep_activations=False, hessian="gauss_newton"),
    regularization=1e-3,
    weight=1e-6,
    weights=snr_weights,
    from_noise=True,
    by_task={
        ("super_resolution", 2500): {"iterations": 50},
        ("gaussian_blur", 2500): {"rule": Adam(1e-2), "weight": 1e-5},
        ("nonlinear_blur", 2500): {"rule": Adam(1e-2)},
        ("phase_retrieval", 2500): {"rule": Adam(1e-2)},
    },
)
"""Table 2, which the paper calls NFE 2500: activations of 50 steps at 256 x 256 fit no GPU, so that
they are recomputed."""


@method
def paper(
    given: Given,
    *,
    steps: int,
    iterations: int,
    rank: int,
    rate: float,
    weight_scale: float,
    regularization: float | str,
    projected: bool = False,
    keep_activations: bool = False,
) -> Tensor:
    r"""Returns images by :data:`PAPER`.

    With rank 0 the gains are :math:`-Q_u / (r_i + a)`, and Adam, which divides every number by its
    own size, undoes the factor: a constant a changes nothing then.

    Args:
        rank: the rank k of the terminal Hessian.
        rate: Adam's learning rate.
        weight_scale: the factor of :func:`snr_weights`.
        regularization: Tikhonov's constant a, or "lemma_4_2" for that of
            :func:`guidance_regularization`.
        projected: whether Jacobians are of that rank, too, by the projections of Appendix D.1 as
            the paper writes them, see :mod:`diffoc.theory.projected`. Its Jacobian-vector products,
            T rank iterations of them, count as one evaluation for each step and iteration.
        keep_activations: whether activations are kept, for speed, or recomputed, for memory.
    """
    damping: float | Callable[[Schedule, Tensor], Tensor] = guidance_regularization
    if regularization != "lemma_4_2":
        if isinstance(regularization, str):
            raise ValueError(
                f"regularization is {regularization!r}, expected a number or 'lemma_4_2'"
            )
        check_at_least(0, regularization=regularization)
        damping = regularization
    kept = MatrixFree(keep_activations=keep_activations, hessian="gauss_newton")
    recipe = replace(
        PAPER,
        steps=steps,
        iterations=iterations,
        rank=rank,
        rule=Adam(rate),
        weight=weight_scale,
        regularization=damping,
        derivatives=Projected(rank, hessian="gauss_newton") if projected else kept,
    )
    return given.reconstruct(recipe, given.x)


def _table_2(task: str) -> dict[str, Any]:
    recipe = PAPER.at(task, 2500)
    return {
        "steps": recipe.steps,
        "iterations": recipe.iterations,
        "rank": recipe.rank,
        "rate": cast(Adam, recipe.rule).rate,
        "weight_scale": recipe.weight,
        "regularization": recipe.regularization,
    }


TABLE_2 = {task: _table_2(task) for task in TASKS}
"""The paper's hyper-parameters for what it calls NFE 2500."""


def _settings(task: str, nfe: int) -> dict:
    if nfe not in (1000, 2500):
        raise ValueError(f"nfe is {nfe}: the paper's settings are for 1000 and 2500 only")
    # At 1000, the steps and iterations are the released code's.
    return _table_2(task) | ({"steps": 20, "iterations": 50} if nfe == 1000 else {})


METHOD = Method(
    "PAPER",
    paper,
    _settings,
    lambda s: (
        s["steps"] * (1 + (2 - s.get("keep_activations", False)) * s["iterations"]),
        s["steps"] * (1 + s["rank"]) * s["iterations"],
    ),
    tuned={"rate": (1e-3, 5e-3, 2e-2, 1e-1), "weight_scale": (1e-6, 1e-4)},
    recipe=PAPER,
)
