"""Greedy controls against dense linear algebra and deepinv, and what they are good for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from azula.denoise import DiracPosterior
from azula.noise import VPSchedule
from deepinv.physics import Inpainting, LinearPhysics
from scipy.fft import dct

from diffoc.baselines.ours import ours
from diffoc.baselines.stopped import stopped
from diffoc.greedy import (
    COLOURS,
    PIXEL_VARIANCE,
    correction,
    cosines,
    greedy_controls,
    image_correction,
    image_spectrum,
)
from diffoc.priors.counting import CountedPrior
from diffoc.priors.gaussian import GaussianPrior
from diffoc.priors.pretrained import load_prior
from diffoc.problem import Problem
from diffoc.problems.metrics import image_metrics
from diffoc.problems.tasks import for_each, measure, task
from diffoc.process import ReverseProcess, draw_noise
from diffoc.recipe import COLD
from diffoc.reconstruct import reconstruct

TASKS = ("super_resolution", "random_inpainting", "box_inpainting", "gaussian_blur", "motion_blur")


def seeded():
    return torch.Generator().manual_seed(0)


def physics_of(matrix):
    return LinearPhysics(A=lambda x, **_: x @ matrix.mT, A_adjoint=lambda y, **_: y @ matrix)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1e3])
def test_the_correction_is_the_normal_equations_solution(ratio):
    generator = seeded()
    matrix = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    x = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    y = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    found = correction(physics_of(matrix), y, x, ratio, tol=1e-12)
    normal = torch.eye(7, dtype=torch.float64) + ratio * matrix.mT @ matrix
    expected = torch.linalg.solve(normal, ratio * matrix.mT @ (y - x @ matrix.mT).mT).mT
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", TASKS)
def test_the_correction_is_deepinv_s_proximal_map(name):
    generator = seeded()
    physics = task(name, (1, 32, 32), generator)
    x, truth = torch.randn(2, 3, 1, 32, 32, generator=generator)
    y = measure(physics, truth, generator)
    found = x + correction(physics, y, x, 50.0, tol=1e-5)
    one_by_one = zip(x.split(1), y.split(1), strict=True)
    expected = [physics.prox_l2(z, w, 50.0, max_iter=200, tol=1e-6) for z, w in one_by_one]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-3, atol=1e-3)


def test_no_image_decides_for_another():
    generator = seeded()
    physics = task("motion_blur", (1, 64, 64), generator)
    x = torch.randn(2, 1, 64, 64, generator=generator) * torch.tensor([1.0, 1e4]).view(2, 1, 1, 1)
    y = measure(physics, x, generator)
    both = correction(physics, y, 0 * x, 10.0)
    alone = correction(physics, y[:1], 0 * x[:1], 10.0)
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothness", [0.0, 2.0, 3.5])
def test_the_spectrum_is_of_the_cosine_transform(smoothness):
    """Against scipy's: the mean variance of a pixel is v, and white noise has v everywhere."""
    spectrum = image_spectrum((6, 9), smoothness)
    ends = [torch.from_numpy(dct(np.eye(n), axis=0, norm="ortho")) for n in (6, 9)]
    for n, expected in zip((6, 9), ends, strict=True):
        torch.testing.assert_close(cosines(n), expected, rtol=0, atol=1e-14)
    both = torch.kron(*ends)
    covariance = both.mT @ torch.diag(spectrum.flatten()) @ both
    assert covariance.diagonal().mean().item() == pytest.approx(PIXEL_VARIANCE)
    if not smoothness:
        torch.testing.assert_close(covariance, PIXEL_VARIANCE * torch.eye(54).double())


@pytest.mark.parametrize("coloured", [False, True])
@pytest.mark.parametrize("smoothness", [0.0, 2.5])
def test_a_step_is_the_posterior_mean_under_a_prior_of_that_spectrum(smoothness, coloured):
    """E[x_0 | x_t, y] by joint Gaussian algebra: no time, mask or weight is left out."""
    generator, s = seeded(), 0.3
    H, W, channels = 5, 4, 3 if coloured else 1
    waves = torch.kron(cosines(H), cosines(W))
    C = waves.mT @ torch.diag(image_spectrum((H, W), smoothness).flatten()) @ waves
    if coloured:
        # Grey has 0.9 of the variance of three colours, red minus blue 0.07, the third 0.03.
        between = sum(
            3 * share * torch.outer(axis, axis) / axis.dot(axis)
            for axis, share in ((torch.tensor(a).double(), v) for a, v in COLOURS.items())
        )
        assert between.diagonal().mean() == pytest.approx(1)
        C = torch.kron(between, C)
    n = channels * H * W
    prior = GaussianPrior(torch.zeros(n, dtype=torch.float64), C, VPSchedule())

    class Images(CountedPrior):
        def forward(self, x, t):
            return DiracPosterior(super().forward(x.flatten(1), t).mean.reshape(x.shape))

    mask = torch.rand(1, 1, H, W, generator=generator, dtype=torch.float64) < 0.4
    physics = LinearPhysics(A=lambda x, **_: mask * x, A_adjoint=lambda y, **_: mask * y)
    x, y = torch.randn(2, 2, channels, H, W, generator=generator, dtype=torch.float64)
    y = mask * y
    process = ReverseProcess(Images(prior), 3)
    u = greedy_controls(process, physics, y, x, s, smoothness, coloured)[1]
    alpha, sigma = prior.schedule(process.times[0])
    A = torch.diag(mask.expand(1, channels, H, W).flatten().double())
    precision = torch.linalg.inv(C) + alpha**2 / sigma**2 * torch.eye(n) + A / s**2
    information = alpha / sigma**2 * x.flatten(1) + y.flatten(1) / s**2
    expected = torch.linalg.solve(precision, information.mT).mT.reshape(x.shape)
    mean = prior(x.flatten(1), process.times[0]).mean.reshape(x.shape)
    _, b, _ = process.coefficients[0]
    torch.testing.assert_close(u, b * (expected - mean), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "most"),
    [("gaussian_blur", 25), ("motion_blur", 250), ("box_inpainting", 100)],
)
def test_a_guess_is_the_minimum_after_few_iterations(name, most, channels):
    """The gradient of what the first control minimises, at the largest noise level.

    There C has a condition number of 10^4, and without a preconditioner the gradient of the
    Gaussian blur is a tenth of what it was after 200 iterations. Where a mask is zero there is
    noise, which no image explains.
    """
    generator = seeded()
    parts = [task(name, (channels, 32, 32), generator).double() for _ in range(2)]
    physics, applied = for_each(parts), []
    truth = torch.randn(2, channels, 32, 32, generator=generator, dtype=torch.float64)
    truth = truth.cumsum(-1).cumsum(-2) / 32
    y = physics.A(truth) + 0.05 * torch.randn(truth.shape, generator=generator).double()
    forward = physics.A

    def counted(x):
        applied.append(1)
        return forward(x)

    physics.A = counted

    class Prior(CountedPrior):
        def forward(self, x, t):
            return DiracPosterior(0 * x)

    process = ReverseProcess(Prior(GaussianPrior(torch.zeros(1), torch.eye(1), VPSchedule())), 2)
    u = greedy_controls(process, physics, y, 0 * truth, 0.05, 2.0, channels == 3)[1]
    assert len(applied) <= most
    alpha, sigma = process.denoiser.schedule(process.times[0])
    waves, axes, shares = cosines(32), torch.eye(1).double(), torch.ones(1).double()
    if channels == 3:
        axes = torch.tensor([*COLOURS]).double()
        axes = axes / axes.norm(dim=1, keepdim=True)
        shares = 3 * torch.tensor([*COLOURS.values()]).double()
    precision = (alpha / sigma) ** 2 + 1 / (shares[:, None, None] * image_spectrum((32, 32), 2.0))

    def gradient(d):
        seen = waves @ torch.einsum("ac,bchw->bahw", axes, d) @ waves.mT
        smooth = torch.einsum("ac,bahw->bchw", axes, waves.mT @ (precision * seen) @ waves)
        return smooth - physics.A_adjoint(y - forward(d)) / 0.05**2

    d = u / process.coefficients[0][1]
    assert gradient(d).norm() < 1e-4 * gradient(0 * d).norm()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_mask_s_type_does_not_matter(dtype):
    generator = seeded()
    kept = torch.rand(1, 1, 8, 8, generator=generator) < 0.5
    x = torch.randn(2, 3, 8, 8, generator=generator)
    found, expected = (
        image_correction(physics, physics.A(x), 0 * x, 0.1, 3.0, True)(0 * x, 0.1)
        for physics in (Inpainting((3, 8, 8), mask=kept.to(kind)) for kind in (dtype, x.dtype))
    )
    assert torch.equal(found, expected)
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("s", [5e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.5), (1.0, 2.0), (0.2, 1.0)])
def test_a_mask_s_guess_is_that_of_float64_at_any_noise(s, weights):
    """What is subtracted in the preconditioner must not be lost in float32's rounding."""
    generator = seeded()
    parts = [task("box_inpainting", (3, 32, 32), generator) for _ in range(2)]
    some = torch.rand(2, 1, 32, 32, generator=generator) < 0.5
    mask = torch.where(some, *weights) * torch.cat([part.mask for part in parts])
    truth = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    truth = truth.cumsum(-1).cumsum(-2) / 32
    found = {}
    for dtype in (torch.float32, torch.float64):
        physics = Inpainting((3, 32, 32), mask=mask.to(dtype))
        y = physics.A(truth.to(dtype))
        correct = image_correction(physics, y, 0 * truth.to(dtype), s, 3.0, True)
        found[dtype] = correct(0 * truth.to(dtype), 1e-3).double()
    error = (found[torch.float32] - found[torch.float64]).norm()
    assert error < 1e-2 * found[torch.float64].norm()


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_the_controls_move_the_posterior_mean_of_every_step(method):
    # The whole trajectory by dense algebra, with the flow written out for images moved by d.
    generator = seeded()
    n, noise = 5, 0.3
    mean = torch.randn(n, generator=generator, dtype=torch.float64)
    prior = GaussianPrior(mean, torch.eye(n, dtype=torch.float64), VPSchedule())
    matrix = torch.randn(2, n, generator=generator, dtype=torch.float64)
    y = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    x = torch.randn(3, n, generator=generator, dtype=torch.float64)
    frozen = draw_noise(6, x.shape, generator) if method == "ddpm" else None
    process = ReverseProcess(prior, 6, method=method, noise=frozen)
    controls = greedy_controls(process, physics_of(matrix), y, x, noise)
    states = process.rollout(x, controls)

    at = x
    for i in range(5):
        t = process.times[i]
        alpha, sigma = prior.schedule(t)
        mean = prior(at, t).mean
        ratio = 1 / (alpha**2 / sigma**2 + 1 / PIXEL_VARIANCE) / noise**2
        normal = torch.eye(n, dtype=torch.float64) + ratio * matrix.mT @ matrix
        moved = mean + torch.linalg.solve(normal, ratio * matrix.mT @ (y - mean @ matrix.mT).mT).mT
        a, b, c = process.coefficients[i]
        at = a * at + b * moved + (0 if frozen is None else c * frozen[i])
        torch.testing.assert_close(states[i + 1] + controls[i + 1], at, rtol=1e-3, atol=1e-3)


def test_bad_arguments():
    prior = load_prior("mnist")
    physics = task("gaussian_blur", (1, 28, 28), seeded())
    x = torch.zeros(1, 1, 28, 28)
    with pytest.raises(ValueError, match="noise_std is 0"):
        greedy_controls(ReverseProcess(prior, 2), physics, x, x, 0)
    with pytest.raises(ValueError, match="smoothness is -1"):
        greedy_controls(ReverseProcess(prior, 2), physics, x, x, 0.1, -1)
    flat = physics_of(torch.eye(4))
    with pytest.raises(ValueError, match="smoothness is 2, but x has shape"):
        greedy_controls(ReverseProcess(prior, 2), flat, torch.ones(1, 4), torch.ones(1, 4), 0.1, 2)
    # Else the vectors of a batch would be the rows of an image.
    with pytest.raises(ValueError, match="smoothness is 2, but x has shape"):
        image_correction(flat, torch.ones(3, 4), torch.ones(3, 4), 0.1, 2)
    with pytest.raises(ValueError, match="coloured is True, but x has shape"):
        greedy_controls(ReverseProcess(prior, 2), physics, x, x, 0.1, 2, True)
    with pytest.raises(ValueError, match="output mode"):
        greedy_controls(ReverseProcess(prior, 2, mode="output"), physics, x, x, 0.1)
    with pytest.raises(ValueError, match="budget is 10"):
        stopped(prior, physics, x, x, seeded(), noise_std=0.1, steps=10, budget=10)


@pytest.mark.parametrize("name", ["gaussian_blur", "box_inpainting"])
def test_the_greedy_guess_saves_evaluations(name):
    # Digits that no training set has seen are not at hand everywhere: a blurred square will do.
    truth = -torch.ones(1, 1, 28, 28)
    truth[..., 6:22, 12:16] = 1
    generator = seeded()
    physics = task(name, (1, 28, 28), generator)
    y = measure(physics, truth, generator)
    scores = {}
    for greedy in (False, True):
        counted = CountedPrior(load_prior("mnist"), None)
        recipe = replace(COLD, iterations=4, guess=greedy)
        x0 = reconstruct(Problem(physics, y, 0.05), counted, recipe, x=0 * truth).x0
        scores[greedy] = image_metrics(x0, truth)["psnr"].item()
    assert scores[True] > scores[False] + 1


@pytest.mark.parametrize(
    ("weight", "changes"),
    [(0.2, {}), (5.0, {}), (5.0, {"in_units": False}), (0.5, {"weighted": False})],
)
def test_ours_reaches_the_minimum_of_the_cost(weight, changes):
    # Of a Gaussian prior the image is affine in the controls, so that the cost is a quadratic.
    generator = seeded()
    n, steps, noise = 4, 5, 0.3
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    prior = GaussianPrior(torch.ones(n, dtype=torch.float64), root @ root.mT, VPSchedule())
    matrix = torch.randn(2, n, generator=generator, dtype=torch.float64)
    physics, y = physics_of(matrix), torch.randn(1, 2, generator=generator, dtype=torch.float64)
    x = torch.zeros(1, n, dtype=torch.float64)

    process = ReverseProcess(prior, torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** 1.5)
    still = process.rollout(x)[-1][0]
    unit = torch.eye(steps * n, dtype=torch.float64).reshape(steps * n, steps, n).movedim(0, 1)
    columns = process.rollout(x.expand(steps * n, n), unit)[-1] - still
    M = matrix @ columns.mT
    alpha, sigma = prior.schedule(process.times[:-1])
    weights = alpha**2 / sigma**2 if changes.get("weighted", True) else torch.ones_like(alpha)
    costs = weight * weights.repeat_interleave(n)
    u = torch.linalg.solve(
        M.mT @ M / noise**2 + torch.diag(costs), M.mT @ (y[0] - matrix @ still) / noise**2
    )
    best = still + columns.mT @ u

    settings = {"noise_std": noise, "steps": steps, "budget": 2000}
    settings |= {"weight": weight} | changes
    found = ours(prior, physics, y, x, seeded(), **settings)
    torch.testing.assert_close(found[0], best, rtol=1e-6, atol=1e-6)
    counted = CountedPrior(prior)
    ended = ours(counted, physics, y, x, seeded(), stopped=True, **settings)
    assert (ended[0] - best).norm() > 1e-2 * best.norm()
    assert counted.evaluations < 100


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_ours_needs_a_cost(weight):
    x = torch.zeros(1, 1, 28, 28)
    physics = task("super_resolution", (1, 28, 28), seeded())
    settings = {"noise_std": 0.05, "budget": 80, "weight": weight}
    with pytest.raises(ValueError, match="weight is"):
        ours(load_prior("mnist"), physics, physics.A(x), x, seeded(), **settings)


@pytest.mark.parametrize("budget", [20, 33])
def test_ours_uses_up_its_budget(budget):
    generator = seeded()
    prior = CountedPrior(load_prior("mnist"))
    physics = task("super_resolution", (1, 28, 28), generator)
    x = -torch.ones(2, 1, 28, 28)
    x[..., 6:22, 12:16] = 1
    y = measure(physics, x, generator)
    ours(prior, physics, y, x, generator, noise_std=0.05, steps=5, budget=budget)
    # A line search of the last iteration may have tried once more.
    assert budget - 5 < prior.evaluations / 2 <= budget + 5
