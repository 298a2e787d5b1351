"""The recipe that stops at the noise, :data:`diffoc.reconstruct.STOPPED`, as a row of tables."""

from __future__ import annotations

from dataclasses import replace

import torch
from azula.denoise import Denoiser
from deepinv.physics import Physics
from torch import Tensor

from diffoc.baselines import Method, method
from diffoc.reconstruct import STOPPED, Problem, reconstruct


@method
def stopped(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int,
    budget: int,
    weight: float = STOPPED.weight,
) -> Tensor:
    """Images (B, ...) by :data:`diffoc.reconstruct.STOPPED`.

    Args:
        noise_std: of the measurements.
        steps: T, at least 1.
        budget: of evaluations, at least 4 T.
        weight: r of the control cost, not negative.

    Raises:
        ValueError: for a smaller budget.
    """
    recipe = replace(STOPPED, steps=steps, budget=budget, weight=weight)
    problem = Problem(physics, y, noise_std)
    return reconstruct(problem, prior, recipe, x=0 * x, generator=generator).x0


METHOD = Method(
    "Ours, stopped",
    stopped,
    lambda task, nfe: {"budget": nfe},
    # At most: the guess and the trials of the line search cost no product.
    lambda settings: (settings["budget"], settings["budget"]),
    tuned={"steps": (5, 10, 20, 30), "weight": (0.3, 3.0)},
    recipe=STOPPED,
)
