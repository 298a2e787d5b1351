r"""What a checked statement is, and the linear-Gaussian setting, where most of them are checked.

One Gaussian prior, one linear measurement with Gaussian noise, and the LQR problem of its exact
reverse kernels: what the identities and the theory notebooks are tried on.
"""

from dataclasses import dataclass

import torch
from azula.noise import VPSchedule
from torch import Tensor

from diffoc.costs import GaussianLikelihood
from diffoc.priors.gaussian import GaussianPrior
from diffoc.priors.mixture import GaussianMixture, MixturePosterior
from diffoc.problems.operators import LinearMeasurement
from diffoc.system import ControlProblem

Kernel = tuple[Tensor, Tensor, Tensor]
"""F (n, n), b (n,) and C (n, n) of one step."""

EXACT = 1e-12
"""The bound on the relative error of what is equal in exact arithmetic."""

QUADRATURE = 1e-8
"""The bound on the relative error of what is equal but for two different quadratures."""

SLOPE = 0.05
"""The bound on the relative deviation of a fitted slope from the theory's."""


@dataclass(frozen=True)
class Identity:
    """One statement, the setting where it was tried, its relative error and the bound of that."""

    name: str
    setting: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        """Returns whether the error is within the bound (a NaN is not)."""
        return self.error <= self.bound


@dataclass(frozen=True)
class LinearGaussian:
    """A Gaussian prior with one linear Gaussian measurement of a state drawn from it."""

    prior: GaussianPrior
    measurement: LinearMeasurement
    likelihood: GaussianLikelihood


def linear_gaussian(
    n: int = 8, m: int = 4, noise_std: float = 0.1, seed: int = 0
) -> LinearGaussian:
    """Returns a random setting of n dimensions and m measurements, at least 1 of each."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    root = draw(n, n) / n**0.5
    covariance = root @ root.mT + 0.1 * torch.eye(n, dtype=torch.float64)
    # Without residual noise at t = 0 the final state is x_0 itself, which is what y measures.
    prior = GaussianPrior(draw(n), covariance, VPSchedule(sigma_min=0.0))
    A = draw(m, n) / n**0.5
    x_0 = prior.mean + torch.linalg.cholesky(covariance) @ draw(n)
    y = (A @ x_0 + noise_std * draw(m)).unsqueeze(0)
    return LinearGaussian(
        prior,
        LinearMeasurement(A, y, noise_std),
        GaussianLikelihood(lambda x: x @ A.mT, y, noise_std),
    )


def standard_normal() -> tuple[GaussianPrior, Tensor]:
    """Returns the prior N(0, 1), and the number one, (1, 1)."""
    one = torch.ones(1, 1, dtype=torch.float64)
    return GaussianPrior(torch.zeros(1, dtype=torch.float64), one, VPSchedule(sigma_min=0.0)), one


def reverse_kernels(setting: LinearGaussian, steps: int, start: float = 1.0) -> list[Kernel]:
    """Returns the exact kernels of the reverse process, `steps` uniform ones from start to 0."""
    times = torch.linspace(start, 0, steps + 1, dtype=torch.float64).tolist()
    return [setting.prior.reverse_kernel(times[i], times[i + 1]) for i in range(steps)]


def exact_kernel_problem(
    setting: LinearGaussian, steps: int, noise: Tensor | None = None, start: float = 1.0
) -> tuple[ControlProblem, list[Kernel], Tensor]:
    r"""Returns LQR for the reverse SDE's exact kernels, with the control cost of KL control.

    .. math:: x_{i+1} = F_i x_i + b_i + C_i^{1/2} \varepsilon_i + u_i, \quad
              \ell_i = \tfrac12 u_i^T C_i^{-1} u_i

    The steps are uniform from `start`, in ]0, 1], to 0. The noise is frozen, (T, B, n), or there is
    none. With the problem the kernels of its steps and the times (T + 1,) are returned.
    """
    times = torch.linspace(start, 0, steps + 1, dtype=torch.float64)
    kernels = reverse_kernels(setting, steps, start)
    precisions = [torch.linalg.inv(C) for _, _, C in kernels]
    roots = [torch.linalg.cholesky(C) for _, _, C in kernels]

    def dynamics(i: int, x: Tensor, u: Tensor) -> Tensor:
        F, b, _ = kernels[i]
        x = x @ F.mT + b + u
        return x if noise is None else x + noise[i] @ roots[i].mT

    def running_cost(i: int, x: Tensor, u: Tensor) -> Tensor:
        return 0.5 * ((u @ precisions[i]) * u).sum(-1)

    return ControlProblem(dynamics, running_cost, setting.likelihood, steps), kernels, times


def posterior_from(setting: LinearGaussian, x: Tensor, t: float = 1.0) -> MixturePosterior:
    """Returns p(x_0 | x_t = x, y), x (B, n), by a mixture of one, which has oracles of its own."""
    L, Q = torch.linalg.eigh(setting.prior.matrix)
    weight, mean = torch.zeros(1, 1, dtype=L.dtype), setting.prior.mean[None, None]
    mixture = GaussianMixture(weight, mean, Q[None], L[None], L[:1])
    scales = setting.prior.schedule(torch.tensor(t, dtype=torch.float64))
    return mixture.given_noisy(x, *scales).given(setting.measurement)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Returns `|value - reference| / |reference|` in the Euclidean norm."""
    return (torch.linalg.norm(value - reference) / torch.linalg.norm(reference)).item()


def fitted_slope(x: list[float], y: list[float]) -> float:
    """Returns the slope of log y against log x by least squares."""
    log_x, log_y = torch.tensor([x, y], dtype=torch.float64).log()
    d = log_x - log_x.mean()
    return ((d @ log_y) / (d @ d)).item()
