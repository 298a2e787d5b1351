"""The default recipe of the controller, :data:`diffoc.reconstruct.OURS`, as a row of the tables."""

from dataclasses import replace

from torch import Tensor

from diffoc.baselines import Given, Method, method
from diffoc.checks import check_above
from diffoc.reconstruct import OURS, constant, snr_squared


@method
def ours(
    given: Given,
    *,
    budget: int,
    steps: int = OURS.steps,
    weight: float = OURS.weight,
    weighted: bool = True,
    in_units: bool = True,
    stopped: bool = False,
) -> Tensor:
    r"""Returns images (B, ...) by :data:`diffoc.reconstruct.OURS`.

    The last three settings are there to see what each part is worth, see the grid `parts` of
    :mod:`diffoc.experiments.ablations`.

    Args:
        budget: how many evaluations each image has, at least 4 T; the last iteration's line search
            may go beyond it.
        steps: T, at least 1.
        weight: w, positive.
        weighted: whether the cost is :math:`w \alpha_i^2 / \sigma_i^2`; without, it is w.
        in_units: whether L-BFGS measures in units of the image; without, in those of the state.
        stopped: whether the discrepancy principle ends it all the same.
    """
    check_above(0, weight=weight)
    recipe = replace(
        OURS,
        budget=budget,
        steps=steps,
        weight=weight,
        weights=snr_squared if weighted else constant,
        preconditioned=in_units,
        stopped=stopped,
    )
    return given.reconstruct(recipe)


METHOD = Method(
    "Ours",
    ours,
    lambda task, nfe: {"budget": nfe},
    # At most: the guess and the trials of the line search cost no product.
    lambda settings: (settings["budget"], settings["budget"]),
    tuned={"weight": (1.0, 4.0, 16.0, 64.0), "steps": (15, 30)},
    recipe=OURS,
)
