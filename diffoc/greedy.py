r"""Greedy controls: each looks one step ahead, and is a first guess for the plan of all of them.

By Theorem 4.3 guidance with the likelihood of Tweedie's estimate is a controller that looks one
step ahead. For a linear operator with Gaussian noise that step has a closed form: where the prior
expects the image :math:`m(x_t, t)`, to some :math:`\rho_t`, the measurements move it by

.. math:: \delta_t = \arg\min_d \frac{\|A (m + d) - y\|^2}{2 s^2} + \frac{\|d\|^2}{2 \rho_t^2},
          \qquad \rho_t^2 = \Big(\frac{\alpha_t^2}{\sigma_t^2} + \frac{1}{v}\Big)^{-1}

(:math:`\rho_t^2` is the posterior variance of a pixel whose prior has variance v), and a step that
is affine in m moves the next state by :math:`b_t \delta_t`, which in input mode is the next
control. The prior is evaluated once a step, and never differentiated.

The closed form is solved by conjugate gradients of its own: deepinv's proximal maps stop theirs by
the worst image of a batch, which couples its images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffoc.checks import check_above, check_size, check_tensor, evaluating
from diffoc.process import ReverseProcess

if TYPE_CHECKING:
    from deepinv.physics import LinearPhysics

PIXEL_VARIANCE = 0.25
"""v: half the range of an image in [-1, 1] as a standard deviation."""


@torch.no_grad()
def greedy_controls(
    process: ReverseProcess, physics: LinearPhysics, y: Tensor, x: Tensor, noise_std: float
) -> Tensor:
    """Returns the controls (T, B, ...) of a process in input mode; T evaluations, and no product.

    The physics is linear and has `A` and `A_adjoint`; measurements y and initial states x are
    (B, ...). The last correction would act on the image itself, which no control of this mode does.
    A ValueError refuses a `noise_std` that is not above 0, `y` or `x` of another shape or not
    finite, and a process in output mode.
    """
    check_above(0, noise_std=noise_std)
    if process.mode != "input":
        raise ValueError(f"process is in {process.mode} mode, expected input")
    check_tensor("x", x)
    check_tensor("y", y)
    try:
        expected = physics.A(x).shape
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"x has shape {tuple(x.shape)}, which physics cannot take") from error
    check_size(expected, y=y)
    controls, u = [], torch.zeros_like(x)
    for i in range(process.horizon):
        controls.append(u)
        x = x + u
        t = process.times[i].to(x)
        alpha, sigma = process.denoiser.schedule(t)
        with evaluating(process.denoiser):
            mean = process.denoiser(x, t).mean.to(x.dtype)
        variance = 1 / ((alpha / sigma) ** 2 + 1 / PIXEL_VARIANCE)
        _, b, _ = process.coefficients[i]
        u = b * correction(physics, y, mean, (variance / noise_std**2).item())
        x = process.affine(i, x, mean)
    return torch.stack(controls)


def correction(
    physics: LinearPhysics, y: Tensor, x: Tensor, ratio: float, trials: int = 50, tol: float = 1e-3
) -> Tensor:
    r"""Returns the d that minimises :math:`r \|A (x + d) - y\|^2 + \|d\|^2`, r >= 0.

    Measurements y and images x are (B, ...). There are at most `trials` iterations of conjugate
    gradients, fewer where the normal equations' residual is `tol` times what it was at the start.
    No image of a batch decides when another is done.
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
