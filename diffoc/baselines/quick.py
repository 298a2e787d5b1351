"""The guess alone in few steps, :data:`diffoc.recipe.QUICK`, as a row of tables."""

from dataclasses import replace

from torch import Tensor

from diffoc.baselines import Given, Method, method
from diffoc.baselines.decomposition import require_linear
from diffoc.recipe import QUICK, per_step


@method
def quick(
    given: Given, *, steps: int = QUICK.steps, smoothness: float = QUICK.smoothness
) -> Tensor:
    """Returns images (B, ...) by :data:`diffoc.recipe.QUICK`, each for 2 T evaluations.

    Args:
        steps: the number T of steps, at least 2.
        smoothness: of the guess's errors, not negative.
    """
    require_linear(given.physics)
    return given.reconstruct(replace(QUICK, steps=steps, smoothness=smoothness))


def _settings(task: str, nfe: int) -> dict:
    if nfe < 4:
        raise ValueError(f"nfe is {nfe}, but 2 steps of 2 evaluations need 4")
    return {"steps": min(QUICK.steps, nfe // 2)}


METHOD = Method(
    "QUICK",
    quick,
    _settings,
    lambda settings: (2 * settings["steps"], 0),
    tuned={"smoothness": (1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5)},
    per_step=lambda settings: per_step(QUICK.iterations),
    recipe=QUICK,
)
