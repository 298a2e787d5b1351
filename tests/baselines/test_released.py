"""What the authors' released code does: item by item, and against what it gave.

The fixture `released.npz` was made by the code itself, commit f20ebff of
github.com/lihenryhfl/diffusion_optimal_control, on a CPU with torch 2.14.1, in float32, by a script
that is not part of this project because it needs that code. For both tasks it

- makes `sampler = create_sampler(**config, timestep_respacing=20)` of the file
  `inverse_configs/diffusion_config.yaml`, with `model_var_type="fixed_small"` for inpainting;
- calls `numpy.random.seed(42)` and makes `env = DPSDiffusion(model=NoisePredictor(), ...)` with the
  defaults of `Experiment.get_env`: 20 steps, weight_scale 1e-6, and as cost the norm of
  `operator.forward(x, mask=mask) - y`; the operator is `get_operator("super_resolution",
  in_shape=(1, 1, 8, 8), scale_factor=2)` or `get_operator("inpainting")`;
- makes `solver = MFDDP(env, seed=42, lr=5e-3)` and replaces its method `approx_inverse` by one that
  returns zeros, which leaves out the term of the random subspace that
  :class:`diffoc.baselines.released.ShrinkingValue` describes;
- calls `solver.solve(start.reshape(1, 64), num_iterations=5)`, and keeps the controls that the
  last call of `solver.iterate` returns, and the last state of every call;
- draws the noise of step i as the code does, `torch.manual_seed(env.seed + 18 - i)` and
  `torch.randn_like(start)`.

The image is sin(0.37 j) for its pixels j; start, mask (half of the pixels) and measurement noise
are torch's with the seed 0.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from azula.denoise import Denoiser, GaussianPosterior
from azula.noise import VESchedule, VPSchedule
from deepinv.physics import Inpainting
from diffusers import DDPMScheduler
from torch import nn

from diffoc.baselines.released import (
    AncestralProcess,
    ResidualNorm,
    ShrinkingValue,
    released_weights,
)
from diffoc.costs import ControlCost
from diffoc.experiments.methods import METHODS
from diffoc.lowrank import LowRankExpansion
from diffoc.priors.counting import CountedPrior
from diffoc.priors.gaussian import GaussianPrior
from diffoc.priors.pretrained import (
    default_schedule,
    load_prior,
    take_nearest_timesteps,
    untrained_adm,
)
from diffoc.problems.operators import average_pool
from diffoc.problems.tasks import super_resolution
from diffoc.process import draw_noise
from diffoc.reconstruct import reconstruct
from diffoc.rules import Adam
from diffoc.solve import solve

FIXTURE = Path(__file__).parents[1] / "fixtures" / "released.npz"
BETA = np.linspace(1e-4, 0.02, 1000)
BAR = np.cumprod(1 - BETA)


class NoisePredictor(nn.Module):
    """A network of the released code's kind: the noise, and what interpolates the variance.

    It is the exact one for pixels N(0, 0.7^2), and a small convolutional network beside it, whose
    weights are fractions of small whole numbers: the same on every machine.
    """

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)
        for step, p in zip((37, 53, 29, 41), self.parameters(), strict=True):
            numbers = torch.arange(p.numel(), dtype=torch.float64) * step % 101
            p.data = (numbers / 101 - 0.5).reshape(p.shape).float()
        self.requires_grad_(False)

    def forward(self, x, timesteps, u=None):
        bar = torch.from_numpy(BAR).to(x)[timesteps].reshape(-1, 1, 1, 1)
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        out = self.two(torch.tanh(self.one(x) + alpha))
        eps = sigma * x / (0.49 * bar + sigma**2) + 0.5 * alpha * out[:, :1]
        return torch.cat([eps, torch.tanh(out[:, 1:])], dim=1)


class Prior(Denoiser):
    """The network as azula denoiser with a variance, at the timestep next to the level of noise."""

    def __init__(self, network):
        super().__init__()
        self.network, self.schedule = network, VPSchedule(alpha_min=1e-2, sigma_min=1e-2)

    def forward(self, x_t, t, **kwargs):
        alpha, sigma = self.schedule(t)
        scale = (alpha**2 + sigma**2).rsqrt()
        timestep = torch.from_numpy(BAR).sub((scale * alpha).double() ** 2).abs().argmin()
        eps, v = self.network(scale * x_t, timestep.expand(len(x_t))).chunk(2, dim=1)
        return GaussianPosterior((x_t - sigma * eps) / alpha, (scale * sigma) ** 2 * v.exp())


class NoHead(Denoiser):
    """As azula's networks without the head: one variance for all."""

    schedule = VPSchedule(alpha_min=1e-2, sigma_min=1e-2)

    def forward(self, x_t, t, **kwargs):
        return GaussianPosterior(x_t, torch.ones(1, 1))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def double_prior():
    return Prior(NoisePredictor().double())


def physics_of(name, mask):
    return super_resolution(2) if name == "super_resolution" else Inpainting((1, 8, 8), mask=mask)


@pytest.fixture
def results(monkeypatch):
    """What `reconstruct` returned to the method: the method returns the image alone."""
    found = []

    def recorded(*args, **settings):
        found.append(reconstruct(*args, **settings))
        return found[-1]

    monkeypatch.setattr("diffoc.baselines.reconstruct", recorded)
    return found


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 5e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", ["super_resolution", "random_inpainting"])
def test_controls_and_images_are_the_released_code_s(name, dtype, bound, results, monkeypatch):
    """After five iterations; images after each of them."""
    with np.load(FIXTURE) as file:
        given = {key: torch.from_numpy(file[key]).to(dtype) for key in file}
    monkeypatch.setattr("diffoc.baselines.released.draw_noise", lambda *_: given["noise"])
    for iterations in range(1, 6):
        METHODS["released"].run(
            Prior(NoisePredictor().to(dtype)),
            physics_of(name, given["mask"]).to(dtype),
            given[f"{name}_y"],
            given["start"],
            generator(),
            noise_std=0.05,
            **METHODS["released"].settings(name, 1000)
            | {"iterations": iterations, "learned_variance": name == "super_resolution"},
        )
    for result, image in zip(results, given[f"{name}_images"], strict=True):
        assert (result.x0 - image).norm() < bound * image.norm()
    controls = given[f"{name}_controls"]
    assert (results[-1].controls - controls).norm() < bound * controls.norm()
    assert (controls.abs().amax((1, 2, 3, 4)) > 0.005).all()  # each step of them has moved


@pytest.mark.parametrize("learned", [False, True])
def test_a_sample_is_that_of_diffusers_scheduler(learned):
    """The same levels but for the noisiest, clipping, variances and, at the end, no noise."""
    prior, x = double_prior(), normal(2, 1, 8, 8)
    levels = [round(999 / 19 * k) for k in range(19)][::-1]
    scheduler = DDPMScheduler(
        1000, 1e-4, 0.02, variance_type="learned_range" if learned else "fixed_small"
    )
    scheduler.set_timesteps(timesteps=levels)
    expected, g = x, generator(1)
    for t in levels:
        output = prior.network(expected, torch.tensor([t, t]))
        if not learned:
            output = output[:, :1]
        expected = scheduler.step(output, t, expected, generator=g).prev_sample
    process = AncestralProcess(prior, 20, draw_noise(19, x.shape, generator(1)), learned)
    found = process.rollout(x)
    assert process.horizon == 19
    assert found[-1].abs().max() == 1  # something was clipped
    # The scheduler's levels are in single precision.
    torch.testing.assert_close(found[-1], expected, rtol=1e-4, atol=1e-4)


def test_the_last_step_is_the_clipped_image():
    prior, x = double_prior(), 2 * normal(2, 1, 8, 8)
    process = AncestralProcess(prior, 20, draw_noise(19, x.shape, generator()), True)
    eps, _ = prior.network(x, torch.tensor([0, 0])).chunk(2, dim=1)
    image = (x - math.sqrt(1e-4) * eps) / math.sqrt(1 - 1e-4)
    torch.testing.assert_close(process.step(18, x), image.clamp(-1, 1), rtol=1e-6, atol=1e-6)


def test_a_control_is_added_before_the_step():
    process = AncestralProcess(double_prior(), 5, draw_noise(4, (1, 1, 8, 8), generator()))
    x, u = normal(1, 1, 8, 8), normal(1, 1, 8, 8, seed=1)
    torch.testing.assert_close(process.step(1, x, u), process.step(1, x + u), rtol=0, atol=0)


def test_states_have_unit_variance_whatever_the_prior_s_schedule():
    """A Gaussian prior in closed form, variance preserving and variance exploding."""
    x, noise = normal(2, 3), draw_noise(19, (2, 3), generator(1))
    mean, covariance = torch.zeros(3).double(), torch.diag(torch.tensor([0.1, 0.2, 0.3])).double()
    schedules = (
        VPSchedule(alpha_min=1e-3, sigma_min=1e-3),
        VESchedule(sigma_min=1e-3, sigma_max=1e3),
    )
    one, two = (
        AncestralProcess(GaussianPrior(mean, covariance, schedule), 20, noise).rollout(x)
        for schedule in schedules
    )
    torch.testing.assert_close(one, two)
    process = AncestralProcess(GaussianPrior(mean, covariance, schedules[1]), 20, noise)
    assert process.initial_state((4000, 3), generator()).std().item() == pytest.approx(1, abs=0.03)


def test_weights():
    """sqrt(alpha / (1 - alpha)) with alpha of one step, at times from 1 to 0.001."""
    expected = []
    for k in range(19):
        t = 1 - 0.999 * k / 19
        beta = 1e-4 + (0.02 - 1e-4) * math.floor(999 * t) / 999
        expected.append(math.sqrt((1 - beta) / (beta + 1e-7)) / (0.999 / 20) ** 2)
    found = released_weights(20)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert (found.diff() > 0).all()  # the earlier, the cheaper


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_residual_norm_is_numpy_s_whatever_the_shape(dtype):
    x, y = normal(3, 2, 4, 4).to(dtype), normal(1, 2, 2, 2, seed=1).to(dtype)
    found = ResidualNorm(average_pool(2), y)(x)
    residual = x.numpy().reshape(3, 2, 2, 2, 2, 2).mean((3, 5)) - y.numpy()
    expected = np.linalg.norm(residual.reshape(3, -1), axis=1)
    assert found.dtype == dtype
    np.testing.assert_allclose(
        found.numpy(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12
    )


def test_residual_norm_has_two_derivatives_away_from_zero():
    cost = ResidualNorm(lambda x: torch.tanh(x) ** 2, normal(2, 3, seed=1))
    x = normal(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(cost, (x,))
    assert torch.autograd.gradgradcheck(cost, (x,))


def test_residual_norm_at_zero_has_no_slope_and_does_not_spoil_the_batch():
    y = normal(2, 3)
    x = torch.stack([y[0], y[1] + torch.tensor([3.0, 0.0, 4.0]).double()]).requires_grad_()
    cost = ResidualNorm(lambda x: x, y)(x)
    (gradient,) = torch.autograd.grad(cost.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient[:, 0].sum(), x)
    torch.testing.assert_close(cost, torch.tensor([0.0, 5.0]).double())
    torch.testing.assert_close(gradient, torch.tensor([[0.0] * 3, [0.6, 0.0, 0.8]]).double())
    # (I - d d^T) / 5 with the direction d
    torch.testing.assert_close(second[1], torch.tensor([0.64, 0.0, -0.48]).double() / 5)
    assert (second[0] == 0).all()


def setting():
    """The released cost and update on a digit's size, in double precision."""
    mask = (normal(1, 1, 8, 8, seed=3) > 0).double()
    physics = physics_of("random_inpainting", mask)
    y = physics.A(torch.sin(torch.arange(64.0).double()).reshape(1, 1, 8, 8))
    process = AncestralProcess(double_prior(), 6, draw_noise(5, y.shape, generator()))
    settings = {
        "control_cost": ControlCost(1e-6 * released_weights(6)),
        "rank": 0,
        "rule": Adam(5e-3, weight_decay=0.01, keeps_best=False),
        "regularization": 1e-3,
    }
    return process, ResidualNorm(physics.A, y), normal(1, 1, 8, 8, seed=2), settings


def test_the_noise_is_frozen_over_iterations():
    """An image of any iteration is that of its controls, rolled out afterwards."""
    process, cost, x, settings = setting()
    found = solve(process, cost, x, iterations=4, **settings)
    torch.testing.assert_close(process.rollout(x, found.controls), found.states, rtol=0, atol=0)
    noiseless = AncestralProcess(process.denoiser, 6, torch.zeros_like(process.noise))
    assert (noiseless.rollout(x)[-1] - process.rollout(x)[-1]).abs().max() > 0.01


def test_adam_cancels_the_constant_of_the_gains():
    """k = -Qu / (w + a): whatever a, but for Adam's epsilon."""
    process, cost, x, settings = setting()
    one, two = (
        solve(process, cost, x, iterations=5, **settings | {"regularization": a}).controls
        for a in (1e-3, 0.0)
    )
    assert one.norm() > 0.1
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_the_first_iteration_moves_every_control_by_the_rate():
    """Weight decay acts from the second on: it takes a share of what there is."""
    process, cost, x, settings = setting()
    first = solve(process, cost, x, iterations=1, **settings).controls
    moved = first.abs()[first != 0]
    assert 0.9 * first.numel() < len(moved)
    torch.testing.assert_close(moved, torch.full_like(moved, 5e-3), rtol=1e-2, atol=0)


def test_the_last_iterate_is_the_result_and_not_the_best():
    process, cost, x, settings = setting()
    for keeps_best in (False, True):
        costs = []
        settings["rule"] = Adam(0.5, keeps_best=keeps_best)
        found = solve(
            process,
            cost,
            x,
            iterations=8,
            callback=lambda i, c, x0, costs=costs: costs.append(c),
            **settings,
        )
        assert found.cost == (min(costs) if keeps_best else costs[-1])
    assert costs[-1] > min(costs)


def test_the_method_too_returns_the_last_iterate(results):
    physics, x = super_resolution(2).double(), normal(1, 1, 8, 8)
    settings = METHODS["released"].settings("super_resolution", 1000)
    settings |= {"steps": 6, "iterations": 8, "rate": 0.5}
    y = physics.A(torch.sin(torch.arange(64.0).double()).reshape(1, 1, 8, 8))
    METHODS["released"].run(double_prior(), physics, y, x, generator(), noise_std=0.05, **settings)
    assert results[0].cost > 1.01 * results[0].costs.min()


def test_the_settings_of_the_tasks():
    settings = METHODS["released"].settings
    for name in ("super_resolution", "gaussian_blur", "phase_retrieval"):
        found = settings(name, 1000)
        assert (found["steps"], found["iterations"]) == (20, 50)
        assert found["rate"] == (5e-3 if name == "super_resolution" else 1e-2)
        assert found["weight_scale"] == (1e-5 if name == "gaussian_blur" else 1e-6)
    with pytest.raises(ValueError, match="nfe is 300"):
        settings("super_resolution", 300)


def test_the_work_of_a_run():
    method, prior = METHODS["released"], CountedPrior(double_prior())
    settings = method.settings("super_resolution", 1000) | {"iterations": 2}
    y = normal(2, 1, 4, 4)
    method.run(
        prior,
        super_resolution(2).double(),
        y,
        normal(2, 1, 8, 8),
        generator(),
        noise_std=0.05,
        **settings,
    )
    work = method.work(settings)
    assert (prior.evaluations / 2, prior.products / 2) == work == (57, 38)


def test_an_adm_network_is_asked_at_the_timesteps_of_the_levels():
    """0, 53, ... 946 of RELEASED, where azula's own search is one too high at several."""
    prior, x = untrained_adm("ffhq256", 32), torch.zeros(1, 3, 32, 32)
    prior.schedule = default_schedule()
    asked = []
    prior.backbone.register_forward_pre_hook(lambda module, args: asked.append(args[1].item()))
    process = AncestralProcess(prior, 20, draw_noise(19, x.shape, generator()).float())
    levels = [round(999 / 19 * k) for k in range(19)][::-1]
    for nearest in (False, True):
        if nearest:
            take_nearest_timesteps(prior)
        with torch.no_grad():
            for i in range(19):
                process.step(i, x)
    assert asked[:19] != levels
    assert asked[19:] == levels


def test_the_head_for_the_variance_of_an_adm_network():
    """Its variance comes through the counter, and is that of the network's second half."""
    prior = untrained_adm("ffhq256", 32, learned_variance=True)
    assert prior.backbone.out[2].weight.shape[0] == 6
    with torch.no_grad():
        prior.backbone.out[2].bias[:3] = 0.1
        prior.backbone.out[2].bias[3:] = 0.4  # of v, everywhere: the weights are zero
    x = normal(1, 3, 32, 32).float()
    noise = draw_noise(19, x.shape, generator(1)).float()
    small, learned = (
        AncestralProcess(CountedPrior(prior), 20, noise, learned) for learned in (False, True)
    )
    with torch.no_grad():
        spread = (learned.step(9, x) - small.step(9, x)) / noise[9]
    largest = math.sqrt(1 - BAR[473] / BAR[421])
    smallest = largest * math.sqrt((1 - BAR[421]) / (1 - BAR[473]))
    expected = math.exp(0.7 * math.log(largest) + 0.3 * math.log(smallest)) - smallest
    assert spread.median().item() == pytest.approx(expected, rel=1e-3)


def test_wrong_arguments_are_named():
    prior, noise = double_prior(), draw_noise(19, (1, 1, 8, 8), generator())
    for steps in (1, 1001):
        with pytest.raises(ValueError, match=f"steps is {steps}, expected 2 to 1000"):
            AncestralProcess(prior, steps, noise)
    with pytest.raises(ValueError, match="noise has 19 steps, expected 9"):
        AncestralProcess(prior, 10, noise)
    with pytest.raises(ValueError, match="the prior's schedule ends at 100"):
        AncestralProcess(prior, 50, noise)
    for headless in (GaussianPrior(torch.zeros(64), torch.eye(64), prior.schedule), NoHead()):
        process = AncestralProcess(headless, 20, draw_noise(19, (1, 64), generator()), True)
        with pytest.raises(ValueError, match="the prior has no head for the variance"):
            process.step(0, torch.zeros(1, 64))
    with pytest.raises(ValueError, match="steps is 1, expected finite and at least 2"):
        released_weights(1)
    with pytest.raises(ValueError, match="weight_decay is -1"):
        Adam(weight_decay=-1.0)
    with pytest.raises(ValueError, match="learned_variance is for ffhq256 and imagenet256"):
        load_prior("faces64", learned_variance=True)


def test_the_side_effect_is_woodbury_s_identity_for_a_part_of_zero():
    """As the released code has it: the inverse of r I + U C V with C = 0, which it regularises."""
    r, e, n, k = 0.02, 1e-3, 12, 3
    value = ShrinkingValue(
        normal(2, n), normal(2, n, 0), normal(2, 0, 0), None, k, generator(seed=5)
    )
    step = LowRankExpansion(
        normal(2, n, seed=1), normal(2, n, seed=2), normal(2, n, 0), normal(2, n, 0),
        normal(2, n, seed=3), r,
    )  # fmt: skip
    gains, below = value.step_back(step, torch.full((2,), e, dtype=torch.float64), "full")
    U = torch.linalg.qr(torch.randn(n, k, generator=generator(seed=5))).Q.double()
    A, eye = (r + e), torch.eye(k, dtype=torch.float64)
    inner = torch.linalg.inv(torch.linalg.inv(e * eye) + U.mT @ U / A + e * eye)
    inverse = torch.eye(n, dtype=torch.float64) / A - U @ inner @ U.mT / A**2
    torch.testing.assert_close(gains.k, -step.gradient @ inverse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(below.Vx, step.px)
    again, _ = below.step_back(step, torch.full((2,), e, dtype=torch.float64), "full")
    assert not torch.equal(again.k, gains.k)  # another subspace


@pytest.mark.parametrize("side_effect", [False, True])
def test_the_side_effect_is_off_unless_it_is_asked_for(side_effect):
    prior, physics = double_prior(), super_resolution(2)
    y, x = normal(1, 1, 4, 4), normal(1, 1, 8, 8, seed=1)
    settings = {"noise_std": 0.05, "steps": 4, "iterations": 3}
    usual = METHODS["released"].run(prior, physics, y, x, generator(), **settings)
    found = METHODS["released"].run(
        prior, physics, y, x, generator(), **settings, side_effect=side_effect
    )
    assert torch.equal(found, usual) != side_effect
    assert (found - usual).abs().max() < 0.5
