r"""The reverse diffusion as a controlled dynamical system, Eqs. 1-4, 17 and 18.

A prior is an :class:`azula.denoise.Denoiser`: it returns the posterior mean
:math:`m(x, t) = E[x_0 \mid x_t = x]` and owns a schedule
:math:`x_t \sim N(\alpha_t x_0, \sigma_t^2 I)`. With the schedule's
:func:`drift_and_diffusion` and the score :math:`(\alpha_t m - x) / \sigma_t^2` (Tweedie), every
first-order sampler is, from time :math:`t` to :math:`s < t`, the same affine function of the state,
of the posterior mean and of a noise that is frozen:

.. math:: h_t(x) = a_t x + b_t \, m(x, t) + c_t \, \varepsilon_t .

The samplers differ in the three numbers only, see :data:`METHODS`.
"""

from collections.abc import Callable, Sequence

import torch
from azula.denoise import Denoiser
from azula.noise import Schedule
from torch import Tensor

from diffoc.checks import (
    as_numbers,
    check_kind,
    check_member,
    check_size,
    check_steps,
    check_tensor,
    check_whole,
    check_within,
    evaluating,
)

MODES = ("input", "output")


def drift_and_diffusion(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns phi(t) and g(t)^2 of the diffusion's SDE, Eq. 1, at times in ]0, 1] of any shape.

    .. math:: dx = \phi(t) \, x \, dt + g(t) \, dw, \quad \phi = \alpha' / \alpha, \quad
              g^2 = 2 \sigma^2 (\sigma' / \sigma - \alpha' / \alpha)

    The schedule maps times to :math:`(\alpha_t, \sigma_t)`, differentiably.
    """
    t = t.detach().requires_grad_()
    with torch.enable_grad():
        alpha, sigma = schedule(t)
        # The scales may be constant: VE's alpha does not depend on t.
        d_alpha, d_sigma = (
            torch.autograd.grad(scale.sum(), t)[0] if scale.requires_grad else torch.zeros_like(t)
            for scale in (alpha, sigma)
        )
    alpha, sigma = alpha.detach(), sigma.detach()
    phi = d_alpha / alpha
    return phi, 2 * sigma**2 * (d_sigma / sigma - phi)


def _euler(schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Eq. 3: x - [phi x - g^2/2 (alpha m - x) / sigma^2] dt
    alpha, sigma = schedule(t)
    phi, g2 = drift_and_diffusion(schedule, t)
    dt = t - s
    half = g2 * dt / (2 * sigma**2)
    return 1 - phi * dt - half, half * alpha, torch.zeros_like(t)


def _ddim(schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # The flow's exact solution if the posterior mean stayed constant from t to s.
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    ratio = sigma_s / sigma_t
    return ratio, alpha_s - ratio * alpha_t, torch.zeros_like(t)


def _ddpm(schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # p(x_s | x_t, x_0) of the forward chain, with x_0 replaced by its posterior mean.
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    kept = (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2
    ratio = sigma_s / sigma_t * kept.sqrt()
    return ratio, alpha_s - ratio * alpha_t, sigma_s * (1 - kept).sqrt()


METHODS: dict[str, Callable[[Schedule, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "euler": _euler,
    "ddim": _ddim,
    "ddpm": _ddpm,
}
"""Step rules: Euler on the probability-flow ODE (Eq. 3), DDIM (arXiv:2010.02502), and the
ancestral step of DDPM (arXiv:2006.11239), which alone uses the noise."""


class ReverseProcess:
    r"""The controlled reverse process :math:`x_{i+1} = h_i(x_i, u_i)`, :math:`i = 0 \dots T-1`.

    Step `i` goes from `times[i]` to `times[i + 1]`; state 0 is noise and state T the image.

    Args:
        denoiser: the prior.
        steps: the number T of steps, uniform in time from 1 to 0, or the T + 1 times
            themselves, decreasing within [0, 1].
        method: a key of :data:`METHODS`.
        mode: "input" for the perturbation :math:`h_i(x + u)` (Eq. 17), "output" for
            :math:`h_i(x) + u` (Eq. 18).
        noise: for "ddpm", the frozen standard normal noise of every step and problem, (T, B, ...),
            as :func:`draw_noise` returns it. Zeros give the mean of each step.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        steps: int | Tensor | Sequence[float],
        method: str = "ddim",
        mode: str = "input",
        noise: Tensor | None = None,
    ) -> None:
        check_kind(Denoiser, denoiser=denoiser)
        check_member(METHODS, method=method)
        check_member(MODES, mode=mode)
        if isinstance(steps, int):
            check_steps(steps=steps)
            steps = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        times = as_numbers("steps", steps).detach().cpu().clone()
        if times.ndim != 1 or len(times) < 2 or not (times.diff() < 0).all():
            raise ValueError("steps is a list of times, which must decrease and be at least 2")
        if times[0] > 1 or times[-1] < 0:
            raise ValueError(f"steps runs from {times[0]:g} to {times[-1]:g}, outside [1, 0]")
        if noise is None and method == "ddpm":
            raise ValueError("noise is missing: method 'ddpm' needs draw_noise(...)")
        if noise is not None:
            if method != "ddpm":
                raise ValueError(f"noise is given, but method {method!r} is deterministic")
            if len(noise) != len(times) - 1:
                raise ValueError(f"noise has {len(noise)} steps, expected {len(times) - 1}")
            check_tensor("noise", noise)
        self.denoiser, self.times = denoiser, times
        self.method, self.mode, self.noise = method, mode, noise
        # Python numbers: they follow every state's dtype and device without a copy.
        self.coefficients: list[tuple[float, ...]] = torch.stack(
            METHODS[method](denoiser.schedule, times[:-1], times[1:]), dim=-1
        ).tolist()

    @property
    def horizon(self) -> int:
        """Returns the number T of steps."""
        return len(self.times) - 1

    def initial_state(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draws x_1 ~ N(0, sigma_1^2 I), (B, ...), in float64 on the generator's device."""
        if self.times[0] < 1:
            raise ValueError(
                f"process begins at time {self.times[0]:g}, where a state is not noise alone: "
                "begin with alpha x_0 + sigma z of an image x_0"
            )
        _, sigma = self.denoiser.schedule(self.times[0])
        return sigma.item() * draw_noise(1, shape, generator)[0]

    def step(self, i: int, x: Tensor, u: Tensor | None = None) -> Tensor:
        """Returns the states at `times[i + 1]`, (B, ...), controlled where `u` is given."""
        if u is not None and self.mode == "input":
            x = x + u
        t = self.times[i].to(dtype=x.dtype, device=x.device)
        y = self.affine(i, x, self.denoiser(x, t).mean)
        return y + u if u is not None and self.mode == "output" else y

    def affine(self, i: int, x: Tensor, mean: Tensor) -> Tensor:
        """Returns the next states without control, from `x` and the posterior mean there."""
        a, b, c = self.coefficients[i]
        y = a * x + b * mean.to(x.dtype)
        return y if self.noise is None else y + c * self.noise[i].to(y.dtype)

    def rollout(self, x: Tensor, controls: Tensor | None = None, start: int = 0) -> Tensor:
        """Returns the trajectory from step `start`, 0 to T, to the image, (T - start + 1, B, ...).

        It begins with x, the states at `times[start]`, (B, ...). Controls are (T - start, B, ...),
        or None for the uncontrolled process.
        """
        check_whole(0, start=start)
        check_within(0, self.horizon, start=start)
        steps = self.horizon - start
        check_tensor("x", x)
        if controls is not None:
            check_size((steps, *x.shape), controls=controls)
        if controls is not None and steps:
            check_tensor("controls", controls)
        self.check_noise(x)
        states = [x]
        with evaluating(self.denoiser):
            for i in range(steps):
                u = None if controls is None else controls[i]
                states.append(self.step(start + i, states[-1], u))
        return torch.stack(states)

    def check_noise(self, x: Tensor) -> None:
        """Raises a ValueError unless the frozen noise, if there is any, is for states like `x`."""
        noise = self.noise
        if noise is not None and (noise.shape[1:] != x.shape or noise.device != x.device):
            raise ValueError(
                f"x has shape {tuple(x.shape)} on {x.device}, but the frozen noise is for "
                f"{tuple(noise.shape[1:])} on {noise.device}"
            )


def draw_noise(steps: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Returns standard normal noise to freeze into an ancestral process, (T, B, ...), in float64.

    It lies on the generator's device. Each problem has its own, and states of any precision use it.
    """
    check_steps(steps=steps)
    check_kind(torch.Generator, generator=generator)
    return torch.randn(
        steps, *shape, generator=generator, dtype=torch.float64, device=generator.device
    )
