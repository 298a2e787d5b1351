r"""Greedy controls: each looks one step ahead, and is a first guess for the plan of all of them.

By Theorem 4.3 guidance with the likelihood of Tweedie's estimate is a controller that looks one
step ahead. For a linear operator with Gaussian noise that step has a closed form: where the prior
expects the image :math:`m(x_t, t)`, to some :math:`\rho_t`, the measurements move it by

.. math:: \delta_t = \arg\min_d \frac{\|A (m + d) - y\|^2}{2 s^2} + \frac{\|d\|^2}{2 \rho_t^2},
          \qquad \rho_t^2 = \Big(\frac{\alpha_t^2}{\sigma_t^2} + \frac{1}{v}\Big)^{-1}

(:math:`\rho_t^2` is the posterior variance of a pixel whose prior has variance v), and a step that
is affine in m moves the next state by :math:`b_t \delta_t`, which in input mode is the next
control. The prior is evaluated once a step, and never differentiated.

Neighbouring pixels are wrong together, because images are smooth. So v may be a covariance, whose
variances S(k) of cosines fall with the frequency as those of images do (:func:`image_spectrum`);
then :math:`\rho_t^2` is one number for each frequency, and a measured pixel moves those around it.
So are the colours of a pixel, because images are mostly grey (:data:`COLOURS`). Free Hunch
(Rissanen et al. 2024, arXiv:2410.11149) has a covariance of cosines as well, and learns more of it
along the way.

The closed form is solved by conjugate gradients of its own: deepinv's proximal maps stop theirs by
the worst image of a batch, which couples its images. Smooth errors make that system
ill-conditioned. A blur with a symmetric kernel nearly multiplies every cosine by a number, and a
mask keeps some pixels of a system that does; so these two have preconditioners. A Gaussian blur
then needs ten iterations where 200 did not do, a motion blur up to 170, a box 40 to 70 instead of
1000, a random mask 190 instead of 350. Of other operators, 4x super-resolution needs 250 with the
noise 0.05, and with 0.01 nearly the 1000 at which iterations end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffoc.checks import check_above, check_at_least, check_size, check_tensor, evaluating
from diffoc.problem import is_physics
from diffoc.process import ReverseProcess

if TYPE_CHECKING:
    from deepinv.physics import LinearPhysics

Linear = Callable[[Tensor], Tensor]

PIXEL_VARIANCE = 0.25
"""v: half the range of an image in [-1, 1] as a standard deviation."""

COLOURS = {(1, 1, 1): 0.90, (1, 0, -1): 0.07, (1, -2, 1): 0.03}
"""Grey, red against blue, green against both; and their shares of the variance of RGB images.

They are near the shares in the errors of the prior `faces64` at much noise, 0.90, 0.07 and 0.02;
its training faces have 0.93, 0.06 and 0.01.
"""


def image_spectrum(shape: Sequence[int], smoothness: float) -> Tensor:
    r"""Returns the variances S(k) of an image's cosine coefficients, (H, W), in float64.

    .. math:: S(k) \propto (1 + |k|^2)^{-\beta/2}

    k counts half waves along either side of (H, W), :math:`\beta \ge 0` is the smoothness, and the
    mean is the variance v of a pixel. White noise has 0, photographs have about 2 (Field 1987,
    doi:10.1364/JOSAA.4.002379).
    """
    vertical, horizontal = (torch.arange(length, dtype=torch.float64) for length in shape)
    spectrum = (1 + vertical[:, None] ** 2 + horizontal**2) ** (-smoothness / 2)
    return PIXEL_VARIANCE * spectrum / spectrum.mean()


def cosines(length: int) -> Tensor:
    """Returns the orthonormal cosine transform of a line, (length, length), in float64."""
    k = torch.arange(length, dtype=torch.float64)
    waves = torch.cos(math.pi / length * k[:, None] * (k + 0.5)) * (2 / length) ** 0.5
    waves[0] /= 2**0.5
    return waves


@torch.no_grad()
def greedy_controls(
    process: ReverseProcess,
    physics: LinearPhysics,
    y: Tensor,
    x: Tensor,
    noise_std: float,
    smoothness: float = 0.0,
    coloured: bool = False,
) -> Tensor:
    """Returns the controls (T, B, ...) of a process in input mode; T evaluations, and no product.

    The physics is linear and has `A` and `A_adjoint`; measurements y and initial states x are
    (B, ...). The last correction would act on the image itself, which no control of this mode does.
    The smoothness is that of :func:`image_spectrum`; other than 0 it is for images (B, C, H, W).
    Coloured errors are those of :data:`COLOURS`, for images (B, 3, H, W).
    """
    check_above(0, noise_std=noise_std)
    check_at_least(0, smoothness=smoothness)
    if process.mode != "input":
        raise ValueError(f"process is in {process.mode} mode, expected input")
    check_tensor("x", x)
    check_tensor("y", y)
    try:
        expected = physics.A(x).shape
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"x has shape {tuple(x.shape)}, which physics cannot take") from error
    check_size(expected, y=y)
    correct = image_correction(physics, y, x, noise_std, smoothness, coloured)
    controls, u = [], torch.zeros_like(x)
    for i in range(process.horizon):
        controls.append(u)
        x = x + u
        t = process.times[i].to(x)
        alpha, sigma = process.denoiser.schedule(t)
        with evaluating(process.denoiser):
            mean = process.denoiser(x, t).mean.to(x.dtype)
        _, b, _ = process.coefficients[i]
        u = b * correct(mean, (alpha / sigma) ** 2)
        x = process.affine(i, x, mean)
    return torch.stack(controls)


def image_correction(
    physics: LinearPhysics,
    y: Tensor,
    x: Tensor,
    noise_std: float,
    smoothness: float = 0.0,
    coloured: bool = False,
) -> Callable[[Tensor, float | Tensor], Tensor]:
    r"""Returns the function of an estimate m and of a number k that returns

    .. math:: \delta = \arg\min_d \frac{\|A (m + d) - y\|^2}{s^2} + d^T (k + V^{-1}) d

    with the covariance V of :func:`image_spectrum`, and where `coloured` of :data:`COLOURS`; for
    :math:`k = \alpha_t^2 / \sigma_t^2` that is the module's. Estimates have the shape of x,
    (B, ...), with a smoothness above 0 (B, C, H, W). Measurements y are (B, ...), and the noise s
    is above 0.
    """
    if smoothness and x.ndim != 4:
        raise ValueError(f"smoothness is {smoothness}, but x has shape {tuple(x.shape)}: take 0")
    if coloured and (x.ndim != 4 or x.shape[1] != 3):
        raise ValueError(f"coloured is True, but x has shape {tuple(x.shape)}: take False")
    errors = _errors(x, smoothness, coloured, physics, y.shape == x.shape)
    # Smooth errors make the system ill-conditioned, and what has not converged is rounding.
    trials, tol = (1000, 1e-5) if smoothness or coloured else (50, 1e-3)

    def correct(mean: Tensor, known: float | Tensor) -> Tensor:
        covariance, precondition = errors(known, noise_std)
        return correction(physics, y, mean, covariance, trials, tol, precondition)

    return correct


def _errors(
    x: Tensor, smoothness: float, coloured: bool, physics: LinearPhysics, alike: bool
) -> Callable[[float | Tensor, float], tuple[Linear, Linear]]:
    r"""Returns what makes :math:`C = \rho^2 / s^2`, for images like x, of snr squared and s.

    With it comes an approximate inverse of :math:`I + A C A^T`, where measurements are like x, as
    `alike` says. For blurs it is that of the matrix's diagonal in cosines. For a mask it is
    :math:`M^{-1} (m + C)^{-1} M^{-1}` between the pixels that are kept, of weights M, where m is
    the mean of :math:`M^{-2}`. For all others it is the unit matrix.
    """
    if not smoothness and not coloured:
        return lambda known, s: (lambda d: d / ((known + 1 / PIXEL_VARIANCE) * s**2), _unchanged)
    rows, columns = (cosines(length).to(x) for length in x.shape[-2:])
    blurs = alike and is_physics(physics, "Blur", "BlurFFT")
    masks = alike and is_physics(physics, "Inpainting")
    powers = _powers(physics.filter, x.shape[-2:]).mean(dim=1, keepdim=True).to(x) if blurs else 0
    if masks:
        mask = physics.mask.to(x).expand(x.shape)
        # A pixel whose weight is far below the largest is hardly known, and its M^-1 is large.
        kept = mask.abs() > 0.1 * mask.abs().amax(dim=(1, 2, 3), keepdim=True)
        inverse = torch.where(kept, 1 / mask, 0)
        mean = _dot(inverse, inverse) / _dot(kept, kept).clamp(min=1)
    axes, shares = torch.eye(x.shape[1]).to(x), torch.ones(x.shape[1])
    if coloured:
        axes = torch.nn.functional.normalize(torch.tensor([*COLOURS]).to(x))
        shares = 3 * torch.tensor([*COLOURS.values()])
    spectrum = shares.to(x)[:, None, None] * image_spectrum(x.shape[-2:], smoothness).to(x)

    def multiply(gain: Tensor) -> Linear:
        def product(d: Tensor) -> Tensor:
            waves = torch.einsum("kc,bchw->bkhw", axes, rows @ d @ columns.mT)
            return rows.mT @ torch.einsum("kc,bkhw->bchw", axes, gain * waves) @ columns

        return product

    def covariance(known: float | Tensor, s: float) -> tuple[Linear, Linear]:
        gain = 1 / ((known + 1 / spectrum) * s**2)
        if blurs:
            return multiply(gain), multiply(1 / (1 + powers * gain))
        if masks:
            # Not I - A C (I + C)^-1 A^T: where C is large, that is lost in rounding.
            within = multiply(1 / (mean + gain))
            return multiply(gain), lambda w: torch.where(kept, inverse * within(inverse * w), w)
        return multiply(gain), _unchanged

    return covariance


def _unchanged(d: Tensor) -> Tensor:
    return d


def _powers(kernels: Tensor, shape: torch.Size) -> Tensor:
    """Returns by how much blurs multiply the squares of cosines, (..., H, W).

    A cosine has two waves, one along each diagonal; a kernel's power is the mean over both.
    """
    height, width = shape
    power = torch.fft.fft2(kernels.double(), s=(2 * height, 2 * width)).abs().square()
    mirrored = power.flip(-2).roll(1, -2)
    return (power + mirrored)[..., :height, :width] / 2


def correction(
    physics: LinearPhysics,
    y: Tensor,
    x: Tensor,
    ratio: float | Linear,
    trials: int = 50,
    tol: float = 1e-3,
    precondition: Linear = _unchanged,
) -> Tensor:
    r"""Returns the d that minimises :math:`\|A (x + d) - y\|^2 + d^T C^{-1} d`.

    C is the ratio times the unit matrix, for a number >= 0, or a function that multiplies images by
    it. There are at most `trials` iterations of conjugate gradients, fewer for an image where the
    residual of :math:`I + A C A^T` is `tol` times what it was at the start; `precondition`
    multiplies measurements by an approximate inverse of that matrix, symmetric and positive.
    """
    covariance: Linear = ratio if callable(ratio) else lambda d: ratio * d
    # In measurement space, (I + A C A^T) w = y - A x and d = C A^T w: never larger than the image.
    residual = y - physics.A(x)
    w, direction = torch.zeros_like(residual), precondition(residual)
    start, square = _dot(residual, residual), _dot(residual, direction)
    for _ in range(trials):
        active = _dot(residual, residual) > tol**2 * start
        if not active.any():
            break
        image = direction + physics.A(covariance(physics.A_adjoint(direction)))
        step = torch.where(active, square / _dot(direction, image).where(active, 1), 0)
        w = w + step * direction
        residual = residual - step * image
        better = precondition(residual)
        new = _dot(residual, better)
        direction = better + torch.where(active, new / square.where(active, 1), 0) * direction
        square = torch.where(active, new, square)
    return covariance(physics.A_adjoint(w))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(dim=1).reshape(-1, *[1] * (a.ndim - 1))
