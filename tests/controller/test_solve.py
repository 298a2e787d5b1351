"""The entry point: what it counts, where it stops, and that it is the controller underneath."""

from inspect import signature

import pytest
import torch
from azula.noise import VPSchedule

import diffoc
from diffoc.baselines.paper import snr_weights
from diffoc.costs import ControlCost, GaussianLikelihood
from diffoc.data import digits
from diffoc.ilqr import ilqr
from diffoc.lowrank import MatrixFree
from diffoc.priors.counting import CountedPrior
from diffoc.priors.gaussian import GaussianPrior
from diffoc.problems.operators import average_pool
from diffoc.process import ReverseProcess
from diffoc.result import DivergenceError
from diffoc.rules import LBFGS, Adam, LineSearch
from diffoc.solve import image_units, solve
from diffoc.system import ControlProblem, Counts
from diffoc.theory.projected import Projected


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def setting(n=12, T=6, mode="input"):
    A = random(n, n, seed=0)
    prior = GaussianPrior(
        random(n, seed=1), A @ A.mT / n + 0.1 * torch.eye(n).double(), VPSchedule()
    )
    process = ReverseProcess(prior, T, mode=mode)
    H = random(n, 4, seed=2)
    likelihood = GaussianLikelihood(lambda x: x @ H, random(2, 4, seed=3), 0.3)
    x = process.initial_state((2, n), torch.Generator().manual_seed(4))
    return process, likelihood, x


@pytest.mark.parametrize("mode", ["input", "output"])
def test_solve_is_the_controller_of_the_theory(mode):
    process, likelihood, x = setting(mode=mode)
    found = solve(process, likelihood, x, rank=4, rule=LineSearch(), iterations=5)
    problem = ControlProblem(process.step, ControlCost(1.0), likelihood, 6)
    expected = ilqr(problem, x, rank=4, regularization=0.0, iterations=5)
    torch.testing.assert_close(found.controls, expected.controls, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found.cost, expected.cost)
    torch.testing.assert_close(found.x0, found.states[-1])
    torch.testing.assert_close(found.x0, expected.states[-1], rtol=1e-7, atol=1e-8)
    # Only the dense form knows the gradient, and needs no second iteration to be sure.
    torch.testing.assert_close(found.costs[0], expected.history.cost[0])
    assert (found.terminal_costs <= found.costs).all()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_counts_are_those_of_the_network(keep, rank):
    """The cost model: T evaluations to begin with, then T (F + (1 + k) B) an iteration."""
    process, likelihood, x = setting()
    calls = []
    process.denoiser.register_forward_hook(lambda *a: calls.append(1))
    options = {"rank": rank, "rule": Adam(), "derivatives": MatrixFree(keep)}
    found = solve(process, likelihood, x, iterations=4, **options)
    evaluations = 6 + (4 if keep else 8) * 6
    assert evaluations <= len(calls) <= evaluations + 6  # the best iterate, once more
    assert found.evaluations.tolist() == [evaluations] * len(x)
    assert found.products.tolist() == [4 * 6 * (1 + rank)] * len(x)


def test_derivatives_may_be_represented_otherwise():
    """With as many columns as numbers the paper's projections change nothing."""
    process, likelihood, x = setting()
    options = {"rank": 4, "rule": LineSearch(), "iterations": 3}
    expected = solve(process, likelihood, x, **options)
    for derivatives, evaluations, products, tangents in (
        (Projected(12), 2, 13, 12),
        (MatrixFree(hessian="gauss_newton"), 1, 5, 0),
    ):
        found = solve(process, likelihood, x, derivatives=derivatives, **options)
        torch.testing.assert_close(found.controls, expected.controls, rtol=1e-7, atol=1e-8)
        iterations = len(found.costs)
        assert (found.evaluations >= 6 * (1 + evaluations * iterations)).all()
        assert (found.products == 6 * products * iterations).all()
        assert (found.tangents == 6 * tangents * iterations).all()
        assert derivatives.counts == Counts()


def test_the_discrepancy_principle_stops_in_time():
    process, likelihood, x = setting()

    def residual(x0):
        return likelihood.operator(x0) - likelihood.y

    long = solve(process, likelihood, x, rank=4, rule=LineSearch(), iterations=30)
    level = 3 * residual(long.x0).square().mean().sqrt().item()
    short = solve(
        process,
        likelihood,
        x,
        rank=4,
        rule=Adam(0.05),
        iterations=300,
        stop=lambda x0: residual(x0).square().mean(1) < level**2,
    )
    assert short.status == ["stopped", "stopped"]
    assert len(short.costs) < 300
    assert (residual(short.x0).square().mean(1) < level**2).all()


def test_what_happens_is_reported(capsys):
    process, likelihood, x = setting()
    seen = []
    found = solve(
        process,
        likelihood,
        x,
        iterations=3,
        progress=True,
        callback=lambda i, cost, x0: seen.append((i, cost, x0)),
    )
    assert [i for i, _, _ in seen] == [0, 1, 2]
    assert found.costs.shape == (3, 2)
    torch.testing.assert_close(found.costs[1], seen[0][1])
    # The terminal cost of the images that it was given.
    torch.testing.assert_close(found.terminal_costs[1], likelihood(seen[0][2]))
    assert "cost" in capsys.readouterr().err


def test_divergence_names_the_rate():
    process, likelihood, x = setting()
    with pytest.raises(DivergenceError, match=r"smaller steps .*rate=1e\+300") as caught:
        solve(process, likelihood, x, rule=Adam(1e300), iterations=3)
    assert caught.value.result.cost.isfinite().all()


def test_defaults_are_those_of_a_recipe():
    recipe, parameters = diffoc.Recipe("plain", steps=1, iterations=1), signature(solve).parameters
    for name in ("derivatives", "rank", "rule", "regularization"):
        assert parameters[name].default == getattr(recipe, name)
    assert parameters["control_cost"].default == recipe.weight


def test_snr_weights():
    """snr = sqrt(abar / (1 - abar)) for a variance-preserving schedule, weight snr / dt^2."""
    schedule = VPSchedule(alpha_min=1e-2, sigma_min=0.0)
    times = torch.linspace(1, 0, 6, dtype=torch.float64)
    bar = schedule(times[:-1])[0] ** 2
    expected = (bar / (1 - bar)).sqrt() / 0.2**2
    torch.testing.assert_close(snr_weights(schedule, times), expected)


def test_in_units_of_the_image_half_of_the_iterations_do():
    prior = diffoc.load_prior("mnist")
    process = ReverseProcess(prior, 10)
    units = image_units(prior.schedule, process.times)
    alpha, _ = prior.schedule(torch.arange(10, 0, -1, dtype=torch.float64) / 10)
    assert units == pytest.approx(alpha.tolist())
    image, operator = digits()[0][6:7], average_pool(2)
    g = torch.Generator().manual_seed(0)
    y = operator(image) + 0.05 * torch.randn(1, 1, 14, 14, generator=g)
    costs = [
        solve(
            process,
            GaussianLikelihood(operator, y, 0.05),
            torch.zeros_like(image),
            rank=0,
            iterations=iterations,
            rule=LBFGS(units=measured),
        ).cost
        for iterations, measured in ((6, units), (12, None))
    ]
    assert costs[0] < costs[1]


def test_a_digit_is_reconstructed_by_the_trained_prior():
    """In float32 and in bfloat16: the residual falls to the noise's size."""
    prior = diffoc.load_prior("mnist")
    image, operator = digits()[0][6:7], average_pool(2)
    g = torch.Generator().manual_seed(0)
    y = operator(image) + 0.05 * torch.randn(1, 1, 14, 14, generator=g)
    x = ReverseProcess(prior, 4).initial_state(image.shape, g).float()
    errors = {}
    for precision in (None, "bfloat16"):
        process = ReverseProcess(CountedPrior(prior, precision), 4)
        cost = GaussianLikelihood(operator, y, 0.05)
        found = solve(process, cost, x, rank=1, iterations=12, rule=Adam(0.05))
        assert found.x0.dtype == torch.float32
        assert found.cost < 0.2 * found.costs[0]
        errors[precision] = (found.x0 - image).square().mean().sqrt().item()
    assert errors[None] < 0.35
    assert errors["bfloat16"] < 0.4
