"""The controller as a reconstruction model of deepinv."""

import deepinv
import torch
from azula.denoise import Denoiser
from deepinv.physics import Physics
from torch import Tensor

from diffoc.checks import as_numbers, check_kind, check_whole
from diffoc.problem import Problem
from diffoc.recipe import OURS, Recipe
from diffoc.reconstruct import reconstruct


class Reconstructor(deepinv.models.Reconstructor):
    """Maps measurements and a physics to images; `deepinv.test` takes it as it takes its own.

    >>> model = diffoc.Reconstructor(diffoc.load_prior("faces64"))
    >>> x0 = model(y, physics)

    The prior is an azula denoiser on images in [-1, 1], which are those that the physics measures.
    The noise's standard deviation is by default the `sigma` of the physics's Gaussian noise model;
    what is random has a seed.
    """

    def __init__(
        self, prior: Denoiser, recipe: Recipe = OURS, noise_std: float | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.prior, self.recipe, self.noise_std, self.seed = prior, recipe, noise_std, seed

    def forward(self, y: Tensor, physics: Physics, **kwargs: object) -> Tensor:
        """Returns images (B, C, H, W) of measurements `y`, (B, ...)."""
        check_kind(Physics, physics=physics)
        check_whole(0, seed=self.seed)
        noise_std = self.noise_std
        if noise_std is None:
            model = physics.noise_model
            if not isinstance(model, deepinv.physics.GaussianNoise):
                raise ValueError(
                    f"noise_std is None, and physics has a {type(model).__name__} in place of "
                    "GaussianNoise: give the noise's standard deviation"
                )
            sigma = as_numbers("sigma of physics", model.sigma)
            if sigma.min() < sigma.max():
                raise ValueError(
                    "noise_std is None, and physics has noise of several deviations: give one"
                )
            noise_std = sigma.max().item()
        generator = torch.Generator().manual_seed(self.seed)
        problem = Problem(physics, y, noise_std)
        return reconstruct(problem, self.prior, self.recipe, generator=generator).x0
