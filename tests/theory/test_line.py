"""Conditionals on the line against scipy's adaptive quadrature, closed forms and other kernels."""

import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad

from diffoc.problems.operators import LinearMeasurement
from diffoc.process import drift_and_diffusion
from diffoc.theory import doob_identities, line
from diffoc.theory.line import LIKELIHOODS, PRIORS, LineProblem
from diffoc.theory.linear_gaussian import relative_error
from diffoc.theory.most_likely_path import bimodal_prior

X = torch.tensor([-1.1, 0.2, 0.9], dtype=torch.float64)


def adaptive(problem, x, t, s):
    """h_t(x), E[x_s|x] and E[x_s|x, y] by scipy: one integral over x_0 for each.

    Given x_0 and x_t, the mean of x_s is a weighted mean of the two, as in DDPM.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = problem.scales(t), problem.scales(s)
    kept = (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2
    ratio = sigma_s / sigma_t * kept**0.5

    def integral(f, conditional):
        def integrand(z):
            at = torch.tensor(z, dtype=torch.float64)
            log = problem.prior.log(at).item() - ((x - alpha_t * z) / sigma_t) ** 2 / 2
            log += problem.likelihood.log(at).item() if conditional else 0
            return f(z) * math.exp(log)

        inner = {b for f in (problem.prior, problem.likelihood) for b in f.breaks}
        low, high = problem.prior.breaks[0], problem.prior.breaks[-1]
        inner |= {x / alpha_t, -0.8, 0.8, 0.1}
        points = sorted(b for b in inner if low < b < high)
        ends = [low, *points, high]
        return sum(
            quad(integrand, a, b, epsabs=1e-14, epsrel=1e-11, limit=200)[0]
            for a, b in pairwise(ends)
        )

    def mean(conditional):
        centre = integral(lambda z: z, conditional) / integral(lambda z: 1, conditional)
        return ratio * x + (alpha_s - ratio * alpha_t) * centre

    return integral(lambda z: 1, True) / integral(lambda z: 1, False), mean(False), mean(True)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("prior", PRIORS)
def test_means_and_evidence_against_adaptive_quadrature(prior, likelihood):
    problem = LineProblem(prior(), likelihood())
    for t, s in ((0.5, 0.3), (0.3, 0.0)):
        step = problem.reverse_step(X, t, s)
        h, mean, conditional = zip(*(adaptive(problem, x, t, s) for x in X.tolist()), strict=True)
        for found, expected in (
            (problem.log_h(X, t).exp(), h),
            (step.mean, mean),
            (step.conditional_mean, conditional),
        ):
            assert relative_error(found, torch.tensor(expected, dtype=torch.float64)) < 1e-8


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_score_against_differences_of_adaptive_quadrature(likelihood):
    problem, d = LineProblem(line.laplace(), likelihood()), 1e-4
    for i, x in enumerate(X.tolist()):
        up, down = (math.log(adaptive(problem, x + e, 0.4, 0.0)[0]) for e in (d, -d))
        assert problem.score(X, 0.4)[i].item() == pytest.approx((up - down) / (2 * d), rel=1e-5)


def test_bimodal_prior_and_linear_measurement_are_a_mixtures():
    problem = LineProblem(line.bimodal(1.0, 0.2, 0.5), line.linear(0.1, 0.3))
    one = torch.ones(1, 1, dtype=torch.float64)
    measurement = LinearMeasurement(one, 0.1 * one, 0.3)
    for t in torch.tensor([1.0, 0.6, 0.2], dtype=torch.float64):
        exact = bimodal_prior(1.0, 0.2).conditional_score(X[:, None], t, measurement)
        assert relative_error(problem.score(X, t.item()), exact[:, 0]) < 1e-10


def test_states_of_any_shape_with_and_without_gradients():
    problem = LineProblem(line.laplace(), line.square())
    rows = X.reshape(3, 1)
    with torch.no_grad():
        assert torch.equal(problem.score(rows, 0.4), problem.score(X, 0.4)[:, None])
    assert torch.equal(problem.log_h(rows, 0.4), problem.log_h(X, 0.4)[:, None])
    one, other = problem.reverse_step(X, 0.4, 0.2), problem.reverse_step(rows, 0.4, 0.2)
    for name in ("mean", "density", "conditional_density", "conditional_mean", "log_h_before"):
        torch.testing.assert_close(getattr(other, name)[:, 0], getattr(one, name))
    torch.testing.assert_close(other.cost(other.log_prob)[:, 0], one.cost(one.log_prob))


def test_the_modes_may_change_sides():
    one = LineProblem(line.bimodal(0.8, 0.2, 0.6), line.linear())
    other = LineProblem(line.bimodal(-0.8, 0.2, 0.4), line.linear())
    torch.testing.assert_close(other.log_h(X, 0.5), one.log_h(X, 0.5))
    with pytest.raises(ValueError, match=r"spread is -0\.05"):
        line.bimodal(spread=-0.05)


def test_panels_end_at_kinks():
    points, log_w = line.nodes((-1.0, 0.3, 2.0))
    assert log_w.exp() @ (points - 0.3).abs() == pytest.approx((1.3**2 + 1.7**2) / 2, rel=1e-14)


def test_densities_are_bayes_rule_on_a_mixture():
    t, s = 0.5, 0.2
    problem, prior = (
        LineProblem(line.bimodal(1.0, 0.2, 0.5), line.linear()),
        bimodal_prior(1.0, 0.2),
    )
    step, (f, v) = problem.reverse_step(X, t, s), problem.forward_kernel(t, s)
    at, before = (torch.tensor(time, dtype=torch.float64) for time in (s, t))
    forward = torch.distributions.Normal(f * step.points, v**0.5).log_prob(X[:, None])
    log_p = prior.log_prob(step.points[:, None], at) + forward
    expected = (log_p - prior.log_prob(X[:, None], before)[:, None]).exp()
    assert relative_error(step.density, expected) < 1e-10
    tilt = problem.log_h(step.points, s) - problem.log_h(X, t)[:, None]
    assert relative_error(step.conditional_density, expected * tilt.exp()) < 1e-10


@pytest.mark.parametrize("prior", PRIORS)
def test_no_kernel_is_cheaper_than_the_h_transform(prior):
    problem = LineProblem(prior(), line.linear())
    step, exact = problem.reverse_step(X, 0.6, 0.4), -problem.log_h(X, 0.6)
    tilted = (step.log_prob + step.log_h).log_softmax(1)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 0.1, 1.0):
        noise = torch.randn(step.log_h.shape, generator=generator, dtype=torch.float64)
        cost = step.cost((tilted + scale * noise).log_softmax(1))
        assert (cost > exact + 1e-4 if scale else (cost - exact).abs() < 1e-12).all()
    # without control the price is the expected cost alone
    assert torch.allclose(step.cost(step.log_prob), -(step.log_prob.exp() @ step.log_h))


def test_another_displacement_is_noticed(monkeypatch):
    """g^2 dt in the place of v/f is off by tens of percent at T = 5."""
    problem = LineProblem(line.laplace(), line.square())
    assert doob_identities.displacement_error(problem, 0.6, 0.4) < 1e-8
    f, v = problem.forward_kernel(0.6, 0.4)
    _, g2 = drift_and_diffusion(problem.schedule, torch.tensor(0.6, dtype=torch.float64))
    assert abs(g2.item() * 0.2 / (v / f) - 1) > 0.1
    score = LineProblem.score
    monkeypatch.setattr(LineProblem, "score", lambda *a: score(*a) * (1 + 1e-6))
    assert doob_identities.displacement_error(problem, 0.6, 0.4) > 1e-7
