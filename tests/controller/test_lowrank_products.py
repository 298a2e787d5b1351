"""The controller with products only, against the one with matrices, and Adam against torch's."""

import weakref

import pytest
import torch

from diffoc import rules
from diffoc.costs import ControlCost, GaussianLikelihood
from diffoc.ilqr import ilqr
from diffoc.lowrank import MatrixFree
from diffoc.result import DivergenceError
from diffoc.riccati import Dense, terminal_value
from diffoc.rules import LBFGS, Adam, Direction, FullStep, LBFGSMemory
from diffoc.system import ControlProblem
from diffoc.theory.projected import Projected


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def setting(mode="input", n=24, T=5, r=0.3, scale=1.0):
    first, second = random(n, n, seed=0) / n**0.5, random(n, n, seed=1) / n**0.5
    calls = []

    def dynamics(i, x, u):
        calls.append(i)
        if mode == "input":
            x = x + u
        y = 0.9 * x + scale * torch.tanh(x @ first + 0.1 * i) @ second
        return y + u if mode == "output" else y

    operator = random(n, 6, seed=2)
    likelihood = GaussianLikelihood(lambda x: x @ operator, random(1, 6, seed=3), 0.5)
    weights = r * torch.linspace(1, 2, T, dtype=torch.float64)
    problem = ControlProblem(dynamics, ControlCost(weights), likelihood, T)
    return problem, random(3, n, seed=4), calls


@pytest.mark.parametrize("mode", ["input", "output"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("rank", [0, 2, 6, 24])
def test_whole_optimisations_agree(mode, keep, together, rank):
    """Rank 6 is the Hessian's own, so 24 adds nothing; the dense form truncates alike."""
    problem, x, _ = setting(mode)
    options = {"rank": rank, "iterations": 6}
    expected = ilqr(problem, x, **options)
    free = MatrixFree(keep, oversampling=24, together=together)
    found = ilqr(problem, x, derivatives=free, **options)
    torch.testing.assert_close(found.cost, expected.cost, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.controls, expected.controls, rtol=1e-6, atol=1e-7)
    assert found.history.step[0].tolist() == expected.history.step[0].tolist()


@pytest.mark.parametrize("convex", [True, False])
def test_the_terminal_hessian_is_the_dense_one_s(convex):
    problem, x, _ = setting()
    for rank in (0, 1, 3, 6):
        expected = terminal_value(problem.terminal_cost, x, rank)
        found = MatrixFree(convex=convex, oversampling=24).terminal(problem, x, rank)
        torch.testing.assert_close(found.Vx, expected.Vx)
        hessian = found.Z @ found.S @ found.Z.mT
        torch.testing.assert_close(hessian, expected.Vxx, rtol=1e-7, atol=1e-7)


def test_activations_that_are_kept_save_an_evaluation_a_step():
    problem, x, calls = setting()
    for keep, per_iteration in ((True, 1), (False, 2)):
        counts = []
        for iterations in (2, 3):
            calls.clear()
            ilqr(
                problem,
                x,
                derivatives=MatrixFree(keep_activations=keep),
                rank=1,
                regularization=1.0,
                rule=FullStep(),
                iterations=iterations,
            )
            counts.append(len(calls))
        assert counts[1] - counts[0] == per_iteration * problem.horizon


def test_a_batch_in_which_one_refuses_keeps_everybody_s_trajectory():
    """States, controls and costs belong together whoever accepted which trial."""
    problem, x, _ = setting(scale=3.0)
    controls = torch.zeros(5, *x.shape, dtype=x.dtype)
    controls[:, 1] = ilqr(problem, x, iterations=200).controls[:, 1]  # nothing left to gain
    for derivatives in (Dense(), MatrixFree()):
        found = ilqr(problem, x, controls, derivatives=derivatives, rank=6, iterations=3)
        states = problem.rollout(x, found.controls)
        torch.testing.assert_close(found.states, states)
        torch.testing.assert_close(found.cost, problem.cost(states, found.controls))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_is_torch_s(decay):
    gains = [[random(2, 4, seed=10 * s + i) for i in range(3)] for s in range(5)]
    rule = Adam(rate=0.1, weight_decay=decay)
    memory, one = rule.start(3), torch.ones(2, dtype=torch.float64)
    parameters = [torch.nn.Parameter(torch.zeros(2, 4, dtype=torch.float64)) for _ in range(3)]
    reference = torch.optim.AdamW(parameters, lr=0.1, weight_decay=decay)
    total = [torch.zeros(2, 4, dtype=torch.float64) for _ in range(3)]
    for sweep in gains:
        changes = rule.direction(memory, Direction(sweep, one, one), [], total).change
        total = [t + c for t, c in zip(total, changes, strict=True)]
        for parameter, k in zip(parameters, sweep, strict=True):
            parameter.grad = -k
        reference.step()
    for found, expected in zip(total, parameters, strict=True):
        torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize("derivatives", [Dense(), MatrixFree()])
def test_adam_lowers_the_cost_and_returns_the_best_iterate(derivatives):
    problem, x, _ = setting()
    costs = []
    found = ilqr(
        problem,
        x,
        derivatives=derivatives,
        rank=1,
        rule=Adam(0.1),  # too large in the end, so that costs go up again
        regularization=1.0,
        iterations=40,
        callback=lambda i, cost, x: costs.append(cost),
    )
    start = problem.cost(problem.rollout(x, torch.zeros(5, *x.shape).double()), found.controls * 0)
    costs = torch.stack([start, *costs])
    assert (costs.diff(dim=0) > 0).any()
    torch.testing.assert_close(found.cost, costs.amin(dim=0))
    torch.testing.assert_close(problem.cost(found.states, found.controls), found.cost)
    assert (found.cost < 0.5 * start).all()


def test_divergence_keeps_the_best_iterate():
    problem, x, _ = setting()
    exploding = ControlProblem(
        lambda i, x, u: x + u.square().exp() - 1,
        problem.running_cost,
        problem.terminal_cost,
        problem.horizon,
    )
    with pytest.raises(DivergenceError, match=r"iteration \d+: .*rate=30.0") as caught:
        ilqr(
            exploding,
            x,
            0.1 + torch.zeros(5, *x.shape, dtype=x.dtype),
            derivatives=MatrixFree(),
            rank=0,
            rule=Adam(30.0),
            regularization=1.0,
        )
    result = caught.value.result
    assert result.cost.isfinite().all()
    torch.testing.assert_close(exploding.cost(result.states, result.controls), result.cost)


def test_stopping_is_each_problem_s_own():
    problem, x, _ = setting()

    def good(x0):
        return problem.terminal_cost(x0) < torch.tensor([1e9, 1e-9, 5.0], dtype=x0.dtype)

    found = ilqr(problem, x, derivatives=MatrixFree(), rank=6, stop=good)
    assert found.status[0] == "stopped"
    assert (found.controls[:, 0] == 0).all()
    assert found.status[1] != "stopped"
    if found.status[2] == "stopped":
        assert problem.terminal_cost(found.states[-1])[2] < 5


def test_what_products_cannot_do_is_refused():
    problem, x, _ = setting()
    with pytest.raises(ValueError, match="rank is None"):
        ilqr(problem, x, derivatives=MatrixFree())
    with pytest.raises(ValueError, match="rank is 25"):
        ilqr(problem, x, derivatives=MatrixFree(), rank=25)
    other = ControlProblem(
        problem.dynamics, lambda i, x, u: u.square().sum(1), problem.terminal_cost, 5
    )
    with pytest.raises(ValueError, match="running_cost is function"):
        ilqr(other, x, derivatives=MatrixFree(), rank=1)
    with pytest.raises(ValueError, match="rate is 0"):
        Adam(0.0)
    with pytest.raises(ValueError, match="oversampling is -3"):
        MatrixFree(oversampling=-3)


@pytest.mark.parametrize("mode", ["input", "output"])
def test_the_gradient_is_known_without_matrices(mode):
    problem, x, _ = setting(mode)
    controls = 0.1 * random(5, *x.shape, seed=5).requires_grad_()
    (expected,) = torch.autograd.grad(
        problem.cost(problem.rollout(x, controls), controls).sum(), controls
    )
    found = ilqr(problem, x, controls.detach(), derivatives=MatrixFree(), rank=2, iterations=1)
    largest = expected.abs().amax(dim=(0, 2))
    torch.testing.assert_close(found.history.gradient[0], largest)
    already = ilqr(
        problem,
        x,
        controls.detach(),
        derivatives=MatrixFree(),
        rank=2,
        gradient_tolerance=largest.max().item() * 1.01,
    )
    assert already.status == ["gradient"] * 3


def test_another_regularization_costs_no_evaluation_and_no_product():
    """A control Hessian that is indefinite without one, and steps that are refused."""
    problem, x, calls = setting(r=0.0, scale=3.0)
    found = ilqr(problem, x[:1], derivatives=MatrixFree(), rank=2, iterations=60)
    assert found.history.regularization[0] > 0  # so that zero was tried first
    moved = [step.item() > 0 for step in found.history.step]
    assert any(moved)
    assert not all(moved)
    trajectories = 1 + sum(moved[:-1])
    assert found.products.item() == trajectories * 5 * 3
    assert found.evaluations.item() == len(calls)


@pytest.mark.parametrize("keep", [True, False])
def test_activations_are_let_go_of_in_time(keep):
    """Those of the last trajectory before the next one's are made; one step's if recomputed."""
    problem, x, _ = setting(T=5)
    alive, most = set(), []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            if x.requires_grad or ctx.needs_input_grad[0]:
                alive.add(id(ctx))
                weakref.finalize(ctx, alive.discard, id(ctx))
                most.append(len(alive))
            return x.square()

        @staticmethod
        def backward(ctx, cotangent):
            (x,) = ctx.saved_tensors
            return 2 * x * cotangent

    counted = ControlProblem(
        lambda i, x, u: problem.dynamics(i, x, u) + 1e-3 * Square.apply(x + u),
        problem.running_cost,
        problem.terminal_cost,
        5,
    )
    ilqr(
        counted,
        x,
        derivatives=MatrixFree(keep_activations=keep),
        rank=1,
        rule=Adam(0.01),
        regularization=1.0,
        iterations=4,
    )
    assert max(most) == (5 if keep else 1)


def test_the_terminal_cost_is_evaluated_once_for_the_value_and_once_for_the_cost():
    problem, x, _ = setting()
    calls = []

    def cost(x):
        calls.append(1)
        return problem.terminal_cost(x)

    counted = ControlProblem(problem.dynamics, problem.running_cost, cost, 5)
    options = {"derivatives": MatrixFree(), "rank": 1, "rule": FullStep()}
    ilqr(counted, x, regularization=1.0, iterations=3, **options)
    assert len(calls) == 1 + 2 * 3


@pytest.mark.parametrize("memory", [3, 20])
@pytest.mark.parametrize("units", [None, (0.1, 2.0, 1.0, 0.5)])
def test_lbfgs_is_bfgs_with_matrices(memory, units, monkeypatch):
    """Against the update of the inverse Hessian itself, Nocedal & Wright, Eq. 6.17."""
    n, steps = 8, 6
    # In other units than 1 it is that of the controls in these, and back.
    D = torch.diag(torch.tensor(units or 4 * (1.0,)).double().repeat_interleave(n // 4))
    A = random(2, n, n, seed=1)
    hessians = A @ A.mT + torch.eye(n).double()
    points = random(steps, 2, n, seed=2)
    gradients = torch.einsum("bij,sbj->sbi", hessians, points)
    gradients[2, 1] = gradients[1, 1] - (points[2, 1] - points[1, 1])  # negative curvature
    monkeypatch.setattr(rules, "MEMORY", memory)
    state = LBFGSMemory(LBFGS(first=0.1, units=units))
    for k in range(steps):
        found = state.direction(gradients[k], points[k]) @ torch.linalg.inv(D)
        for b in range(2):
            pairs = [
                (
                    torch.linalg.solve(D, points[j + 1, b] - points[j, b]),
                    D @ (gradients[j + 1, b] - gradients[j, b]),
                )
                for j in range(max(0, k - memory), k)
            ]
            pairs = [(s, y) for s, y in pairs if s @ y > 0]
            norm = (D @ gradients[k, b]).norm()
            scale = pairs[-1][0] @ pairs[-1][1] / pairs[-1][1].square().sum() if pairs else None
            H = torch.eye(n).double() * (0.1 * n**0.5 / norm if scale is None else scale)
            for s, y in pairs:
                left = torch.eye(n).double() - torch.outer(s, y) / (s @ y)
                H = left @ H @ left.mT + torch.outer(s, s) / (s @ y)
            torch.testing.assert_close(found[b], -H @ D @ gradients[k, b])


@pytest.mark.parametrize(
    ("rule", "length"),
    [(LBFGS(), 1e-3), (LBFGS(units=(0.1, 2.0)), 1e-2), (LBFGS(first=0.3, units=(0.1, 2.0)), 0.3)],
)
def test_the_first_change_of_lbfgs_has_its_length(rule, length):
    """As a root mean square, each step's measured in its unit."""
    change = LBFGSMemory(rule).direction(random(3, 8, seed=6), torch.zeros(3, 8).double())
    units = torch.tensor(rule.units or (1.0, 1.0)).double().repeat_interleave(4)
    found = (change / units).square().mean(dim=1).sqrt()
    torch.testing.assert_close(found, torch.full_like(found, length), rtol=1e-6, atol=0)


@pytest.mark.parametrize("derivatives", [Dense(), MatrixFree()])
def test_lbfgs_finds_the_optimum_of_full_newton_steps(derivatives):
    problem, x, _ = setting(n=12, T=3, r=30.0)
    best = ilqr(problem, x, iterations=1000)
    found = ilqr(
        problem,
        x,
        derivatives=derivatives,
        rank=0,
        rule=LBFGS(),
        regularization=0.0,
        iterations=200,
    )
    torch.testing.assert_close(found.cost, best.cost, rtol=1e-7, atol=0)
    costs = torch.stack(found.history.cost)
    assert (costs.diff(dim=0) <= 0).all()
    for i in range(len(x)):
        alone = ilqr(
            problem,
            x[i : i + 1],
            derivatives=derivatives,
            rank=0,
            rule=LBFGS(),
            regularization=0.0,
            iterations=10,
        )
        for row, other in zip(costs, alone.history.cost, strict=False):
            torch.testing.assert_close(row[i], other[0])


def test_lbfgs_needs_few_more_evaluations_than_iterations():
    problem, x, _ = setting()
    found = ilqr(
        problem,
        x,
        derivatives=MatrixFree(),
        rank=0,
        rule=LBFGS(contraction=0.2),
        regularization=0.0,
        iterations=20,
        gradient_tolerance=0.0,
    )
    assert found.evaluations.max() <= 1.5 * 20 * problem.horizon


def test_lbfgs_forgets_where_no_step_helps():
    """A direction that misleads is dropped, and that of steepest descent taken.

    What was learnt of the first problem has the inverse curvature 1, of the second 2.
    """
    state = LBFGSMemory(LBFGS(first=0.1))
    g = random(2, 2, 4, seed=5)
    u = torch.stack([torch.zeros(2, 4).double(), (g[1] - g[0]) * torch.tensor([[1.0], [2.0]])])
    state.direction(g[0], u[0])
    both = state.direction(g[1], u[1])
    nothing = state.forget(torch.tensor([True, False]))
    assert nothing.tolist() == [False, False]
    again = state.direction(g[1], u[1])
    torch.testing.assert_close(again[0], -g[1, 0] * 0.2 / g[1, 0].norm())
    torch.testing.assert_close(again[1], both[1])
    assert state.forget(torch.tensor([True, True])).tolist() == [True, False]
    steep = torch.full_like(g[1], 1e-3)
    for found, curvature in zip(state.direction(steep, u[1]), (1, 1 / 2), strict=True):
        torch.testing.assert_close(found, -steep[0] / curvature)


def test_lbfgs_goes_on_where_the_cost_is_steep_and_flat():
    """Twelve curvatures of 1 to 10^8: where a search fails, it is not the last one."""
    problem = ControlProblem(
        lambda i, x, u: x + u,
        ControlCost(1e-9),
        lambda x: (torch.logspace(0, 8, 12).to(x) * x.square()).sum(1) / 2,
        horizon=1,
    )
    x = random(180, 12, seed=7)
    found = ilqr(problem, x, derivatives=MatrixFree(), rank=0, rule=LBFGS(), iterations=2000)
    assert not found.status.count("stalled")
    assert found.cost.max() < 1e-6


def test_lbfgs_stalls_only_where_steepest_descent_does():
    """A cost that the gradient is wrong about has no direction that helps."""
    problem, x, _ = setting()

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square().flatten(1).sum(1)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return -2 * x * g[:, None]

    problem = ControlProblem(problem.dynamics, ControlCost(1.0), Wrong.apply, problem.horizon)
    found = ilqr(
        problem,
        x,
        derivatives=MatrixFree(),
        rank=0,
        rule=LBFGS(),
        regularization=0.0,
    )
    assert found.status == ["stalled"] * len(x)
    torch.testing.assert_close(found.controls, torch.zeros_like(found.controls))


def test_lbfgs_needs_gradients():
    problem, x, _ = setting()
    with pytest.raises(ValueError, match="rule is LBFGS"):
        ilqr(
            problem,
            x,
            derivatives=Projected(2),
            rank=2,
            rule=LBFGS(),
            regularization=1.0,
        )


def test_lbfgs_s_units_are_one_for_each_step():
    problem, x, _ = setting()
    units = (1.0,) * (problem.horizon - 1)
    with pytest.raises(ValueError, match=f"rule has {len(units)} units"):
        ilqr(problem, x, derivatives=MatrixFree(), rule=LBFGS(units=units))


@pytest.mark.parametrize(("name", "value"), [("first", 0.0), ("units", (1.0, 0.0))])
def test_unfit_parameters_of_lbfgs_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}"):
        LBFGS(**{name: value})
