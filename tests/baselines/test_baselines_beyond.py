"""PiGDM, MMPS, DiffPIR, DAPS, D-Flow and NDTM, against closed forms for Gaussian priors."""

import inspect
from itertools import pairwise

import numpy as np
import pytest
import torch
from azula.denoise import DiracPosterior
from azula.noise import VPSchedule
from azula.sample import DDIMSampler
from deepinv.physics import LinearPhysics, Physics
from scipy.fft import dct

from diffoc.baselines.d_flow import d_flow
from diffoc.baselines.daps import _end_of_chain, daps
from diffoc.baselines.decomposition import decompose
from diffoc.baselines.diffpir import diffpir
from diffoc.baselines.diffpir_smooth import diffpir_smooth
from diffoc.baselines.mmps import mmps
from diffoc.baselines.ndtm import ndtm
from diffoc.baselines.pgdm import pgdm
from diffoc.data import portrait
from diffoc.priors.counting import CountedPrior
from diffoc.priors.gaussian import GaussianPrior
from diffoc.priors.pretrained import load_prior
from diffoc.problems.metrics import image_metrics
from diffoc.problems.operators import LinearMeasurement
from diffoc.problems.tasks import UnsupportedTask, measure, task
from diffoc.process import ReverseProcess
from diffoc.theory.linear_gaussian import linear_gaussian

N, M, NOISE_STD = 6, 3, 0.3
METHODS = (pgdm, mmps, diffpir, daps, d_flow, ndtm)


class Setting:
    """A Gaussian prior, a linear measurement of one state, and states at time 1."""

    def __init__(self, count):
        given = linear_gaussian(N, M, NOISE_STD, seed=1)
        # Residual noise at t = 0, as networks have it.
        self.prior = GaussianPrior(given.prior.mean, given.prior.matrix, VPSchedule())
        self.A = (
            0.8 * given.measurement.matrix / torch.linalg.matrix_norm(given.measurement.matrix, 2)
        )
        self.noise_std = NOISE_STD
        self.physics = LinearPhysics(A=lambda x: x @ self.A.mT, A_adjoint=lambda y, **_: y @ self.A)
        state = self.prior.mean + torch.linalg.cholesky(self.prior.matrix) @ noise(N, seed=3)
        self.y = (self.A @ state + NOISE_STD * noise(M, seed=4)).expand(count, M)
        self.x = self.prior.schedule(torch.ones(()))[1].item() * noise(count, N, seed=5)

    def run(self, method, **settings):
        generator = torch.Generator().manual_seed(0)
        return method(
            self.prior,
            self.physics,
            self.y,
            self.x,
            generator,
            noise_std=self.noise_std,
            **settings,
        )

    def mean_map(self, t):
        """m(x, t) = J x + b, from the prior's own definition: J (N, N), b (N,)."""
        alpha, sigma = self.prior.schedule(torch.as_tensor(t, dtype=torch.float64))
        S = self.prior.matrix
        J = alpha * S @ torch.linalg.inv(alpha**2 * S + sigma**2 * torch.eye(N))
        return J, self.prior.mean - alpha * J @ self.prior.mean

    def flow_map(self, start, steps):
        """DDIM from time `start` to 0 as F x + b."""
        F, b = torch.eye(N).double(), torch.zeros(N).double()
        for t, s in pairwise(torch.linspace(start, 0, steps + 1, dtype=torch.float64)):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = map(self.prior.schedule, (t, s))
            J, c = self.mean_map(t)
            ratio = sigma_s / sigma_t
            step = ratio * torch.eye(N) + (alpha_s - ratio * alpha_t) * J
            F, b = step @ F, step @ b + (alpha_s - ratio * alpha_t) * c
        return F, b


def noise(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_moments(samples, mean, covariance, sigmas=5.0):
    """Mean and covariance within their Monte Carlo errors."""
    count = len(samples)
    variances = covariance.diag()
    error = (samples.mean(0) - mean).abs() / (variances / count).sqrt()
    assert error.max() < sigmas, error
    spread = ((variances[:, None] * variances + covariance**2) / count).sqrt()
    assert ((samples.T.cov() - covariance).abs() / spread).max() < sigmas


@pytest.mark.parametrize(("eta", "bias"), [(0.0, 0.04), (1.0, 0.08)])
def test_mmps_samples_the_posterior(eta, bias):
    setting = Setting(3000)
    exact = setting.prior.posterior(LinearMeasurement(setting.A, setting.y[:1], NOISE_STD))
    found = setting.run(mmps, steps=200, iterations=M, eta=eta)
    # The finite steps make the spread a few hundredths too small, the more so with noise.
    deviation = exact.covariance.diag().sqrt()
    assert ((found.mean(0) - exact.mean[0]).abs() / deviation).max() < 0.08
    assert (found.std(0) / deviation - 1).abs().max() < bias + 0.04
    correlation = exact.covariance / deviation[:, None] / deviation
    assert (found.T.corrcoef() - correlation).abs().max() < 0.08


def test_pgdm_takes_its_step():
    setting = Setting(5)
    found = setting.run(pgdm, steps=2, eta=0.0, guidance=0.7)
    x = setting.x
    for t, s in pairwise(torch.linspace(1, 0, 3, dtype=torch.float64)):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = map(setting.prior.schedule, (t, s))
        J, b = setting.mean_map(t)
        mean = x @ J.mT + b
        variance = sigma_t**2 / (alpha_t**2 + sigma_t**2)
        S = setting.A @ setting.A.mT + NOISE_STD**2 / variance * torch.eye(M)
        pulled = torch.linalg.solve(S, (setting.y - mean @ setting.A.mT).mT).mT @ setting.A @ J
        x = alpha_s * mean + sigma_s / sigma_t * (x - alpha_t * mean)
        x = x + 0.7 * alpha_s * alpha_t * pulled
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


def test_diffpir_takes_its_step():
    setting = Setting(5)
    found = setting.run(diffpir, steps=2, strength=3.0, renewal=0.0)
    x = setting.x
    for t, s in pairwise(torch.tensor([1.0, 1 - 0.5**0.5, 0.0], dtype=torch.float64)):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = map(setting.prior.schedule, (t, s))
        J, b = setting.mean_map(t)
        rho = 3 * NOISE_STD**2 * alpha_t**2 / sigma_t**2
        H = setting.A.mT @ setting.A + rho * torch.eye(N)
        right = setting.y @ setting.A + rho * (x @ J.mT + b)
        x0 = torch.linalg.solve(H, right.mT).mT
        x = alpha_s * x0 + sigma_s / sigma_t * (x - alpha_t * x0)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_diffpir_renews_a_share_of_the_noise():
    setting = Setting(20000)
    setting.x = setting.x[:1].expand(20000, N)
    between = setting.prior.schedule(torch.tensor(1 - 0.5**0.5, dtype=torch.float64))

    class Seen(CountedPrior):
        def forward(self, x_t, t, **kwargs):
            self.last = x_t
            return super().forward(x_t, t, **kwargs)

    setting.prior = Seen(setting.prior)
    setting.run(diffpir, steps=2, renewal=0.4)
    expected = 0.4 * between[1] ** 2 * torch.eye(N)
    assert (setting.prior.last.T.cov() - expected).abs().max() < 0.03


def refuse(*_):
    raise UnsupportedTask("too large")


def test_pgdm_is_the_same_by_conjugate_gradients(monkeypatch):
    setting = Setting(3)
    setting.y = setting.y + noise(3, M, seed=8)
    decomposed = setting.run(pgdm, steps=5)
    monkeypatch.setattr("diffoc.baselines.decomposition.decompose", refuse)
    torch.testing.assert_close(setting.run(pgdm, steps=5), decomposed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at_once", [True, False])
def test_daps_has_the_moments_of_its_linear_recursion(at_once, monkeypatch):
    if not at_once:
        monkeypatch.setattr("diffoc.baselines.daps.decompose", refuse)
    steps, ode_steps, langevin_steps, step_size = 8, 3, 40, 0.02
    setting = Setting(20000)
    found = setting.run(
        daps,
        steps=steps,
        ode_steps=ode_steps,
        langevin_steps=langevin_steps,
        step_size=step_size,
        likelihood_std=0.25,
    )
    eye = torch.eye(N).double()
    alpha, sigma = setting.prior.schedule(torch.ones(()).double())
    levels = polynomial_levels(sigma / alpha, 0.1, steps)[:-1]
    mean, cov = torch.zeros(N).double(), levels[0] ** 2 * eye
    for i, level in enumerate(levels):
        F, b = eye, torch.zeros(N).double()
        for now, then in pairwise(polynomial_levels(level, 0.01, ode_steps)):
            # Euler's step of dx / dr = (x - E[x_0 | x]) / r, of images x with noise of level r.
            gain = setting.prior.matrix @ torch.linalg.inv(setting.prior.matrix + now**2 * eye)
            slope = (eye - gain) / now
            ahead = eye + (then - now) * slope
            F = ahead @ F
            b = ahead @ b - (then - now) * slope @ setting.prior.mean
        mean, cov = F @ mean + b, F @ cov @ F.mT
        precision = 1 / level**2
        eta = step_size * (1 - 0.99 * i / steps)
        H = setting.A.mT @ setting.A / 0.25**2 + precision * eye
        # The error from the mode is contracted by K a step; the mode is affine in the estimate.
        K = eye - eta * H
        power = torch.linalg.matrix_power(K, langevin_steps)
        G = precision * torch.linalg.inv(H)
        mode = torch.linalg.solve(H, setting.A.mT @ setting.y[0]) / 0.25**2
        L = G + power @ (eye - G)
        added = 2 * eta * torch.linalg.solve(eye - K @ K, eye - power @ power)
        mean, cov = L @ mean + (eye - power) @ mode, L @ cov @ L.mT + added
        if i + 1 < steps:
            cov = cov + levels[i + 1] ** 2 * eye
    assert_moments(found, mean, cov)


def polynomial_levels(first, last, steps):
    """From `first` to `last`, uniform in their seventh root."""
    first, last = float(first) ** (1 / 7), last ** (1 / 7)
    return [(first + i / steps * (last - first)) ** 7 for i in range(steps + 1)]


def test_daps_draws_the_spread_of_what_is_not_measured_in_single_precision():
    # 1 - (1 - eta / r^2)^2N is lost to rounding there, for r = 157 and eta = 1e-4.
    physics = task("box_inpainting", (1, 64, 64), torch.Generator().manual_seed(0))
    x = torch.zeros(1, 1, 64, 64)
    langevin = _end_of_chain(decompose(physics, x), x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    hole = langevin(x, 157.0, 0.05, 1e-4, 100, lambda: noise)[physics.mask == 0]
    assert hole.std().item() == pytest.approx((2 * 100 * 1e-4) ** 0.5, rel=0.1)


def test_daps_with_long_langevin_comes_near_the_posterior():
    setting = Setting(1000)
    exact = setting.prior.posterior(LinearMeasurement(setting.A, setting.y[:1], NOISE_STD))
    found = setting.run(
        daps, steps=30, langevin_steps=100, step_size=0.01, likelihood_std=NOISE_STD
    )
    deviation = exact.covariance.diag().sqrt()
    assert ((found.mean(0) - exact.mean[0]).abs() / deviation).max() < 0.5
    ratio = found.std(0) / deviation
    assert ratio.min() > 0.7
    assert ratio.max() < 1.6


def test_d_flow_finds_the_least_squares_solution_nearest_to_its_start():
    setting = Setting(4)
    found = setting.run(d_flow, steps=5, iterations=60, blend=0.0)
    F, b = setting.flow_map(1.0, 5)
    AF = setting.A @ F
    x = setting.x + (setting.y - (setting.x @ F.mT + b) @ setting.A.mT) @ torch.linalg.pinv(AF).mT
    torch.testing.assert_close(found, x @ F.mT + b, rtol=1e-4, atol=1e-4)


def test_d_flow_s_regularization_sets_the_norm_of_the_noise():
    setting = Setting(4)
    seen = []

    class Seen(CountedPrior):
        def forward(self, x_t, t, **kwargs):
            if t == 1:
                seen.append(x_t.detach())
            return super().forward(x_t, t, **kwargs)

    setting.prior = Seen(setting.prior)
    setting.run(d_flow, steps=2, iterations=80, blend=0.0, regularization=1e4)
    variance = setting.prior.schedule(torch.ones(()))[1].item() ** 2
    expected = torch.full((4,), (N - 1) * variance, dtype=torch.float64)
    torch.testing.assert_close(seen[-1].square().sum(1), expected, rtol=1e-2, atol=0)


def test_d_flow_starts_from_a_blend_with_the_inversion():
    setting = Setting(4)
    found = setting.run(d_flow, steps=40, iterations=1, blend=1.0)
    # Up and down again: what was measured comes back, but for the solvers' errors.
    assert (found @ setting.A.mT - setting.y).abs().max() < 0.2
    other = setting.run(d_flow, steps=40, iterations=1, blend=0.0)
    assert (other @ setting.A.mT - setting.y).abs().max() > 0.5


def test_ndtm_s_control_minimises_its_cost():
    setting = Setting(4)
    t, s = torch.ones(()).double(), torch.zeros(()).double()
    (alpha_t, sigma_t), (alpha_s, sigma_s) = map(setting.prior.schedule, (t, s))
    eta, scale = 0.6, 0.5
    c1 = eta * sigma_s / sigma_t * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).sqrt()
    c2 = (sigma_s**2 - c1**2).sqrt()
    # So that in v = scale u the cost is 2 |AJ v - r|^2 + 0.3 |v|^2 + 0.4 |Z v|^2.
    settings = {
        "control_cost": 0.3 / (scale * alpha_t / alpha_s).item() ** 2,
        "score_cost": 0.4 / (c2 - alpha_s / alpha_t * sigma_t).item() ** 2,
        "guidance": 2.0,
    }
    found = setting.run(ndtm, steps=1, iterations=1000, rate=0.05, scale=scale, eta=eta, **settings)
    drawn = noise(4, N, seed=0)  # by the generator of `run`
    J, b = setting.mean_map(t)
    Z = (torch.eye(N) - alpha_t * J) / sigma_t
    AJ = setting.A @ J
    H = 2 * AJ.mT @ AJ + 0.3 * torch.eye(N) + 0.4 * Z.mT @ Z
    r = setting.y - (setting.x @ J.mT + b) @ setting.A.mT
    x = setting.x + torch.linalg.solve(H, 2 * (r @ AJ).mT).mT
    mean = x @ J.mT + b
    expected = alpha_s * mean + c2 / sigma_t * (x - alpha_t * mean) + c1 * drawn
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_ndtm_s_rate_falls_linearly_to_zero():
    setting = Setting(4)
    seen = []

    class Seen(CountedPrior):
        def forward(self, x_t, t, **kwargs):
            seen.append(x_t.detach())
            return super().forward(x_t, t, **kwargs)

    setting.prior = Seen(setting.prior)
    setting.run(ndtm, steps=4, iterations=1, rate=0.02, scale=3.0, eta=0.0)
    # Adam's first step is as long as its rate.
    for i in range(4):
        moved = (seen[2 * i + 1] - seen[2 * i]).abs()
        expected = torch.full_like(moved, 3 * 0.02 * (1 - i / 4))
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=0)


def test_ndtm_starts_from_the_pseudoinverse_with_noise():
    setting = Setting(4)
    found = setting.run(ndtm, steps=6, iterations=1, guidance=0.0, eta=0.0, start=0.4)
    times = 0.4 * torch.linspace(1, 0, 7, dtype=torch.float64)
    alpha, sigma = setting.prior.schedule(times[0])
    first = alpha * setting.y @ torch.linalg.pinv(setting.A).mT
    first = first + sigma * setting.x / setting.prior.schedule(torch.ones(()).double())[1]
    expected = ReverseProcess(setting.prior, times.tolist()).rollout(first)[-1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_ndtm_without_guidance_is_ddim():
    setting = Setting(4)
    found = setting.run(ndtm, steps=7, iterations=2, guidance=0.0, eta=0.0)
    expected = ReverseProcess(setting.prior, 7).rollout(setting.x)[-1]
    torch.testing.assert_close(found, expected)


def test_ndtm_s_noise_is_ddim_s():
    setting = Setting(20000)
    setting.x = setting.x[:1].expand(20000, N)
    found = setting.run(ndtm, steps=3, iterations=1, guidance=0.0, eta=0.7)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        # Its share is of the variance, ours of the standard deviation, as in the DDIM paper.
        sampler = DDIMSampler(setting.prior, eta=0.7**2, steps=3, silent=True, dtype=torch.float64)
        other = sampler(setting.x)
    assert (found.mean(0) - other.mean(0)).abs().max() < 0.05
    assert (found.T.cov() - other.T.cov()).abs().max() < 0.05


COSTS = {
    pgdm: ({"steps": 3}, 3, 3),
    mmps: ({"steps": 3, "iterations": 2}, 3, 9),
    diffpir: ({"steps": 3}, 3, 0),
    daps: ({"steps": 3, "ode_steps": 2, "langevin_steps": 4}, 6, 0),
    d_flow: ({"steps": 3, "iterations": 4}, 15, 12),
    ndtm: ({"steps": 3, "iterations": 2}, 9, 6),
}


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_and_products_are_as_documented(method):
    settings, evaluations, products = COSTS[method]
    setting = Setting(2)
    setting.prior = CountedPrior(setting.prior)
    setting.run(method, **settings)
    assert setting.prior.evaluations == 2 * evaluations
    if method is mmps:
        # The counter also sees gradients that stop at the mean; none is missed.
        assert setting.prior.products >= 2 * products
    else:
        assert setting.prior.products == 2 * products


@pytest.mark.parametrize("method", [pgdm, diffpir])
def test_nonlinear_operators_are_refused_before_any_evaluation(method):
    setting = Setting(2)
    setting.prior, setting.physics = CountedPrior(setting.prior), Physics(A=lambda x: x[:, :M] ** 3)
    with pytest.raises(UnsupportedTask, match="linear"):
        setting.run(method)
    assert setting.prior.evaluations == 0


@pytest.mark.parametrize("method", [mmps, daps, d_flow, ndtm])
def test_nonlinear_operators_are_fitted(method):
    setting = Setting(4)

    def operator(x):
        return torch.tanh(x @ setting.A.mT)

    setting.physics = Physics(A=operator)
    setting.y = operator(
        setting.prior.mean + setting.x @ torch.linalg.cholesky(setting.prior.matrix).mT
    )
    setting.x = setting.x.flip(0)
    setting.noise_std = 0.05
    settings = {} if method is d_flow else {"steps": 30}
    if method is ndtm:
        settings |= {"rate": 0.1}
    if method is daps:
        settings |= {"step_size": 1e-3, "likelihood_std": 0.05}
    found = setting.run(method, **settings)
    free = ReverseProcess(setting.prior, 30).rollout(setting.x)[-1]
    assert (operator(found) - setting.y).norm() < 0.7 * (operator(free) - setting.y).norm()


BAD = {
    pgdm: {"noise_std": 0.0, "steps": 0, "eta": 1.5, "guidance": -1.0},
    mmps: {"noise_std": 0.0, "steps": 0, "iterations": 0, "eta": -0.1},
    diffpir: {"noise_std": -1.0, "steps": 0, "strength": 0.0, "renewal": 1.1},
    daps: {
        "likelihood_std": 0.0,
        "steps": 0,
        "ode_steps": 0,
        "langevin_steps": -1,
        "step_size": 0.0,
        "last_level": 0.01,
    },
    d_flow: {"steps": 0, "iterations": 0, "regularization": -1.0, "blend": 2.0},
    ndtm: {"steps": 0, "iterations": 0, "guidance": -1.0, "rate": 0.0, "scale": 0.0, "eta": 2.0}
    | {"control_cost": -1.0, "score_cost": float("nan"), "start": 0.0},
}


@pytest.mark.parametrize(
    ("method", "name", "value"), [(m, *item) for m, bad in BAD.items() for item in bad.items()]
)
def test_bad_settings_are_refused_by_name(method, name, value):
    setting = Setting(1)
    settings = {"noise_std": NOISE_STD} | {name: value}
    assert name in {"noise_std", *inspect.signature(method).parameters}
    with pytest.raises(ValueError, match=name):
        method(setting.prior, setting.physics, setting.y, setting.x, None, **settings)


FACE = {
    pgdm: {"steps": 15},
    mmps: {"steps": 12, "iterations": 1},
    diffpir: {"steps": 15},
    daps: {"steps": 12, "ode_steps": 2, "langevin_steps": 50},
    d_flow: {"steps": 4, "iterations": 25},
    ndtm: {"steps": 12, "iterations": 2, "rate": 0.1},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_face_is_restored_better_than_by_interpolation(method):
    truth = portrait("astronaut")
    physics = task("super_resolution", truth.shape[1:], torch.Generator())
    y = measure(physics, truth, torch.Generator().manual_seed(1))
    prior = load_prior("faces64")
    x = torch.randn(truth.shape, generator=torch.Generator().manual_seed(2))
    found = method(
        prior, physics, y, x, torch.Generator().manual_seed(3), noise_std=0.05, **FACE[method]
    )
    assert found.dtype == torch.float32
    nearest = y.repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert image_metrics(found, truth)["psnr"] > image_metrics(nearest, truth)["psnr"]


@pytest.mark.parametrize("smoothness", [0.0, 3.0])
def test_diffpir_with_smooth_errors_takes_its_step(smoothness):
    """Against dense linear algebra, with scipy's cosines."""
    H, W, lam, s = 5, 6, 0.8, 0.3
    n, generator = H * W, torch.Generator().manual_seed(0)
    A = torch.randn(7, n, generator=generator, dtype=torch.float64) / n**0.5
    physics = LinearPhysics(
        A=lambda x, **_: x.flatten(1) @ A.mT, A_adjoint=lambda y, **_: (y @ A).view(-1, 1, H, W)
    )
    prior = GaussianPrior(torch.zeros(n).double(), 0.2 * torch.eye(n).double(), VPSchedule())

    class OfImages(CountedPrior):
        def forward(self, x_t, t, **kwargs):
            mean = super().forward(x_t.flatten(1), t, **kwargs).mean
            return DiracPosterior(mean=mean.view_as(x_t))

    x = noise(2, 1, H, W, seed=5)
    y, one = noise(2, 7, seed=6), torch.Generator().manual_seed(0)
    settings = {"steps": 2, "strength": lam, "smoothness": smoothness}
    found = diffpir_smooth(OfImages(prior), physics, y, x, one, noise_std=s, **settings)

    one.manual_seed(0)
    waves = torch.from_numpy(np.kron(*(dct(np.eye(k), axis=0, norm="ortho") for k in (H, W))))
    k = torch.arange(max(H, W), dtype=torch.float64)
    V = (1 + k[:H, None] ** 2 + k[:W] ** 2) ** (-smoothness / 2)
    V *= 0.25 / V.mean()
    for t, later in pairwise(torch.tensor([1.0, 1 - 0.5**0.5, 0.0], dtype=torch.float64)):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = map(prior.schedule, (t, later))
        m = prior(x.flatten(1), t).mean
        precision = waves.mT @ torch.diag(lam * (alpha_t / sigma_t) ** 2 + 1 / V.flatten()) @ waves
        d = torch.linalg.solve(A.mT @ A / s**2 + precision, A.mT @ (y - m @ A.mT).mT / s**2).mT
        drawn = torch.randn(x.shape, generator=one, dtype=torch.float64)
        x = alpha_s * (m + d).view_as(x) + sigma_s * drawn
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3 if not smoothness else 1e-5)
