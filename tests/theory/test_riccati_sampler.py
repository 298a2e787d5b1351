"""The Riccati sampler in closed form against iLQR and dense conditioning of whole paths."""

from dataclasses import replace

import pytest
import torch
from azula.noise import VPSchedule

from diffoc.ilqr import ilqr
from diffoc.priors.gaussian import GaussianPrior
from diffoc.priors.mixture import with_noise
from diffoc.theory.linear_gaussian import (
    exact_kernel_problem,
    linear_gaussian,
    posterior_from,
    relative_error,
    reverse_kernels,
)
from diffoc.theory.riccati_sampler import (
    ancestral_kernels,
    path_divergence,
    propagate,
    riccati_policies,
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


def test_policies_are_for_one_measurement_and_kernels_of_any_precision():
    setting = linear_gaussian(n=3, m=2)
    several = replace(setting.measurement, y=random(3, 2))
    with pytest.raises(ValueError, match="y has shape"):
        riccati_policies(reverse_kernels(setting, 2), several)
    prior = GaussianPrior(setting.prior.mean, setting.prior.matrix, VPSchedule())
    double = ancestral_kernels(prior, 3)
    for pair in zip(ancestral_kernels(prior.float(), 3), double, strict=True):
        for found, expected in zip(*pair, strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


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
