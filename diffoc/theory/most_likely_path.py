r"""Deterministic control as the most likely path, on the line, by dynamic programming.

For the chain :math:`x_{i+1} \sim N(\mu_i(x), c_i^2)` of DDPM there are three ways back in time from
:math:`V_T = -\log p(y \mid x_0)`:

.. math::
    \text{h-transform} &: -\log E\, e^{-V_{i+1}(\mu_i + c_i \epsilon)} \\
    \text{stochastic control} &: \min_u \big[ u^2 / (2 c_i^2)
        + E\, V_{i+1}(\mu_i + u + c_i \epsilon) \big] \\
    \text{noise-free control} &: \min_u \big[ u^2 / (2 c_i^2) + V_{i+1}(\mu_i + u) \big] .

The third is the first with the integral's largest term for the integral. All three agree if V is
quadratic; only the first two agree with each other, and with :math:`-\log p(y \mid x_t)`, in the
limit of small steps whatever the prior is.
"""

from dataclasses import dataclass

import numpy as np
import torch
from azula.noise import Schedule, VPSchedule
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.special import logsumexp
from torch import Tensor

from diffoc.priors.gaussian import GaussianMixturePrior
from diffoc.priors.mixture import mixture_from_loadings
from diffoc.problems.operators import LinearMeasurement
from diffoc.process import METHODS

GRID = np.linspace(-3.5, 3.5, 701)
"""The states; the values are cubic splines between them, and end there."""


def bimodal_prior(
    centre: float = 1.0, spread: float = 0.2, schedule: Schedule | None = None
) -> GaussianMixturePrior:
    """Returns two normals of equal weight at -centre and centre as a prior of (B, 1), float64."""
    mixture = mixture_from_loadings(
        torch.zeros(2, dtype=torch.float64),
        torch.tensor([[-centre], [centre]], dtype=torch.float64),
        torch.zeros(2, 1, 1, dtype=torch.float64),
        torch.full((2,), spread**2, dtype=torch.float64),
    )
    return GaussianMixturePrior(mixture, schedule or VPSchedule(sigma_min=0.0))


@dataclass(frozen=True)
class Values:
    """The three values' gradients at one time, with their signs turned: estimates of the score.

    They are -dV/dx on :data:`GRID`; the plan is where control without noise takes these states in
    one step.
    """

    t: float
    h_transform: NDArray[np.float64]
    stochastic: NDArray[np.float64]
    noise_free: NDArray[np.float64]
    plan: NDArray[np.float64]


@torch.no_grad()
def values(prior: GaussianMixturePrior, y: float, noise_std: float, steps: int) -> list[Values]:
    """Returns the values of all times but 0, from the first step on, for y = x_0 + s noise.

    The prior is of states (B, 1), and the T = `steps` steps are uniform in time.
    """
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    a, b, c = METHODS["ddpm"](prior.schedule, times[:-1], times[1:])
    states = torch.from_numpy(GRID)[:, None]
    nodes, weights = np.polynomial.hermite_e.hermegauss(61)
    weights = weights / weights.sum()
    h = stochastic = noise_free = (GRID - y) ** 2 / (2 * noise_std**2)
    backward = []
    for i in reversed(range(steps)):
        mean = (a[i] * states + b[i] * prior(states, times[i]).mean)[:, 0].numpy()
        std = c[i].item()

        def expected(V: NDArray[np.float64], at: NDArray[np.float64], std: float = std) -> NDArray:
            return _inside(V, at[:, None] + std * nodes)

        h = -logsumexp(-expected(h, mean), axis=1, b=weights)
        stochastic, _ = _cheapest(expected(stochastic, GRID) @ weights, mean, std)
        noise_free, plan = _cheapest(noise_free, mean, std)
        slopes = [-CubicSpline(GRID, V)(GRID, 1) for V in (h, stochastic, noise_free)]
        backward.append(Values(times[i].item(), slopes[0], slopes[1], slopes[2], plan))
    return backward[::-1]


def planned_ends(path: list[Values], starts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns where control without noise ends from each start, between points linearly."""
    for value in path:
        starts = np.interp(starts, GRID, value.plan)
    return starts


def score_error(
    estimate: NDArray[np.float64], prior: GaussianMixturePrior, y: float, noise_std: float, t: float
) -> float:
    """Returns the root mean square error of an estimate on :data:`GRID`, relative to the score."""
    x = torch.from_numpy(GRID)[:, None]
    time = torch.tensor(t, dtype=torch.float64)
    weight = prior.log_prob(x, time).exp()
    exact = exact_score(prior, y, noise_std, t)
    error = torch.from_numpy(estimate) - exact
    return ((weight @ error.square()) / (weight @ exact.square())).sqrt().item()


def exact_score(prior: GaussianMixturePrior, y: float, noise_std: float, t: float) -> Tensor:
    """Returns d log p(y | x_t) / dx on :data:`GRID`, in closed form."""
    one = torch.ones(1, 1, dtype=torch.float64)
    measurement = LinearMeasurement(one, y * one, noise_std)
    x = torch.from_numpy(GRID)[:, None]
    return prior.conditional_score(x, torch.tensor(t, dtype=torch.float64), measurement)[:, 0]


def _inside(V: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the spline of V at points, those beyond the grid taken for its ends."""
    return CubicSpline(GRID, V)(np.clip(at, GRID[0], GRID[-1]))


def _cheapest(
    V: NDArray[np.float64], mean: NDArray[np.float64], std: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns min_z (z - mean)^2 / (2 std^2) + V(z), and z: by the grid, then Newton's steps."""
    if std == 0:
        return _inside(V, mean), mean
    spline = CubicSpline(GRID, V)
    best = GRID[((GRID - mean[:, None]) ** 2 / (2 * std**2) + V).argmin(1)]
    z, width = best, GRID[1] - GRID[0]
    for _ in range(8):
        curvature = 1 / std**2 + spline(z, 2)
        step = ((z - mean) / std**2 + spline(z, 1)) / np.where(curvature > 0, curvature, np.inf)
        z = np.clip(z - step, np.maximum(best - width, GRID[0]), np.minimum(best + width, GRID[-1]))
    return (z - mean) ** 2 / (2 * std**2) + spline(z), z
