"""The second implementation of Eq. 3 and of its gradients, against the first and differences."""

import pytest
import torch

from diffoc.process import ReverseProcess, draw_noise
from diffoc.theory.linear_gaussian import linear_gaussian, relative_error
from diffoc.theory.rollouts import (
    end_of_guided_flow,
    euler,
    planar_mixture,
    replanned,
    rollout_gradient,
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
