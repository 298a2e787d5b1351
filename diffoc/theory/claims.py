r"""The paper's statements that take seconds to check, each as one number, in float64.

`data/claims.yaml` names these functions, and groups of :mod:`diffoc.theory.identities`;
:mod:`diffoc.experiments.ledger` compares what they return with what is written there. Most are the
distance between the controller and a computation that does not use it. Errors are relative.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffoc.costs import ControlCost
from diffoc.hessian import range_finder
from diffoc.ilqr import ilqr
from diffoc.lowrank import low_rank_step
from diffoc.problems.metrics import frechet_between
from diffoc.problems.operators import LinearMeasurement
from diffoc.process import ReverseProcess
from diffoc.rules import Adam, FullStep
from diffoc.solve import solve
from diffoc.system import ControlProblem
from diffoc.theory.identities import uncontrolled
from diffoc.theory.linear_gaussian import (
    fitted_slope,
    linear_gaussian,
    relative_error,
    standard_normal,
)
from diffoc.theory.rollouts import euler

STEPS = 20


# Section 4


def rollout_score_ratio() -> float:
    """Returns how much longer the rollout's gradient is than the score: N(0, 1), t = 1/2."""
    (prior, one), y, x, s = standard_normal(), 0.7, 0.3, 0.1
    measurement = LinearMeasurement(one, y * one, s)
    score = prior.conditional_score(x * one, torch.tensor(0.5), measurement)
    return (y - x) / s**2 / score.item()  # the flow is the identity


def marginals_of_the_flow() -> float:
    """Returns the error of the moments that the exact flow carries from t = 1/2 to 0."""
    prior, t, unit = linear_gaussian().prior, 0.5, torch.eye(8, dtype=torch.float64)
    c = prior.flow(0 * unit[:1], t, 0.0)
    M = (prior.flow(unit, t, 0.0) - c).mT  # the flow maps x to M x + c
    alpha, sigma = prior.schedule(torch.tensor(t, dtype=torch.float64))
    noisy = alpha**2 * prior.matrix + sigma**2 * unit
    return max(
        relative_error(M @ noisy @ M.mT, prior.matrix),
        relative_error(M @ (alpha * prior.mean) + c[0], prior.mean),
    )


def order_of_heun() -> float:
    """Returns the order in dt of Heun's method on Eq. 2, against a Gaussian's exact flow."""
    prior = linear_gaussian().prior
    start = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth, counts, errors = prior.flow(start, 1.0, 0.0), [100, 200, 400], []
    for steps in counts:
        x, times = start, torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        for t, s in pairwise(times):
            ahead = euler(prior, x, t, t - s)
            x = (x + euler(prior, ahead, s, t - s)) / 2
        errors.append(relative_error(x, truth))
    return -fitted_slope([float(count) for count in counts], errors)


def decay_with_few_steps() -> float:
    """Returns how much farther conditional sampling ends from its target than unconditional.

    Euler steps of Eq. 9 with the exact conditional score against those of Eq. 3, n = 8.
    Distances are Wasserstein's (2), in units of the target's own spread; both are of order dt.
    """
    setting = linear_gaussian()
    prior, measurement = setting.prior, setting.measurement
    posterior = prior.posterior(measurement)
    times, distances = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64), []
    for guided in (False, True):
        x = torch.cat([torch.zeros(1, 8), torch.eye(8)]).double()
        for t in times[:-1]:
            guidance = prior.conditional_score(x, t, measurement) if guided else 0.0
            x = euler(prior, x, t, 1 / STEPS, guidance)
        columns = x[1:] - x[:1]
        mean = posterior.mean[0] if guided else prior.mean
        C = posterior.covariance if guided else prior.matrix
        squared = frechet_between((x[0], columns.mT @ columns), (mean, C))
        distances.append((squared / C.trace().item()) ** 0.5)
    return distances[1] / distances[0]


def rank_one_feedback() -> float:
    """Returns the error of all feedback K with a terminal Hessian of rank 1, not 4, n = 8."""
    setting, process, nominal = uncontrolled("input", STEPS)
    problem = ControlProblem(process.step, ControlCost(1.0), setting.likelihood, STEPS)
    x = nominal[0]

    def feedback(rank: int | None) -> Tensor:
        plan = ilqr(problem, x, regularization=0.0, rank=rank, rule=FullStep(), iterations=1)
        # The columns of K, one problem each
        return torch.stack(
            [torch.cat([g.feedback(e[None]) for e in torch.eye(8).double()]) for g in plan.gains]
        )

    return relative_error(feedback(1), feedback(None))


def share_of_the_algebra() -> float:
    """Returns what a step's Riccati algebra takes of the network's multiplications, in %.

    A 64 x 64 image, rank 16, and one convolution of 64 to 64 channels of 3 x 3 in place of a
    network, which is less than any network here.
    """
    n, k = 64 * 64, 16
    g = torch.Generator().manual_seed(0)
    Qu, U = torch.randn(1, n, generator=g), torch.randn(1, n, k, generator=g)
    with FlopCounterMode(display=False) as algebra:
        low_rank_step(Qu, U, U, torch.eye(k)[None], 1.0, torch.ones(1), "full")
    layer = torch.nn.Conv2d(64, 64, 3, padding=1)
    with FlopCounterMode(display=False) as network, torch.no_grad():
        layer(torch.zeros(1, 64, 64, 64))
    return 100 * algebra.get_total_flops() / network.get_total_flops()


# Appendix D and Table 2


def woodbury() -> float:
    """Returns the error of Eq. 85's inverse against a dense solve, n = 40, rank 5."""
    g = torch.Generator().manual_seed(0)
    U, root, Qu = (
        torch.randn(1, *shape, generator=g, dtype=torch.float64)
        for shape in ((40, 5), (5, 5), (40,))
    )
    S, r, a = root @ root.mT, 0.3, torch.tensor([0.2], dtype=torch.float64)
    gains, _, _ = low_rank_step(Qu, U, U, S, r, a, "full")
    Quu = (r + a) * torch.eye(40, dtype=torch.float64) + U @ S @ U.mT
    return relative_error(gains.k, -torch.linalg.solve(Quu, Qu))


def range_of_low_rank() -> float:
    """Returns the error of a range finder with 5 directions on a 40 x 40 matrix of rank 5."""
    g = torch.Generator().manual_seed(0)
    left, right, directions = (
        torch.randn(1, 40, 5, generator=g, dtype=torch.float64) for _ in range(3)
    )
    J = left @ right.mT
    Q = range_finder(lambda v: J @ v, directions)
    return relative_error(Q @ (Q.mT @ J), J)


def evaluations_of_table_2() -> float:
    """Returns the evaluations of 100 iterations with T = 50, counted on a prior of one pixel."""
    prior, one = standard_normal()
    process = ReverseProcess(prior, 50)

    def evaluations(iterations: int) -> float:
        return solve(
            process,
            lambda x: x.square().flatten(1).sum(1),
            one,
            iterations=iterations,
            rule=Adam(1e-3),
        ).evaluations.item()

    # The first rollout is no iteration.
    return 100.0 * (evaluations(2) - evaluations(1))


def megabytes_of_an_image() -> float:
    """Returns the size of a 3 x 256 x 256 image in single precision, in MB."""
    return torch.empty(3, 256, 256).nbytes / 1e6
