"""Distances to posteriors, against closed forms, scipy, and samplers that are right or wrong."""

import math

import pytest
import torch
from azula.noise import VPSchedule
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance

from diffoc.baselines.cold import cold
from diffoc.baselines.dps import dps
from diffoc.experiments.known_posteriors import (
    control_frozen_noise,
    digit_problem,
    exact,
    exact_kernels,
    problem,
    small_problems,
)
from diffoc.experiments.posterior_distance import (
    DISTANCES,
    distance_table,
    posterior_distances,
    random_directions,
    shadow_distance,
    shadows,
)
from diffoc.priors.gaussian import GaussianPosterior, GaussianPrior
from diffoc.problems.tasks import UnsupportedTask


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def sliced(samples, reference, directions):
    return shadow_distance(shadows(samples, directions), shadows(reference, directions))


def whitened(samples):
    """Samples with exactly the mean 0 and the covariance I."""
    centred = samples - samples.mean(0)
    L = torch.linalg.cholesky(torch.cov(centred.mT))
    return torch.linalg.solve_triangular(L, centred.mT, upper=False).mT


def test_moments_and_bures_of_two_gaussians():
    standard = whitened(normal(50, 3))
    scales = torch.tensor([1.0, 2.0, 3.0]).double()
    target = GaussianPosterior(torch.ones(1, 3).double(), (scales**2).diag(), torch.zeros(1))
    found = posterior_distances(
        2 * standard, target, standard, random_directions(3, 2, generator())
    )
    assert found["mean"] == pytest.approx(math.sqrt(3 / 14))
    # C = 4 I beside diag(1, 4, 9).
    assert found["covariance"] == pytest.approx(math.sqrt((9 + 25) / (1 + 16 + 81)))
    assert found["trace"] == pytest.approx(12 / 14)
    assert found["bures"] == pytest.approx(math.sqrt((3 + 1 + 0 + 1) / 14))


def test_one_dimensional_couplings_are_optimal():
    a, b = normal(40, 1, seed=1), 0.5 * normal(40, 1, seed=2) + 1
    one = torch.ones(1, 1).double()
    costs = (a - b.mT).square()
    i, j = linear_sum_assignment(costs.numpy())
    assert sliced(a, b, one) == pytest.approx(costs[i, j].mean().sqrt().item())
    # Of a shift every distance is the shift, W_1 too.
    assert sliced(a, a + 2, one) == pytest.approx(2)
    assert wasserstein_distance(a[:, 0], a[:, 0] + 2) == pytest.approx(2)


def test_a_larger_reference_splits_the_samples_mass():
    a, b = normal(10, 1, seed=1), normal(30, 1, seed=2)
    one = torch.ones(1, 1).double()
    costs = (a.repeat(3, 1) - b.mT).square()
    i, j = linear_sum_assignment(costs.numpy())
    assert sliced(a, b, one) == pytest.approx(costs[i, j].mean().sqrt().item())
    with pytest.raises(ValueError, match="no multiple of 20"):
        sliced(b[:20], b, one)


def test_the_sliced_distance_of_isotropic_gaussians():
    n, count = 5, 20_000
    a, b = normal(count, n, seed=3), 3 * normal(count, n, seed=4)
    axes = random_directions(n, 20, generator(5))
    torch.testing.assert_close(axes.norm(dim=0), torch.ones(20).double())
    # Along every direction W_2 is the difference of standard deviations.
    assert sliced(a, b, axes) == pytest.approx(2, rel=0.02)


def test_sliced_distance_sees_a_mode_that_moments_do_not():
    modes = torch.tensor([[-1.0], [1.0]]).double().repeat(500, 1)
    target = GaussianPosterior(torch.zeros(1, 1).double(), torch.eye(1).double(), torch.zeros(1))
    axes = torch.ones(1, 1).double()
    found = posterior_distances(modes, target, normal(4000, 1), axes)
    assert found["bures"] < 0.01
    # E (|z| - 1)^2 = 2 - 2 sqrt(2 / pi)
    assert found["sliced"] == pytest.approx(math.sqrt(2 - 2 * math.sqrt(2 / math.pi)), rel=0.05)


def test_refused():
    target = small_problems()[2].posterior
    axes = random_directions(2, 3, generator())
    with pytest.raises(ValueError, match="samples has shape"):
        posterior_distances(normal(4, 3), target, normal(4, 2), axes)
    with pytest.raises(ValueError, match="not finite"):
        posterior_distances(normal(4, 2) / 0, target, normal(4, 2), axes)
    prior = GaussianPrior(torch.zeros(1).double(), torch.eye(1).double(), VPSchedule(sigma_min=0))
    clean = problem("no noise at time 0", prior, torch.eye(1).double(), normal(1), 0.5)
    with pytest.raises(ValueError, match="weights has values that are not finite"):
        distance_table({"frozen": (control_frozen_noise, {})}, [clean], 2, generator())


@pytest.mark.parametrize("index", range(3))
def test_an_exact_sampler_is_at_the_floor_and_a_shifted_one_at_its_shift(index):
    target = small_problems()[index]
    spread = target.posterior.covariance.reshape(2 * target.posterior.mean.shape[1:]).trace().sqrt()

    def shifted(*args, **settings):
        x0 = exact(*args, **settings)
        unit = torch.ones(x0.shape[1]).to(x0) / x0.shape[1] ** 0.5
        return x0 + 2 * spread * unit

    methods = {"right": (exact, {}), "shifted": (shifted, {})}
    floor, right, wrong = distance_table(methods, [target], 1000, generator(1))
    assert floor["method"] == "exact"
    assert right["mean"] < 0.1
    assert right["bures"] < 0.2
    assert right["trace"] == pytest.approx(1, abs=0.1)
    assert right["sliced"] < 2.5 * floor["sliced"] < 0.5
    assert wrong["mean"] == pytest.approx(2, abs=0.1)
    assert wrong["covariance"] == pytest.approx(right["covariance"])
    assert wrong["sliced"] > 1
    assert (right["evaluations"], right["products"]) == (0, 0)


@pytest.mark.parametrize("index", [0, 1])
def test_control_of_the_exact_kernels_samples_exactly(index):
    target = small_problems()[index]
    _, row = distance_table({"control": (exact_kernels, {})}, [target], 1000, generator(2))
    assert row["mean"] < 0.1
    assert row["covariance"] < 0.25
    assert row["trace"] == pytest.approx(1, abs=0.1)


def test_frozen_noise_becomes_exact_with_the_number_of_steps():
    # A standard normal's reverse kernels are isotropic, and DDPM's in the limit: their variance
    # leaves out that of x_0 given x_t, which is of first order in the step.
    n = 3
    prior = GaussianPrior(torch.zeros(n).double(), torch.eye(n).double(), VPSchedule())
    A = torch.eye(n).double()[:2]
    target = problem("normal", prior, A, torch.tensor([1.0, -0.5]).double(), 0.5)
    methods = {
        str(steps): (control_frozen_noise, {"steps": steps, "iterations": 1}) for steps in (25, 200)
    }
    _, few, many = distance_table(methods, [target], 2000, generator(3))
    assert 0.7 < few["trace"] < 0.85
    # Traces of 2000 samples have a standard deviation of 0.023.
    assert 0.9 < many["trace"] < 1.05
    assert many["mean"] < 0.08
    assert many["covariance"] < 0.15


def test_control_from_zero_is_one_point_and_from_noise_a_cloud():
    target = small_problems()[0]
    methods = {
        "zero": (cold, {"iterations": 5}),
        "noise": (cold, {"iterations": 5, "from_noise": True}),
    }
    _, zero, noise = distance_table(methods, [target], 20, generator(4))
    assert zero["trace"] < 1e-12
    assert zero["covariance"] == pytest.approx(1)
    assert noise["trace"] > 1e-3
    assert zero["settings"] == "iterations 5"
    assert noise["products"] > 0


def test_dps_runs_counts_and_is_no_exact_sampler():
    target = small_problems()[0]
    methods = {"dps": (dps, {"steps": 20, "guidance": 0.3}), "exact kernels": (exact_kernels, {})}
    floor, row, _ = distance_table(methods, [target], 200, generator(5))
    assert (row["evaluations"], row["products"]) == (20, 20)
    assert row["sliced"] > 1.5 * floor["sliced"]
    # A row does not depend on which others there are.
    alone = distance_table({"exact kernels": (exact_kernels, {})}, [target], 200, generator(5))[1]
    together = distance_table(methods, [target], 200, generator(5))[2]
    assert {k: alone[k] for k in DISTANCES} == {k: together[k] for k in DISTANCES}


def test_what_cannot_be_done_has_a_reason_and_no_number():
    ring = small_problems()[2]

    def diverging(prior, physics, y, x, generator, *, noise_std):
        return torch.cat([x[:-1], x[-1:] / 0])

    methods = {"kernels": (exact_kernels, {}), "diverging": (diverging, {})}
    _, unsupported, broken = distance_table(methods, [ring], 10, generator())
    assert "expected a GaussianPrior" in unsupported["reason"]
    assert broken["reason"] == "1 of 10 samples are not finite"
    assert all(math.isnan(row[name]) for row in (unsupported, broken) for name in DISTANCES)
    with pytest.raises(UnsupportedTask):
        exact_kernels(
            ring.prior, ring.physics, ring.measurement.y, normal(1, 2), generator(), noise_std=1
        )


def test_the_ring_s_posterior_by_brute_force():
    ring = small_problems()[2]
    grid = torch.linspace(-2, 2, 401, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    y, s = ring.measurement.y[0], ring.measurement.noise_std
    mixture, one, zero = ring.prior.mixture, torch.ones(()).double(), torch.zeros(()).double()
    log_density = mixture.log_prob(points, one, zero) - (points[:, 0] - y).square() / (2 * s**2)
    weights = log_density.softmax(dim=0)
    mean = weights @ points
    covariance = (points - mean).mT @ ((points - mean) * weights[:, None])
    torch.testing.assert_close(ring.posterior.mean[0], mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ring.posterior.covariance[0], covariance, rtol=1e-4, atol=1e-6)
    # Modes above the axis and below it: between them, where the mean is, is nothing.
    assert weights[(points[:, 1] - mean[1]).abs() < 0.1].sum() < 0.05


def test_the_digit_s_samples_explain_the_measurement():
    digit = digit_problem()
    samples = digit.posterior.sample(50, generator())[:, 0]
    residual = digit.physics.A(samples) - digit.measurement.y
    assert residual.square().mean().sqrt().item() == pytest.approx(0.05, rel=0.2)
    assert digit.posterior.covariance.shape == (1, 784, 784)
