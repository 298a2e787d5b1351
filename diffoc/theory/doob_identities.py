"""The identities of notebook 14 as numbers: the score as a control, and what follows from it.

Every row compares two computations that have no formula in common, as the rows of
:mod:`diffoc.theory.identities` do.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from azula.noise import VPSchedule
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from diffoc.costs import ControlCost
from diffoc.ilqr import ilqr
from diffoc.lowrank import MatrixFree
from diffoc.priors.gaussian import GaussianPrior
from diffoc.priors.mixture import with_noise
from diffoc.problems.operators import LinearMeasurement
from diffoc.process import ReverseProcess, drift_and_diffusion
from diffoc.system import ControlProblem
from diffoc.theory.beliefs import believed_covariance
from diffoc.theory.certificate import Guidance
from diffoc.theory.line import LIKELIHOODS, PRIORS, LineProblem, linear, nodes
from diffoc.theory.linear_gaussian import (
    EXACT,
    QUADRATURE,
    SLOPE,
    Identity,
    fitted_slope,
    linear_gaussian,
    posterior_from,
    relative_error,
    reverse_kernels,
)
from diffoc.theory.most_likely_path import bimodal_prior
from diffoc.theory.riccati_draws import ancestral_mean, noise_price, riccati_draws
from diffoc.theory.riccati_sampler import (
    ancestral_kernels,
    path_divergence,
    propagate,
    riccati_policies,
)

STATES = (-2.0, -1.0, -0.4, 0.1, 0.5, 1.2, 2.0)
"""Where the identities of the line are tried, at every time."""


def score_is_a_control() -> Iterator[Identity]:
    """E[x_s|x_t,y] - E[x_s|x_t] = (v/f) grad log p(y|x_t), any prior and likelihood, any steps."""
    for prior in PRIORS:
        for likelihood in LIKELIHOODS:
            problem = LineProblem(prior(), likelihood())
            errors = [displacement_error(problem, t, s) for t, s in _steps(2, 5, 20)]
            yield Identity(
                "E[x_s|x_t,y] - E[x_s|x_t] = (v/f) grad log p(y|x_t)",
                f"{problem.prior.name}, {problem.likelihood.name}, T = 2, 5, 20",
                max(errors),
                QUADRATURE,
            )


def displacement_error(problem: LineProblem, t: float, s: float) -> float:
    """Returns the relative error of the identity for one step, over :data:`STATES`."""
    x = torch.tensor(STATES, dtype=torch.float64)
    step = problem.reverse_step(x, t, s)
    f, v = problem.forward_kernel(t, s)
    return relative_error(step.conditional_mean - step.mean, v / f * problem.score(x, t))


def doob() -> Iterator[Identity]:
    """h is harmonic, h_t = E[h_s | x_t], and the tilted kernel costs -log h_t."""
    x = torch.tensor(STATES, dtype=torch.float64)
    harmonic, optimal = [], []
    for prior in PRIORS:
        for likelihood in LIKELIHOODS:
            problem = LineProblem(prior(), likelihood())
            for t, s in _steps(5):
                step, exact = problem.reverse_step(x, t, s), problem.log_h(x, t)
                harmonic.append(relative_error(step.log_h_before, exact))
                tilted = (step.log_prob + step.log_h).log_softmax(1)
                optimal.append(relative_error(-step.cost(tilted), exact))
    for name, errors in (
        ("h-transform: h_t(x) = E[h_s(x_s) | x_t = x]", harmonic),
        ("h-transform: p h_s / h_t costs KL - E log h_s = -log h_t", optimal),
    ):
        yield Identity(name, "3 priors, 4 likelihoods, T = 5", max(errors), QUADRATURE)


def gaussian_case() -> Iterator[Identity]:
    """In the linear-Gaussian case F' C^-1 = (f/v) I: of KL control u* = (v/f) grad log p(y|x_t)."""
    setting = linear_gaussian()
    problem = LineProblem(PRIORS[0](), linear(), setting.prior.schedule)
    identity, errors = torch.eye(8, dtype=torch.float64), []
    for (t, s), (F, _, C) in zip(_steps(10), reverse_kernels(setting, 10), strict=True):
        f, v = problem.forward_kernel(t, s)
        errors.append(relative_error(v / f * torch.linalg.solve(C, F).mT, identity))
    yield Identity("Gaussian kernels: F' C^-1 = (f/v) I", "n = 8, T = 10", max(errors), EXACT)


def price_of_noise() -> Iterator[Identity]:
    """(v/f) tends to g^2 dt, first order in dt; DDPM with E[x_0|x_t,y] shifts by (v/f) grad."""
    problem = LineProblem(PRIORS[0](), linear())
    _, g2 = drift_and_diffusion(problem.schedule, torch.tensor(0.5, dtype=torch.float64))
    counts = [200, 400, 800, 1600]
    errors = []
    for steps in counts:
        f, v = problem.forward_kernel(0.5, 0.5 - 1 / steps)
        errors.append(abs(v / f * steps / g2.item() - 1))
    yield Identity(
        "v/f -> g^2 dt",
        "t = 1/2, slope over T = 200 ... 1600",
        abs(fitted_slope([float(c) for c in counts], errors) + 1),
        SLOPE,
    )
    process = ReverseProcess(bimodal_prior(), 20, "ddpm", noise=torch.zeros(20, 1, 1))
    shifts = []
    for (t, s), (_, b, _) in zip(_steps(20), process.coefficients, strict=True):
        (alpha, sigma), (f, v) = problem.scales(t), problem.forward_kernel(t, s)
        shifts.append(abs(b * sigma**2 / alpha / (v / f) - 1))
    yield Identity("DDPM: b sigma^2 / alpha = v/f", "T = 20", max(shifts), EXACT)


def riccati_sampler() -> Iterator[Identity]:
    """u ~ N(k + K x, Quu^-1) samples the linear-Gaussian posterior exactly, for any T."""
    for n, m, noise_std, seed in ((8, 4, 0.1, 0), (2, 1, 0.3, 4)):
        setting = linear_gaussian(n, m, noise_std, seed)
        x = torch.randn(1, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        exact = posterior_from(setting, x)
        means, covariances, divergences = [], [], []
        for steps in (1, 10, 100):
            kernels = reverse_kernels(setting, steps)
            policies = riccati_policies(kernels, setting.measurement)
            mean, covariance = propagate(kernels, policies, x[0])[-1]
            means.append(relative_error(mean, exact.mean[0]))
            covariances.append(relative_error(covariance, exact.covariances[0]))
            evidence = exact.log_evidence[0]
            divergences.append(
                path_divergence(kernels, policies, setting.measurement, x[0], evidence).abs().item()
            )
        where = f"n = {n}, T = 1, 10, 100"
        yield Identity("Riccati sampler: mean of p(x_0|x_T, y)", where, max(means), EXACT)
        yield Identity("Riccati sampler: its covariance", where, max(covariances), EXACT)
        yield Identity(
            "Riccati sampler: KL(its paths || posterior's) = 0", where, max(divergences), EXACT
        )


def draws_by_products() -> Iterator[Identity]:
    """Draws by products have the law of the dense policies, and one weight."""
    n, steps = 6, 5
    setting = linear_gaussian(n, 3, 0.3)
    prior = GaussianPrior(setting.prior.mean, setting.prior.matrix, VPSchedule(sigma_min=1e-2))
    kernels, measurement = ancestral_kernels(prior, steps), setting.measurement
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, n, generator=g).double()
    policies = riccati_policies(kernels, measurement)
    mean, covariance = propagate(kernels, policies, x[0])[-1]
    # No noise, and then every unit of it, is pushed through the sampler.
    count = 1 + steps * n
    noise = torch.eye(count, dtype=torch.float64)[:, 1:].reshape(count, steps, n).movedim(1, 0)
    x = x.expand(count, n)
    process = ancestral_mean(prior, steps, x, g)
    price = ControlCost(noise_price(prior.schedule, process.times))
    problem = ControlProblem(process.step, price, setting.likelihood, steps)
    products = MatrixFree(convex=True, together=True)
    plan = ilqr(problem, x, derivatives=products, regularization=0.0, rank=3, iterations=1)
    draws = riccati_draws(problem, x, plan.controls, noise, products, 3)
    ends = draws.states[-1]
    columns = ends[1:] - ends[:1]
    # log p(y | x_T) of the chain, but for the constant that the cost leaves out
    A, s = measurement.matrix, measurement.noise_std
    centre, spread = x[0], torch.zeros(n, n, dtype=torch.float64)
    for F, b, C in kernels:
        centre, spread = F @ centre + b, F @ spread @ F.mT + C
    predicted = MultivariateNormal(A @ centre, with_noise(A @ spread @ A.mT, s))
    constant = len(A) * math.log(2 * math.pi * s**2) / 2
    evidence = (predicted.log_prob(measurement.y[0]) + constant).expand(count)
    where = f"DDPM, n = {n}, T = {steps}, rank 3 of 3, one iteration"
    yield Identity("Draws by products: mean given y", where, relative_error(ends[0], mean), EXACT)
    error = relative_error(columns.mT @ columns, covariance)
    yield Identity("Draws by products: covariance given y", where, error, EXACT)
    error = relative_error(draws.log_weights, evidence)
    yield Identity("Draws by products: every weight is p(y|x_T)", where, error, EXACT)


def girsanov() -> Iterator[Identity]:
    r"""Checks that :math:`E[\sum |u|^2 / 2c^2 + l] + \log p(y)` is the KL of Gaussian path laws."""
    for steps in (2, 5):
        certificate, divergence = gaussian_certificate(steps)
        yield Identity(
            "E[sum |u|^2/2c^2 + l] + log p(y) = KL(paths || posterior's)",
            f"DDPM, Gaussian prior, wrong guidance, n = 3, T = {steps}",
            abs(certificate / divergence - 1),
            EXACT,
        )


def guided_gaussian(steps: int) -> tuple[ReverseProcess, LinearMeasurement, Guidance]:
    """Returns a DDPM chain of a Gaussian prior, n = 3, a measurement of 2, and weak guidance."""
    g = torch.Generator().manual_seed(3)
    root, A = (torch.randn(k, 3, generator=g, dtype=torch.float64) for k in (3, 2))
    prior = GaussianPrior(
        torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64),
        root @ root.mT / 3 + 0.1 * torch.eye(3, dtype=torch.float64),
        VPSchedule(sigma_min=0.1),
    )
    y = torch.tensor([[0.7, -0.4]], dtype=torch.float64)
    measurement = LinearMeasurement(A, y, 0.3)
    process = ReverseProcess(
        prior, steps, "ddpm", "output", torch.zeros(steps, 1, 3, dtype=torch.float64)
    )

    def guidance(i: int, x: Tensor, mean: Tensor) -> Tensor:
        score = prior.conditional_score(x, process.times[i], measurement)
        return 0.6 * process.coefficients[i][2] ** 2 * score

    return process, measurement, guidance


def gaussian_certificate(steps: int) -> tuple[float, float]:
    """Returns both sides of the certificate of :func:`guided_gaussian`.

    The left one is a mean of quadratic forms over the guided paths; the right one is the divergence
    of two dense Gaussians over (x_T, ..., x_0), the posterior's by conditioning on y.
    """
    process, measurement, guidance = guided_gaussian(steps)
    A, y, s = measurement.matrix, measurement.y[0], measurement.noise_std
    zero, unit = torch.zeros(1, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    mean, spread = _path_law(process, guidance)
    free_mean, free_spread = _path_law(process, lambda i, x, mean: torch.zeros_like(x))

    work = _expected_square(-y / s, A / s, mean[-3:], spread[-3:, -3:]) / 2
    work += len(y) * math.log(2 * math.pi * s**2) / 2
    for i, (_, _, c) in enumerate(process.coefficients):
        at = slice(3 * i, 3 * i + 3)
        offset = guidance(i, zero, zero)
        slope = (guidance(i, unit, unit) - offset).mT
        work += _expected_square(offset[0] / c, slope / c, mean[at], spread[at, at]) / 2

    rows = torch.cat([torch.zeros(2, 3 * steps, dtype=torch.float64), A], dim=1)
    innovation = with_noise(rows @ free_spread @ rows.mT, s)
    evidence = MultivariateNormal(rows @ free_mean, innovation).log_prob(y).item()
    gain = torch.linalg.solve(innovation, rows @ free_spread).mT
    posterior = MultivariateNormal(
        free_mean + gain @ (y - rows @ free_mean), free_spread - gain @ rows @ free_spread
    )
    divergence = kl_divergence(MultivariateNormal(mean, spread), posterior)
    return work + evidence, divergence.item()


def _path_law(process: ReverseProcess, guidance: Guidance) -> tuple[Tensor, Tensor]:
    """Returns the moments of (x_T, ..., x_0) of a chain that is affine in its noises, n = 3."""
    size = 3 * (process.horizon + 1)
    noise = torch.cat([torch.zeros(1, size), torch.eye(size)]).double().split(3, dim=1)
    still = ReverseProcess(
        process.denoiser,
        process.times,
        "ddpm",
        "output",
        torch.zeros(process.horizon, size + 1, 3, dtype=torch.float64),
    )
    states = [process.denoiser.schedule(process.times[0])[1] * noise[0]]
    for i, (_, _, c) in enumerate(process.coefficients):
        x, mean = states[-1], still.step(i, states[-1])
        states.append(mean + guidance(i, x, mean) + c * noise[i + 1])
    rows = torch.cat(states, dim=1)
    return rows[0], (rows[1:] - rows[0]).mT @ (rows[1:] - rows[0])


def believed_prior() -> Iterator[Identity]:
    """The plan ends in the posterior mean of the prior that its cost believes in."""
    setting = linear_gaussian(n=6, m=3)
    x = torch.randn(1, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    costs = torch.linspace(0.5, 3, 10, dtype=torch.float64)
    for mode in ("input", "output"):
        process = ReverseProcess(setting.prior, 10, "ddim", mode)
        problem = ControlProblem(process.step, ControlCost(costs), setting.likelihood, 10)
        plan = ilqr(problem, x, regularization=0.0, iterations=1).states[-1]
        S = believed_covariance(process, costs, x)
        believed = GaussianPrior(process.rollout(x)[-1][0], S, setting.prior.schedule)
        exact = believed.posterior(setting.measurement).mean
        yield Identity(
            "The plan's end = posterior mean for N(x_0, sum J J' / r)",
            f"DDIM, {mode} mode, n = 6, T = 10",
            relative_error(plan, exact),
            EXACT,
        )


def flow_push_forward() -> Iterator[Identity]:
    """Weighted by p(y | flow's end), the start's own law is carried to the posterior."""
    prior, y, s = bimodal_prior(0.8, 0.4), 0.3, 0.4
    one = torch.ones(1, 1, dtype=torch.float64)
    exact = prior.posterior(LinearMeasurement(one, y * one, s))
    # In z = x / alpha and tau = sigma / alpha the flow is dz/dtau = -tau grad log p_tau(z).
    tau = 1e3
    points, log_w = nodes(tuple(np.linspace(-9, 9, 91)))
    starts = tau * points

    def slope(tau: float, z: np.ndarray) -> np.ndarray:
        at = torch.tensor(tau, dtype=torch.float64)
        return -tau * prior.mixture.score(torch.from_numpy(z)[:, None], one[0, 0], at)[:, 0].numpy()

    path = solve_ivp(slope, (tau, 0), starts.numpy(), method="DOP853", rtol=1e-12, atol=1e-13)
    ends = torch.from_numpy(path.y[:, -1])
    log_density = prior.mixture.log_prob(starts[:, None], one[0, 0], tau * one[0, 0])
    believed = (log_w + log_density - ((y - ends) / s).square() / 2).softmax(0)
    for name, value, reference in (
        ("mean", believed @ ends, exact.mean[0, 0]),
        ("second moment", believed @ ends**2, exact.covariance[0, 0, 0] + exact.mean[0, 0] ** 2),
    ):
        yield Identity(
            f"D-Flow's density, carried by the flow: posterior {name}",
            "bimodal prior, linear measurement, quadrature",
            relative_error(value, reference),
            QUADRATURE,
        )


DOOB_IDENTITIES: tuple[Callable[[], Iterator[Identity]], ...] = (
    score_is_a_control,
    doob,
    gaussian_case,
    price_of_noise,
    riccati_sampler,
    draws_by_products,
    girsanov,
    believed_prior,
    flow_push_forward,
)


def _steps(*counts: int) -> list[tuple[float, float]]:
    """Returns the pairs (t, s) of all chains with so many steps, uniform from 1 to 0."""
    return [
        pair
        for steps in counts
        for pair in pairwise(torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist())
    ]


def _expected_square(a: Tensor, B: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """Returns E|a + B x|^2 for x of this mean and covariance."""
    return ((a + B @ mean).square().sum() + (B @ covariance @ B.mT).trace()).item()
