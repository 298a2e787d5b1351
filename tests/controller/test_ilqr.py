"""The controller against least squares, scipy's optimisers and autograd."""

import math

import numpy as np
import pytest
import torch
from azula.noise import VPSchedule
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from diffoc.costs import ControlCost, GaussianLikelihood
from diffoc.ilqr import ilqr
from diffoc.priors.gaussian import GaussianPrior
from diffoc.process import ReverseProcess
from diffoc.riccati import Dense, SingularControlHessianError
from diffoc.rules import FullStep, LineSearch, Tikhonov
from diffoc.system import ControlProblem, forward_sweep, roll_out


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def shooting_gradient(problem: ControlProblem, x, controls) -> tuple[torch.Tensor, torch.Tensor]:
    """J (B,) and dJ/du (T, B, ...) by autograd through a rollout of its own."""
    u = controls.detach().clone().requires_grad_()
    cost = 0.0
    for i in range(problem.horizon):
        cost = cost + problem.running_cost(i, x, u[i])
        x = problem.dynamics(i, x, u[i])
    cost = cost + problem.terminal_cost(x)
    return cost.detach(), torch.autograd.grad(cost.sum(), u)[0]


# ---------------------------------------------------------------- linear dynamics, quadratic costs


class LQ:
    """x' = A x + B u + c; costs z^T H z / 2 + h^T z of z = (x, u), and P, p at the end."""

    def __init__(self, n: int, m: int, T: int, seed: int = 0) -> None:
        self.n, self.m, self.T = n, m, T
        Q = torch.linalg.qr(normal(T, n, n, seed=seed))[0]
        self.A = 0.97 * Q + 0.02 * normal(T, n, n, seed=seed + 1) / n**0.5
        self.B = normal(T, n, m, seed=seed + 2) / n**0.5
        self.c = 0.1 * normal(T, n, seed=seed + 3)
        W = normal(T + 1, n + m, n + m, seed=seed + 4)
        H = W @ W.mT / (n + m) + 0.3 * torch.eye(n + m, dtype=torch.float64)
        h = normal(T + 1, n + m, seed=seed + 5)
        self.H, self.h, self.P, self.p = H[:T], h[:T], H[T, :n, :n], h[T, :n]

    def problem(self) -> ControlProblem:
        def running(i, x, u):
            z = torch.cat([x, u], dim=1)
            return ((z @ self.H[i]) * z).sum(1) / 2 + z @ self.h[i]

        return ControlProblem(
            lambda i, x, u: x @ self.A[i].mT + u @ self.B[i].mT + self.c[i],
            running,
            lambda x: ((x @ self.P) * x).sum(1) / 2 + x @ self.p,
            self.T,
        )

    def tail_policy(self, i: int, states, controls) -> tuple[np.ndarray, np.ndarray]:
        """The first control of the tail problem's optimum, k (B, m) and K (m, n).

        All controls from step i on are unknowns of one least-squares problem: with the Cholesky
        factor L of a stage's Hessian, z^T H z / 2 + g^T z = |L^T z + L^-1 g|^2 / 2 + const.
        """
        n, m, tail = self.n, self.m, self.T - i
        batch = states.shape[1]
        reach, effect = np.eye(n), np.zeros((n, tail * m))  # dx_j = reach dx_i + effect dU
        rows, constant, from_state = [], [], []

        def add(factor, select, start, gradient):
            rows.append(factor.T @ select)
            from_state.append(factor.T @ start)
            constant.append(np.linalg.solve(factor, gradient.T))

        for j in range(i, self.T):
            z = torch.cat([states[j], controls[j]], dim=1).numpy()
            own = np.zeros((m, tail * m))
            own[:, (j - i) * m : (j - i + 1) * m] = np.eye(m)
            H = self.H[j].numpy()
            add(
                np.linalg.cholesky(H),
                np.vstack([effect, own]),
                np.vstack([reach, np.zeros((m, n))]),
                z @ H + self.h[j].numpy(),
            )
            A, B = self.A[j].numpy(), self.B[j].numpy()
            reach, effect = A @ reach, A @ effect + B @ own
        P = self.P.numpy()
        add(np.linalg.cholesky(P), effect, reach, states[-1].numpy() @ P + self.p.numpy())
        right = np.hstack([np.vstack(constant), np.vstack(from_state)])
        Q, R = np.linalg.qr(np.vstack(rows))
        solution = -np.linalg.solve(R, Q.T @ right)[:m]
        return solution[:, :batch].T, solution[:, batch:]


@pytest.mark.parametrize(("n", "m", "T"), [(4, 2, 10), (3, 5, 7), (64, 8, 40), (6, 3, 200)])
def test_linear_quadratic_problems_take_one_iteration_and_have_least_squares_gains(n, m, T):
    lq = LQ(n, m, T, seed=n)
    problem, x, controls = lq.problem(), normal(2, n, seed=91), normal(T, 2, m, seed=92)
    result = ilqr(problem, x, controls)
    assert result.status == ["gradient", "gradient"]
    for rows in vars(result.history).values():
        assert len(rows) == 1
    assert result.history.step[0].tolist() == [1, 1]
    cost, gradient = shooting_gradient(problem, x, result.controls)
    torch.testing.assert_close(result.cost, cost, rtol=1e-11, atol=1e-11)
    assert gradient.abs().max() < 1e-8

    nominal = problem.rollout(x, controls)
    for i in sorted({0, T // 2, T - 1}):
        k, K = lq.tail_policy(i, nominal, controls)
        gains = result.gains[i]
        assert np.linalg.norm(gains.k.numpy() - k) <= 1e-10 * np.linalg.norm(k)
        for b in range(2):
            assert np.linalg.norm(gains.K[b].numpy() - K) <= 1e-10 * np.linalg.norm(K)
    # The expected decrease of a full step is the decrease.
    first = shooting_gradient(problem, x, controls)[0]
    torch.testing.assert_close(result.history.expected[0], first - cost, rtol=1e-9, atol=1e-9)


def test_forward_sweep_is_the_policy():
    lq = LQ(4, 2, 5, seed=5)
    problem, x, controls = lq.problem(), normal(2, 4, seed=91), normal(5, 2, 2, seed=92)
    states = problem.rollout(x, controls)
    gains = ilqr(problem, x, controls, iterations=1).gains  # of the first sweep
    step = torch.tensor([0.25, 0.0], dtype=torch.float64)
    nominal = roll_out(problem, x, controls, Dense())
    new = forward_sweep(problem, nominal, gains, step, Dense())
    new_states, new_controls = new.states, new.controls
    assert torch.equal(new_states[:, 1], states[:, 1])
    assert torch.equal(new_controls[:, 1], controls[:, 1])
    y = x[0].numpy()
    for i, g in enumerate(gains):
        u = controls[i, 0].numpy() + 0.25 * g.k[0].numpy()
        u = u + g.K[0].numpy() @ (y - states[i, 0].numpy())
        np.testing.assert_allclose(new_controls[i, 0].numpy(), u, rtol=1e-12, atol=1e-12)
        y = lq.A[i].numpy() @ y + lq.B[i].numpy() @ u + lq.c[i].numpy()
        np.testing.assert_allclose(new_states[i + 1, 0].numpy(), y, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- swing-ups


def pendulum() -> tuple[ControlProblem, torch.Tensor, torch.Tensor]:
    """From hanging, and elsewhere, to upright (angle zero)."""
    dt = 0.1

    def dynamics(i, x, u):
        angle, speed = x[:, 0], x[:, 1]
        speed = speed + dt * (9.81 * torch.sin(angle) - 0.1 * speed + 2 * u[:, 0])
        return torch.stack([angle + dt * speed, speed], dim=1)

    problem = ControlProblem(
        dynamics,
        lambda i, x, u: 0.05 * dt * u.square().sum(1),
        lambda x: 50 * x.square().sum(1),
        22,
    )
    x = torch.tensor([[math.pi, 0], [2, 0], [1, 1]], dtype=torch.float64)
    return problem, x, torch.full((22, 3, 1), 0.1, dtype=torch.float64)


def cart_pole() -> tuple[ControlProblem, torch.Tensor, torch.Tensor]:
    """Cart of 1 kg, pole of 0.1 kg and half a metre, hanging at angle pi; semi-implicit Euler."""
    dt, M, m, length, gravity = 0.1, 1.0, 0.1, 0.5, 9.81

    def dynamics(i, x, u):
        position, angle, velocity, rate = x.unbind(1)
        s, c = torch.sin(angle), torch.cos(angle)
        common = (10 * u[:, 0] + m * length * rate.square() * s) / (M + m)
        turn = (gravity * s - c * common) / (length * (4 / 3 - m * c.square() / (M + m)))
        push = common - m * length * turn * c / (M + m)
        velocity, rate = velocity + dt * push, rate + dt * turn
        return torch.stack([position + dt * velocity, angle + dt * rate, velocity, rate], dim=1)

    weights = torch.tensor([20.0, 100.0, 5.0, 5.0], dtype=torch.float64)
    problem = ControlProblem(
        dynamics,
        lambda i, x, u: dt * (0.1 * x[:, 0].square() + u.square().sum(1)),
        lambda x: (weights.to(x.dtype) * x.square()).sum(1),
        20,
    )
    x = torch.tensor([[0, math.pi, 0, 3], [0, math.pi, 0, 2]], dtype=torch.float64)
    return problem, x, torch.full((20, 2, 1), 0.1, dtype=torch.float64)


def scipys_cost(problem: ControlProblem, x, controls) -> float:
    """The least cost L-BFGS-B finds from the same controls, of one problem."""

    def objective(u):
        u = torch.from_numpy(u).reshape(controls.shape)
        cost, gradient = shooting_gradient(problem, x, u)
        return cost.item(), gradient.flatten().numpy()

    options = {"maxiter": 400, "gtol": 1e-6, "ftol": 1e-11, "maxcor": 40}
    start = controls.flatten().numpy()
    return minimize(objective, start, jac=True, method="L-BFGS-B", options=options).fun


@pytest.fixture(scope="module", params=[pendulum, cart_pole], ids=["pendulum", "cart-pole"])
def swing_up(request):
    """Problem, initial states and controls, what the callback saw, and the result."""
    problem, x, controls = request.param()
    seen = []
    result = ilqr(
        problem,
        x,
        controls,
        iterations=500,
        callback=lambda i, cost, x: seen.append((i, cost.clone())),
    )
    return problem, x, controls, seen, result


def test_swing_ups_are_no_worse_than_scipys(swing_up):
    problem, x, controls, _, result = swing_up
    assert set(result.status) <= {"gradient", "cost"}
    cost, gradient = shooting_gradient(problem, x, result.controls)
    torch.testing.assert_close(result.cost, cost, rtol=1e-12, atol=0)
    assert gradient.abs().max() < 1e-6
    for b in range(0, len(x), 2):  # the second start of each is like another
        one = slice(b, b + 1)
        best = scipys_cost(problem, x[one], controls[:, one])
        assert cost[b] <= best * (1 + 1e-6)


def test_the_history_descends_and_tells_the_truth(swing_up):
    problem, x, controls, seen, result = swing_up
    history = result.history
    count = len(history.cost)
    assert [i for i, _ in seen] == list(range(count))
    costs = torch.stack([*history.cost, result.cost])
    assert (costs.diff(dim=0) <= 0).all()
    for (_, reported), after in zip(seen, costs[1:], strict=True):
        assert torch.equal(reported, after)
    first, gradient = shooting_gradient(problem, x, controls)
    torch.testing.assert_close(costs[0], first)
    torch.testing.assert_close(history.gradient[0], gradient.abs().amax(dim=(0, 2)))
    for rows in vars(history).values():
        assert len(rows) == count
        assert all(row.shape == (len(x),) for row in rows)
    # what took no step kept its cost
    for change, step in zip(costs.diff(dim=0), history.step, strict=True):
        assert ((step > 0) | (change == 0)).all()
    # the states are the controls'
    torch.testing.assert_close(problem.rollout(x, result.controls), result.states)


def test_no_problem_of_a_batch_depends_on_another(swing_up):
    problem, x, controls, *_ = swing_up
    together = ilqr(problem, x, controls, iterations=6)
    for b in range(len(x)):
        one = slice(b, b + 1)
        alone = ilqr(problem, x[one], controls[:, one], iterations=6)
        assert alone.status[0] == together.status[b]
        torch.testing.assert_close(alone.cost[0], together.cost[b], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            alone.controls[:, 0], together.controls[:, b], rtol=1e-9, atol=1e-9
        )


def fast_and_slow() -> tuple[ControlProblem, torch.Tensor]:
    """Problem 0 is quadratic and converges at once, problem 1 is not and does not."""
    bend = torch.tensor([0.0, 2.0], dtype=torch.float64)

    def dynamics(i, x, u):
        return x + u + bend[:, None] * torch.sin(3 * x)

    problem = ControlProblem(
        dynamics,
        lambda i, x, u: u.square().sum(1),
        lambda x: 5 * (x - 1).square().sum(1),
        6,
    )
    return problem, torch.tensor([[2.0], [2.0]], dtype=torch.float64)


def test_gains_of_a_converged_problem_do_not_depend_on_the_others():
    """The unregularised problem's own gains at its optimum, from numpy's Riccati recursion."""
    problem, x = fast_and_slow()
    result = ilqr(problem, x, iterations=15)
    assert len(result.history.cost) > 3
    assert result.history.step[1][0] == 0
    V = 10.0
    for gains in reversed(result.gains):
        assert gains.K[0].item() == pytest.approx(-V / (2 + V), rel=1e-8)
        V = V - V**2 / (2 + V)


# ---------------------------------------------------------------- random problems


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 4),
    m=st.integers(1, 3),
    T=st.integers(1, 8),
    strength=st.floats(0.05, 2.0),
)
def test_costs_never_rise(seed, n, m, T, strength):
    W, V = normal(n, n, seed=seed), normal(n, m, seed=seed + 1)
    L = normal(n, n, seed=seed + 2)
    Q, target = L @ L.mT / n, normal(n, seed=seed + 3)
    problem = ControlProblem(
        lambda i, x, u: x + strength * torch.tanh(x @ W.mT + u @ V.mT),
        lambda i, x, u: ((x @ Q) * x).sum(1) / 20 + 0.05 * u.square().sum(1),
        lambda x: 5 * (((x - target) @ Q) * (x - target)).sum(1),
        T,
    )
    x, controls = normal(2, n, seed=seed + 4), normal(T, 2, m, seed=seed + 5)
    result = ilqr(problem, x, controls, iterations=15)
    costs = torch.stack([shooting_gradient(problem, x, controls)[0], *result.history.cost[1:]])
    costs = torch.cat([costs, shooting_gradient(problem, x, result.controls)[0][None]])
    assert (costs.diff(dim=0) <= 1e-12 * costs[:-1].abs()).all()
    final = shooting_gradient(problem, x, result.controls)[1].abs().amax(dim=(0, 2))
    for b, status in enumerate(result.status):
        assert status != "gradient" or final[b] <= 1.01e-8


# ---------------------------------------------------------------- singular control Hessians


def diffusion(
    mode: str, T: int = 4, batch: int = 2, weights=0.0
) -> tuple[ControlProblem, torch.Tensor]:
    """A controlled reverse process of 3 numbers, of which the terminal cost sees one."""
    prior = GaussianPrior(
        torch.zeros(3, dtype=torch.float64),
        torch.diag(torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)),
        VPSchedule(0.1, 0.1),
    )
    process = ReverseProcess(prior, T, "ddim", mode)
    A = torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64)
    y = normal(batch, 1, seed=81)
    likelihood = GaussianLikelihood(lambda x: x @ A.mT, y, 0.5)
    problem = ControlProblem(process.step, ControlCost(weights), likelihood, T)
    return problem, normal(batch, 3, seed=82)


@pytest.mark.parametrize("mode", ["input", "output"])
def test_a_singular_hessian_without_regularization_is_named(mode):
    """Zero control cost, a terminal Hessian of rank one: Quu is singular at the last step."""
    problem, x = diffusion(mode)
    for constant in (0.0, torch.tensor(0.0), torch.zeros(4)):
        with pytest.raises(SingularControlHessianError, match=r"step 3 of problem 0") as error:
            ilqr(problem, x, regularization=constant)
        assert isinstance(error.value, torch.linalg.LinAlgError)
    # regularised there, it is the step before
    constants = torch.tensor([0.0, 0.0, 0.0, 1e3])
    with pytest.raises(SingularControlHessianError, match=r"step 2 of problem 0"):
        ilqr(problem, x, regularization=constants)


def test_an_indefinite_hessian_at_the_schedule_s_maximum_is_named():
    """Quu = -2e12 at step 1 of problem 1 alone; constants up to 1e12 do not help."""
    signs = torch.tensor([1.0, -1e12], dtype=torch.float64)
    problem = ControlProblem(
        lambda i, x, u: x + u,
        lambda i, x, u: (signs if i == 1 else signs.abs()) * u.square().sum(1),
        lambda x: x.sum(1),
        3,
    )
    x = normal(2, 2)
    with pytest.raises(SingularControlHessianError, match=r"step 1 of problem 1"):
        ilqr(problem, x, regularization=Tikhonov())
    with pytest.raises(SingularControlHessianError, match=r"step 1 of problem 1 .*0\.5:"):
        ilqr(problem, x, regularization=0.5)


@pytest.mark.parametrize("mode", ["input", "output"])
def test_the_default_schedule_recovers_from_singular_hessians(mode):
    problem, x = diffusion(mode)
    result = ilqr(problem, x)
    assert set(result.status) <= {"gradient", "cost"}
    assert result.history.regularization[0].min() > 0
    # one measurement of three numbers, free controls: it can be met exactly
    assert result.cost.max() < 1e-12
    assert shooting_gradient(problem, x, result.controls)[1].abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["input", "output"])
def test_a_control_cost_makes_the_controlled_diffusion_one_least_squares(mode):
    """The process of a Gaussian prior is affine: all controls by numpy's lstsq."""
    problem, x = diffusion(mode, weights=0.3)
    result = ilqr(problem, x)
    assert result.status == ["gradient", "gradient"]
    assert len(result.history.cost) == 1
    for b in range(2):

        def residuals(u, b=b):
            u = u.reshape(4, 1, 3).expand(4, 2, 3)
            final = problem.rollout(x, u)[-1]
            cost = problem.terminal_cost
            misfit = (cost.operator(final) - cost.y)[b] / cost.noise_std
            return torch.cat([misfit, math.sqrt(0.3) * u[:, b].flatten()])

        zero = torch.zeros(12, dtype=torch.float64)
        J = torch.autograd.functional.jacobian(residuals, zero)
        best = np.linalg.lstsq(J.numpy(), -residuals(zero).numpy(), rcond=None)[0]
        np.testing.assert_allclose(result.controls[:, b].flatten().numpy(), best, atol=1e-10)


# ---------------------------------------------------------------- options


def test_fixed_regularization_damps_the_step():
    """One scalar step: minimise u^2 + (x + u)^2 / 2 with a: u = -x / (3 + a)."""
    problem = ControlProblem(
        lambda i, x, u: x + u,
        lambda i, x, u: u.square().sum(1),
        lambda x: x.square().sum(1) / 2,
        1,
    )
    x = torch.tensor([[2.0], [-3.0]], dtype=torch.float64)
    for constant in (0.7, torch.tensor([0.7])):
        result = ilqr(problem, x, regularization=constant, iterations=1)
        torch.testing.assert_close(result.controls[0], -x / 3.7, rtol=1e-7, atol=0)
        assert result.status == ["iterations", "iterations"]
        torch.testing.assert_close(
            result.history.regularization[0], torch.full((2,), 0.7, dtype=torch.float64),
            rtol=1e-7, atol=0,
        )  # fmt: skip
    result = ilqr(problem, x, regularization=0.7)
    torch.testing.assert_close(result.controls[0], -x / 3, rtol=0, atol=1e-7)


def test_no_line_search_takes_every_full_step():
    """Newton's iteration on u^4 / 4 + u^2 / 2 without a safeguard, by hand."""
    problem = ControlProblem(
        lambda i, x, u: x + 0,
        lambda i, x, u: (torch.cosh(u) + 0.1 * u.square()).sum(1),
        lambda x: 0 * x.sum(1),
        1,
    )
    x, u = torch.zeros(1, 1).double(), 2.0
    controls = torch.full((1, 1, 1), u, dtype=torch.float64)
    for iterations in range(1, 5):
        u -= (math.sinh(u) + 0.2 * u) / (math.cosh(u) + 0.2)
        result = ilqr(
            problem, x, controls, regularization=0.0, rule=FullStep(), iterations=iterations
        )
        assert result.controls.item() == pytest.approx(u, rel=1e-9, abs=1e-12)
        assert all(step.item() == 1 for step in result.history.step)


def test_the_line_search_backtracks_by_its_contraction():
    """Newton on sqrt(1 + u^2) overshoots from beyond 1: u -> -u^3."""
    problem = ControlProblem(
        lambda i, x, u: x + 0,
        lambda i, x, u: (1 + u.square()).sqrt().sum(1),
        lambda x: 0 * x.sum(1),
        1,
    )
    x = torch.zeros(2, 1, dtype=torch.float64)
    controls = torch.tensor([[[2.0], [0.5]]], dtype=torch.float64)
    search = LineSearch(contraction=0.3)
    result = ilqr(problem, x, controls, rule=search, iterations=1)
    full = -(2.0 + 2.0**3)
    step = 1.0
    while (
        math.sqrt(5) - math.sqrt(1 + (2 + step * full) ** 2) < 1e-4 * step * 20 / math.sqrt(5) / 2
    ):
        step *= 0.3
    assert 0 < step < 1
    assert result.history.step[0].tolist() == pytest.approx([step, 1.0])
    expected = torch.tensor([[[2 + step * full], [-(0.5**3)]]], dtype=torch.float64)
    torch.testing.assert_close(result.controls, expected)
    assert ilqr(problem, x, controls).controls.abs().max() < 1e-8


def test_hessian_rank_zero_is_gradient_descent_through_the_control_cost():
    """Without curvature: k = -(lu + fu^T Vx) / (luu + a), K from the running cost alone."""
    problem, x = diffusion("output", T=1, weights=0.0)
    result = ilqr(problem, x, rank=0, regularization=50.0, iterations=1, rule=FullStep())
    gradient = shooting_gradient(problem, x, torch.zeros(1, 2, 3, dtype=torch.float64))[1]
    torch.testing.assert_close(result.controls, -gradient / 50, rtol=1e-10, atol=1e-12)


def test_a_full_hessian_rank_changes_nothing():
    problem, x = diffusion("input", weights=0.3)
    whole, truncated, one = (ilqr(problem, x, rank=r) for r in (None, 3, 1))
    torch.testing.assert_close(truncated.controls, whole.controls, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(one.controls, whole.controls, rtol=1e-9, atol=1e-10)  # rank one


def test_no_iterations_return_the_start():
    problem, x, controls = pendulum()
    result = ilqr(problem, x, controls, iterations=0)
    assert torch.equal(result.controls, controls)
    assert torch.equal(result.states, problem.rollout(x, controls))
    assert result.status == ["iterations"] * 3
    assert result.history.cost == []


def test_controls_default_to_zeros_and_inputs_are_not_changed():
    problem, x = diffusion("input", weights=0.3)
    before = x.clone()
    zeros = torch.zeros(4, 2, 3, dtype=torch.float64)
    found = ilqr(problem, x).controls
    assert torch.equal(found, ilqr(problem, x, zeros).controls)
    assert not found.requires_grad
    assert torch.is_grad_enabled()
    assert not zeros.any()
    assert torch.equal(x, before)


def test_an_optimal_start_is_recognised():
    problem, x = diffusion("input", weights=0.3)
    solved = ilqr(problem, x)
    again = ilqr(problem, x, solved.controls)
    assert again.status == ["gradient", "gradient"]
    assert again.history.cost == []
    assert torch.equal(again.controls, solved.controls)


def test_a_problem_converged_in_a_batch_keeps_its_trajectory(swing_up):
    problem, x, controls, _, solved = swing_up
    start = controls.clone()
    start[:, 1] = solved.controls[:, 1]
    result = ilqr(problem, x, start, iterations=3, gradient_tolerance=1e-6)
    assert result.status[1] == "gradient"
    assert torch.equal(result.controls[:, 1], start[:, 1])
    assert not torch.equal(result.controls[:, 0], start[:, 0])
    assert all(step[1] == 0 for step in result.history.step)


def test_images_are_controlled_like_flat_states():
    A = normal(3, 12, seed=83)

    def solve(x, flatten):
        problem = ControlProblem(
            lambda i, x, u: 0.9 * torch.tanh(x) + u,
            lambda i, x, u: 0.1 * u.flatten(1).square().sum(1),
            lambda x: (x.flatten(1) @ A.mT - 1).square().sum(1),
            3,
        )
        return ilqr(problem, x.flatten(1) if flatten else x)

    x = normal(2, 3, 2, 2, seed=84)
    image, flat = solve(x, False), solve(x, True)
    assert image.controls.shape == (3, 2, 3, 2, 2)
    assert image.states.shape == (4, 2, 3, 2, 2)
    torch.testing.assert_close(image.controls.flatten(2), flat.controls, rtol=1e-10, atol=1e-11)


def test_float32_runs_of_the_swing_ups_reach_the_cost(swing_up):
    problem, x, controls, _, double = swing_up
    start = double.controls + 0.01 * normal(*controls.shape, seed=85)
    result = ilqr(problem, x.float(), start.float(), iterations=8)
    assert result.controls.dtype == result.states.dtype == result.cost.dtype == torch.float32
    torch.testing.assert_close(result.cost.double(), double.cost, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the schedule


def test_tikhonov_grows_and_shrinks_quadratically():
    schedule = Tikhonov()
    a, delta = torch.zeros(1).double(), torch.ones(1).double()
    grown = []
    for _ in range(5):
        a, delta = schedule.grow(a, delta)
        grown.append(a.item())
    # minimum, then times 4, 8, 16, 32
    assert grown == pytest.approx([1e-8, 4e-8, 32e-8, 512e-8, 16384e-8], rel=1e-9, abs=0)
    shrunk = []
    for _ in range(7):
        a, delta = schedule.shrink(a, delta)
        shrunk.append(a.item())
    # after a growth the factor falls back to 1/2 at once
    expected = [16384e-8 / 2, 16384e-8 / 8, 16384e-8 / 64, 16384e-8 / 1024, 0, 0, 0]
    assert shrunk == pytest.approx(expected, rel=1e-9, abs=0)
    a, delta = torch.tensor([4e11]).double(), torch.tensor([4.0]).double()
    for _ in range(5):
        a, delta = schedule.grow(a, delta)
    assert a.item() == 1e12


# ---------------------------------------------------------------- doors


def simple(T: int = 3) -> ControlProblem:
    return ControlProblem(
        lambda i, x, u: x + u,
        lambda i, x, u: u.square().sum(1),
        lambda x: x.square().sum(1),
        T,
    )


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("x", {"x": torch.zeros(2)}),
        ("x", {"x": torch.zeros(2, 2, dtype=torch.int64)}),
        ("x", {"x": torch.full((2, 2), math.nan)}),
        ("x", {"x": torch.tensor([[0.0, math.inf], [0.0, 0.0]])}),
        ("controls", {"controls": torch.zeros(2, 2, 2)}),
        ("controls", {"controls": torch.zeros(3, 1, 2)}),
        ("controls", {"controls": torch.zeros(3, 2)}),
        ("controls", {"controls": torch.zeros(3, 2, 2, dtype=torch.float64)}),
        ("controls", {"controls": torch.full((3, 2, 2), math.nan)}),
        ("controls", {"controls": torch.full((3, 2, 2), math.inf)}),
        ("controls", {"controls": torch.full((3, 2, 2), 1e30)}),  # squares overflow
        ("regularization", {"regularization": -1.0}),
        ("regularization", {"regularization": math.nan}),
        ("regularization", {"regularization": torch.zeros(2)}),
        ("regularization", {"regularization": torch.tensor([0.0, -1.0, 0.0])}),
        ("iterations", {"iterations": -1}),
    ],
)
def test_doors(named, change):
    with pytest.raises(ValueError, match=rf"^{named} "):
        ilqr(simple(), **{"x": torch.zeros(2, 2), **change})


def test_a_start_whose_cost_is_not_finite_is_refused():
    problem = ControlProblem(
        lambda i, x, u: x * torch.exp(10 * x) + u,
        lambda i, x, u: u.square().sum(1),
        lambda x: x.square().sum(1),
        8,
    )
    x = torch.tensor([[0.1], [2.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^controls .*not finite"):
        ilqr(problem, x)


def test_trials_that_are_not_finite_are_refused_by_the_line_search():
    """exp overflows on a full Newton step from far left; shorter ones are taken."""
    problem = ControlProblem(
        lambda i, x, u: x + u,
        lambda i, x, u: 1e-4 * u.square().sum(1),
        lambda x: (torch.exp(x) - 3 * x + 1e-3 * x.square()).sum(1),
        1,
    )
    x = torch.full((1, 1), -30.0, dtype=torch.float64)
    result = ilqr(problem, x)
    assert result.history.step[0].item() < 1
    assert result.cost.isfinite().all()
    assert shooting_gradient(problem, x, result.controls)[1].abs().max() < 1e-7


def test_a_callback_that_raises_stop_iteration_ends_the_run():
    problem, x, controls = pendulum()
    seen = []

    def enough(iteration, cost, states):
        seen.append((cost, states))
        if iteration == 2:
            raise StopIteration

    result = ilqr(problem, x, controls, callback=enough)
    assert len(seen) == 3
    assert result.status == ["stopped"] * len(x)
    torch.testing.assert_close(result.cost, seen[-1][0], rtol=0, atol=0)
    torch.testing.assert_close(result.states[-1], seen[-1][1], rtol=0, atol=0)


def test_what_a_callback_does_to_its_copies_changes_nothing():
    problem, x, controls = pendulum()

    def spoil(iteration, cost, states):
        cost.zero_(), states.fill_(torch.nan)

    alone, watched = (ilqr(problem, x, controls, iterations=6, callback=c) for c in (None, spoil))
    assert watched.status == alone.status
    torch.testing.assert_close(watched.controls, alone.controls, rtol=0, atol=0)
