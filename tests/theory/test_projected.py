"""Appendix D.1 against its formulas, written out with dense matrices, and against the truth."""

import numpy as np
import pytest
import torch

from diffoc.costs import ControlCost, GaussianLikelihood
from diffoc.ilqr import ilqr
from diffoc.lowrank import MatrixFree
from diffoc.riccati import Dense, expand_step
from diffoc.rules import FullStep, LineSearch
from diffoc.system import ControlProblem, backward_sweep, roll_out
from diffoc.theory.projected import Projected, push_forward


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def wave(z):
    return z + 0.1 * torch.sin(2 * z)


def setting(mode, n=14, T=4, batch=2):
    """Nonlinear dynamics with a Jacobian far from symmetric, and a nonlinear measurement."""
    first, second = random(n, n, seed=0) / n**0.5, random(n, n, seed=1) / n**0.5

    def dynamics(i, x, u):
        if mode == "input":
            x = x + u
        y = 0.8 * x + torch.tanh(x @ first + 0.1 * i) @ second
        return y + u if mode == "output" else y

    operator = random(n, 6, seed=2) / n**0.5
    cost = GaussianLikelihood(lambda x: wave(x @ operator), random(1, 6, seed=3), 0.5)
    weights = 0.4 + 0.1 * torch.arange(T, dtype=torch.float64)
    problem = ControlProblem(dynamics, ControlCost(weights), cost, T)
    return problem, random(batch, n, seed=4), 0.3 * random(T, batch, n, seed=5)


def sweep(problem, x, controls, derivatives, terminal_rank, a=2.0, update="full"):
    trajectory = roll_out(problem, x, controls, derivatives)
    value = derivatives.terminal(problem, trajectory.states[-1], terminal_rank)
    expansions = derivatives.expand(trajectory.steps, value)
    constant = torch.full((problem.horizon, len(x)), a, dtype=x.dtype)
    return backward_sweep(expansions, value, constant, update)


def feedback_matrix(gains):
    return -gains.U @ gains.M @ gains.W.mT


@pytest.mark.parametrize("mode", ["input", "output"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("update", ["full", "paper"])
@pytest.mark.parametrize("together", [False, True])
def test_with_all_columns_nothing_is_lost(mode, passes, sides, update, together):
    problem, x, controls = setting(mode)
    n, options = x.shape[1], {"a": 3.0, "update": update}
    expected, first = sweep(problem, x, controls, Dense(), n, **options)
    found, value = sweep(
        problem, x, controls, Projected(n, passes, sides, together=together), n, **options
    )
    for e, f in zip(expected, found, strict=True):
        assert e.definite.all()
        assert f.definite.all()
        torch.testing.assert_close(f.k, e.k, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(feedback_matrix(f), e.K, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(value.Vx, first.Vx, rtol=1e-10, atol=1e-10)
    hessian = value.Z @ value.S @ value.Z.mT
    torch.testing.assert_close(hessian, first.Vxx, rtol=1e-10, atol=1e-10)


def orthonormal(matrix):
    return np.linalg.svd(matrix, full_matrices=False)[0]


def by_the_formulas(problem, states, controls, b, mode, rank, terminal_rank, passes, sides, a):
    """k and K of every step of problem b, from Eqs. 79-89 with matrices of full size."""
    n = states.shape[-1]

    def drawn(count):
        return random(n, count, seed=0).numpy()

    final = states[-1, b]
    (H,) = (torch.autograd.functional.hessian(lambda x: problem.terminal_cost(x[None])[0], final),)
    (Vx,) = torch.autograd.functional.jacobian(lambda x: problem.terminal_cost(x[None]), final)
    H, Vx = H.numpy(), Vx.numpy()
    P = orthonormal(H @ drawn(terminal_rank) if passes == 2 else drawn(terminal_rank))
    V = P @ (P.T @ H @ P) @ P.T
    gains = []
    for i in reversed(range(problem.horizon)):
        u, r = controls[i, b].numpy(), problem.running_cost.weight(i)
        hx = torch.autograd.functional.jacobian(
            lambda x, i=i: problem.dynamics(i, x[None], controls[i, b][None])[0], states[i, b]
        ).numpy()
        hu = hx if mode == "input" else np.eye(n)
        P = orthonormal(hx @ drawn(rank) if passes == 2 else drawn(rank))
        Qx, Qu = hx.T @ Vx, r * u + hu.T @ Vx
        if sides == 2:
            small_x, small_u, C = P.T @ hx @ P, P.T @ hu @ P, P.T @ V @ P
            Qxx = P @ (small_x.T @ C @ small_x) @ P.T
            small = small_u.T @ C @ small_u
            Quu = r * np.eye(n) + P @ small @ P.T
            Qux = P @ (small_u.T @ C @ small_x) @ P.T
            inverse = (np.eye(n) - P @ P.T) / (r + a)
            inverse += P @ np.linalg.inv((r + a) * np.eye(rank) + small) @ P.T
        else:
            hx, hu = P @ (P.T @ hx), P @ (P.T @ hu)
            Qxx, Quu, Qux = hx.T @ V @ hx, r * np.eye(n) + hu.T @ V @ hu, hu.T @ V @ hx
            inverse = np.linalg.inv(Quu + a * np.eye(n))
        k, K = -inverse @ Qu, -inverse @ Qux
        Vx = Qx + K.T @ Quu @ k + K.T @ Qu + Qux.T @ k
        V = Qxx + K.T @ Quu @ K + K.T @ Qux + Qux.T @ K
        gains.append((k, K))
    return gains[::-1]


@pytest.mark.parametrize("mode", ["input", "output"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize(("rank", "terminal_rank"), [(1, 1), (4, 4), (5, 3)])
def test_with_few_columns_it_is_what_the_formulas_say(mode, passes, sides, rank, terminal_rank):
    problem, x, controls = setting(mode)
    derivatives = Projected(rank, passes, sides)
    found, _ = sweep(problem, x, controls, derivatives, terminal_rank)
    states = problem.rollout(x, controls)
    for b in range(len(x)):
        expected = by_the_formulas(
            problem, states, controls, b, mode, rank, terminal_rank, passes, sides, 2.0
        )
        for (k, K), gains in zip(expected, found, strict=True):
            np.testing.assert_allclose(gains.k[b].numpy(), k, rtol=1e-9, atol=1e-10)
            np.testing.assert_allclose(feedback_matrix(gains)[b].numpy(), K, rtol=1e-9, atol=1e-10)


def test_the_projections_lose_something_and_always_the_same():
    problem, x, controls = setting("input")
    truth, _ = sweep(problem, x, controls, Dense(), 3)
    once, again = (sweep(problem, x, controls, Projected(3), 3)[0] for _ in range(2))
    for t, first, second in zip(truth, once, again, strict=True):
        assert torch.equal(first.k, second.k)
        assert not torch.allclose(feedback_matrix(first), t.K, atol=1e-6)


def test_what_is_kept_of_the_jacobian_is_not_projected():
    """K of a step whose Jacobian is 0.8 I and a part of rank 3: three columns lose nothing."""
    n, T, a = 14, 4, torch.zeros(4, 2, dtype=torch.float64)
    low = random(n, 3, seed=6) @ random(3, n, seed=7) / n
    problem, x, u = setting("input")
    problem = ControlProblem(
        lambda i, x, u: 0.8 * (x + u) + (x + u) @ low,
        problem.running_cost,
        problem.terminal_cost,
        T,
    )
    found = {}
    for name, derivatives, rank in (
        ("dense", Dense(), None),
        ("kept", Projected(3, kept=(0.8,) * T), 6),  # the measurement has six numbers
        ("letter", Projected(3), 6),
    ):
        trajectory = roll_out(problem, x, u, derivatives)
        value = derivatives.terminal(problem, trajectory.states[-1], rank)
        expansions = derivatives.expand(trajectory.steps, value)
        gains, _ = backward_sweep(expansions, value, a, "full")
        found[name] = torch.stack([g.feedback(x) for g in gains])
    error = {k: (v - found["dense"]).norm() / found["dense"].norm() for k, v in found.items()}
    assert error["kept"] < 1e-9
    assert error["letter"] > 0.1
    output, x, u = setting("output")
    derivatives = Projected(3, kept=(0.8,) * T)
    trajectory = roll_out(output, x, u, derivatives)
    value = derivatives.terminal(output, trajectory.states[-1], 6)
    expansions = derivatives.expand(trajectory.steps, value)
    with pytest.raises(ValueError, match="kept needs the control before the step"):
        backward_sweep(expansions, value, a, "full")


def test_rank_zero_is_first_order_and_exact():
    for mode in ("input", "output"):
        problem, x, controls = setting(mode)
        expected, _ = sweep(problem, x, controls, Dense(), 0)
        found, _ = sweep(problem, x, controls, Projected(0), 0)
        for e, f in zip(expected, found, strict=True):
            torch.testing.assert_close(f.k, e.k, rtol=1e-12, atol=1e-12)
            assert (f.feedback(x) == 0).all()


def test_the_first_order_of_every_rank_is_exact():
    """With a strong regulariser the second order drops out, so whatever was projected as well."""
    problem, x, controls = setting("input")
    expected, _ = sweep(problem, x, controls, Dense(), 14, a=1e9)
    for derivatives in (Projected(1), Projected(5, passes=1, sides=1)):
        found, _ = sweep(problem, x, controls, derivatives, 2, a=1e9)
        for e, f in zip(expected, found, strict=True):
            assert (f.k - e.k).norm() < 1e-5 * e.k.norm()


def test_jacobian_vector_products():
    problem, x, controls = setting("input", batch=3)
    X = random(3, 14, 5, seed=8)
    with torch.no_grad():
        found = push_forward(lambda x: problem.dynamics(1, x, controls[1]), x, X)
    exact = expand_step(problem.dynamics, problem.running_cost, 1, x, controls[1]).fx
    torch.testing.assert_close(found, exact @ X)


@pytest.mark.parametrize(("passes", "evaluations", "tangents"), [(2, 2, 4), (1, 1, 0)])
def test_counts_are_those_of_the_cost_model(passes, evaluations, tangents):
    problem, x, controls = setting("input")
    counts = []
    for iterations in (1, 3):
        found = ilqr(
            problem,
            x,
            controls,
            derivatives=Projected(4, passes),
            rank=2,
            regularization=50.0,
            rule=FullStep(),
            iterations=iterations,
        )
        counts.append(found)
    before, after = counts
    assert (after.evaluations - before.evaluations == 2 * 4 * evaluations).all()
    assert (after.products - before.products == 2 * 4 * (1 + 4)).all()
    assert (after.tangents - before.tangents == 2 * 4 * tangents).all()


def test_problems_of_a_batch_do_not_influence_each_other():
    problem, x, controls = setting("input", batch=3)
    together, _ = sweep(problem, x, controls, Projected(3), 3)
    disturbed = x.clone()
    disturbed[0] = 50 * random(14, seed=9)
    beside, _ = sweep(problem, disturbed, controls, Projected(3), 3)
    for b in (1, 2):
        alone, _ = sweep(problem, x[b : b + 1], controls[:, b : b + 1], Projected(3), 3)
        for t, d, single in zip(together, beside, alone, strict=True):
            torch.testing.assert_close(t.k[b], single.k[0], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(t.k[b], d.k[b], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(
                feedback_matrix(t)[b], feedback_matrix(single)[0], rtol=1e-9, atol=1e-11
            )


@pytest.mark.parametrize("passes", [1, 2])
def test_the_controller_descends_with_it(passes):
    problem, x, controls = setting("input")
    start = problem.cost(problem.rollout(x, controls), controls)
    found = ilqr(
        problem,
        x,
        controls,
        derivatives=Projected(4, passes),
        rank=4,
        rule=LineSearch(),
        iterations=15,
    )
    free = ilqr(problem, x, controls, derivatives=MatrixFree(), rank=6, iterations=60)
    assert (found.cost < 0.5 * start).all()
    assert (free.cost <= found.cost + 1e-9).all()


def test_wrong_arguments_are_named():
    for wrong, message in (
        ({"rank": -1}, "rank is -1"),
        ({"rank": 2, "passes": 3}, "passes is 3, expected 1 or 2"),
        ({"rank": 2, "sides": 0}, "sides is 0, expected 1 or 2"),
        ({"rank": 2, "hessian": "half"}, "hessian is 'half'"),
    ):
        with pytest.raises(ValueError, match=message):
            Projected(**wrong)
    with pytest.raises(TypeError, match=r"rank is 1\.5, expected a whole number"):
        Projected(1.5)
    problem, x, controls = setting("input")
    options = {"derivatives": Projected(2)}
    with pytest.raises(ValueError, match="rank is None"):
        ilqr(problem, x, controls, **options)
    with pytest.raises(ValueError, match="rank is 15"):
        ilqr(problem, x, controls, rank=15, **options)
    with pytest.raises(ValueError, match="rank is 15, but the states have 14 numbers"):
        ilqr(problem, x, controls, derivatives=Projected(15), rank=2)
    other = ControlProblem(
        problem.dynamics, lambda i, x, u: u.square().sum(1), problem.terminal_cost, 4
    )
    with pytest.raises(ValueError, match="running_cost is function"):
        ilqr(other, x, controls, rank=1, **options)
