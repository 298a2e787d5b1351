r"""The paper's statements that take seconds to check, each as one number, in float64.

`data/claims.yaml` names these functions, and groups of :mod:`diffoc.theory.identities`;
:mod:`diffoc.experiments.ledger` compares what they return with what is written there. Most are the
distance between the controller and a computation that does not use it. Errors are relative.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.utils.flop_counter import FlopCounterMode

from diffoc.costs import ControlCost
from diffoc.hessian import range_finder
from diffoc.ilqr import ilqr
from diffoc.lowrank import low_rank_step
from diffoc.priors.gaussian import GaussianPrior
from diffoc.problems.metrics import frechet_between
from diffoc.problems.operators import LinearMeasurement
from diffoc.process import ReverseProcess, drift_and_diffusion
from diffoc.rules import Adam, FullStep
from diffoc.solve import solve
from diffoc.system import ControlProblem
from diffoc.theory.identities import second_order_slope, uncontrolled
from diffoc.theory.linear_gaussian import (
    LinearGaussian,
    exact_kernel_problem,
    fitted_slope,
    linear_gaussian,
    relative_error,
    standard_normal,
)
from diffoc.theory.rollouts import end_of_guided_flow, euler, one_sweep

STEPS = 20


# Section 4


def theorem_4_1_second_order() -> float:
    """Returns the slope of log error against log a, with V_xx kept, in output mode."""
    return second_order_slope("output", STEPS)


def theorem_4_3_second_order() -> float:
    """Returns the slope of :func:`theorem_4_1_second_order` in input mode."""
    return second_order_slope("input", STEPS)


def lemma_4_2_by_differences() -> float:
    """Returns the worst error of Eq. 18 against Eq. 9, the rollout's gradient taken at h(x_t).

    The constant of Eq. 9 is that of the schedule's central differences.
    """
    setting, process, nominal = uncontrolled("output", STEPS)
    t, dt = process.times[:-1], -process.times.diff()
    _, g2 = drift_and_diffusion(setting.prior.schedule, t)
    controls = one_sweep(process, setting.likelihood, nominal[0], 2 / (g2 * dt), rank=0).controls
    h = 1e-5
    (alpha, sigma), (before, less), (after, more) = map(setting.prior.schedule, (t, t - h, t + h))
    g2 = (more**2 - less**2 - 2 * sigma**2 / alpha * (after - before)) / (2 * h)
    worst = 0.0
    for i, x in enumerate(nominal[:-1]):
        guidance = g2[i] * dt[i] / 2 * setting.gradient(process, i + 1, nominal[i + 1])
        guided = process.step(i, x) + guidance
        worst = max(worst, relative_error(process.step(i, x, controls[i]), guided))
    return worst


def kl_control_by_autograd() -> float:
    """Returns the worst error of F' C^-1 u* against autograd's grad log p(y | x_t), T = 10."""
    setting = linear_gaussian()
    problem, kernels, times = exact_kernel_problem(setting, 10)
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plan = ilqr(problem, x, regularization=0.0, iterations=1)
    errors = []
    for i, (F, _, C) in enumerate(kernels):
        control = torch.linalg.solve(C, plan.controls[i].mT).mT @ F
        errors.append(relative_error(control, _score(setting, plan.states[i], times[i])))
    return max(errors)


def rollout_score_ratio() -> float:
    """Returns how much longer the rollout's gradient is than the score: N(0, 1), t = 1/2."""
    s, y, time = 0.1, 0.7, 0.5
    prior, _ = standard_normal()
    x = torch.full((1, 1), 0.3, dtype=torch.float64, requires_grad=True)
    log_likelihood = -((y - prior.flow(x, time, 0.0)) ** 2).sum() / (2 * s**2)
    (gradient,) = torch.autograd.grad(log_likelihood, x)
    alpha = prior.schedule(torch.tensor(time, dtype=torch.float64))[0].item()
    return gradient.item() * (1 - alpha**2 + s**2) / (alpha * (y - alpha * x.item()))


def value_gradient() -> float:
    """Returns the worst error of -V_x, with exact kernels, against grad log p(y | x_t)."""
    setting = linear_gaussian()
    problem, _, times = exact_kernel_problem(setting, 10)
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    worst = 0.0

    def rest(i: int) -> ControlProblem:
        return ControlProblem(
            lambda j, x, u: problem.dynamics(i + j, x, u),
            lambda j, x, u: problem.running_cost(i + j, x, u),
            problem.terminal_cost,
            10 - i,
        )

    for i in range(10):
        h, eye = 1e-3, torch.eye(8, dtype=torch.float64)
        V = ilqr(rest(i), torch.cat([x + h * eye, x - h * eye]), regularization=0.0, iterations=1)
        difference = (V.cost[8:] - V.cost[:8]) / (2 * h)  # exact for a quadratic, but for rounding
        worst = max(worst, relative_error(difference[None], _score(setting, x, times[i])))
    return worst


def marginals_of_the_flow() -> float:
    """Returns the error of the moments that the exact flow carries from t = 1/2 to 0."""
    prior, t = linear_gaussian().prior, 0.5
    M, c = _flow_from(prior, t)
    alpha, sigma = prior.schedule(torch.tensor(t, dtype=torch.float64))
    noisy = alpha**2 * prior.matrix + sigma**2 * torch.eye(8, dtype=torch.float64)
    return max(
        relative_error(M @ noisy @ M.mT, prior.matrix),
        relative_error(M @ (alpha * prior.mean) + c, prior.mean),
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


def score_of_the_flows_law() -> float:
    """Returns the error of the flow's likelihood gradient against the score of its own law.

    In that law x_0 = M x_t + c, so that x_t and y are jointly Gaussian; t = 1/2.
    """
    setting, t = linear_gaussian(), 0.5
    prior, A, s = setting.prior, setting.measurement.matrix, setting.measurement.noise_std
    M, _ = _flow_from(prior, t)
    alpha, sigma = prior.schedule(torch.tensor(t, dtype=torch.float64))
    noisy = alpha**2 * prior.matrix + sigma**2 * torch.eye(8, dtype=torch.float64)
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gain = torch.linalg.solve(noisy, noisy @ (A @ M).mT).mT  # regression of y on x_t
    residual = setting.measurement.y - prior.mean @ A.mT - (x - alpha * prior.mean) @ gain.mT
    x = x.requires_grad_()
    (through,) = torch.autograd.grad(-setting.likelihood(prior.flow(x, t, 0.0)).sum(), x)
    return relative_error(through, residual @ gain / s**2)


def mean_of_guided_flow() -> float:
    """Returns where Eq. 9 with the rollout's gradient ends: N(0, 1), y = 0.7, s = 0.5, T = 1000."""
    return _guided_flow()[0]


def spread_of_guided_flow() -> float:
    """Returns the standard deviation at that end; the posterior's is s / sqrt(1 + s^2) = 0.447."""
    return _guided_flow()[1]


def spread_of_posterior() -> float:
    """Returns the posterior's standard deviation in the setting of the guided flow."""
    prior, one = standard_normal()
    posterior = prior.posterior(LinearMeasurement(one, 0.7 * one, 0.5))
    return posterior.covariance.sqrt().item()


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


# Sections 2 and 3, Appendices B and D


def riccati() -> float:
    """Returns the error of iLQR on a random linear-quadratic problem against a solve in all u."""
    n, m, steps = 4, 3, 6
    g = torch.Generator().manual_seed(0)
    F, G, R, L, z = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((steps, n, n), (steps, n, m), (steps, n + m, n + m), (n, n), (1, n))
    )

    def running_cost(i: int, x: Tensor, u: Tensor) -> Tensor:
        both = torch.cat([x, u], dim=-1)
        return (both @ R[i]).square().sum(-1) / 2 + both.sum(-1)

    problem = ControlProblem(
        lambda i, x, u: x @ F[i].mT / n**0.5 + u @ G[i].mT,
        running_cost,
        lambda x: ((x - 1) @ L).square().sum(-1) / 2,
        steps,
    )

    def total(flat: Tensor) -> Tensor:
        u = flat.reshape(steps, 1, m)
        return problem.cost(problem.rollout(z, u), u).sum()

    zero = torch.zeros(steps * m, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(total, zero)
    best = torch.linalg.solve(torch.autograd.functional.hessian(total, zero), -slope)
    start = torch.zeros(steps, 1, m, dtype=torch.float64)
    plan = ilqr(problem, z, start, regularization=0.0, iterations=1)
    return relative_error(plan.controls.flatten(), best)


def mode_shift() -> float:
    """Returns the error of output control against input control one step later (Eqs. 17, 18)."""
    _, output, nominal = uncontrolled("output", STEPS)
    shifted = ReverseProcess(output.denoiser, STEPS, "euler", "input")
    g = torch.Generator().manual_seed(2)
    u = torch.randn(STEPS, 1, 8, generator=g, dtype=torch.float64)
    u[-1] = 0  # after the last step there is no step to perturb the input of
    later = torch.cat([torch.zeros_like(u[:1]), u[:-1]])
    return relative_error(output.rollout(nominal[0], u)[-1], shifted.rollout(nominal[0], later)[-1])


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


def _guided_flow() -> tuple[float, float]:
    prior, _ = standard_normal()
    return end_of_guided_flow(prior, lambda x, t: (0.7 - x) / 0.5**2, 1000)


def _flow_from(prior: GaussianPrior, t: float) -> tuple[Tensor, Tensor]:
    """Returns the exact flow from t to 0 as x -> M x + c: M and c."""
    n = len(prior.mean)
    c = prior.flow(torch.zeros(1, n, dtype=torch.float64), t, 0.0)
    return (prior.flow(torch.eye(n, dtype=torch.float64), t, 0.0) - c).mT, c[0]


def _score(setting: LinearGaussian, x: Tensor, t: Tensor) -> Tensor:
    """Returns grad log p(y | x_t) of a Gaussian prior: p(y | x_t) from the joint, then autograd."""
    x = x.detach().requires_grad_()
    m, C = setting.prior.mean, setting.prior.matrix
    alpha, sigma = setting.prior.schedule(t)
    noisy = alpha**2 * C + sigma**2 * torch.eye(len(m), dtype=C.dtype)
    gain = alpha * torch.linalg.solve(noisy, C).mT
    A, s = setting.measurement.matrix, setting.measurement.noise_std
    mean = (m + (x - alpha * m) @ gain.mT) @ A.mT
    spread = A @ (C - alpha * gain @ C) @ A.mT + s**2 * torch.eye(len(A), dtype=C.dtype)
    log_p = MultivariateNormal(mean, spread).log_prob(setting.measurement.y)
    return torch.autograd.grad(log_p.sum(), x)[0]
