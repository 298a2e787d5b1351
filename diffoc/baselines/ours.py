"""The default recipe of the controller, :data:`diffoc.recipe.OURS`, as a row of the tables."""

from dataclasses import replace

from torch import Tensor

from diffoc.baselines import Given, Method, method
from diffoc.checks import check_above
from diffoc.recipe import OURS, constant, deterministic, per_step, snr_squared


@method
def ours(
    given: Given,
    *,
    budget: int,
    steps: int = OURS.steps,
    weight: float = OURS.weight,
    smoothness: float = OURS.smoothness,
    iterations: int | None = OURS.iterations,
    weighted: bool = True,
    in_units: bool = True,
    coloured: bool = True,
    dense: bool = True,
    stopped: bool = False,
    from_noise: bool = False,
) -> Tensor:
    r"""Returns images (B, ...) by :data:`diffoc.recipe.OURS`.

    The last six settings are there to see what each part is worth, see the grids `parts` and
    `robustness` of :mod:`diffoc.experiments.ablations`.

    Args:
        budget: how many evaluations each image has, at least 4 T, or 2 T without iterations.
        weight: w, positive.
        smoothness: of the guess's errors, not negative.
        iterations: of the plan, at most; 0 leaves the guess as it is, None is no limit.
        weighted: whether the cost is :math:`w \alpha_i^2 / \sigma_i^2`; without, it is w.
        in_units: whether L-BFGS measures in units of the image; without, in those of the state.
        coloured: whether the guess's errors are mostly grey.
        dense: whether steps are dense near the image; without, they are uniform in time.
        stopped: whether the discrepancy principle ends it all the same.
        from_noise: whether the process starts from the random state, not from zero.
    """
    check_above(0, weight=weight)
    recipe = replace(
        OURS,
        budget=budget,
        steps=steps,
        weight=weight,
        smoothness=smoothness,
        iterations=iterations,
        weights=snr_squared if weighted else constant,
        preconditioned=in_units,
        coloured=coloured,
        process=OURS.process if dense else deterministic,
        stopped=stopped,
        from_noise=from_noise,
    )
    return given.reconstruct(recipe, given.x if from_noise else None)


def _work(settings: dict) -> tuple[int, int]:
    # At most: the guess and the trials of the line search cost no product.
    if settings.get("iterations") == 0:
        return 2 * settings.get("steps", OURS.steps), 0
    return settings["budget"], settings["budget"]


METHOD = Method(
    "OURS",
    ours,
    lambda task, nfe: {"budget": nfe},
    _work,
    # A plan, or the guess alone in more steps.
    tuned={"smoothness": (2.0, 2.5, 3.0, 3.5), ("steps", "iterations"): ((15, 20), (30, 0))},
    per_step=lambda settings: per_step(settings.get("iterations", OURS.iterations)),
    recipe=OURS,
)
