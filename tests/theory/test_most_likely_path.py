"""Dynamic programming on the line against a Gaussian's closed form and brute force."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize

from diffoc.process import METHODS
from diffoc.theory.most_likely_path import (
    GRID,
    bimodal_prior,
    planned_ends,
    values,
)

NEAR = (np.abs(GRID) < 1).nonzero()[0]  # from where no noise leaves the grid
Y, S = 0.1, 0.3


def test_the_three_values_agree_if_the_prior_is_a_gaussian():
    for value in values(bimodal_prior(0.0, 0.7), Y, S, 6):
        scale = np.abs(value.h_transform[NEAR]).max()
        for other in (value.stochastic, value.noise_free):
            assert np.abs(other - value.h_transform)[NEAR].max() < 2e-3 * scale


def test_against_brute_force_over_two_steps():
    prior = bimodal_prior(0.8, 0.3)
    times = torch.tensor([1, 0.5, 0], dtype=torch.float64)
    a, b, c = (v.tolist() for v in METHODS["ddpm"](prior.schedule, times[:-1], times[1:]))

    def mean(i, x):
        at = torch.tensor([[x]], dtype=torch.float64)
        return a[i] * x + b[i] * prior(at, times[i]).mean.item()

    def cost(x):
        return (x - Y) ** 2 / (2 * S**2)

    def best(x):
        # the last step has no noise, so no control either
        def total(u):
            return u[0] ** 2 / (2 * c[0] ** 2) + cost(mean(1, mean(0, x) + u[0]))

        tries = [minimize(total, [u], tol=1e-12) for u in np.linspace(-2, 2, 9)]
        return min(tries, key=lambda found: found.fun)

    def noise_free(x):
        return best(x).fun

    def h(x):
        def integrand(e):
            return np.exp(-(e**2) / 2 - cost(mean(1, mean(0, x) + c[0] * e)))

        return -np.log(quad(integrand, -9, 9, limit=200, points=[-2, 0, 2])[0])

    steps = values(prior, Y, S, 2)
    found, d = steps[0], 1e-3
    for x in (-0.7, 0.1, 1.0):
        at = np.abs(GRID - x).argmin()
        for f, slope in ((noise_free, found.noise_free), (h, found.h_transform)):
            expected = -(f(x + d) - f(x - d)) / (2 * d)
            assert slope[at] == pytest.approx(expected, rel=1e-2, abs=1e-3)
        end = mean(1, mean(0, x) + best(x).x[0])
        assert planned_ends(steps, np.array([x])) == pytest.approx(end, abs=2e-3)


@pytest.mark.parametrize("noise_std", [0.3, 0.02])
def test_one_step_without_noise_is_a_chain_rule(noise_std):
    """However sharp the measurement: its likelihood is zero in floating point on most of GRID."""
    prior, one = bimodal_prior(0.8, 0.3), torch.ones((), dtype=torch.float64)
    x = torch.from_numpy(GRID)[:, None].requires_grad_()
    (a, b, _), zero = METHODS["ddpm"](prior.schedule, one, 0 * one), 0.9
    cost = (a * x + b * prior(x, one).mean - zero).square().sum() / (2 * noise_std**2)
    expected = -torch.autograd.grad(cost, x)[0][:, 0].numpy()
    (found,) = values(prior, zero, noise_std, 1)
    np.testing.assert_allclose(found.h_transform[NEAR], expected[NEAR], rtol=1e-4, atol=1e-2)
