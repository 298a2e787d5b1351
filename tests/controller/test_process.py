"""The reverse process against azula's samplers, scipy's ODE solver and closed forms."""

import math

import numpy as np
import pytest
import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.noise import CosineSchedule, RectifiedSchedule, VESchedule, VPSchedule
from azula.sample import DDIMSampler, DDPMSampler, EulerSampler
from scipy.integrate import solve_ivp

from diffoc.priors.gaussian import GaussianPrior
from diffoc.process import METHODS, ReverseProcess, draw_noise, drift_and_diffusion

# alpha, sigma, phi and g^2 of the two schedules, written by hand.
ALPHA_MIN, SIGMA_MIN, SIGMA_MAX = 0.05, 0.1, 10.0


def vp_by_hand(t):
    alpha = math.exp(math.log(ALPHA_MIN) * t**2)
    phi = 2 * t * math.log(ALPHA_MIN)
    return alpha, math.sqrt(1 - alpha**2 + SIGMA_MIN**2), phi, -2 * phi * (1 + SIGMA_MIN**2)


def ve_by_hand(t):
    sigma = SIGMA_MIN ** (1 - t) * SIGMA_MAX**t
    return 1.0, sigma, 0.0, 2 * sigma**2 * math.log(SIGMA_MAX / SIGMA_MIN)


SCHEDULES = {
    "vp": (VPSchedule(ALPHA_MIN, SIGMA_MIN), vp_by_hand),
    "ve": (VESchedule(SIGMA_MIN, SIGMA_MAX), ve_by_hand),
}


@pytest.fixture(params=sorted(SCHEDULES))
def schedule(request):
    return SCHEDULES[request.param]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def gaussian(schedule, n: int = 4) -> GaussianPrior:
    W = normal(n, n, seed=7)
    return GaussianPrior(normal(n, seed=8), W @ W.mT / n + 0.1 * torch.eye(n).double(), schedule)


class Wave(Denoiser):
    """A denoiser of images that is linear in nothing and knows its time."""

    def __init__(self, schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t, t, **kwargs):
        return DiracPosterior(torch.tanh(x_t * (1 - t) + x_t.roll(1, -1)))


def process_of(method, denoiser, steps, x, mode="input", seed=3):
    count = steps if isinstance(steps, int) else len(steps) - 1
    noise = draw_noise(count, x.shape, seeded(seed)).to(x.dtype) if method == "ddpm" else None
    return ReverseProcess(denoiser, steps, method, mode, noise)


# ---------------------------------------------------------------- coefficients


@pytest.mark.parametrize("t", [0.003, 0.2, 0.5, 0.97, 1.0])
def test_drift_and_diffusion_are_the_hand_written(schedule, t):
    phi, g2 = drift_and_diffusion(schedule[0], torch.tensor(t, dtype=torch.float64))
    np.testing.assert_allclose([phi.item(), g2.item()], schedule[1](t)[2:], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("other", [CosineSchedule(0.02, 0.05), RectifiedSchedule(0.02, 0.05)])
def test_drift_and_diffusion_are_finite_differences(other):
    t, h = torch.linspace(0.05, 0.95, 7, dtype=torch.float64), 1e-5
    (alpha, _), (up, sup), (down, sdown) = other(t), other(t + h), other(t - h)
    phi = (up - down) / (2 * h) / alpha
    # g^2 = alpha^2 d/dt (sigma / alpha)^2, the other way to write it
    g2 = alpha**2 * ((sup / up) ** 2 - (sdown / down) ** 2) / (2 * h)
    got_phi, got_g2 = drift_and_diffusion(other, t)
    assert got_phi.shape == got_g2.shape == t.shape
    torch.testing.assert_close(got_phi, phi, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(got_g2, g2, rtol=1e-6, atol=1e-8)


def test_drift_and_diffusion_work_without_gradients_and_return_none():
    t = torch.tensor([0.3, 0.6], dtype=torch.float64)
    with torch.no_grad():
        phi, g2 = drift_and_diffusion(SCHEDULES["vp"][0], t)
    assert not phi.requires_grad
    assert not g2.requires_grad
    assert not t.requires_grad


def test_ddpm_coefficients_are_gaussian_conditioning(schedule):
    """p(x_s | x_t, x_0) from the 2 x 2 covariance of (x_s, x_t) given x_0."""
    t, s = 0.7, 0.45
    (alpha_t, sigma_t, *_), (alpha_s, sigma_s, *_) = schedule[1](t), schedule[1](s)
    a = alpha_t / alpha_s
    C = np.array([[sigma_s**2, a * sigma_s**2], [a * sigma_s**2, sigma_t**2]])
    slope = C[0, 1] / C[1, 1]
    expected = (slope, alpha_s - slope * alpha_t, math.sqrt(C[0, 0] - slope * C[0, 1]))
    noise = torch.zeros(1, 1, 1).double()
    process = ReverseProcess(gaussian(schedule[0]), [t, s], "ddpm", noise=noise)
    np.testing.assert_allclose(process.coefficients[0], expected, rtol=1e-11)


# ---------------------------------------------------------------- one step


def test_the_euler_step_is_the_ode_s(schedule):
    """x - (f - g^2/2 score) dt with the score of the Gaussian written out."""
    prior, x = gaussian(schedule[0]), normal(3, 4)
    t, s = 0.8, 0.77
    alpha, sigma, phi, g2 = schedule[1](t)
    cov_t = alpha**2 * prior.matrix + sigma**2 * torch.eye(4).double()
    score = -torch.linalg.solve(cov_t, (x - alpha * prior.mean).mT).mT
    expected = x - (phi * x - g2 / 2 * score) * (t - s)
    got = ReverseProcess(prior, [t, s], "euler").step(0, x)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sampler", [DDIMSampler, EulerSampler])
@pytest.mark.parametrize("steps", [1, 9])
def test_ddim_is_azulas(schedule, sampler, steps):
    denoiser, x = Wave(schedule[0]), normal(2, 3, 4, 4)
    reference = sampler(denoiser, steps=steps, silent=True, dtype=torch.float64)
    states = ReverseProcess(denoiser, steps, "ddim").rollout(x)
    expected = x
    for i, (t, s) in enumerate(reference.timesteps.unfold(0, 2, 1)):
        expected = reference.step(expected, t, s)
        torch.testing.assert_close(states[i + 1], expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("sampler", [DDPMSampler, lambda d, **kw: DDIMSampler(d, eta=1.0, **kw)])
def test_ddpm_is_azulas_under_the_same_noise(schedule, sampler, monkeypatch):
    denoiser, x, steps = Wave(schedule[0]), normal(2, 3, 4, 4), 7
    noise = draw_noise(steps, x.shape, seeded(3))
    queue = iter(noise)
    monkeypatch.setattr(torch, "randn_like", lambda _: next(queue))
    expected = sampler(denoiser, steps=steps, silent=True, dtype=torch.float64)(x)
    states = ReverseProcess(denoiser, steps, "ddpm", noise=noise).rollout(x)
    torch.testing.assert_close(states[-1], expected, rtol=1e-10, atol=1e-11)
    assert next(queue, None) is None


def test_ddpm_mean_and_variance_by_algebra(schedule):
    """Zero noise is azula's mean; the difference of two noises is its standard deviation."""
    denoiser, x = Wave(schedule[0]), normal(2, 1, 3, 3)
    t, s = 0.6, 0.5
    (alpha_t, sigma_t, *_), (alpha_s, sigma_s, *_) = schedule[1](t), schedule[1](s)
    tau = 1 - (alpha_t / alpha_s * sigma_s / sigma_t) ** 2
    m = denoiser(x, torch.tensor(t, dtype=torch.float64)).mean
    mean = alpha_s * m + sigma_s * math.sqrt(1 - tau) * (x - alpha_t * m) / sigma_t
    at = [
        ReverseProcess(denoiser, [t, s], "ddpm", noise=noise).step(0, x)
        for noise in (torch.zeros(1, *x.shape).double(), torch.ones(1, *x.shape).double())
    ]
    torch.testing.assert_close(at[0], mean, rtol=1e-11, atol=1e-12)
    std = torch.full_like(x, sigma_s * math.sqrt(tau))
    torch.testing.assert_close(at[1] - at[0], std, rtol=1e-9, atol=1e-12)


def test_denoiser_is_called_once_a_step_at_the_step_s_time(schedule):
    calls = []

    class Recorder(Wave):
        def forward(self, x_t, t, **kwargs):
            calls.append((t.item(), t.dtype, tuple(t.shape)))
            return super().forward(x_t, t, **kwargs)

    ReverseProcess(Recorder(schedule[0]), 4).rollout(normal(2, 5).float())
    assert calls == [(t, torch.float32, ()) for t in (1.0, 0.75, 0.5, 0.25)]


# ---------------------------------------------------------------- the exact flow


def test_the_flow_is_scipys_solution(schedule):
    prior, x = gaussian(schedule[0]), normal(1, 4)
    mean, cov = prior.mean.numpy(), prior.matrix.numpy()

    def ode(t, x):
        alpha, sigma, phi, g2 = schedule[1](t)
        cov_t = alpha**2 * cov + sigma**2 * np.eye(4)
        return phi * x + g2 / 2 * np.linalg.solve(cov_t, x - alpha * mean)

    for t, s in [(1.0, 0.0), (0.9, 0.3), (0.2, 0.8)]:
        solution = solve_ivp(ode, (t, s), x[0].numpy(), "DOP853", rtol=1e-12, atol=1e-13)
        assert solution.success
        got = prior.flow(x, t, s)[0].numpy()
        np.testing.assert_allclose(got, solution.y[:, -1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["euler", "ddim"])
def test_first_order_convergence(schedule, method):
    prior, x = gaussian(schedule[0]), schedule[1](1.0)[1] * normal(16, 4)
    exact = prior.flow(x, 1.0, 0.0)
    steps = [50, 100, 200, 400, 800]
    errors = [
        (ReverseProcess(prior, T, method).rollout(x)[-1] - exact).norm().item() for T in steps
    ]
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 0.93 < order < 1.07
    assert errors[-2] / errors[-1] == pytest.approx(2, rel=0.04)


# ---------------------------------------------------------------- controls


@pytest.mark.parametrize("method", sorted(METHODS))
def test_input_control_is_output_control_of_the_shifted_state(schedule, method):
    x, T = normal(2, 1, 3, 3), 6
    controls = 0.1 * normal(T, *x.shape, seed=1)
    denoiser = Wave(schedule[0])
    before = process_of(method, denoiser, T, x, "input")
    after = process_of(method, denoiser, T, x, "output")
    states = before.rollout(x, controls)
    assert torch.equal(before.step(2, x, controls[2]), after.step(2, x + controls[2]))
    # z_i = x_i + u_i obeys z_{i+1} = h(z_i) + u_{i+1}
    last = torch.zeros(1, *x.shape).double()
    shifted = after.rollout(x + controls[0], torch.cat([controls[1:], last]))
    assert torch.equal(shifted[-1], states[-1])
    torch.testing.assert_close(shifted[:-1], states[:-1] + controls, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["input", "output"])
def test_zero_controls_are_no_controls(schedule, mode):
    x, T = normal(2, 5), 5
    process = ReverseProcess(Wave(schedule[0]), T, mode=mode)
    assert torch.equal(process.rollout(x, torch.zeros(T, *x.shape).double()), process.rollout(x))


def test_output_control_adds_after_the_step(schedule):
    x, u = normal(2, 5), normal(2, 5, seed=1)
    process = ReverseProcess(Wave(schedule[0]), 5, mode="output")
    torch.testing.assert_close(process.step(1, x, u) - process.step(1, x), u)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_rollout_continues_where_another_stopped(schedule, method):
    x, T, start = normal(2, 5), 6, 2
    process = process_of(method, Wave(schedule[0]), T, x)
    controls = normal(T, 2, 5, seed=1)
    states = process.rollout(x, controls)
    assert states.shape == (T + 1, 2, 5)
    assert torch.equal(states[0], x)
    rest = process.rollout(states[start], controls[start:], start)
    assert torch.equal(rest, states[start:])
    assert torch.equal(process.rollout(x, start=T), x.unsqueeze(0))


# ---------------------------------------------------------------- noise, dtype, batch


@pytest.mark.parametrize("method", sorted(METHODS))
def test_rollouts_repeat_bit_for_bit(schedule, method):
    x, T = normal(2, 1, 4, 4), 8
    process = process_of(method, Wave(schedule[0]), T, x)
    first, state = process.rollout(x), torch.get_rng_state()
    assert torch.equal(process.rollout(x), first)
    assert torch.equal(process_of(method, Wave(schedule[0]), T, x).rollout(x), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_ddpm_noise_matters_and_seeds_differ(schedule):
    x = normal(2, 5)
    one, two = (process_of("ddpm", Wave(schedule[0]), 4, x, seed=s).rollout(x) for s in (3, 4))
    assert not torch.allclose(one[-1], two[-1])


@pytest.mark.parametrize("mode", ["input", "output"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_float32_stays_float32_and_close(schedule, method, mode):
    prior, T = gaussian(schedule[0]), 30
    x = schedule[1](1.0)[1] * normal(3, 4)
    controls = 0.1 * normal(T, 3, 4, seed=1)
    double = process_of(method, prior, T, x, mode).rollout(x, controls)
    prior32 = GaussianPrior(prior.mean.float(), prior.matrix.float(), schedule[0])
    single = process_of(method, prior32, T, x.float(), mode).rollout(x.float(), controls.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_problem_of_a_batch_depends_on_another(schedule, method):
    x, T = normal(3, 4), 6
    controls, noise = normal(T, 3, 4, seed=1), draw_noise(T, (3, 4), seeded(3))
    prior = gaussian(schedule[0])

    def rollout(which):
        given = noise[:, which] if method == "ddpm" else None
        process = ReverseProcess(prior, T, method, noise=given)
        return process.rollout(x[which], controls[:, which])

    together = rollout([0, 1, 2])
    for b in range(3):
        torch.testing.assert_close(rollout([b])[:, 0], together[:, b], rtol=1e-12, atol=1e-12)


def test_the_process_is_differentiable(schedule):
    x, T = normal(1, 3), 4
    process = ReverseProcess(Wave(schedule[0]), T)
    controls = 0.1 * normal(T, 1, 3, seed=1)
    assert torch.autograd.gradcheck(
        lambda x, u: process.rollout(x, u)[-1],
        (x.requires_grad_(), controls.requires_grad_()),
    )


# ---------------------------------------------------------------- times and initial states


def test_times_are_uniform_or_as_given(schedule):
    denoiser = Wave(schedule[0])
    process = ReverseProcess(denoiser, 4)
    assert process.horizon == 4
    assert process.times.tolist() == [1, 0.75, 0.5, 0.25, 0]
    for times in (
        [0.9, 0.5, 0.1],
        (0.9, 0.5, 0.1),
        torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64),
    ):
        process = ReverseProcess(denoiser, times)
        assert process.horizon == 2
        assert process.times.tolist() == [0.9, 0.5, 0.1]


def test_times_are_the_process_s_own(schedule):
    times = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    process, x = ReverseProcess(Wave(schedule[0]), times), normal(2, 1, 3, 3)
    expected = process.rollout(x)
    with torch.no_grad():
        times.mul_(0.5)
    assert torch.equal(process.rollout(x), expected)
    assert not expected.requires_grad


def test_initial_states_are_sigma_1_times_the_generator_s_noise(schedule):
    process = ReverseProcess(Wave(schedule[0]), 3)
    x = process.initial_state((2, 1, 3, 3), seeded(5))
    expected = schedule[1](1.0)[1] * normal(2, 1, 3, 3, seed=5)
    assert x.dtype == torch.float64
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=0)


def test_draw_noise_is_standard_normal_and_seeded():
    noise = draw_noise(50, (4, 3, 16, 16), seeded(0))
    assert noise.shape == (50, 4, 3, 16, 16)
    assert noise.dtype == torch.float64
    assert torch.equal(noise, draw_noise(50, (4, 3, 16, 16), seeded(0)))
    count = noise.numel()
    assert abs(noise.mean()) < 5 / math.sqrt(count)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / count)
    # every step and problem has its own
    flat = noise.flatten(0, 1).flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(200).double()
    assert correlation.abs().max() < 6 / math.sqrt(flat.shape[1])


# ---------------------------------------------------------------- doors

NOISE = torch.zeros(3, 2, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("named", "arguments"),
    [
        ("method", {"steps": 3, "method": "heun"}),
        ("mode", {"steps": 3, "mode": "inside"}),
        ("steps", {"steps": 0}),
        ("steps", {"steps": -2}),
        ("steps", {"steps": [1.0]}),
        ("steps", {"steps": []}),
        ("steps", {"steps": [0.0, 0.5, 1.0]}),
        ("steps", {"steps": [1.0, 0.5, 0.5, 0.0]}),
        ("steps", {"steps": [1.0, math.nan, 0.0]}),
        ("steps", {"steps": [[1.0, 0.5], [0.5, 0.0]]}),
        ("steps", {"steps": [1.1, 0.5, 0.0]}),
        ("steps", {"steps": [1.0, 0.5, -0.1]}),
        ("noise", {"steps": 3, "method": "ddpm"}),
        ("noise", {"steps": 3, "method": "ddim", "noise": NOISE}),
        ("noise", {"steps": 3, "method": "euler", "noise": NOISE}),
        ("noise", {"steps": 4, "method": "ddpm", "noise": NOISE}),
    ],
)
def test_the_constructor_s_doors(named, arguments):
    with pytest.raises(ValueError, match=rf"^{named}\b"):
        ReverseProcess(Wave(SCHEDULES["vp"][0]), **arguments)


@pytest.mark.parametrize(
    ("named", "arguments"),
    [
        ("start", {"start": -1}),
        ("start", {"start": 4}),
        ("x", {"x": torch.zeros(2, 4, dtype=torch.int64)}),
        ("x", {"x": torch.full((2, 4), math.nan)}),
        ("x", {"x": torch.full((2, 4), math.inf)}),
        ("x", {"x": torch.zeros(3, 4)}),
        ("controls", {"controls": torch.zeros(2, 2, 4)}),
        ("controls", {"controls": torch.zeros(3, 4)}),
        ("controls", {"controls": torch.zeros(3, 2, 5)}),
        ("controls", {"start": 1, "controls": torch.zeros(3, 2, 4)}),
    ],
)
def test_the_rollout_s_doors(named, arguments):
    process = ReverseProcess(Wave(SCHEDULES["vp"][0]), 3, "ddpm", noise=NOISE)
    with pytest.raises(ValueError, match=rf"^{named}\b"):
        process.rollout(**{"x": torch.zeros(2, 4), **arguments})


def test_frozen_noise_of_double_precision_drives_single_precision():
    prior = GaussianPrior(torch.zeros(3), torch.eye(3), VPSchedule())
    noise = draw_noise(5, (2, 3), torch.Generator().manual_seed(0))
    x = torch.ones(2, 3)
    single = ReverseProcess(prior, 5, "ddpm", noise=noise).rollout(x)
    assert single.dtype == torch.float32
    double = ReverseProcess(prior.double(), 5, "ddpm", noise=noise).rollout(x.double())
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


def test_no_initial_state_is_drawn_where_states_are_noisy_images():
    """At t = 1/2 noise alone would have the standard deviation 0.94 of a unit Gaussian's states."""
    prior = GaussianPrior(torch.zeros(1).double(), torch.eye(1).double(), VPSchedule())
    late = ReverseProcess(prior, torch.linspace(0.5, 0, 101))
    with pytest.raises(ValueError, match=r"begins at time 0\.5"):
        late.initial_state((2, 1), torch.Generator())
    x = torch.ones(2, 1, dtype=torch.float64)
    assert late.rollout(x).shape == (101, 2, 1)
