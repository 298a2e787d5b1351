"""The rank-k recursion against the dense one, on nonlinear dynamics."""

from dataclasses import replace

import pytest
import torch

from diffoc.costs import ControlCost
from diffoc.lowrank import LowRankValue, MatrixFree, linearize_step
from diffoc.riccati import DenseValue, expand_step
from diffoc.system import ControlProblem, backward_sweep


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def dynamics(mode, n, seed=0):
    """A smooth nonlinear map with a step-dependent, non-symmetric Jacobian."""
    first, second = random(n, n, seed=seed) / n**0.5, random(n, n, seed=seed + 1) / n**0.5

    def step(i, x, u):
        if mode == "input":
            x = x + u
        y = 0.9 * x + torch.tanh(x @ first + 0.1 * i) @ second
        return y + u if mode == "output" else y

    return step


def setting(mode, n, k, T=6, batch=2, definite=True):
    step = dynamics(mode, n)
    controls = 0.3 * random(T, batch, n, seed=2)
    states = [random(batch, n, seed=3)]
    expansions, free = [], []
    for i in range(T):
        r = 0.5 + 0.1 * i
        cost = ControlCost(r)
        expansions.append(expand_step(step, cost, i, states[i], controls[i]))
        problem = ControlProblem(step, cost, None, T)
        y, expand = MatrixFree().step(problem, i, states[i], controls[i])
        free.append(expand)
        states.append(y)
    Vx, Z = random(batch, n, seed=4), random(batch, n, k, seed=5)
    A = random(batch, k, k, seed=6)
    S = A @ A.mT if definite else 0.02 * (A + A.mT) / k**0.5 / n
    return expansions, free, DenseValue(Vx, Z @ S @ Z.mT), LowRankValue(Vx, Z, S)


def free_sweep(steps, value, constant, update):
    """The backward sweep by products only; `steps` stay as they are."""
    return backward_sweep(MatrixFree().expand(list(steps), value), value, constant, update)


def close(found, expected):
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    return expected.numel() == 0 or (found - expected).abs().max().item() < 1e-10 * scale


@pytest.mark.parametrize("mode", ["input", "output"])
@pytest.mark.parametrize("update", ["full", "paper"])
@pytest.mark.parametrize(("n", "k"), [(60, 20), (30, 5), (12, 12), (30, 1), (30, 0)])
@pytest.mark.parametrize("a", [0.0, 0.7])
def test_equal_to_the_dense_recursion(mode, update, n, k, a):
    expansions, free, dense, low = setting(mode, n, k)
    constant = torch.full((len(free), 2), a, dtype=torch.float64)
    expected, dense_first = backward_sweep(expansions, dense, constant, update)
    found, low_first = free_sweep(free, low, constant, update)
    dx = random(2, n, seed=7)
    for e, f in zip(expected, found, strict=True):
        assert e.definite.all()
        assert f.definite.all()
        assert close(f.k, e.k)
        assert close(-f.U @ f.M @ f.W.mT, e.K)
        assert close(f.feedback(dx), e.feedback(dx))
        assert close(f.slope, e.slope)
        assert close(f.curvature, e.curvature)
    assert close(low_first.Vx, dense_first.Vx)
    assert close(low_first.Z @ low_first.S @ low_first.Z.mT, dense_first.Vxx)


@pytest.mark.parametrize("mode", ["input", "output"])
def test_indefinite_hessians_and_rank_zero_are_first_order(mode):
    expansions, free, dense, low = setting(mode, 20, 4, definite=False)
    constant = torch.zeros(len(free), 2, dtype=torch.float64)
    expected, _ = backward_sweep(expansions, dense, constant, "full")
    found, _ = free_sweep(free, low, constant, "full")
    for e, f in zip(expected, found, strict=True):
        assert close(f.k, e.k)

    matrices, free, _, none = setting(mode, 20, 0)
    gains, _ = free_sweep(free, none, constant, "full")
    cotangent = none.Vx
    for step, expand, g in zip(*map(reversed, (matrices, free, gains)), strict=True):
        e = expand(cotangent, none.Z)
        # With a = 0 the controls' own quadratic cost is minimised: u + k = -f_u^T Vx / r.
        in_x, in_u = (cotangent[:, None] @ step.fx)[:, 0], (cotangent[:, None] @ step.fu)[:, 0]
        torch.testing.assert_close(e.u + g.k, -in_u / e.r, rtol=1e-12, atol=1e-12)
        assert not g.feedback(e.u).any()
        cotangent = in_x


def test_singular_and_indefinite_control_hessians_are_reported():
    for problem_r, S_scale in ((0.0, 1.0), (0.5, -10.0)):
        _, free, _, low = setting("output", 10, 3)
        value = LowRankValue(low.Vx, low.Z, S_scale * low.S)
        a = torch.tensor([0.0, 1e4], dtype=torch.float64)
        expansion = replace(free[0](value.p, value.Z), r=problem_r)
        gains, new = value.step_back(expansion, a, "full")
        assert gains.definite.tolist() == [False, True]
        assert (gains.k[0] == 0).all()
        assert (gains.feedback(random(2, 10, seed=8))[0] == 0).all()
        assert new.Vx.isfinite().all()


@pytest.mark.parametrize("mode", ["input", "output"])
def test_one_backward_pass_pulls_every_cotangent_back(mode):
    step = dynamics(mode, 9)
    x, u, cotangents = random(2, 9, seed=1), random(2, 9, seed=2), random(4, 2, 9, seed=3)
    y, pullback = linearize_step(step, 2, x, u)
    torch.testing.assert_close(y, step(2, x, u))
    in_x, in_u = pullback(cotangents)
    for b in range(2):
        for which, found in ((0, in_x), (1, in_u)):
            J = torch.autograd.functional.jacobian(
                lambda a, c: step(2, a[None], c[None])[0], (x[b], u[b])
            )[which]
            torch.testing.assert_close(found[:, b], cotangents[:, b] @ J)
