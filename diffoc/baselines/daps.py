r"""Decoupled annealing posterior sampling (DAPS): Zhang et al. 2024, arXiv:2407.01521.

States are images with noise of level :math:`r`, :math:`x_t / \alpha_t` with
:math:`r = \sigma_t / \alpha_t`. At each of T annealing levels: a few Euler steps of the flow lead
to an image :math:`\hat x_0`; Langevin dynamics samples

.. math:: p(x_0 \mid x_t, y) \propto N(x_0; \hat x_0, r^2 I) \, N(y; A(x_0), \tau^2 I) ;

and noise of the next level is added to the sample, none to the last. The prior is never
differentiated.

For a linear task, Langevin's chain of N steps of size :math:`\eta` is Gaussian, and with
:math:`A = U S V^T` each coefficient of V is a chain of its own, so that its end is drawn at once,
from the law that the steps have, in place of the N steps that the released code takes:

.. math::
    h_i = \frac{1}{r^2} + \frac{s_i^2}{\tau^2}, \quad k_i = (1 - \eta h_i)^N, \quad
    \mu_i = \frac{1}{h_i} \Big(\frac{(V^T \hat x_0)_i}{r^2} + \frac{s_i (U^T y)_i}{\tau^2}\Big),
    \quad
    (V^T x_0)_i \sim N\Big(\mu_i + k_i \big((V^T \hat x_0)_i - \mu_i\big),
    \frac{2 (1 - k_i^2)}{h_i (2 - \eta h_i)}\Big).

Levels are those of the released code,

.. math:: r_i = \big(a^{1/7} + \tfrac{i}{n} (b^{1/7} - a^{1/7})\big)^7 ,

for the annealing from the prior's noisiest a to b = 0.1, n = T, with 0 in place of the last; for
the flow from the level to 0.01. Langevin's step falls linearly with the number of the level, to a
hundredth, and is meant to be too short for its noise to fill the whole of :math:`r` where nothing
is measured: as white noise there, which images do not have, it would be more than the network
expects at the next level. That is also why the annealing ends at 0.1, above Langevin's noise, and
why :math:`\tau` is less than the noise of the measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from deepinv.physics import DecomposablePhysics, Physics
from torch import Tensor

from diffoc.baselines import Given, Method, method
from diffoc.baselines.decomposition import decompose
from diffoc.baselines.noise_level import times_of_levels
from diffoc.checks import check_above, check_steps, check_whole
from diffoc.problems.tasks import UnsupportedTask

FLOW_END = 0.01
"""The level at which the flow's result is taken for an image."""


@method
@torch.no_grad()
def daps(
    given: Given,
    *,
    steps: int = 60,
    ode_steps: int = 5,
    langevin_steps: int = 100,
    step_size: float = 1e-4,
    likelihood_std: float = 0.01,
    last_level: float = 0.1,
) -> Tensor:
    r"""Returns images (B, ...) by DAPS; its last settings have to be tuned to the noise.

    Args:
        steps: annealing levels T; 200 in the released code.
        ode_steps: steps of the flow for each of them, at least 1.
        langevin_steps: N, not negative. Operators that are not linear, or not decomposed (see
            :mod:`diffoc.baselines.decomposition`), pay for each.
        step_size: of Langevin at the first level, above 0; unstable from
            :math:`2 / (\|A\|^2 / \tau^2 + 1 / r^2)` on.
        likelihood_std: :math:`\tau`, above 0; 0.01 in the released code.
        last_level: b, above 0.01 and below the prior's noisiest.
    """
    check_steps(steps=steps, ode_steps=ode_steps)
    check_whole(0, langevin_steps=langevin_steps)
    check_above(0, step_size=step_size, likelihood_std=likelihood_std)
    check_above(FLOW_END, last_level=last_level)
    prior, physics, y, x = given.prior, given.physics, given.y, given.x
    alpha, sigma = (scale.item() for scale in prior.schedule(torch.ones((), dtype=torch.float64)))
    if last_level >= sigma / alpha:
        raise ValueError(f"last_level is {last_level}, expected below {sigma / alpha:g}")

    langevin: Langevin
    try:
        langevin = _end_of_chain(decompose(physics, x), y)
    except UnsupportedTask:
        langevin = _chain(physics, y)

    annealing = _polynomial(torch.tensor(sigma / alpha).double(), last_level, steps)[:-1]
    flows = _polynomial(annealing, FLOW_END, ode_steps)
    times = times_of_levels(prior.schedule, flows)
    scales = prior.schedule(times)[0].tolist()
    state = x / alpha
    for i, level in enumerate(annealing.tolist()):
        estimate = state
        # The flow of images with noise is a straight line, for as long as their mean is constant.
        for t, scale, (now, then) in zip(
            times[i].to(x), scales[i], pairwise(flows[i].tolist()), strict=False
        ):
            mean = prior(scale * estimate, t).mean
            estimate = mean + then / now * (estimate - mean)
        rate = step_size * (1 - 0.99 * i / steps)
        x0 = langevin(estimate, level, likelihood_std, rate, langevin_steps, given.noise)
        if i + 1 < steps:
            state = x0 + annealing[i + 1].item() * given.noise()
    return x0


def _polynomial(first: Tensor, last: float, steps: int) -> Tensor:
    """Returns levels from `first` (...) to `last`, (..., steps + 1), uniform in their 7th root."""
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    root = first[..., None] ** (1 / 7)
    return (root + share * (last ** (1 / 7) - root)) ** 7


Langevin = Callable[[Tensor, float, float, float, int, Callable[[], Tensor]], Tensor]
"""From an estimate, r, tau, the size and number of steps, and a source of noise to a sample."""


def _chain(physics: Physics, y: Tensor) -> Langevin:
    """Goes step by step, for any operator that can be differentiated."""

    def gradient(x0: Tensor) -> Tensor:
        with torch.enable_grad():
            x0 = x0.detach().requires_grad_()
            return torch.autograd.grad((physics.A(x0) - y).square().sum() / 2, x0)[0]

    def langevin(
        estimate: Tensor, r: float, tau: float, rate: float, steps: int, draw: Callable[[], Tensor]
    ) -> Tensor:
        x0 = estimate
        for _ in range(steps):
            descent = (x0 - estimate) / r**2 + gradient(x0) / tau**2
            x0 = x0 - rate * descent + (2 * rate) ** 0.5 * draw()
        return x0

    return langevin


def _end_of_chain(svd: DecomposablePhysics, y: Tensor) -> Langevin:
    measured = svd.U_adjoint(y)
    # In single precision 1 - k^2 is lost where neither measurements nor level say anything.
    singular = svd.mask.double()

    def langevin(
        estimate: Tensor, r: float, tau: float, rate: float, steps: int, draw: Callable[[], Tensor]
    ) -> Tensor:
        h = 1 / r**2 + singular**2 / tau**2
        k = (1 - rate * h) ** steps
        std = (2 * (1 - k**2) / (h * (2 - rate * h))).sqrt()
        of_estimate, of_measured = k + (1 - k) / (h * r**2), (1 - k) * singular / (h * tau**2)
        scales = [scale.to(estimate) for scale in (of_estimate, of_measured, std)]
        parts = (svd.V_adjoint(estimate), measured, draw())
        return svd.V(sum(scale * part for scale, part in zip(scales, parts, strict=True)))

    return langevin


def _settings(task: str, nfe: int) -> dict:
    # The released code has 200 levels of five steps. Where the budget is less, levels come first,
    # which on tuning faces is worth some 5 dB of random inpainting at 100 evaluations.
    ode_steps = min(5, max(1, nfe // 100))
    return {"steps": max(1, nfe // ode_steps), "ode_steps": ode_steps}


METHOD = Method(
    "DAPS",
    daps,
    _settings,
    lambda settings: (settings["steps"] * settings["ode_steps"], 0),
    tuned={"likelihood_std": (0.01, 0.02, 0.03, 0.05), "last_level": (0.05, 0.1)},
    smallest={"last_level": 0.013},
)
