"""Least squares with a linear operator and a quadratic penalty, of every image on its own.

deepinv's proximal maps stop conjugate gradients by the worst image of a batch, which couples them;
image by image they take as many times longer as there are images.
"""

from __future__ import annotations

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor


def correction(
    physics: LinearPhysics, y: Tensor, x: Tensor, ratio: float, trials: int = 50, tol: float = 1e-3
) -> Tensor:
    r"""The d that minimises :math:`r \|A (x + d) - y\|^2 + \|d\|^2`, by conjugate gradients.

    No image of a batch decides when another is done.

    Args:
        physics: linear, `A` and `A_adjoint`.
        y: measurements, (B, ...).
        x: images, (B, ...).
        ratio: r, not negative.
        trials: iterations, at most.
        tol: of the normal equations' residual, relative to its start.
    """
    # In measurement space, (I + r A A^T) w = y - A x and d = r A^T w: never larger than the image.
    residual = y - physics.A(x)
    w, direction = torch.zeros_like(residual), residual
    square = start = _dot(residual, residual)
    for _ in range(trials):
        active = square > tol**2 * start
        if not active.any():
            break
        image = direction + ratio * physics.A(physics.A_adjoint(direction))
        step = torch.where(active, square / _dot(direction, image).where(active, 1), 0)
        w = w + step * direction
        residual = residual - step * image
        new = _dot(residual, residual)
        direction = residual + torch.where(active, new / square.where(active, 1), 0) * direction
        square = torch.where(active, new, square)
    return ratio * physics.A_adjoint(w)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(dim=1).reshape(-1, *[1] * (a.ndim - 1))
