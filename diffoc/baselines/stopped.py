"""The recipe that stops at the noise, :data:`diffoc.recipe.STOPPED`, as a row of tables."""

from dataclasses import replace

from torch import Tensor

from diffoc.baselines import Given, Method, method
from diffoc.recipe import STOPPED, per_step


@method
def stopped(given: Given, *, steps: int, budget: int, weight: float = STOPPED.weight) -> Tensor:
    """Returns images (B, ...) by :data:`diffoc.recipe.STOPPED`.

    Args:
        budget: the number of evaluations that each image has, at least 4 T.
        weight: the weight r of the control cost, not negative.
    """
    return given.reconstruct(replace(STOPPED, steps=steps, budget=budget, weight=weight))


METHOD = Method(
    "STOPPED",
    stopped,
    lambda task, nfe: {"budget": nfe},
    # At most: the guess and the trials of the line search cost no product.
    lambda settings: (settings["budget"], settings["budget"]),
    tuned={"steps": (5, 10, 20, 30), "weight": (0.3, 3.0)},
    per_step=lambda settings: per_step(STOPPED.iterations),
    recipe=STOPPED,
)
