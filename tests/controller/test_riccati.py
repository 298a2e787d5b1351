"""Riccati steps against brute-force minimisation, numpy and autograd."""

import numpy as np
import pytest
import torch

from diffoc.hessian import random_directions
from diffoc.lowrank import MatrixFree, low_rank_step
from diffoc.riccati import DenseValue, Expansion, control_gradient, expand_step, terminal_value
from diffoc.system import ControlProblem, backward_sweep

B, N, M, T = 3, 4, 2, 6


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def definite(*shape: int, seed: int = 0) -> torch.Tensor:
    """Positive definite matrices, (..., n, n)."""
    W = normal(*shape, shape[-1], seed=seed)
    return W @ W.mT / shape[-1] + 0.3 * torch.eye(shape[-1], dtype=torch.float64)


def random_expansion(seed: int, batch: int = B, mode: str = "any") -> Expansion:
    """With controls of any effect, or of that of input or output perturbation."""
    fx = 0.7 * normal(batch, N, N, seed=seed + 1)
    fu = {
        "any": normal(batch, N, M, seed=seed + 2),
        "input": fx.clone(),
        "output": torch.eye(N, dtype=torch.float64).repeat(batch, 1, 1),
    }[mode]
    m = fu.shape[-1]
    H = definite(batch, N + m, seed=seed)
    return Expansion(
        fx=fx,
        fu=fu,
        lx=normal(batch, N, seed=seed + 3),
        lu=normal(batch, m, seed=seed + 4),
        lxx=H[:, :N, :N],
        luu=H[:, N:, N:],
        lux=H[:, N:, :N],
    )


def random_value(seed: int, batch: int = B) -> DenseValue:
    return DenseValue(normal(batch, N, seed=seed), definite(batch, N, seed=seed + 1))


def stage_cost(e: Expansion, b: int, dx: torch.Tensor, du: torch.Tensor) -> torch.Tensor:
    """l_x dx + l_u du + (dx, du) Hessian (dx, du) / 2, of problem b."""
    linear = e.lx[b] @ dx + e.lu[b] @ du
    return linear + dx @ e.lxx[b] @ dx / 2 + du @ e.lux[b] @ dx + du @ e.luu[b] @ du / 2


def action_value(e, value, b, dx, du):
    """Q(dx, du): the stage's cost and the value where the linear dynamics lead."""
    z = e.fx[b] @ dx + e.fu[b] @ du
    return stage_cost(e, b, dx, du) + value.Vx[b] @ z + z @ value.Vxx[b] @ z / 2


def near(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> bool:
    return (got - expected).norm() <= tolerance * expected.norm()


# ---------------------------------------------------------------- one step


MODES = ("any", "input", "output")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("update", ["full", "paper"])
def test_gains_minimise_the_regularised_action_value(update, mode):
    """k + K dx is where Q(dx, du) + a/2 |du|^2 is least, found by Newton on autograd's Q."""
    e, value = random_expansion(10, mode=mode), random_value(20)
    a = torch.tensor([0.0, 0.3, 5.0], dtype=torch.float64)
    gains, _ = value.step_back(e, a, update)
    assert gains.definite.all()
    deviations = normal(5, B, N, seed=30)
    for dx in deviations:
        policy = gains.k + gains.feedback(dx)
        for b in range(B):

            def objective(du, b=b, dx=dx):
                return action_value(e, value, b, dx[b], du) + a[b] / 2 * du @ du

            zero = torch.zeros_like(e.lu[b])
            slope = torch.autograd.functional.jacobian(objective, zero)
            curvature = torch.autograd.functional.hessian(objective, zero)
            least = np.linalg.solve(curvature.numpy(), -slope.numpy())
            np.testing.assert_allclose(policy[b].numpy(), least, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_the_full_update_is_the_value_of_the_policy(mode):
    """Gradient and Hessian of Q(dx, k + K dx), by autograd, for any gains."""
    e, value = random_expansion(10, mode=mode), random_value(20)
    a = torch.tensor([0.0, 0.3, 5.0], dtype=torch.float64)
    gains, before = value.step_back(e, a, "full")
    _, paper = value.step_back(e, a, "paper")
    zero = torch.zeros(N, dtype=torch.float64)
    for b in range(B):

        def cost(dx, b=b):
            return action_value(e, value, b, dx, gains.k[b] + gains.K[b] @ dx)

        gradient = torch.autograd.functional.jacobian(cost, zero)
        hessian = torch.autograd.functional.hessian(cost, zero)
        assert near(before.Vx[b], gradient)
        assert near(before.Vxx[b], hessian)
        # Eqs. 48 and 49 agree where a = 0, and only there
        assert near(paper.Vx[b], gradient) == (a[b] == 0)
        assert near(paper.Vxx[b], hessian) == (a[b] == 0)
        # the constant's change is slope + curvature / 2
        change = gains.slope[b] + gains.curvature[b] / 2
        at_zero = action_value(e, value, b, zero, torch.zeros_like(e.lu[b]))
        torch.testing.assert_close(change, cost(zero) - at_zero, rtol=1e-10, atol=1e-12)


def test_slope_and_curvature_expect_the_change_of_every_step():
    e, value = random_expansion(10), random_value(20)
    gains, _ = value.step_back(e, torch.full((B,), 0.4).double(), "full")
    zero = torch.zeros(N, dtype=torch.float64)
    for step in (0.1, 0.5, 1.0):
        for b in range(B):
            expected = step * gains.slope[b] + step**2 * gains.curvature[b] / 2
            got = action_value(e, value, b, zero, step * gains.k[b])
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_value_hessians_are_symmetric():
    value = random_value(20)
    for update in ("full", "paper"):
        _, before = value.step_back(random_expansion(10), torch.ones(B).double(), update)
        assert torch.equal(before.Vxx, before.Vxx.mT)


# ---------------------------------------------------------------- whole sweeps


def test_constants_may_differ_between_steps_and_problems():
    expansions, value = [random_expansion(100 + 10 * i) for i in range(T)], random_value(500)
    a = torch.rand(T, B, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gains, start = backward_sweep(expansions, value, a, "full")
    for b in range(B):
        one = slice(b, b + 1)
        alone = [Expansion(**{k: v[one] for k, v in vars(e).items()}) for e in expansions]
        terminal = DenseValue(value.Vx[one], value.Vxx[one])
        alone_gains, alone_start = backward_sweep(alone, terminal, a[:, one], "full")
        assert near(alone_start.Vxx[0], start.Vxx[b], 1e-12)
        for g, h in zip(alone_gains, gains, strict=True):
            assert near(g.k[0], h.k[b], 1e-11)
            assert near(g.K[0], h.K[b], 1e-11)


# ---------------------------------------------------------------- definiteness


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_singular_and_indefinite_hessians_are_told_apart_by_problem(dtype):
    """Quu = luu + fu^T Vxx fu: definite, of rank one with rounding in it, indefinite, zero."""
    v = torch.tensor([[1.0], [1 / 3]], dtype=dtype)
    luu = torch.stack(
        [torch.eye(2), 7 * v @ v.mT, torch.diag(torch.tensor([1.0, -1])), 0 * v @ v.mT]
    )
    zero = torch.zeros(4, 2, 2, dtype=dtype)
    linear = torch.ones(4, 2, dtype=dtype)
    e = Expansion(zero, zero, linear, linear, zero, luu.to(dtype), zero)
    value = DenseValue(linear, zero)
    gains, before = value.step_back(e, torch.zeros(4, dtype=dtype), "full")
    assert gains.definite.tolist() == [True, False, False, False]
    assert not gains.k[1:].any()
    assert not gains.K[1:].any()
    assert before.Vx.isfinite().all()
    torch.testing.assert_close(gains.k[0], -linear[0])
    gains, _ = value.step_back(e, torch.full((4,), 1.5, dtype=dtype), "full")
    assert gains.definite.all()


def test_widely_scaled_hessians_are_definite():
    zero, linear = torch.zeros(1, 2, 2).double(), torch.ones(1, 2).double()
    luu = torch.diag(torch.tensor([1.0, 1e-12], dtype=torch.float64))[None]
    e = Expansion(zero, zero, linear, linear, zero, luu, zero)
    gains, _ = DenseValue(linear, zero).step_back(e, torch.zeros(1).double(), "full")
    assert gains.definite.all()
    torch.testing.assert_close(gains.k[0], torch.tensor([-1.0, -1e12]).double())


# ---------------------------------------------------------------- expansions

WX, WU = normal(N, N, seed=41), normal(N, M, seed=42)


def dynamics(i, x, u):
    return x + 0.3 * torch.tanh(x @ WX.mT + u @ WU.mT + i) + 0.1 * x * u[:, :1]


def running_cost(i, x, u):
    return (x.square().sum(1) + 1).log() * (1 + u.square().sum(1)) + torch.sin(
        x[:, 0] * u[:, 1] + i
    )


def terminal_cost(x):
    return torch.cosh(x).sum(1) + (x[:, 0] * x[:, 1] * x[:, 2])


def differences(f, z: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """The derivative of f (n,) -> (p,) by central differences, (p, n)."""
    return np.stack([(f(z + h * d) - f(z - h * d)) / (2 * h) for d in np.eye(len(z))], axis=-1)


def test_expansions_are_finite_differences():
    i, x, u = 2, normal(B, N, seed=51), normal(B, M, seed=52)
    e = expand_step(dynamics, running_cost, i, x, u)
    for b in range(B):

        def f(z):
            z = torch.from_numpy(z)[None]
            return dynamics(i, z[:, :N], z[:, N:])[0].numpy()

        def cost(z):
            z = torch.from_numpy(z)[None]
            return running_cost(i, z[:, :N], z[:, N:]).numpy()

        z = torch.cat([x[b], u[b]]).numpy()
        jacobian, gradient = differences(f, z), differences(cost, z)[0]
        hessian = differences(lambda z: differences(cost, z, 1e-4)[0], z, 1e-4)
        got = torch.cat([e.fx[b], e.fu[b]], dim=1).numpy()
        np.testing.assert_allclose(got, jacobian, atol=1e-8)
        np.testing.assert_allclose(torch.cat([e.lx[b], e.lu[b]]).numpy(), gradient, atol=1e-8)
        np.testing.assert_allclose(e.lxx[b].numpy(), hessian[:N, :N], atol=1e-5)
        np.testing.assert_allclose(e.luu[b].numpy(), hessian[N:, N:], atol=1e-5)
        np.testing.assert_allclose(e.lux[b].numpy(), hessian[N:, :N], atol=1e-5)


def test_expansions_of_images_are_flat():
    """(B, C, H, W) states and controls: what the flat problem gives."""
    kernel = normal(2, 2, 3, 3, seed=61)

    def blur(i, x, u):
        return torch.tanh(torch.nn.functional.conv2d(x + u, kernel, padding=1))

    def cost(i, x, u):
        return (x * u).square().flatten(1).sum(1)

    x, u = normal(B, 2, 2, 3, seed=62), normal(B, 2, 2, 3, seed=63)
    e = expand_step(blur, cost, 0, x, u)
    for b in range(B):
        jacobian = torch.autograd.functional.jacobian(
            lambda v, u=u[b : b + 1]: blur(0, v, u), x[b : b + 1]
        )
        torch.testing.assert_close(e.fx[b], jacobian.reshape(12, 12))
        torch.testing.assert_close(e.fu[b], e.fx[b])
        torch.testing.assert_close(e.lx[b], (2 * x[b] * u[b] ** 2).flatten())
        torch.testing.assert_close(e.lux[b], torch.diag((4 * x[b] * u[b]).flatten()))


IDENTITY = torch.eye(N, dtype=torch.float64)


@pytest.mark.parametrize(
    ("f", "cost", "nonzero"),
    [
        (
            lambda i, x, u: x + 0,
            lambda i, x, u: u.square().sum(1),
            {"fx": IDENTITY, "luu": 2 * IDENTITY[:M, :M]},
        ),
        (lambda i, x, u: torch.ones_like(x), lambda i, x, u: x.new_zeros(len(x)), {}),
        (
            lambda i, x, u: u @ WU.mT,
            lambda i, x, u: x.sum(1),
            {"fu": WU, "lx": torch.ones(N, dtype=torch.float64)},
        ),
    ],
    ids=["no control", "constant", "no state"],
)
def test_what_does_not_depend_on_an_input_has_zero_derivatives(f, cost, nonzero):
    x, u = normal(B, N, seed=51), torch.zeros(B, M, dtype=torch.float64)
    e = vars(expand_step(f, cost, 0, x, u))
    shapes = [tuple(value.shape) for value in e.values()]
    assert shapes == [(B, *s) for s in ((N, N), (N, M), (N,), (M,), (N, N), (M, M), (M, N))]
    for name, value in e.items():
        expected = nonzero.get(name, torch.zeros(value.shape[1:], dtype=torch.float64))
        assert torch.equal(value, expected.expand_as(value)), name


def test_expansions_work_inside_no_grad_and_keep_no_graph():
    x, u = normal(B, N, seed=51), normal(B, M, seed=52)
    with torch.no_grad():
        e = expand_step(dynamics, running_cost, 1, x, u)
    for value in vars(e).values():
        assert not value.requires_grad
    assert e.fx.abs().sum() > 0


# ---------------------------------------------------------------- the terminal value


def test_the_terminal_value_is_finite_differences():
    x = normal(B, N, seed=51)
    value = terminal_value(terminal_cost, x)
    for b in range(B):

        def cost(z):
            return terminal_cost(torch.from_numpy(z)[None]).numpy()

        z = x[b].numpy()
        np.testing.assert_allclose(value.Vx[b].numpy(), differences(cost, z)[0], atol=1e-7)
        hessian = differences(lambda z: differences(cost, z, 1e-4)[0], z, 1e-4)
        np.testing.assert_allclose(value.Vxx[b].numpy(), hessian, atol=1e-5)
        assert torch.equal(value.Vxx, value.Vxx.mT)


@pytest.mark.parametrize("rank", [None, 0, 1, 2, 3, N])
def test_truncation_keeps_numpys_largest_eigenvalues(rank):
    """An indefinite Hessian: the largest in magnitude, negative ones too."""
    Q = np.linalg.qr(normal(N, N, seed=71).numpy())[0]
    H = (Q * [-5.0, 3.0, -1.0, 0.5]) @ Q.T
    matrix = torch.from_numpy((H + H.T) / 2)
    x = normal(B, N, seed=51)
    value = terminal_value(lambda x: (x @ matrix * x).sum(1) / 2, x, rank)
    values, vectors = np.linalg.eig(matrix.numpy())
    kept = np.argsort(-np.abs(values))[: N if rank is None else rank]
    expected = (vectors[:, kept] * values[kept]) @ vectors[:, kept].T
    torch.testing.assert_close(value.Vx, x @ matrix)
    for b in range(B):
        np.testing.assert_allclose(value.Vxx[b].numpy(), expected, atol=1e-12)


def test_truncation_is_of_each_problem_s_own_hessian():
    x = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    value = terminal_value(lambda x: (x**4).sum(1), x, rank=1)
    assert torch.allclose(value.Vxx[0], torch.diag(torch.tensor([48.0, 0.0])).double())
    assert torch.allclose(value.Vxx[1], torch.diag(torch.tensor([0.0, 108.0])).double())


def quadratic(values):
    """x^T A x / 2 for an A with these eigenvalues."""
    Q = torch.linalg.qr(normal(len(values), len(values), seed=72)).Q
    A = (Q * values.double()) @ Q.mT
    return A, lambda x, A=A: (x @ A * x).sum(1) / 2


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_of_equal_eigenvalues_the_dense_form_keeps_what_products_keep(rank):
    """It is the projected directions that both have, not what a decomposition puts first."""
    A, cost = quadratic(torch.tensor([400.0] * 8 + [0.0] * 12))
    x = normal(B, 20, seed=51)
    omega = random_directions(x, rank + 5)[..., :rank]
    Q = torch.linalg.qr(A @ omega).Q
    found = terminal_value(cost, x, rank).Vxx
    torch.testing.assert_close(found, 400 * Q @ Q.mT, rtol=0, atol=1e-9)
    free = MatrixFree().terminal(ControlProblem(None, None, cost, 1), x, rank)
    torch.testing.assert_close(found, free.Z @ free.S @ free.Z.mT, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize(("dtype", "jitter"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_a_jitter_moves_what_the_dense_form_keeps_by_its_own_size(rank, dtype, jitter):
    A, _ = quadratic(torch.tensor([1.0] * 8 + [0.0] * 12))
    x, found = normal(1, 20, seed=51).to(dtype), []
    for seed in range(5):
        noise = jitter * normal(20, 20, seed=seed)
        moved = (A + (noise + noise.mT) / 2).to(dtype)
        found.append(terminal_value(lambda x, A=moved: (x @ A * x).sum(1) / 2, x, rank).Vxx)
    assert (torch.stack(found) - found[0]).abs().amax() < 500 * jitter


def test_an_update_of_another_name_is_refused():
    value, e, a = random_value(20), random_expansion(10), torch.ones(B).double()
    with pytest.raises(ValueError, match="update is 'adam', expected one of full, paper"):
        value.step_back(e, a, "adam")
    zero = torch.zeros(B, N, 0).double()
    with pytest.raises(ValueError, match="update is 'adam', expected one of full, paper"):
        low_rank_step(value.Vx, zero, zero, zero[:, :0], 1.0, a, "adam")


# ---------------------------------------------------------------- the open-loop gradient


def test_control_gradient_is_autograd_s():
    x, controls = normal(B, N, seed=51), normal(T, B, M, seed=53).requires_grad_()
    states, cost = [x], 0.0
    for i in range(T):
        cost = cost + running_cost(i, states[-1], controls[i])
        states.append(dynamics(i, states[-1], controls[i]))
    cost = cost + terminal_cost(states[-1])
    (expected,) = torch.autograd.grad(cost.sum(), controls)
    expansions = [expand_step(dynamics, running_cost, i, states[i], controls[i]) for i in range(T)]
    got = control_gradient(expansions, terminal_value(terminal_cost, states[-1], 0).Vx)
    assert got.shape == (T, B, M)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rank", [-1, 4])
def test_impossible_ranks_are_refused(rank):
    with pytest.raises(ValueError, match="rank is"):
        terminal_value(lambda x: x.square().sum(-1), torch.zeros(2, 3, dtype=torch.float64), rank)
