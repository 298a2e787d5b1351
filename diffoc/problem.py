"""What was measured: an operator, the measurements and their noise."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffoc.checks import (
    check_above,
    check_alike,
    check_kind,
    check_size,
    check_tensor,
    one_line,
    shown,
)


@dataclass(frozen=True)
class Problem:
    """A measurement y = A(x_0) + noise, and what is known of it.

    Attributes:
        physics: a deepinv physics, or any differentiable callable A that maps images (B, C, H, W)
            to measurements (B, ...), no image having a part in another's.
        y: the measurements, (B, ...), finite.
        noise_std: the standard deviation of the Gaussian noise, above 0.
        task: one of :data:`diffoc.recipe.TASKS`, or of the recipe's own, for recipes that were
            tuned for it; None for any other problem.

    Raises:
        TypeError: if `physics` cannot be called, or `y` is no tensor.
        ValueError: if `y` or `noise_std` is out of its range.
    """

    physics: Any
    y: Tensor
    noise_std: float
    task: str | None = None

    def __post_init__(self) -> None:
        if not callable(self.physics) or isinstance(self.physics, type):
            raise TypeError(
                f"physics is {shown(self.physics)}, expected a deepinv physics or a callable"
            )
        if self.task is not None:
            check_kind(str, task=self.task)
        check_tensor("y", self.y)
        if self.y.ndim < 2:
            raise ValueError(
                f"y has shape {tuple(self.y.shape)}, expected (B, ...): give y[:, None]"
            )
        check_above(0, noise_std=self.noise_std)

    @property
    def operator(self) -> Callable[[Tensor], Tensor]:
        """Returns A, without noise."""
        return self.physics.A if is_physics(self.physics, "Physics") else self.physics

    @property
    def linear(self) -> bool:
        """Returns whether A is known to be linear, with an adjoint."""
        return is_physics(self.physics, "LinearPhysics")

    @property
    def noise_level(self) -> Tensor:
        """Returns the root mean square of each true image's residual, (B,).

        Where inpainting has dropped pixels, and `y` is zero, there is no noise.
        """
        mask = self.physics.mask.to(self.y) if is_physics(self.physics, "Inpainting") else 1
        noisy = (self.y != 0) | (mask * torch.ones_like(self.y) != 0)
        share = noisy.to(self.y).flatten(1).mean(dim=1)
        return (self.noise_std * share.sqrt().double()).to(self.y)

    def residual_over_noise(self, x0: Tensor) -> Tensor:
        """Returns the root mean square of A(x_0) - y over the noise's, (B,)."""
        measured = self.operator(x0)
        check_size(self.y.shape, **{"what physics makes of x0": measured})
        residual = measured - self.y
        return residual.flatten(1).square().mean(dim=1).sqrt() / self.noise_level

    def explained(self, x0: Tensor) -> Tensor:
        """Returns which images have a residual as small as the noise, (B,) bool."""
        return self.residual_over_noise(x0) < 1


def is_physics(value: object, *kinds: str) -> bool:
    """Returns whether a value is an object of one of these classes of `deepinv.physics`."""
    # Whoever has a physics has imported deepinv; who has none need not wait for it.
    physics = sys.modules.get("deepinv.physics")
    return physics is not None and isinstance(value, tuple(getattr(physics, k) for k in kinds))


def check_operator(problem: Problem, x: Tensor) -> None:
    """Raises an error unless the operator measures each of the images, which are like `x`, alone.

    It is tried on random images, the others of a batch being changed for a second trial.
    """
    check_alike(y=problem.y, x=x)
    check_tensor("y / noise_std, squared,", (problem.y / problem.noise_std).square())
    y, images = problem.y, tuple(x.shape)
    generator = torch.Generator().manual_seed(0)
    tried = (1.8 * torch.rand(images, generator=generator) - 0.9).to(x).requires_grad_()
    changes = torch.ones(len(x), *[1] * (x.ndim - 1)).to(x)
    changes[1:] = -0.5
    try:
        with torch.enable_grad():
            measured, again = problem.operator(tried), problem.operator(tried.detach() * changes)
    except Exception as error:  # an operator of the user's fails anywhere
        raise ValueError(
            f"physics cannot measure images of shape {images}, the prior's: "
            f"{one_line(error) or type(error).__name__}"
        ) from error
    check_kind(Tensor, **{"what physics makes": measured})
    if measured.shape != y.shape:
        raise ValueError(
            f"y has shape {tuple(y.shape)}, but physics makes {tuple(measured.shape)} of images of "
            f"shape {images}"
        )
    check_alike(y=y, **{"what physics makes": measured})
    check_tensor("what physics makes of images in [-1, 1]", measured)
    largest = measured[0].abs().max().item()
    if not torch.allclose(measured[0], again[0], rtol=1e-3, atol=1e-3 * largest):
        raise ValueError(
            "physics measures an image otherwise beside other images, or each time otherwise: it "
            "must mix none, and add no noise"
        )
    if not measured.requires_grad:
        raise ValueError("physics makes y without derivatives in the image: leave out its detach()")
    weights = torch.linspace(1, 2, measured.numel()).to(measured).reshape(y.shape)
    (slope,) = torch.autograd.grad(measured, tried, weights, allow_unused=True)
    if slope is None or not slope.flatten(1).any(dim=1).all():
        raise ValueError(
            "physics makes y that does not change with each image, as where a mask keeps no pixel"
        )
    if problem.linear and (back := tuple(problem.physics.A_adjoint(y).shape)) != images:
        raise ValueError(
            f"physics has an adjoint that makes {back} of y, where images have shape {images}: "
            "the operator does not fit images of this size"
        )
