"""The default recipe of the controller, :data:`diffoc.reconstruct.OURS`, as a row of the tables."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from azula.denoise import Denoiser
from deepinv.physics import Physics
from torch import Tensor

from diffoc.baselines import Method, method
from diffoc.reconstruct import OURS, Problem, constant, reconstruct, snr_squared


@method
def ours(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    budget: int,
    steps: int = OURS.steps,
    weight: float = OURS.weight,
    weighted: bool = True,
    in_units: bool = True,
    stopped: bool = False,
) -> Tensor:
    r"""Images (B, ...) by :data:`diffoc.reconstruct.OURS`.

    Args:
        noise_std: of the measurements.
        budget: of evaluations by each image, at least 4 T; the last iteration's line search may go
            beyond it.
        steps: T, at least 1.
        weight: w, positive.
        weighted: whether the cost is :math:`w \alpha_i^2 / \sigma_i^2`; without, it is w.
        in_units: whether L-BFGS measures in units of the image; without, in those of the state.
        stopped: whether the discrepancy principle ends it all the same. These three are there to
            see what each is worth, see the grid `parts` of the ablations.

    Raises:
        ValueError: for a smaller budget, or a weight that is not positive.
    """
    if not 0 < weight < math.inf:
        raise ValueError(f"weight is {weight}, expected finite and positive")
    recipe = replace(
        OURS,
        budget=budget,
        steps=steps,
        weight=weight,
        weights=snr_squared if weighted else constant,
        preconditioned=in_units,
        stopped=stopped,
    )
    problem = Problem(physics, y, noise_std)
    return reconstruct(problem, prior, recipe, x=0 * x, generator=generator).x0


METHOD = Method(
    "Ours",
    ours,
    lambda task, nfe: {"budget": nfe},
    # At most: the guess and the trials of the line search cost no product.
    lambda settings: (settings["budget"], settings["budget"]),
    tuned={"weight": (1.0, 4.0, 16.0, 64.0), "steps": (15, 30)},
    recipe=OURS,
)
