"""The second implementation of Eq. 3 and of its gradients, against the first and differences."""

import pytest
import torch

from diffoc.costs import GaussianLikelihood
from diffoc.process import ReverseProcess, draw_noise
from diffoc.theory.linear_gaussian import linear_gaussian, relative_error, standard_normal
from diffoc.theory.rollouts import (
    end_of_guided_flow,
    euler,
    one_sweep,
    planar_mixture,
    replanned,
    rollout_gradient,
    second_order_gains,
)

T = 6
TIMES = torch.linspace(1, 0, T + 1, dtype=torch.float64)


def test_euler_is_the_step_of_the_process():
    setting = planar_mixture()
    process = ReverseProcess(setting.prior, T, "euler")
    for i in range(T):
        found = euler(setting.prior, setting.starts, TIMES[i], TIMES[i] - TIMES[i + 1])
        assert relative_error(found, process.step(i, setting.starts)) < 1e-13


def test_the_gradient_is_that_of_central_differences():
    setting, h = planar_mixture(), 1e-5
    process = ReverseProcess(setting.prior, T, "euler")
    found = rollout_gradient(setting.prior, setting.likelihood, TIMES, 2, setting.starts)
    for j in range(2):
        shift = h * torch.eye(2, dtype=torch.float64)[j]
        more, less = (
            -setting.likelihood(process.rollout(setting.starts + d, start=2)[-1])
            for d in (shift, -shift)
        )
        torch.testing.assert_close(found[:, j], (more - less) / (2 * h), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["euler", "ddim", "ddpm"])
@pytest.mark.parametrize("mode", ["input", "output"])
def test_replanning_corrects_where_the_state_is(mode, method):
    setting, a = planar_mixture(), 40.0
    noise = draw_noise(T, setting.starts.shape, torch.Generator().manual_seed(0))
    noise = noise if method == "ddpm" else None
    process = ReverseProcess(setting.prior, T, method, mode, noise)
    states = replanned(process, setting.likelihood, setting.starts, a)
    x = setting.starts
    for i in range(T):
        if mode == "output":
            x = process.step(i, x)
        where = i + (mode == "output")
        z = x.clone().requires_grad_()
        cost = setting.likelihood(process.rollout(z, start=where)[-1]).sum()
        x = x - torch.autograd.grad(cost, z)[0] / a
        if mode == "input":
            x = process.step(i, x)
        assert relative_error(states[i + 1], x) < 1e-12


@pytest.mark.parametrize("mode", ["input", "output"])
def test_full_gains_are_those_of_ilqr(mode):
    setting, a = planar_mixture(), 40.0
    process = ReverseProcess(setting.prior, T, "euler", mode)
    expected = one_sweep(process, setting.likelihood, setting.starts, a).gains
    found = second_order_gains(process, setting.likelihood, setting.starts, a)
    assert relative_error(found, torch.stack([gains.k for gains in expected])) < 1e-12


@pytest.mark.parametrize(
    ("update", "left"),
    [
        ("full", lambda a, curvature: (a / (a + curvature)) ** 2),
        ("paper", lambda a, curvature: 1 - (curvature / (a + curvature)) ** 2),
    ],
)
def test_what_a_step_leaves_where_the_flow_stands_still(update, left):
    """The step is the identity for N(0, 1), so that gradient and curvature are numbers."""
    (prior, one), y, s, x, a = standard_normal(), 0.7, 0.1, 0.3, 250.0
    process = ReverseProcess(prior, T, "euler", "output")
    likelihood = GaussianLikelihood(lambda z: z, y * one, s)
    found = second_order_gains(process, likelihood, x * one, a, update)
    slope, curvature = (x - y) / s**2, 1 / s**2
    for k in found.flatten().flip(0).tolist():
        assert k == pytest.approx(-slope / (a + curvature), rel=1e-12)
        kept = left(a, curvature)
        slope, curvature = kept * slope, kept * curvature


def test_gradients_are_those_without_gradients_outside():
    setting = planar_mixture()

    def gradients():
        return rollout_gradient(setting.prior, setting.likelihood, TIMES, 2, setting.starts)

    expected = gradients()
    with torch.no_grad():
        assert torch.equal(gradients(), expected)


def test_the_end_of_an_unguided_flow_is_the_prior():
    prior = linear_gaussian(1, 1).prior
    unguided = end_of_guided_flow(prior, lambda x, t: torch.zeros_like(x), 4000)
    assert unguided[0] == pytest.approx(prior.mean.item(), abs=2e-2)
    assert unguided[1] == pytest.approx(prior.matrix.sqrt().item(), abs=2e-2)
