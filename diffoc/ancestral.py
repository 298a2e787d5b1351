r"""The process and the control cost of the authors' released code, which are not the paper's.

The paper steps along the probability-flow ODE (Eq. 3). The code that its authors released
(github.com/lihenryhfl/diffusion_optimal_control) takes ancestral steps of DDPM with frozen noise,
and clips the estimate of the image to [-1, 1] in each of them:

.. math:: x_{i+1} = a_i x + b_i \, \mathrm{clip}(m(x)) + c_i \, \varepsilon_i , \quad x = x_i + u_i.

The levels of noise are those of DDPM's 1000 linear steps, respaced by even strides. With them
:class:`AncestralProcess` is to :class:`diffoc.process.ReverseProcess` what the released process is
to the paper's: the controller takes either.

Source: Ho et al. 2020 (arXiv:2006.11239); Nichol & Dhariwal 2021 (arXiv:2102.09672) for respacing
and for the learned variance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from azula.denoise import Denoiser, Posterior
from torch import Tensor

from diffoc.process import METHODS, ReverseProcess, times_of_levels

LEVELS = 1000
"""Of the chain that is respaced."""


def respaced_levels(steps: int) -> Tensor:
    r"""The levels :math:`\bar\alpha` of T points of DDPM's chain, the least noisy first, float64.

    .. math:: \bar\alpha_j = \prod_{i \le j} (1 - \beta_i), \qquad
              j = \mathrm{round}(999 \, k / (T - 1)), \quad k = 0 \dots T - 1

    with :math:`\beta` linear from 0.0001 to 0.02.

    Args:
        steps: T, 2 to 1000.

    Raises:
        ValueError: if it is out of its range.
    """
    if not 2 <= steps <= LEVELS:
        raise ValueError(f"steps is {steps}, expected 2 to {LEVELS}")
    bar = (1 - torch.linspace(1e-4, 0.02, LEVELS, dtype=torch.float64)).cumprod(0)
    return bar[[round((LEVELS - 1) / (steps - 1) * k) for k in range(steps)]]


class AncestralProcess(ReverseProcess):
    r"""The released code's process: T - 1 ancestral steps with frozen noise and a clipped image.

    Its T points in time give T - 1 steps, the first of which is for the second noisiest level: the
    noisiest is never used. The last step returns the clipped image and adds no noise. Controls are
    added to the state before the step (input mode, Eq. 17), and the state has unit variance at
    every level whatever the prior's schedule: :attr:`scales` converts.

    Args:
        denoiser: the prior, an azula denoiser.
        steps: T as the released code counts, 2 to 1000; the horizon is T - 1.
        noise: the frozen standard normal noise, (T - 1, B, ...), see
            :func:`diffoc.process.draw_noise`; the last step's is not used.
        learned_variance: whether the variance of a step is that of the prior's own head, between
            the smallest and the largest possible one; by default it is the smallest. The prior must
            then be an azula `AblatedDenoiser` with `learn_var`, whose posterior has the variance
            :math:`(1 - \bar\alpha) e^v` for the head's output v.

    Raises:
        ValueError: if an argument is out of its range, the noise does not fit, or the prior's
            schedule ends below the noisiest level; in a step, if the prior has no such head.
    """

    noise: Tensor

    def __init__(
        self, denoiser: Denoiser, steps: int, noise: Tensor, learned_variance: bool = False
    ) -> None:
        bar = respaced_levels(steps)[:-1].flip(0)
        ratios = (1 / bar - 1).sqrt()
        alpha, sigma = denoiser.schedule(torch.ones((), dtype=torch.float64))
        if ratios[0] > sigma / alpha:
            raise ValueError(
                f"steps is {steps}, which begins at {ratios[0]:.4g} times as much noise as image, "
                f"but the prior's schedule ends at {sigma / alpha:.4g}: take fewer steps, or "
                "another schedule for the prior"
            )
        times = torch.cat([times_of_levels(denoiser.schedule, ratios), torch.zeros(1)])
        super().__init__(denoiser, times, "ddpm", "input", noise)
        # After the last step nothing is noise.
        bar = torch.cat([bar, torch.ones(1)])

        def schedule(i: Tensor) -> tuple[Tensor, Tensor]:
            return bar[i].sqrt(), (1 - bar[i]).sqrt()

        first = torch.arange(steps - 1)
        self.coefficients = torch.stack(
            METHODS["ddpm"](schedule, first, first + 1), dim=-1
        ).tolist()
        alpha, sigma = denoiser.schedule(times[:-1])
        self.scales: list[float] = (alpha.square() + sigma.square()).sqrt().tolist()
        self.learned_variance = learned_variance
        self._levels = (1 - bar[:-1]).tolist()
        self._largest = (1 - bar[:-1] / bar[1:]).sqrt().tolist()

    def initial_state(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draws a state from N(0, I), float64 on the generator's device; `shape` is (B, ...)."""
        return torch.randn(
            *shape, generator=generator, dtype=torch.float64, device=generator.device
        )

    def step(self, i: int, x: Tensor, u: Tensor | None = None) -> Tensor:
        """One step, see :meth:`diffoc.process.ReverseProcess.step`."""
        if u is not None:
            x = x + u
        t = self.times[i].to(dtype=x.dtype, device=x.device)
        posterior = self.denoiser(self.scales[i] * x, t)
        a, b, c = self.coefficients[i]
        std = self._learned_std(i, posterior) if self.learned_variance and c else c
        y = a * x + b * posterior.mean.clamp(-1, 1)
        return y + std * self.noise[i].to(y.dtype)

    def _learned_std(self, i: int, posterior: Posterior) -> Tensor:
        """Of step i: the smallest for v = -1, the largest for 1, between them by logarithms."""
        _, _, smallest = self.coefficients[i]
        # Without the head azula's networks have one variance for all pixels.
        if getattr(posterior, "var", posterior.mean[:0]).shape != posterior.mean.shape:
            raise ValueError(
                "learned_variance is True, but the prior has no head for the variance: see "
                "load_prior(..., learned_variance=True)"
            )
        v = (posterior.var / self._levels[i]).log()
        return smallest * (self._largest[i] / smallest) ** ((v + 1) / 2)


def released_weights(steps: int, scale: float = 1e-6) -> Tensor:
    r"""Weights of the control cost as in the authors' released code, (T - 1,), float64.

    .. math:: r_i = \frac{s}{dt^2} \sqrt{\frac{1 - \beta_i}{\beta_i + 10^{-7}}}, \qquad
              dt = \frac{1 - 10^{-3}}{T}

    :math:`\beta_i` is one of DDPM's 1000 steps, at the time :math:`t_i` of the T from 1 to 0.001.
    What its root is called there is a signal-to-noise ratio, which would have the product of all
    steps in place of the one: see :func:`diffoc.solve.snr_weights`.

    Args:
        steps: T, at least 2.
        scale: s.

    Raises:
        ValueError: if there are fewer.
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}, expected at least 2")
    # In single precision, as there: the index is a product that is cut off.
    index = (torch.linspace(1, 1e-3, steps)[:-1] * (LEVELS - 1)).long()
    beta = torch.linspace(1e-4, 0.02, LEVELS, dtype=torch.float64)[index]
    dt = (1 - 1e-3) / steps
    return scale / dt**2 * ((1 - beta) / (beta + 1e-7)).sqrt()
