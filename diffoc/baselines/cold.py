"""The recipe without a guess, :data:`diffoc.recipe.COLD`, as a row of the tables."""

from dataclasses import replace

from torch import Tensor

from diffoc.baselines import Given, Method, method
from diffoc.recipe import COLD


def iterations_within(budget: int, steps: int) -> int:
    """Returns the iterations of T steps that a budget of evaluations allows, at least 1.

    Some 15 % of it are left for the first rollout and for the line search, which may take more.
    """
    return max(1, 17 * budget // (20 * steps))


@method
def cold(
    given: Given,
    *,
    steps: int = COLD.steps,
    iterations: int = 80,
    control_cost: float = 1.0,
    from_noise: bool = False,
    greedy: bool = False,
) -> Tensor:
    """Returns images (B, ...) by :data:`diffoc.recipe.COLD`.

    Args:
        iterations: the largest number of iterations; the discrepancy principle may end before. The
            line search's trials may take more than T (1 + iterations) evaluations.
        control_cost: the weight r of the control cost, positive.
        from_noise: whether to start from `x`, and not from zero.
        greedy: whether there is a guess after all, which takes T evaluations more.
    """
    recipe = replace(COLD, steps=steps, iterations=iterations, weight=control_cost, guess=greedy)
    return given.reconstruct(recipe, given.x if from_noise else None)


METHOD = Method(
    "COLD",
    cold,
    # On the tuning faces ten steps and twice the iterations blur less than twenty steps.
    lambda task, nfe: {"steps": COLD.steps, "iterations": iterations_within(nfe, COLD.steps)},
    lambda s: (s["steps"] * (1 + s["iterations"]), s["steps"] * s["iterations"]),
    tuned={"control_cost": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)},
    recipe=COLD,
)
