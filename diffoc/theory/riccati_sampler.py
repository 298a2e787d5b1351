r"""The Riccati sampler: the optimal policy of KL control, noise included, in the Gaussian case.

For kernels :math:`x_{i+1} \sim N(F_i x + b_i, C_i)` and a value
:math:`V_{i+1}(z) = \frac12 z^T P z + q^T z` + const, the kernel that is optimal for KL control is
:math:`p(z \mid x) e^{-V_{i+1}(z)}`, normalised: again a Gaussian. Its mean is that of LQR, and its
covariance is smaller than the process's:

.. math::
    Q_{uu} = C^{-1} + P, \quad K = -Q_{uu}^{-1} P F, \quad k = -Q_{uu}^{-1} (P b + q), \qquad
    u \sim N(k + K x, \; Q_{uu}^{-1}) .

No Monte Carlo is needed: the chain's moments are propagated. Draws by products, for states of any
size, are those of :mod:`diffoc.theory.riccati_draws`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffoc.checks import check_size
from diffoc.priors.gaussian import GaussianPrior
from diffoc.priors.mixture import log_normal
from diffoc.problems.operators import LinearMeasurement
from diffoc.process import ReverseProcess
from diffoc.theory.linear_gaussian import Kernel


@dataclass(frozen=True)
class Policy:
    """The controlled kernel of a step, x + u with u ~ N(k + K x, covariance); k is (n,)."""

    k: Tensor
    K: Tensor
    covariance: Tensor


def ancestral_kernels(prior: GaussianPrior, steps: int) -> list[Kernel]:
    """Returns the kernels of DDPM's chain of a Gaussian prior: affine means, noise c I."""
    unit = torch.eye(len(prior.mean)).to(prior.mean)
    still = unit.new_zeros(steps, *unit.shape)
    process, kernels = ReverseProcess(prior, steps, "ddpm", noise=still), []
    for i, (_, _, c) in enumerate(process.coefficients):
        b = process.step(i, torch.zeros_like(unit))
        kernels.append(((process.step(i, unit) - b).mT, b[0], c**2 * unit))
    return kernels


def riccati_policies(kernels: Sequence[Kernel], measurement: LinearMeasurement) -> list[Policy]:
    """Returns the optimal policy of every step, for one measurement of the final state."""
    A, s = measurement.matrix, measurement.noise_std
    check_size((1, len(A)), y=measurement.y)
    P, q = A.mT @ A / s**2, -A.mT @ measurement.y[0] / s**2
    identity = torch.eye(len(P), dtype=P.dtype)
    policies = []
    for F, b, C in reversed(kernels):
        covariance = torch.linalg.solve(identity + C @ P, C)  # (C^-1 + P)^-1
        covariance = (covariance + covariance.mT) / 2
        K, k = -covariance @ P @ F, -covariance @ (P @ b + q)
        policies.append(Policy(k, K, covariance))
        rest = identity - P @ covariance
        P, q = F.mT @ rest @ P @ F, F.mT @ rest @ (P @ b + q)
        P = (P + P.mT) / 2
    return policies[::-1]


def shift_alone(kernels: Sequence[Kernel], policies: Sequence[Policy]) -> list[Policy]:
    """Returns the same feedback with the process's own noise C in place of the optimal one."""
    return [
        replace(policy, covariance=C) for (_, _, C), policy in zip(kernels, policies, strict=True)
    ]


def propagate(
    kernels: Sequence[Kernel], policies: Sequence[Policy], x: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Returns mean (n,) and covariance (n, n) of the controlled chain's states from x (n,)."""
    moments = [(x, torch.zeros(len(x), len(x), dtype=x.dtype))]
    for (F, b, _), policy in zip(kernels, policies, strict=True):
        mean, covariance = moments[-1]
        closed = F + policy.K
        moments.append(
            (closed @ mean + b + policy.k, closed @ covariance @ closed.mT + policy.covariance)
        )
    return moments


def path_divergence(
    kernels: Sequence[Kernel],
    policies: Sequence[Policy],
    measurement: LinearMeasurement,
    x: Tensor,
    log_evidence: Tensor,
) -> Tensor:
    r"""Returns KL(law of the controlled paths from x, (n,) || the posterior's) in closed form.

    .. math:: E \sum_i \mathrm{KL}\big(N(k + K x_i, \Sigma_i) \,\|\, N(0, C_i)\big)
              - E \log p(y \mid x_0) + \log p(y \mid x_T)

    The final state is measured, y (1, m); the log-evidence log p(y | x_T) is from elsewhere.
    """
    moments = propagate(kernels, policies, x)
    total = torch.zeros((), dtype=x.dtype)
    for (_, _, C), policy, (mean, covariance) in zip(kernels, policies, moments[:-1], strict=True):
        u = policy.k + policy.K @ mean
        spread = policy.K @ covariance @ policy.K.mT + policy.covariance
        ratio = torch.linalg.solve(C, policy.covariance)
        total = total + (u @ torch.linalg.solve(C, u) + torch.linalg.solve(C, spread).trace()) / 2
        total = total - (len(u) + torch.linalg.slogdet(ratio).logabsdet) / 2
    mean, covariance = moments[-1]
    A, s = measurement.matrix, measurement.noise_std
    root = s * torch.eye(len(A), dtype=A.dtype)
    expected = log_normal(measurement.y - mean @ A.mT, root)[0]
    expected = expected - (A @ covariance @ A.mT).trace() / (2 * s**2)
    return total - expected + log_evidence
