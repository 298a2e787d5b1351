r"""What a control cost believes: exp(-J) as a density.

Of the controls :math:`u_i \sim N(0, 1 / r_i)` the process makes a law of :math:`x_0`. It is the
prior that the plan believes in: :math:`e^{-J}` with :math:`J = \sum_i r_i |u_i|^2 / 2 + l(x_0)` is,
up to its integral, the density of the controls given the measurement under that prior, and the
optimal plan is its largest value. If the process is linear, with
:math:`x_0 = \bar x_0 + \sum_i J_i u_i`, the believed prior is

.. math:: N(\bar x_0, S), \qquad S = \sum_i J_i J_i^T / r_i ,

and the plan ends in the mean of its posterior. With the start :math:`x_T` for the only control, at
the price :math:`|x_T|^2 / 2` of a standard normal, and the probability flow for the process, the
believed prior is the prior, and :func:`langevin` samples the posterior. D-Flow (arXiv:2402.14017)
descends the same cost, with another price or none, to one point.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffoc.checks import check_above, check_size
from diffoc.process import ReverseProcess


def believed_covariance(process: ReverseProcess, costs: Tensor, x: Tensor) -> Tensor:
    """Returns S, (n, n), of a process that is linear in state and control.

    Any start x, (1, n), serves; the costs r are (T,), above 0.
    """
    check_above(0, costs=costs.min().item())
    controls = torch.zeros(process.horizon, *x.shape, dtype=x.dtype)
    J = torch.autograd.functional.jacobian(lambda u: process.rollout(x, u)[-1, 0], controls)
    J = J[:, :, 0]  # (n, T, n)
    return torch.einsum("atk,t,btk->ab", J, 1 / costs, J)


@torch.no_grad()
def believed_draws(
    process: ReverseProcess, costs: Tensor, x: Tensor, generator: torch.Generator
) -> Tensor:
    """Returns draws of any process's believed prior: ends, (B, ...), under u_i ~ N(0, 1 / r_i).

    The process is deterministic, or has its noise frozen. The costs are r of every step, (T,),
    above 0; the starts are (B, ...).
    """
    controls = torch.randn(process.horizon, *x.shape, generator=generator, dtype=x.dtype)
    shape = (-1, *[1] * x.ndim)
    return process.rollout(x, controls / costs.sqrt().reshape(shape))[-1]


def langevin(
    log_density: Callable[[Tensor], Tensor],
    x: Tensor,
    step: float,
    count: int,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    r"""Runs Metropolis-adjusted Langevin chains, one for each row, towards one density.

    .. math:: x' = x + \tau \nabla \log \pi(x) + \sqrt{2 \tau} \, \epsilon , \quad \text{kept with}
              \quad \min\Big(1, \frac{\pi(x') q(x \mid x')}{\pi(x) q(x' \mid x)}\Big)

    The log-density, known up to a constant, maps (B, n) to (B,) and is differentiable; tau is
    `step`. The ends of `count` steps from x, (B, n), are returned, and the share of proposals that
    were kept.

    Source: Roberts & Tweedie 1996, doi:10.2307/3318418.
    """
    value, gradient = _with_gradient(log_density, x)
    kept = 0.0
    for _ in range(count):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        trial = x + step * gradient + (2 * step) ** 0.5 * noise
        new_value, new_gradient = _with_gradient(log_density, trial)
        back = (x - trial - step * new_gradient).square().sum(1) / (4 * step)
        forth = noise.square().sum(1) / 2
        odds = new_value - back - value + forth
        decision = torch.rand(len(x), generator=generator, dtype=torch.float64).to(x).log() < odds
        kept += decision.double().mean().item() / count
        x = torch.where(decision[:, None], trial, x)
        gradient = torch.where(decision[:, None], new_gradient, gradient)
        value = torch.where(decision, new_value, value)
    return x, kept


def _with_gradient(log_density: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        value = log_density(x)
        check_size((len(x),), log_density=value)
        return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def effective_draws(chains: Tensor) -> float:
    r"""Returns how many independent draws have as precise a mean as these of parallel chains.

    .. math:: \frac{L B}{1 + 2 \sum_k \rho_k}

    The chains, (L, B), have a number of the state at L times, at least 2. The autocorrelation
    :math:`\rho_k` is that of deviations from the mean of all, summed up to where the sum of two
    that follow each other is negative (Geyer 1992, doi:10.1214/ss/1177011137).
    """
    deviations = (chains - chains.mean()).double()
    length, count = chains.shape
    covariances = [
        (deviations[: length - k] * deviations[k:]).sum().item() / (length * count)
        for k in range(length)
    ]
    check_above(0, **{"the variance of chains": covariances[0]})
    total = 1.0
    for k in range(1, length - 1, 2):
        pair = covariances[k] + covariances[k + 1]
        if pair < 0:
            break
        total += 2 * pair / covariances[0]
    return chains.numel() / total
