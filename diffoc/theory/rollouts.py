r"""What Theorems 4.1 (Eq. 29) and 4.3 (Eq. 32) compare: rollout gradients, and one sweep.

The Euler step of Eq. 3 is written here a second time, from nothing but the prior's score, so that a
comparison with :class:`diffoc.process.ReverseProcess` is one of two implementations. Its schedule
must be variance preserving with :math:`\log\alpha_t = t^2 \log\alpha_{\min}`, as azula's
`VPSchedule` with `sigma_min=0` is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from azula.noise import VPSchedule
from torch import Tensor

from diffoc.costs import ControlCost, GaussianLikelihood
from diffoc.ilqr import ilqr
from diffoc.priors.gaussian import GaussianMixturePrior, GaussianPrior
from diffoc.priors.mixture import mixture_from_loadings
from diffoc.process import ReverseProcess
from diffoc.result import Result
from diffoc.riccati import expand_step, terminal_value
from diffoc.rules import FullStep
from diffoc.system import ControlProblem, backward_sweep

ExactPrior = GaussianPrior | GaussianMixturePrior


@dataclass(frozen=True)
class PlanarMixture:
    """Three Gaussians in the plane, of which y measures the horizontal coordinate."""

    prior: GaussianMixturePrior
    likelihood: GaussianLikelihood
    starts: Tensor


def planar_mixture() -> PlanarMixture:
    """Returns the setting, with six states x_T to start from, (6, 2), in float64."""

    def tensor(*rows: object) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    mixture = mixture_from_loadings(
        tensor(0, 0, 0),
        tensor([-1.6, -0.7], [0.1, 1.3], [1.3, -0.6]),
        tensor([[0.3], [0.5]], [[0.6], [0.1]], [[0.3], [-0.3]]),
        tensor(0.04, 0.04, 0.04),
    )
    return PlanarMixture(
        GaussianMixturePrior(mixture, VPSchedule(sigma_min=0.0)),
        GaussianLikelihood(lambda x: x[:, :1], tensor([0.9]), 0.3),
        tensor([-1.6, 0.9], [-0.9, -1.2], [-0.2, 1.7], [0.3, -1.6], [1.9, 0.6], [-0.7, 0.2]),
    )


def drift_rate(prior: ExactPrior, t: Tensor | float) -> Tensor | float:
    r"""Returns the drift's :math:`\varphi = 2 t \log\alpha_{\min}`; :math:`g^2 = -2\varphi`."""
    return 2 * t * math.log(prior.schedule.alpha_min)


def euler(
    prior: ExactPrior, x: Tensor, t: Tensor, dt: Tensor | float, guidance: Tensor | float = 0.0
) -> Tensor:
    r"""Takes one step of Eq. 9: Eq. 3 with a guidance term added to the score, states (B, n).

    .. math:: x - \big[\varphi x - \tfrac12 g^2 (\nabla\log p(x) + \text{guidance})\big]\,dt
    """
    phi = drift_rate(prior, t)
    return x - phi * (x + prior.score(x, t) + guidance) * dt


@torch.enable_grad()
def rollout_gradient(
    prior: ExactPrior, cost: Callable[[Tensor], Tensor], times: Tensor, i: int, x: Tensor
) -> Tensor:
    """Returns grad log p(y | x_0(x)) at states x (B, n) of step i, through the rollout."""
    start = x = x.detach().requires_grad_()
    for t, s in zip(times[i:-1], times[i + 1 :], strict=True):
        x = euler(prior, x, t, t - s)
    return torch.autograd.grad(-cost(x).sum(), start)[0]


def one_sweep(
    process: ReverseProcess,
    cost: Callable[[Tensor], Tensor],
    x: Tensor,
    regularization: float | Tensor,
    rank: int | None = None,
) -> Result:
    """Runs one iteration of iLQR without running cost (Eq. 28) at full step, from zero controls."""
    problem = ControlProblem(process.step, ControlCost(0.0), cost, process.horizon)
    return ilqr(problem, x, regularization=regularization, rank=rank, rule=FullStep(), iterations=1)


def second_order_gains(
    process: ReverseProcess,
    cost: Callable[[Tensor], Tensor],
    x: Tensor,
    a: float | Tensor,
    update: str = "full",
) -> Tensor:
    """Returns k of every step (T, B, n) with V_xx kept, from zero controls and no running cost.

    Tikhonov's constant is a number, or one for each state (B,). The update is as for
    :meth:`diffoc.riccati.DenseValue.step_back`; by "full" these are the gains of :func:`one_sweep`.
    """
    states, free, zeros = process.rollout(x), ControlCost(0.0), torch.zeros_like(x)
    steps = range(process.horizon)
    expansions = [expand_step(process.step, free, i, states[i], zeros) for i in steps]
    constants = torch.as_tensor(a, dtype=x.dtype).expand(process.horizon, len(x))
    gains, _ = backward_sweep(expansions, terminal_value(cost, states[-1]), constants, update)
    return torch.stack([g.k for g in gains])


def replanned(
    process: ReverseProcess, cost: Callable[[Tensor], Tensor], x: Tensor, a: float
) -> Tensor:
    """Returns the states (T + 1, B, n) of iLQR that plans anew at every one, to first order."""
    states = [x]
    for i in range(process.horizon):
        noise = None if process.noise is None else process.noise[i:]
        rest = ReverseProcess(
            process.denoiser, process.times[i:], process.method, process.mode, noise
        )
        plan = one_sweep(rest, cost, states[-1], a, rank=0)
        states.append(process.step(i, states[-1], plan.controls[0]))
    return torch.stack(states)


def end_of_guided_flow(
    prior: GaussianPrior, score: Callable[[Tensor, Tensor], Tensor], steps: int
) -> tuple[float, float]:
    """Returns mean and standard deviation at the end of Eq. 9 in one dimension from N(0, 1).

    The guidance is an affine function of states (B, 1) and a time, so that the end is affine in the
    start, and no sampling is needed. The Euler steps are uniform from t = 1 to 0.
    """
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for t in times[:-1]:
        x = euler(prior, x, t, 1 / steps, guidance=score(x, t))
    return x[0].item(), (x[1] - x[0]).abs().item()
