"""Hessian products against finite differences, and the sketches of true terminal Hessians."""

import math

import pytest
import torch
from torch import nn

from diffoc.baselines.released import ResidualNorm
from diffoc.costs import GaussianLikelihood
from diffoc.data import digits
from diffoc.hessian import HESSIANS, range_finder, terminal_products
from diffoc.lowrank import MatrixFree, linearize_step
from diffoc.problems.operators import average_pool
from diffoc.system import ControlProblem


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def nonlinear(n=9, m=5, batch=2):
    """A cost whose residual is curved and far from zero, and where it is looked at."""
    operator = random(n, m, seed=0) / n**0.5
    y = 2 * random(batch, m, seed=1)
    return GaussianLikelihood(lambda x: torch.sin(x @ operator), y, 0.4), random(batch, n, seed=2)


def central_differences(function, x, step=1e-5):
    """The Jacobian (p, n) of a function of one vector (n,) to (p,)."""
    columns = [
        (function(x + step * e) - function(x - step * e)) / (2 * step)
        for e in torch.eye(len(x), dtype=x.dtype)
    ]
    return torch.stack(columns, dim=-1)


def dense(product, x):
    n = x[0].numel()
    return product(torch.eye(n, dtype=x.dtype).expand(len(x), n, n))


def test_the_gradient_is_the_cost_s():
    cost, x = nonlinear()
    for hessian in HESSIANS:
        gradient, _ = terminal_products(cost, x, hessian)
        for b in range(2):
            one = GaussianLikelihood(cost.operator, cost.y[b : b + 1], 0.4)
            expected = central_differences(lambda v, one=one: one(v[None]), x[b])[0]
            torch.testing.assert_close(gradient[b], expected, rtol=1e-7, atol=1e-7)


def test_gauss_newton_is_the_squared_jacobian():
    cost, x = nonlinear()
    _, product = terminal_products(cost, x, "gauss_newton")
    found = dense(product, x)
    for b in range(2):
        J = central_differences(lambda v: cost.operator(v[None])[0], x[b]) / 0.4
        torch.testing.assert_close(found[b], J.mT @ J, rtol=1e-6, atol=1e-6)
    values = torch.linalg.eigvalsh((found + found.mT) / 2)
    assert (values > -1e-12).all()


def test_the_full_hessian_has_the_residual_s_curvature_as_well():
    cost, x = nonlinear()
    full, half = (dense(terminal_products(cost, x, hessian)[1], x) for hessian in HESSIANS)
    for b in range(2):
        one = GaussianLikelihood(cost.operator, cost.y[b : b + 1], 0.4)

        def gradient(v, one=one):
            return terminal_products(one, v[None])[0][0]

        torch.testing.assert_close(
            full[b], central_differences(gradient, x[b]), rtol=1e-6, atol=1e-6
        )
    assert (torch.linalg.eigvalsh(full)[:, 0] < -1).all()  # what Nystrom could not represent
    assert (full - half).norm() > 0.1 * full.norm()


def test_for_a_linear_operator_the_two_agree():
    images = random(2, 1, 6, 6, seed=3)
    cost = GaussianLikelihood(average_pool(2), random(1, 1, 3, 3, seed=4), 0.1)
    full, half = (
        dense(terminal_products(cost, images, hessian)[1], images) for hessian in HESSIANS
    )
    torch.testing.assert_close(half, full)
    # The mean of four pixels: 1 / 16 where two pixels share a block, over s^2 = 0.01.
    assert half[0, 0, 0].item() == pytest.approx(1 / 16 / 0.01)
    assert half[0, 0, 2].item() == 0


def test_problems_of_a_batch_do_not_influence_each_other():
    cost, x = nonlinear()
    X = random(2, 9, 3, seed=5)
    for hessian in HESSIANS:
        together = terminal_products(cost, x, hessian)[1](X)
        for b in range(2):
            one = GaussianLikelihood(cost.operator, cost.y[b : b + 1], 0.4)
            alone = terminal_products(one, x[b : b + 1], hessian)[1](X[b : b + 1])
            torch.testing.assert_close(together[b], alone[0])


def test_a_linear_cost_has_no_curvature():
    _, product = terminal_products(lambda x: x.sum(1), random(2, 4, seed=6))
    assert (product(random(2, 4, 3, seed=7)) == 0).all()


def test_what_a_cost_does_not_offer_is_named():
    x = random(1, 4, seed=8)
    norm = ResidualNorm(lambda x: x, torch.zeros(1, 4).double())
    with pytest.raises(ValueError, match="ResidualNorm, has no method whitened_residual"):
        terminal_products(norm, x, "gauss_newton")
    with pytest.raises(ValueError, match="hessian is 'fisher', expected one of full, gauss_newton"):
        terminal_products(norm, x, "fisher")
    with pytest.raises(ValueError, match="hessian is 'fisher'"):
        MatrixFree(hessian="fisher")


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_controller_s_terminal_value_is_gauss_newton_s_best_of_that_rank(rank):
    """With n directions Nystrom is exact, so that only the truncation is left."""
    cost, x = nonlinear()
    problem = ControlProblem(lambda i, x, u: x + u, lambda i, x, u: 0 * u.sum(1), cost, 1)
    value = MatrixFree(hessian="gauss_newton", oversampling=9).terminal(problem, x, rank)
    found = value.Z @ value.S @ value.Z.mT
    for b in range(2):
        J = torch.autograd.functional.jacobian(lambda v: cost.operator(v[None])[0], x[b]) / 0.4
        _, s, Vh = torch.linalg.svd(J)
        best = (Vh[:rank].mT * s[:rank] ** 2) @ Vh[:rank]
        torch.testing.assert_close(found[b], best, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(value.Vx, terminal_products(cost, x)[0])


def blur(side, std):
    """The matrix (n, n) of a Gaussian blur of images of side x side pixels, zero outside."""
    at = torch.arange(side, dtype=torch.float64)
    kernel = torch.exp(-((at[:, None] - at) ** 2) / (2 * std**2)) / (std * (2 * torch.pi) ** 0.5)
    return torch.kron(kernel, kernel)


def saturated_digit():
    """A blurred, saturated digit of n = 400 pixels, its cost, and the cost's Hessian by hand."""
    image = nn.functional.interpolate(digits()[0][6:7].double(), (20, 20), mode="bilinear")
    K = blur(20, 1.5)

    def operator(x):
        return torch.tanh(x.flatten(1) @ K.mT)

    y = operator(image) + 0.05 * random(1, 400, seed=9)
    x = image + 0.3 * random(1, 1, 20, 20, seed=10)
    z = torch.tanh(K @ x.flatten())
    slope = 1 - z**2
    curvature = slope**2 + (z - y[0]) * (-2 * z * slope)  # of (tanh(v) - y)^2 / 2 in v
    return GaussianLikelihood(operator, y, 0.05), x, K.mT @ (curvature[:, None] * K) / 0.05**2


def test_the_bound_of_halko_et_al_holds_for_a_terminal_hessian():
    """Theorem 1.1 for the mean over the directions, and no basis beats the true spectrum."""
    cost, x, H = saturated_digit()
    _, product = terminal_products(cost, x)
    torch.testing.assert_close(product(random(1, 400, 2, seed=11))[0], H @ random(400, 2, seed=11))
    true = torch.linalg.svdvals(H)
    assert true[60] < 1e-2 * true[0]  # a spectrum that decays, so that the bound says something
    for rank, oversampling in ((10, 5), (40, 10)):
        errors = []
        for seed in range(20):
            Q = range_finder(product, random(1, 400, rank + oversampling, seed=100 + seed))[0]
            torch.testing.assert_close(Q.mT @ Q, torch.eye(rank + oversampling).double())
            missed = H - Q @ (Q.mT @ H)
            errors.append(torch.linalg.eigvalsh(missed @ missed.mT)[-1].sqrt().item())
        mean = sum(errors) / len(errors)
        k, p, tail = rank, oversampling, true[rank:].norm()
        bound = (1 + 4 * (k + p) ** 0.5 / (p - 1) * 400**0.5) * true[k]
        assert true[k + p] <= mean <= bound
        # Theorem 10.6 is sharper, for it knows the whole tail of the spectrum.
        sharp = (1 + (k / (p - 1)) ** 0.5) * true[k] + math.e * (k + p) ** 0.5 / p * tail
        assert mean <= sharp < bound


@pytest.mark.parametrize("together", [True, False])
def test_what_does_not_depend_on_something_has_zeros_for_every_problem(together):
    """torch's zeros lack a dimension: of linear costs, and of steps without state or control."""
    x, n = torch.ones(2, 1, 2, 2).double(), 4
    zero = torch.zeros_like(x)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(n, 1), nn.Flatten(0)).double()
    _, product = terminal_products(linear, x)
    assert torch.equal(product(torch.ones(2, n, 3).double()), torch.zeros(2, n, 3).double())
    for step, of_x, of_u in ((lambda i, x, u: 2 * x, 2, 0), (lambda i, x, u: 3 * u, 0, 3)):
        _, pullback = linearize_step(step, 0, x, zero, together)
        in_x, in_u = pullback(torch.ones(5, 2, n).double())
        assert torch.equal(in_x, torch.full((5, 2, n), of_x).double())
        assert torch.equal(in_u, torch.full((5, 2, n), of_u).double())
