"""The Riccati sampler against iLQR, dense conditioning of whole paths, and dense inverses."""

import pytest
import torch
from azula.noise import VPSchedule

from diffoc.costs import ControlCost, GaussianLikelihood
from diffoc.experiments.known_posteriors import small_problems
from diffoc.experiments.posterior_distance import random_directions, sliced_wasserstein
from diffoc.ilqr import ilqr
from diffoc.lowrank import MatrixFree
from diffoc.priors.gaussian import GaussianPrior
from diffoc.priors.mixture import with_noise
from diffoc.process import ReverseProcess
from diffoc.system import ControlProblem
from diffoc.theory.doob_identities import posterior_from
from diffoc.theory.linear_gaussian import exact_kernel_problem, linear_gaussian, relative_error
from diffoc.theory.riccati_sampler import (
    low_rank_draw,
    path_divergence,
    propagate,
    reverse_kernels,
    riccati_policies,
    riccati_samples,
    shift_alone,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_policies_are_those_of_ilqr():
    setting, x = linear_gaussian(n=5, m=2), random(1, 5, seed=1)
    problem, kernels, _ = exact_kernel_problem(setting, 7)
    policies = riccati_policies(kernels, setting.measurement)
    result = ilqr(problem, x, regularization=0.0, iterations=1)
    for i, policy in enumerate(policies):
        assert relative_error(policy.K, result.gains[i].K[0]) < 1e-10
        planned = policy.k + policy.K @ result.states[i, 0]
        assert relative_error(planned, result.controls[i, 0]) < 1e-10


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_every_state_has_the_law_of_the_chain_given_y(steps):
    """Brute force: the dense joint Gaussian of the uncontrolled path, conditioned on y."""
    setting, x = linear_gaussian(n=3, m=2, noise_std=0.2), random(3, seed=1)
    kernels = reverse_kernels(setting, steps)
    n = 3
    maps, means, noise = torch.zeros(n, 0, dtype=x.dtype), x, []
    rows, centres = [], []
    for F, b, C in kernels:
        maps = torch.cat([F @ maps, torch.linalg.cholesky(C)], dim=1)
        means = F @ means + b
        rows.append(torch.nn.functional.pad(maps, (0, n * steps - maps.shape[1])))
        centres.append(means)
        noise.append(C)
    M, centre = torch.cat(rows), torch.cat(centres)
    joint = M @ M.mT
    A, y, s = setting.measurement.matrix, setting.measurement.y[0], setting.measurement.noise_std
    gain = torch.linalg.solve(with_noise(A @ joint[-n:, -n:] @ A.mT, s), A @ joint[-n:]).mT
    mean = centre + gain @ (y - A @ means)
    covariance = joint - gain @ A @ joint[-n:]
    moments = propagate(kernels, riccati_policies(kernels, setting.measurement), x)[1:]
    for i, (found, spread) in enumerate(moments):
        at = slice(n * i, n * (i + 1))
        assert relative_error(found, mean[at]) < 1e-12
        assert relative_error(spread, covariance[at, at]) < 1e-12


@pytest.mark.parametrize(
    ("n", "m", "noise_std", "seed", "off"), [(8, 4, 0.1, 0, 0.24), (2, 1, 0.3, 4, 0.36)]
)
def test_a_shift_alone_is_wide_by_a_quarter_to_a_third(n, m, noise_std, seed, off):
    setting, x = linear_gaussian(n, m, noise_std, seed), random(1, n, seed=1)
    exact = posterior_from(setting, x)
    errors = []
    for steps in (10, 100):
        kernels = reverse_kernels(setting, steps)
        policies = shift_alone(kernels, riccati_policies(kernels, setting.measurement))
        mean, covariance = propagate(kernels, policies, x[0])[-1]
        assert relative_error(mean, exact.mean[0]) < 1e-12
        errors.append(relative_error(covariance, exact.covariances[0]))
    assert errors[0] == pytest.approx(off, abs=0.01)
    assert errors[1] < 0.03


def test_every_other_policy_has_a_positive_divergence():
    setting, x = linear_gaussian(n=4, m=2), random(1, 4, seed=1)
    evidence = posterior_from(setting, x).log_evidence[0]
    kernels = reverse_kernels(setting, 5)
    best = riccati_policies(kernels, setting.measurement)

    def divergence(policies):
        return path_divergence(kernels, policies, setting.measurement, x[0], evidence).item()

    assert abs(divergence(best)) < 1e-12
    for change in (
        lambda p: type(p)(p.k, p.K, 1.05 * p.covariance),
        lambda p: type(p)(p.k, p.K, 0.95 * p.covariance),
        lambda p: type(p)(p.k + 0.01, p.K, p.covariance),
        lambda p: type(p)(p.k, 0.99 * p.K, p.covariance),
    ):
        assert divergence([change(policy) for policy in best]) > 1e-3
    assert divergence(shift_alone(kernels, best)) > 1


def test_samples_by_products_have_the_law_of_the_dense_policies():
    """DDPM's chain of a Gaussian prior: every unit of noise is pushed through the sampler."""
    n, T = 6, 5
    setting = linear_gaussian(n=n, m=3, noise_std=0.3)
    prior = GaussianPrior(setting.prior.mean, setting.prior.matrix, VPSchedule(sigma_min=1e-2))
    process = ReverseProcess(prior, T, "ddpm", "output", torch.zeros(T, 1, n).double())
    spreads = torch.tensor([c for _, _, c in process.coefficients], dtype=torch.float64)
    eye, x = torch.eye(n, dtype=torch.float64), random(1, n, seed=1)
    kernels = []
    for i, c in enumerate(spreads):
        b = process.step(i, torch.zeros(1, n).double())
        F = (torch.cat([process.step(i, e[None]) for e in eye]) - b).mT
        kernels.append((F, b[0], c**2 * eye))
    mean, covariance = propagate(kernels, riccati_policies(kernels, setting.measurement), x[0])[-1]

    count = 1 + T * n
    many = ReverseProcess(prior, T, "ddpm", "output", torch.zeros(T, count, n).double())
    problem = ControlProblem(many.step, ControlCost(1 / spreads**2), setting.likelihood, T)
    noise = torch.cat([torch.zeros(1, T * n), torch.eye(T * n)]).double()
    noise = noise.reshape(count, T, n).movedim(1, 0)
    plan = 0.1 * random(T, 1, n, seed=2).expand(T, count, n)  # affine steps: any plan will do
    ends = riccati_samples(problem, x.expand(count, n), plan, noise, rank=3)
    columns = ends[1:] - ends[:1]
    assert relative_error(ends[0], mean) < 1e-9
    assert relative_error(columns.mT @ columns, covariance) < 1e-9


def test_on_the_ring_it_is_near_the_posterior_and_the_plan_is_not():
    """An approximation: eight modes, one coordinate measured, a quadratic around one plan."""
    ring, g = small_problems()[-1], torch.Generator().manual_seed(0)
    count, T = 200, 40
    times = torch.linspace(1, 0.02, T + 1, dtype=torch.float64)
    still = torch.zeros(T, count, 2, dtype=torch.float64)
    process = ReverseProcess(ring.prior, times, "ddpm", "output", still)
    weights = torch.tensor([1 / c**2 for _, _, c in process.coefficients], dtype=torch.float64)
    A, y, s = ring.measurement.matrix, ring.measurement.y, ring.measurement.noise_std
    cost = GaussianLikelihood(lambda x: x @ A.mT, y, s)
    problem = ControlProblem(process.step, ControlCost(weights), cost, T)
    start = torch.randn(count, 2, generator=g, dtype=torch.float64)
    noise = torch.randn(T, count, 2, generator=g, dtype=torch.float64)
    exact, directions = ring.posterior.sample(4000, g)[:, 0], random_directions(2, 50, g)
    scale = (torch.cov(exact.mT).trace() / 2).sqrt()

    def distance(x):
        return sliced_wasserstein(x, exact, directions) / scale

    derivatives = MatrixFree(convex=True, together=True)
    plan = ilqr(problem, start, derivatives=derivatives, rank=1, iterations=2).states[-1]
    drawn = riccati_samples(problem, start, still, noise, rank=1)
    assert distance(drawn) < 0.45
    assert distance(plan) > 0.8


@pytest.mark.parametrize("kind", ["positive", "indefinite", "dependent", "rank 0"])
def test_low_rank_draws_have_the_dense_covariance(kind):
    m, r = 12, 0.7
    U, S = random(m, 4), random(4, 4, seed=1)
    S = {"indefinite": 0.01 * (S + S.mT)}.get(kind, S @ S.mT)
    if kind == "dependent":
        U[:, 3] = U[:, 0] - 2 * U[:, 1]
    if kind == "rank 0":
        U, S = U[:, :0], S[:0, :0]
    unit = torch.eye(m, dtype=torch.float64)
    root = low_rank_draw(U.expand(m, -1, -1), S.expand(m, -1, -1), r, unit)
    assert relative_error(root.mT @ root, torch.linalg.inv(r * unit + U @ S @ U.mT)) < 1e-12


def test_an_indefinite_control_hessian_is_refused():
    with pytest.raises(ValueError, match="raise r"):
        low_rank_draw(random(1, 5, 2), -5 * torch.eye(2).double()[None], 0.1, random(1, 5))
