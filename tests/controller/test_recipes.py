"""A problem and a recipe give a result: the same recipe by whatever door, image by image."""

import inspect
import json
from dataclasses import replace

import pytest
import torch
from azula.noise import VPSchedule
from deepinv.physics import Inpainting

import diffoc
from diffoc.baselines.paper import TABLE_2
from diffoc.commands.panel import Panel
from diffoc.commands.solve import RECIPES, Settings
from diffoc.data import digits
from diffoc.data.manifest import data_folder
from diffoc.experiments.inaccurate import IdentityDenoiser
from diffoc.experiments.methods import METHODS, settings_of
from diffoc.priors import wrap
from diffoc.priors.counting import CountedPrior
from diffoc.priors.gaussian import GaussianPrior
from diffoc.priors.pretrained import load_prior
from diffoc.problem import Problem
from diffoc.problems import tasks
from diffoc.problems.tasks import measure, super_resolution, task
from diffoc.process import ReverseProcess
from diffoc.recipe import COLD, OURS, QUICK, STOPPED, TASKS, Recipe
from diffoc.reconstruct import reconstruct
from diffoc.rules import LBFGS


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def digit_problem(name="super_resolution", index=6, noise=0.05):
    truth = digits()[0][index][None]
    physics = task(name, truth.shape[1:], seeded())
    return Problem(physics, measure(physics, truth, seeded(1), noise), noise, name), truth


@pytest.mark.parametrize(("name", "nfe"), OURS.by_task)
def test_rows_of_the_table_run_the_named_recipe(name, nfe, monkeypatch):
    """What a row hands on is, field by field, the recipe that a reader gets for that task."""
    ran = []
    monkeypatch.setattr(
        "diffoc.baselines.reconstruct",
        lambda problem, prior, recipe, **_: ran.append(recipe) or 1 / 0,
    )
    method = METHODS["ours"]
    assert method.recipe is OURS
    settings = settings_of("faces64", "ours", name, nfe, {})
    x = torch.zeros(1, 1, 28, 28)
    problem, _ = digit_problem(name)
    with pytest.raises(ZeroDivisionError):
        method.run(
            load_prior("mnist"), problem.physics, problem.y, x, seeded(), noise_std=0.05, **settings
        )
    assert replace(ran[0], by_task={}) == replace(OURS.at(name, nfe), budget=nfe)


def test_every_door_has_the_same_default():
    assert inspect.signature(diffoc.reconstruct).parameters["recipe"].default is OURS
    assert RECIPES[Settings("gaussian_blur", "mnist").recipe] is OURS
    assert RECIPES[Panel().recipe.value] is OURS
    assert Settings("gaussian_blur", "mnist").changed == OURS.at("gaussian_blur")
    names = ("quick", "stopped", "cold", "paper", "released")
    assert [METHODS[name].recipe for name in names] == [
        QUICK,
        STOPPED,
        COLD,
        diffoc.PAPER,
        diffoc.RELEASED,
    ]


def test_recipes_know_the_tasks_by_name():
    assert tuple(tasks.TASKS) == TASKS


@pytest.mark.parametrize("from_noise", [False, True])
def test_what_is_not_measured_stays_where_ours_starts(from_noise):
    """Without a network and without smoothness a hidden pixel has no control."""
    g, prior = seeded(), IdentityDenoiser((1, 16, 16))
    physics = task("random_inpainting", prior.image_shape, g)
    truth, x = torch.randn(2, 2, 1, 16, 16, generator=g)
    y = measure(physics, truth, g)
    settings = {"budget": 60, "steps": 10, "smoothness": 0.0, "iterations": 3}
    given = prior, physics, y, x, g
    x0 = METHODS["ours"].run(*given, noise_std=0.05, **settings, from_noise=from_noise)
    hidden = (physics.mask == 0).expand_as(x)
    torch.testing.assert_close(x0[hidden], (x if from_noise else 0 * x)[hidden])
    assert not torch.allclose(x0[~hidden], x[~hidden], atol=0.1)


@pytest.mark.parametrize("recipe", [OURS, QUICK])
def test_what_ours_has_for_a_task_is_what_was_tuned(recipe):
    tuned = json.loads((data_folder() / "tuned.json").read_text())["faces64"][recipe.name]
    assert recipe.by_task == {
        (name, int(nfe)): values
        for name, budgets in tuned.items()
        for nfe, values in budgets.items()
    }


@pytest.mark.parametrize("name", ["ours", "quick", "stopped", "paper"])
def test_rows_count_what_an_image_needs_for_itself(name):
    """Beside another, which needs other trials, a row counts what the prior counts alone."""
    problem, truth = digit_problem("gaussian_blur")
    noise = torch.randn(truth.shape, generator=seeded(3)).clamp(-1, 1)
    measured = torch.cat([problem.y, problem.physics.A(noise)])
    settings = {
        "ours": {"budget": 60, "steps": 5},
        "quick": {"steps": 5},
        "stopped": {"budget": 60, "steps": 5},
        "paper": TABLE_2["gaussian_blur"] | {"steps": 3, "iterations": 2},
    }[name]

    def counted(y):
        prior = CountedPrior(load_prior("mnist"))
        x = torch.zeros(len(y), 1, 28, 28)
        METHODS[name].run(prior, problem.physics, y, x, seeded(), noise_std=0.05, **settings)
        return prior

    each = [counted(y[None]) for y in measured]
    alone = [(float(prior.evaluations), float(prior.products)) for prior in each]
    assert [prior.work(1)[0] for prior in each] == alone
    assert counted(measured).work(2) == alone


@pytest.mark.parametrize("recipe", [OURS, QUICK, STOPPED])
def test_nothing_of_an_image_depends_on_its_neighbour(recipe):
    """A digit beside a picture of noise, which needs other steps, trials and evaluations."""
    recipe = replace(recipe, steps=5, budget=60)
    problem, truth = digit_problem("gaussian_blur")
    noise = torch.randn(truth.shape, generator=seeded(3)).clamp(-1, 1)
    y = torch.cat([problem.y, problem.physics.A(noise)])
    prior = load_prior("mnist")
    alone = reconstruct(problem, prior, recipe)
    both = reconstruct(replace(problem, y=y), prior, recipe)
    # Equal but for the rounding of sums over a batch of another size, which iterations amplify.
    assert (both.x0[:1] - alone.x0).abs().max() < 0.02
    assert both.evaluations[0] == alone.evaluations[0]
    assert both.status[0] == alone.status[0]


def test_the_budget_is_each_image_s_own():
    recipe = replace(OURS, steps=5, budget=60)
    problem, _ = digit_problem()
    found = reconstruct(problem, load_prior("mnist"), recipe)
    # The last iteration's line search alone may go beyond.
    assert 55 < found.evaluations.item() <= 60 + 5 * LBFGS().trials
    assert found.status == ["budget"]


def test_a_gaussian_s_minimum_is_found_with_any_callable():
    """With a callable in place of a physics there is no guess; the minimum is the same."""
    n, generator = 6, seeded(4)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    prior = GaussianPrior(torch.ones(n, dtype=torch.float64), root @ root.mT, VPSchedule())
    matrix = torch.randn(3, n, generator=generator, dtype=torch.float64)
    y = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    recipe = replace(OURS, steps=4, budget=2000)
    x = torch.zeros(1, n, dtype=torch.float64)
    found = reconstruct(Problem(lambda x: x @ matrix.mT, y, 0.3), prior, recipe, x=x)
    # The image is affine in the controls: the least squares of J, solved at once.
    process = ReverseProcess(prior, torch.linspace(1, 0, 5, dtype=torch.float64) ** 1.5)
    still = process.rollout(x)[-1][0]
    unit = torch.eye(4 * n, dtype=torch.float64).reshape(4 * n, 4, 1, n)
    J = torch.stack([process.rollout(x, u)[-1][0] - still for u in unit], dim=1)
    alpha, sigma = prior.schedule(process.times[:-1])
    R = torch.diag((OURS.weight * (alpha / sigma).square()).repeat_interleave(n))
    A = matrix @ J / 0.3
    u = torch.linalg.solve(A.mT @ A + R, A.mT @ (y[0] - matrix @ still) / 0.3)
    torch.testing.assert_close(found.x0[0], still + J @ u, rtol=1e-4, atol=1e-4)


def test_several_starts_are_as_many_problems():
    problem, truth = digit_problem("phase_retrieval")
    recipe = replace(OURS, steps=3, budget=24)
    prior = load_prior("mnist")
    many = reconstruct(problem, prior, recipe, starts=3)
    one = reconstruct(problem, prior, recipe)
    assert many.x0.shape == (3, *truth.shape[1:])
    assert (many.x0[:1] - one.x0).abs().max() < 0.02
    assert (many.x0[1] - many.x0[2]).abs().max() > 0.1


def test_a_mask_s_weight_is_no_indicator():
    """Noise where something is measured, of one strength; none where a pixel was dropped."""
    x = torch.zeros(1, 1, 8, 8)
    weights = torch.ones(1, 1, 8, 8)
    weights[..., :4], weights[..., 0] = 0.5, 0.0
    physics = Inpainting((1, 8, 8), mask=weights)
    y = measure(physics, x, seeded(), 0.05)
    assert (y[..., 0] == 0).all()
    kept = 7 / 8
    assert Problem(physics, y, 0.05).noise_level.item() == pytest.approx(0.05 * kept**0.5)
    full = Inpainting((1, 64, 64), mask=255 * torch.ones(1, 1, 64, 64))
    noise = measure(full, torch.zeros(1, 1, 64, 64), seeded(), 0.05)
    assert noise.std().item() == pytest.approx(0.05, rel=0.05)


def test_each_image_has_the_noise_level_of_its_own_mask():
    """An image beside another with fewer holes is stopped where it is alone."""
    mask = torch.ones(2, 1, 8, 8)
    mask[0, :, :6] = 0
    y = torch.zeros(2, 1, 8, 8)
    physics, expected = Inpainting((1, 8, 8), mask=mask), torch.tensor([0.05 * 0.5, 0.05])
    problem = Problem(physics, y, 0.05)
    torch.testing.assert_close(problem.noise_level, expected)
    torch.testing.assert_close(problem.residual_over_noise(0.05 * mask), torch.ones(2))
    with pytest.raises(ValueError, match=r"^what physics makes of x0 has shape"):
        Problem(lambda x: x, y, 0.05).residual_over_noise(mask[:1])
    prior = wrap(lambda x, i: 0.1 * x, torch.linspace(0.999, 0.01, 50), (1, 8, 8))
    with pytest.raises(ValueError, match=r"physics cannot measure images of shape \(4, 1, 8"):
        reconstruct(problem, prior, starts=2)


def test_what_does_not_fit_is_refused():
    prior = load_prior("mnist")
    problem, _ = digit_problem()
    with pytest.raises(ValueError, match="y has shape"):
        reconstruct(replace(problem, y=torch.zeros(1, 1, 8, 8)), prior)
    x = torch.zeros(1, 1, 30, 30)
    y = super_resolution(4).A(x)
    with pytest.raises(ValueError, match="adjoint that makes"):
        reconstruct(Problem(super_resolution(4), y, 0.05), prior, x=x)
    with pytest.raises(ValueError, match="noise_std is 0"):
        Problem(super_resolution(4), y, 0.0)
    with pytest.raises(TypeError, match="physics is 3"):
        Problem(3, y, 0.05)
    with pytest.raises(ValueError, match="starts is 0"):
        reconstruct(problem, prior, starts=0)
    with pytest.raises(ValueError, match="budget is 59, expected at least 4 times the 15"):
        replace(OURS, budget=59)
    with pytest.raises(ValueError, match="budget is 29, expected at least 2 times the 15"):
        replace(OURS, budget=29, iterations=0)
    with pytest.raises(ValueError, match="budget is 59, expected at least 4 times the 15"):
        replace(OURS, budget=59, iterations=0, draw=lambda *args: None)  # which takes 2 T more
    with pytest.raises(ValueError, match="both None"):
        Recipe("nothing", steps=3)


def test_what_was_tuned_is_left_out_where_a_reader_changes_it():
    """Else a number of steps of one's own would be undone without a word."""
    own = replace(OURS, steps=20)
    assert own.at("gaussian_blur") == replace(own, by_task={})
    assert OURS.at("gaussian_blur").steps == 30
    # A budget is at least four times the steps of a plan, and twice those of a guess alone.
    assert OURS.at("motion_blur", 40).steps == 10
    assert OURS.at("gaussian_blur", 40).steps == 20
    drawn = replace(OURS, budget=60, draw=lambda *args: None)
    assert drawn.at("gaussian_blur").steps == 15
    assert replace(OURS, rank=1).at("gaussian_blur").steps == 30
    assert Settings("gaussian_blur", "mnist", steps=20).changed == own.at("gaussian_blur")
    assert Settings("gaussian_blur", "mnist", budget=60).changed.iterations == 0


def test_a_guess_alone_is_refused_where_it_would_not_know_the_measurements():
    problem, _ = digit_problem()
    prior = load_prior("mnist")
    found, other = (
        reconstruct(replace(problem, y=y), prior, QUICK).x0 for y in (problem.y, -problem.y)
    )
    assert (found - other).abs().max() > 0.5
    with pytest.raises(ValueError, match="a guess needs at least 2 steps"):
        reconstruct(problem, prior, replace(QUICK, steps=1))
    hidden = diffoc.Problem(problem.physics.A, problem.y, 0.05)
    with pytest.raises(ValueError, match="'quick' has no iterations here, and a guess needs a lin"):
        reconstruct(hidden, prior, QUICK)
    unplanned = replace(hidden, task="gaussian_blur")  # for which OURS is a guess alone
    with pytest.raises(ValueError, match="'ours' has no iterations here"):
        reconstruct(unplanned, prior)
    with pytest.raises(ValueError, match="nfe is 3"):
        METHODS["quick"].settings("gaussian_blur", 3)


def test_a_budget_limits_the_steps_of_a_guess_alone():
    changed = {
        n: Settings("gaussian_blur", "mnist", recipe="quick", budget=n).changed for n in (20, 99)
    }
    assert [(some.steps, some.iterations, some.smoothness) for some in changed.values()] == [
        (10, 0, 2.75),
        (20, 0, 2.75),
    ]
    planned = Settings("motion_blur", "mnist", recipe="quick", budget=200, iterations=2).changed
    assert (planned.budget, planned.iterations) == (200, 2)
    assert Settings("motion_blur", "mnist", recipe="quick").changed.smoothness == 2.25
