"""The certificate by Monte Carlo against closed forms, and its two inequalities."""

import math
from dataclasses import replace

import pytest
import torch

from diffoc.costs import GaussianLikelihood
from diffoc.experiments.known_posteriors import small_problems
from diffoc.process import ReverseProcess, draw_noise
from diffoc.theory.certificate import certify, noise_priced
from diffoc.theory.doob_identities import gaussian_certificate, guided_gaussian
from diffoc.theory.guidance import covariance_score, tweedie_score


@pytest.fixture(scope="module")
def ring():
    problem = small_problems()[-1]
    measurement = problem.measurement
    cost = GaussianLikelihood(
        lambda x: x @ measurement.matrix.mT, measurement.y, measurement.noise_std
    )
    return problem, cost


def runs(problem, steps, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = draw_noise(steps, (count, 2), generator)
    process = ReverseProcess(problem.prior, steps, "ddpm", "output", noise)
    return process, process.initial_state((count, 2), generator)


def unguided(i, x, mean):
    return torch.zeros_like(x)


def test_both_ways_to_average_agree_with_the_closed_form():
    """A Gaussian chain, whose certificate is a KL of two dense Gaussians."""
    steps, count = 4, 4000
    exact, _ = gaussian_certificate(steps)
    still, measurement, guidance = guided_gaussian(steps)
    generator = torch.Generator().manual_seed(0)
    noise = draw_noise(steps, (count, 3), generator)
    process = ReverseProcess(still.denoiser, steps, "ddpm", "output", noise)
    x = process.initial_state((count, 3), generator)
    A, s = measurement.matrix, measurement.noise_std
    cost = GaussianLikelihood(lambda x: x @ A.mT, measurement.y, s)
    found = certify(process, cost, guidance, x)
    # log p(y) with the constant that the cost leaves out is the chain's log Z
    log_Z = certify(process, cost, unguided, x).log_evidence
    value, error = found.divergence(log_Z)
    assert abs(value - exact) < 4 * error
    assert error < 0.05 * exact
    work = found.work.mean().item()
    work_error = found.work.std().item() / count**0.5
    assert abs(work - found.mean_work[0]) < 4 * math.hypot(work_error, found.mean_work[1])
    assert abs(found.log_evidence[0] - log_Z[0]) < 4 * math.hypot(found.log_evidence[1], log_Z[1])


def test_without_guidance_it_is_the_divergence_of_prior_and_posterior(ring):
    problem, cost = ring
    s, y = problem.measurement.noise_std, problem.measurement.y.item()
    mixture = problem.prior.mixture
    weights, first = mixture.log_weights[0].exp(), mixture.means[0, :, 0]
    expected = (weights @ ((first - y).square() + 0.01)).item() / (2 * s**2)
    log_Z = problem.posterior.log_evidence.item() + math.log(2 * math.pi * s**2) / 2
    sharper = replace(problem.measurement, noise_std=s / 2**0.5)
    log_Z2 = problem.prior.posterior(sharper).log_evidence.item() + math.log(math.pi * s**2) / 2

    process, x = runs(problem, 100, 4000)
    found = certify(process, cost, unguided, x)
    assert torch.equal(found.work, cost(found.x0))
    value, error = found.divergence(found.log_evidence)
    # A hundred DDPM steps do not quite make the prior: two percent are allowed for them.
    assert abs(value - expected - log_Z) < 4 * error + 0.02 * value
    assert found.effective == pytest.approx(math.exp(2 * log_Z - log_Z2), rel=0.1)


def test_better_estimates_have_smaller_certificates(ring):
    problem, cost = ring
    process, x = runs(problem, 60, 1500)
    scores = {
        "DPS": tweedie_score(problem.prior, cost),
        "covariance": covariance_score(problem.prior, problem.measurement),
        "exact": lambda x, t: problem.prior.conditional_score(x, t, problem.measurement),
    }
    found = {k: certify(process, cost, noise_priced(process, v), x) for k, v in scores.items()}
    log_Z = found["exact"].log_evidence
    values = {k: v.divergence(log_Z) for k, v in found.items()}
    assert values["exact"][0] > -4 * values["exact"][1]
    assert values["exact"][0] < 0.3 < values["DPS"][0] - 4 * values["DPS"][1]
    assert values["covariance"][0] < values["DPS"][0]
    assert found["DPS"].effective < 0.3 < found["covariance"].effective < 1

    # Data processing: which mode a sample is in is a function of x_0.
    means = problem.prior.mixture.means[0]
    exact = problem.posterior.sample(20000, torch.Generator().manual_seed(1))[:, 0]

    def shares(points):
        return torch.cdist(points, means).argmin(1).bincount(minlength=8) / len(points)

    p, q = shares(found["DPS"].x0), shares(exact)
    coarse = torch.where(p > 0, p * (p / q).log(), 0).sum().item()
    assert 0 < coarse < values["DPS"][0]


def test_what_would_be_counted_wrongly_is_refused(ring):
    """As a cost (B, 1), of which (B, B) sums are made, or one shift for all numbers of a state."""
    problem, cost = ring
    process, x = runs(problem, 3, 5)
    with pytest.raises(ValueError, match="cost has shape"):
        certify(process, lambda x: x[:, :1].square(), unguided, x)
    with pytest.raises(ValueError, match="guidance has shape"):
        certify(process, cost, lambda i, x, mean: x[:, :1], x)


def test_what_has_no_noise_has_no_certificate(ring):
    problem, cost = ring
    x = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="needs method 'ddpm'"):
        certify(ReverseProcess(problem.prior, 3), cost, unguided, x)
    prior = type(problem.prior)(problem.prior.mixture, type(problem.prior.schedule)(sigma_min=0.0))
    process = ReverseProcess(prior, 3, "ddpm", "output", torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match="step 2 has no noise"):
        certify(process, cost, lambda i, x, mean: torch.full_like(x, float(i == 2)), x)
    priced = noise_priced(process, lambda x, t: torch.ones_like(x))
    assert certify(process, cost, priced, x).work.isfinite().all()
