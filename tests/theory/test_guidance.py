"""Estimates of the conditional score against closed forms, differences and repetition."""

import pytest
import torch

from diffoc.costs import GaussianLikelihood
from diffoc.experiments.known_posteriors import small_problems
from diffoc.process import ReverseProcess
from diffoc.theory.guidance import (
    conditional_rollout,
    covariance_score,
    feynman_kac,
    label_score,
    members,
    rollout_score,
    tweedie_score,
)
from diffoc.theory.linear_gaussian import linear_gaussian, relative_error

T = torch.tensor(0.4, dtype=torch.float64)


def states(count, n, seed=1):
    return torch.randn(count, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def differences(f, x, d=1e-5):
    """Central differences of a function of states (B, n) -> (B,)."""
    columns = [f(x + d * e) - f(x - d * e) for e in torch.eye(x.shape[1], dtype=x.dtype)]
    return torch.stack(columns, dim=1) / (2 * d)


def test_with_covariance_it_is_exact_for_a_gaussian():
    setting, x = linear_gaussian(), states(4, 8)
    exact = setting.prior.conditional_score(x, T, setting.measurement)
    found = covariance_score(setting.prior, setting.measurement)(x, T)
    assert relative_error(found, exact) < 1e-12
    assert relative_error(tweedie_score(setting.prior, setting.likelihood)(x, T), exact) > 0.1


def test_tweedie_and_rollout_are_gradients_of_their_likelihoods():
    problem, x = small_problems()[-1], states(5, 2)
    cost = GaussianLikelihood(
        lambda x: x @ problem.measurement.matrix.mT,
        problem.measurement.y,
        problem.measurement.noise_std,
    )
    expected = differences(lambda z: -cost(problem.prior(z, T).mean), x)
    found = tweedie_score(problem.prior, cost)(x, T)
    assert relative_error(found, expected) < 1e-6
    process = ReverseProcess(problem.prior, torch.linspace(0.4, 0, 9, dtype=torch.float64))
    expected = differences(lambda z: -cost(process.rollout(z)[-1]), x)
    assert relative_error(rollout_score(problem.prior, cost, 8)(x, T), expected) < 1e-5


def test_feynman_kac_is_within_its_errors_which_are_those_of_repetition():
    problem, x = small_problems()[-1], states(1, 2)[0]
    cost = GaussianLikelihood(
        lambda x: x @ problem.measurement.matrix.mT,
        problem.measurement.y,
        problem.measurement.noise_std,
    )
    exact = problem.prior.conditional_score(x[None], T, problem.measurement)[0]
    generator = torch.Generator().manual_seed(0)
    pairs = [feynman_kac(problem.prior, cost, x, T, 500, generator) for _ in range(200)]
    estimates, errors = (torch.stack(column) for column in zip(*pairs, strict=True))
    spread = estimates.std(0)
    assert ((estimates.mean(0) - exact).abs() < 4 * spread / 200**0.5 + 0.05 * spread).all()
    assert torch.allclose(errors.mean(0), spread, rtol=0.2)


def test_label_score_is_the_gradient_of_the_labels_probability():
    prior, x, labels = small_problems()[-1].prior, states(5, 2), [1, 2, 3]

    def log_probability(z):
        alpha, sigma = prior.schedule(T)
        d = (z[:, None] - alpha * prior.means[0]).square().sum(-1)
        logits = prior.log_weights[0] - d / (2 * (alpha**2 * 0.01 + sigma**2))
        return logits[:, labels].logsumexp(1) - logits.logsumexp(1)

    found = label_score(prior, labels)(x, T)
    assert relative_error(found, differences(log_probability, x)) < 1e-7
    assert members(prior.mixture, labels).log_weights.exp().sum().item() == pytest.approx(1)
    for same in ([3, 1, 2, 2], torch.tensor(labels)):
        assert relative_error(label_score(prior, same)(x, T), found) < 1e-12


def test_conditional_rollout_takes_the_posteriors_mean():
    """With the exact score, the mean that a step uses is that of p(x_0 | x_t, y)."""
    problem, x = small_problems()[-1], states(3, 2)

    def score(x, t):
        return problem.prior.conditional_score(x, t, problem.measurement)

    process = ReverseProcess(problem.prior, 4, "ddim")
    expected = x
    for i, t in enumerate(process.times[:-1]):
        belief = problem.prior.mixture.given_noisy(expected, *problem.prior.schedule(t))
        expected = process.affine(i, expected, belief.given(problem.measurement).mean)
    assert relative_error(conditional_rollout(process, score, x), expected) < 1e-9
