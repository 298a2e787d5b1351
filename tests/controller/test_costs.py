"""The costs against their formulas, scipy and finite differences."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from diffoc.costs import ClassLikelihood, ControlCost, GaussianLikelihood
from diffoc.priors.pretrained import load_prior
from diffoc.priors.weights import classifier
from diffoc.problems.operators import average_pool
from diffoc.process import ReverseProcess
from diffoc.rules import LBFGS
from diffoc.solve import solve


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_gaussian_likelihood_is_scipys_up_to_the_constant():
    A, y, s = normal(3, 5), normal(4, 3, seed=1), 0.3
    x = normal(4, 5, seed=2)
    cost = GaussianLikelihood(lambda x: x @ A.mT, y, s)(x)
    log_density = norm(x.numpy() @ A.numpy().T, s).logpdf(y.numpy()).sum(axis=1)
    constant = 3 * math.log(s * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(cost.numpy(), -log_density - constant, rtol=1e-12)


def test_gaussian_likelihood_of_images_sums_over_everything_but_the_batch():
    x, y, s = normal(2, 3, 4, 4), normal(2, 3, 2, 2, seed=1), 0.2
    cost = GaussianLikelihood(average_pool(2), y, s)(x)
    assert cost.shape == (2,)
    for b in range(2):
        expected = 0.0
        for c in range(3):
            for i in range(2):
                for j in range(2):
                    block = x[b, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                    expected += (block.mean() - y[b, c, i, j]).item() ** 2 / (2 * s**2)
        assert cost[b].item() == pytest.approx(expected, rel=1e-12)


def test_gaussian_likelihood_of_a_nonlinear_operator_has_two_derivatives():
    cost = GaussianLikelihood(lambda x: torch.tanh(x) ** 2, normal(2, 3, seed=1), 0.5)
    x = normal(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(cost, (x,))
    assert torch.autograd.gradgradcheck(cost, (x,))


def test_gaussian_likelihood_is_zero_at_the_measurement():
    x = normal(2, 3)
    assert torch.equal(GaussianLikelihood(lambda x: x, x, 0.1)(x), torch.zeros(2).double())


@pytest.mark.parametrize("noise_std", [0.0, -1.0, math.nan])
def test_gaussian_likelihood_door(noise_std):
    with pytest.raises(ValueError, match=r"^noise_std"):
        GaussianLikelihood(lambda x: x, torch.zeros(1, 1), noise_std)


def test_the_whitened_residual_is_in_units_of_the_noise():
    x, y = normal(2, 1, 4, 4), normal(1, 1, 2, 2, seed=1)
    likelihood = GaussianLikelihood(average_pool(2), y, 0.2)
    residual = likelihood.whitened_residual(x)
    torch.testing.assert_close(0.2 * residual + y, average_pool(2)(x))


@pytest.mark.parametrize("shape", [(4, 6), (4, 1, 2, 3)])
def test_control_cost_of_one_weight(shape):
    u = normal(*shape)
    expected = 0.5 * 0.7 * np.linalg.norm(u.flatten(1).numpy(), axis=1) ** 2
    for weights in (0.7, torch.tensor(0.7, dtype=torch.float64)):
        for i in (0, 5):
            cost = ControlCost(weights)(i, torch.zeros(shape), u)
            assert cost.shape == (4,)
            np.testing.assert_allclose(cost.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_control_cost_of_a_weight_per_step(dtype):
    weights = torch.tensor([0.0, 1.5, 3.0], dtype=torch.float64)
    u = normal(4, 6).to(dtype)
    for i, r in enumerate(weights.tolist()):
        cost = ControlCost(weights)(i, u, u)
        assert cost.dtype == dtype
        expected = 0.5 * r * u.double().square().sum(1)
        torch.testing.assert_close(cost.double(), expected, rtol=1e-6, atol=0)


def test_control_cost_does_not_depend_on_the_state_and_is_quadratic():
    u = normal(2, 3).requires_grad_()
    cost = ControlCost(0.4)
    assert torch.equal(cost(0, normal(2, 3), u), cost(0, normal(2, 3, seed=1), u))
    (gradient,) = torch.autograd.grad(cost(0, u.detach(), u).sum(), u)
    torch.testing.assert_close(gradient, 0.4 * u.detach())
    assert torch.autograd.gradgradcheck(lambda u: cost(0, u.detach(), u), (u,))


@pytest.mark.parametrize(
    "weights",
    [
        -0.1,
        math.nan,
        torch.tensor([0.1, -0.1]),
        torch.tensor([0.1, math.nan]),
        torch.ones(2, 2),
    ],
)
def test_control_cost_door(weights):
    with pytest.raises(ValueError, match=r"^weights"):
        ControlCost(weights)


def test_weights_for_fewer_steps_are_named():
    with pytest.raises(ValueError, match="weights has 2 steps"):
        ControlCost(torch.ones(2))(2, torch.zeros(1, 3), torch.zeros(1, 3))


def test_class_likelihood_is_minus_the_log_of_the_softmax():
    weights = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([0, 3, 1])
    found = ClassLikelihood(lambda x: torch.tanh(x) @ weights, labels)(x)
    for i in range(3):
        powers = (torch.tanh(x[i]) @ weights).exp()
        torch.testing.assert_close(found[i], -(powers[labels[i]] / powers.sum()).log())
    shared = ClassLikelihood(lambda x: torch.tanh(x) @ weights, torch.tensor([3]))
    torch.testing.assert_close(shared(x)[1], found[1])
    assert torch.autograd.gradgradcheck(shared, x.requires_grad_())


def test_a_classifier_guides_the_digit_prior():
    """The controller makes the digit likely that was the least so."""
    network, process = classifier(), ReverseProcess(load_prior("mnist"), 5)
    x = process.initial_state((2, 1, 28, 28), torch.Generator().manual_seed(0)).float()
    uncontrolled = process.rollout(x)[-1]
    cost = ClassLikelihood(network, network(uncontrolled).argmin(1))
    before = cost(uncontrolled)
    found = solve(process, cost, x, control_cost=0.01, rank=0, iterations=40, rule=LBFGS())
    after = cost(found.x0)
    assert (after < 0.1 * before).all()
    assert (after < 0.1).all()  # above 90 %


@pytest.mark.parametrize(
    "labels", [torch.tensor([0.0]), torch.tensor(1), torch.tensor([-1]), torch.tensor([4])]
)
def test_unfit_labels_are_refused(labels):
    with pytest.raises(ValueError, match=r"^labels"):
        ClassLikelihood(lambda x: x, labels)(torch.zeros(1, 4))
