"""The baselines on pixel priors against linear algebra on Gaussian priors, where all is affine."""

import copy
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.noise import CosineSchedule, VPSchedule
from deepinv.physics import Blur, LinearPhysics

from diffoc.baselines.admm_tv import admm_tv
from diffoc.baselines.ddnm import ddnm
from diffoc.baselines.ddrm import ddrm
from diffoc.baselines.decomposition import corrections, decompose
from diffoc.baselines.mcg import mcg
from diffoc.baselines.noise_level import NoiseLevelDenoiser, times_of_levels
from diffoc.baselines.pnp_admm import pnp_admm
from diffoc.baselines.score_sde import score_sde
from diffoc.priors.counting import CountedPrior
from diffoc.priors.gaussian import GaussianPrior
from diffoc.problems.operators import LinearMeasurement
from diffoc.problems.tasks import UnsupportedTask, task

METHODS = [score_sde, mcg, ddnm, ddrm, pnp_admm, admm_tv]
STEPS, COUNT, N, M, NOISE = 30, 20_000, 5, 3, 0.3


class Half(Denoiser):
    schedule = VPSchedule()

    def forward(self, x, t):
        return DiracPosterior(x / 2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def flat(matrix):
    return LinearPhysics(A=lambda x: x @ matrix.mT, A_adjoint=lambda y: y @ matrix)


def gaussian_problem():
    root = normal(N, N, seed=1)
    prior = GaussianPrior(normal(N, seed=2), root @ root.mT / N + 0.1 * torch.eye(N), VPSchedule())
    return prior, normal(M, N, seed=3), normal(1, M, seed=4)


# --- decomposition --------------------------------------------------------------------------------


def images(name, dtype):
    physics = task(name, (3, 16, 24), seeded()).to(dtype)
    return physics, normal(2, 3, 16, 24, seed=1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name", ["super_resolution", "random_inpainting", "box_inpainting", "motion_blur", "gaussian"]
)
def test_the_decomposition_is_the_operator(name, dtype):
    if name == "gaussian":  # exactly separable, which the task's kernel is to float32
        column = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
        kernel = torch.outer(column, column.flip(0))[None, None].to(dtype)
        physics, (_, x) = Blur(kernel, padding="reflect"), images("super_resolution", dtype)
    else:
        physics, x = images(name, dtype)
    svd, y = decompose(physics, x), physics.A(x)
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-10}
    w = normal(*y.shape, seed=2).to(dtype)
    torch.testing.assert_close(svd.A(x), y, **tolerance)
    torch.testing.assert_close(svd.A_adjoint(w), physics.A_adjoint(w), **tolerance)
    torch.testing.assert_close(svd.V(svd.V_adjoint(x)), x, **tolerance)
    torch.testing.assert_close(svd.V_adjoint(svd.V(x)), x, **tolerance)
    assert (svd.mask >= 0).all()


@pytest.mark.parametrize("name", ["super_resolution", "gaussian_blur", "motion_blur"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_values_are_those_of_the_dense_matrix(name, dtype):
    physics, x = task(name, (1, 24, 16), seeded()), torch.zeros(1, 1, 24, 16, dtype=dtype)
    units = torch.eye(24 * 16).double().reshape(-1, 1, 24, 16)
    expected = torch.linalg.svdvals(copy.deepcopy(physics).double().A(units).flatten(1).mT)
    found = decompose(physics.to(dtype), x).mask.flatten().double().sort(descending=True).values
    atol = 1e-7 * expected[0].item()  # kernels are in single precision
    torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-6, atol=atol)
    assert not found[len(expected) :].any()


def test_single_precision_does_at_256_pixels():
    """Where the paper's tables are: the blur to single precision's rounding."""
    physics = task("gaussian_blur", (3, 256, 256), seeded())
    x = torch.randn(1, 3, 256, 256, generator=seeded(1))
    svd, y = decompose(physics, x), physics.A(x)
    assert (svd.A(x) - y).norm() < 2e-6 * y.norm()
    assert (svd.V(svd.V_adjoint(x)) - x).norm() < 2e-6 * x.norm()


@pytest.mark.parametrize("name", ["super_resolution", "motion_blur"])
def test_the_pseudo_inverse_meets_penroses_conditions(name):
    physics, x = images(name, torch.float64)
    svd, y = decompose(physics, x), physics.A(x)
    inverse = torch.where(svd.mask > 0, 1 / svd.mask, 0)

    def dagger(y):
        return svd.V(inverse * svd.U_adjoint(y))

    v, w = normal(*x.shape, seed=2), normal(*y.shape, seed=3)
    tolerance = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(physics.A(dagger(y)), y, **tolerance)
    torch.testing.assert_close(dagger(physics.A(dagger(w))), dagger(w), **tolerance)
    torch.testing.assert_close(
        (v * dagger(physics.A(x))).sum(), (dagger(physics.A(v)) * x).sum(), **tolerance
    )
    torch.testing.assert_close(
        (w * physics.A(dagger(y))).sum(), (physics.A(dagger(w)) * y).sum(), **tolerance
    )


@pytest.mark.parametrize("ratio", [0.5, 40.0, 4000.0])
@pytest.mark.parametrize("name", ["super_resolution", "random_inpainting", "motion_blur", "turn"])
def test_corrections_solve_the_normal_equations(name, ratio):
    """Exactly where the operator is decomposed; by conjugate gradients where channels mix."""
    x = normal(2, 1, 12, 12) if name != "turn" else normal(2, 3, 6, 6)
    if name == "turn":
        physics = LinearPhysics(A=lambda x: x.flip(1) / 2, A_adjoint=lambda y: y.flip(1) / 2)
    else:
        physics = task(name, x.shape[1:], seeded()).double()
    n = x[0].numel()
    A = physics.A(torch.eye(n).double().reshape(n, *x.shape[1:])).flatten(1).mT
    y = physics.A(x) + normal(*physics.A(x).shape, seed=5)
    residual = (y - physics.A(x)).flatten(1).mT
    system = torch.eye(n).double() + ratio * A.mT @ A
    expected = torch.linalg.solve(system, ratio * A.mT @ residual).mT.reshape(x.shape)
    found = corrections(physics, x)(y, x, ratio)
    atol = 1e-4 if name == "turn" else 1e-9
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("m", "n"), [(3, 5), (5, 5), (7, 5)])
def test_flat_states_are_decomposed(m, n):
    matrix = normal(m, n)
    svd = decompose(flat(matrix), normal(2, n))
    torch.testing.assert_close(svd.A(torch.eye(n).double()).mT, matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(svd.A_adjoint(torch.eye(m).double()), matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [40, 25, 0])
def test_square_matrices_are_decomposed_whatever_their_condition(rank):
    """Singular values from 1 to 1e-14, some of them equal, and zeros."""
    U, V = (torch.linalg.qr(normal(40, 40, seed=seed)).Q for seed in (1, 2))
    s = torch.cat([torch.ones(5), torch.logspace(0, -14, 35)]).double()
    s[rank:] = 0
    matrix = U * s @ V.mT
    svd = decompose(flat(matrix), normal(2, 40))
    unit = torch.eye(40).double()
    torch.testing.assert_close(svd.A(unit).mT, matrix, rtol=0, atol=1e-12)
    for factor in (svd.U, svd.V):
        torch.testing.assert_close(factor(unit) @ factor(unit).mT, unit, rtol=0, atol=1e-12)
    values = svd.mask.flatten().sort(descending=True).values
    torch.testing.assert_close(values, s, rtol=0, atol=1e-12)


def test_single_precision_keeps_small_singular_values():
    # What rounding would make of a motion blur's smallest is not what it does to images.
    physics = task("motion_blur", (1, 32, 32), seeded())
    x = torch.randn(2, 1, 32, 32, generator=seeded())
    torch.testing.assert_close(decompose(physics, x).A(x), physics.A(x), rtol=0, atol=1e-4)


def test_what_cannot_be_decomposed_is_refused():
    x = normal(1, 3, 8, 8)
    mixing = LinearPhysics(A=lambda x: x.flip(1), A_adjoint=lambda y: y.flip(1))
    with pytest.raises(UnsupportedTask, match="every channel alike"):
        decompose(mixing, x)
    large = normal(1, 1, 80, 80)
    with pytest.raises(UnsupportedTask, match="6400 numbers"):
        decompose(task("motion_blur", (1, 80, 80), seeded()).double(), large)


# --- the adapter ----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [VPSchedule(), CosineSchedule()])
def test_noise_levels_have_times(schedule):
    t = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    alpha, sigma = schedule(t)
    found = times_of_levels(schedule, sigma / alpha)
    torch.testing.assert_close(found, t, rtol=0, atol=1e-9)
    assert times_of_levels(schedule, torch.zeros(())) == 0
    for wrong in (-1.0, 1e9, math.nan):
        with pytest.raises(ValueError, match="sigma is"):
            times_of_levels(schedule, torch.tensor(wrong))


def test_the_denoiser_is_wieners_filter():
    prior, _, _ = gaussian_problem()
    x, sigma = normal(4, N), 0.7
    gain = prior.matrix @ torch.linalg.inv(prior.matrix + sigma**2 * torch.eye(N))
    expected = prior.mean + (x - prior.mean) @ gain.mT
    torch.testing.assert_close(NoiseLevelDenoiser(prior)(x, sigma), expected)


# --- samplers: the moments of affine recursions ---------------------------------------------------


def tweedie(prior, alpha, sigma):
    """The matrix and the offset of the posterior mean."""
    gain = (
        alpha * prior.matrix @ torch.linalg.inv(alpha**2 * prior.matrix + sigma**2 * torch.eye(N))
    )
    return gain, prior.mean - alpha * gain @ prior.mean


def scales(prior, steps):
    return torch.stack(prior.schedule(torch.linspace(1, 0, steps + 1, dtype=torch.float64)), 1)


def step(moments, F, b, C):
    mean, covariance = moments
    return F @ mean + b, F @ covariance @ F.mT + C


def start(prior):
    return torch.zeros(N).double(), prior.schedule(torch.ones(()))[1] ** 2 * torch.eye(N).double()


def ddpm_moments(prior, moments, t, s):
    (alpha, sigma), (alpha_s, sigma_s) = t, s
    gain, offset = tweedie(prior, alpha, sigma)
    q = 1 - (alpha / alpha_s * sigma_s / sigma) ** 2  # of the noise that is new
    k = sigma_s * (1 - q).sqrt() / sigma
    F = k * torch.eye(N) + (alpha_s - k * alpha) * gain
    return step(moments, F, (alpha_s - k * alpha) * offset, sigma_s**2 * q * torch.eye(N))


def score_sde_moments(prior, A, y, strength):
    moments, levels = start(prior), scales(prior, STEPS)
    pull = strength * A.mT / torch.linalg.matrix_norm(A, 2) ** 2
    for t, s in pairwise(levels):
        moments = ddpm_moments(prior, moments, t, s)
        noise = s[1] ** 2 * pull @ A @ A.mT @ pull.mT
        moments = step(moments, torch.eye(N) - pull @ A, s[0] * pull @ y[0], noise)
    return moments


def ddnm_moments(prior, A, y, eta):
    moments, levels = start(prior), scales(prior, STEPS)
    U, S, Vh = torch.linalg.svd(A)
    for (alpha, sigma), (alpha_s, sigma_s) in pairwise(levels):
        Lambda, Gamma, Kept = torch.eye(N).double(), torch.zeros(N).double(), torch.zeros(N)
        Kept = Kept.double()
        inverse = torch.zeros(N, M).double()
        for i in range(N):
            if i >= M:
                Gamma[i], Kept[i] = (eta * sigma_s) ** 2, math.sqrt(1 - eta**2) * sigma_s
                continue
            inverse[i, i] = 1 / S[i]
            if sigma_s >= alpha_s * NOISE / S[i]:
                Gamma[i] = sigma_s**2 - (alpha_s * NOISE / S[i]) ** 2
            else:
                Gamma[i] = (eta * sigma_s) ** 2
                Lambda[i, i] = S[i] * sigma_s * math.sqrt(1 - eta**2) / (alpha_s * NOISE)
        correct = Vh.mT @ Lambda @ inverse @ U.mT  # V Lambda S^+ U^T
        kept = Vh.mT @ Kept.diag() @ Vh / sigma
        gain, offset = tweedie(prior, alpha, sigma)
        left = alpha_s * (torch.eye(N) - correct @ A) - alpha * kept
        b = left @ offset + alpha_s * correct @ y[0]
        moments = step(moments, left @ gain + kept, b, Vh.mT @ Gamma.diag() @ Vh)
    return moments


def ddrm_moments(prior, A, y, eta, eta_b):
    levels = scales(prior, STEPS)
    U, S, Vh = torch.linalg.svd(A)
    y_bar = U.mT @ y[0] / S
    tau = levels[:, 1] / levels[:, 0]
    known = S * tau[0] > NOISE
    mean = torch.cat([torch.where(known, y_bar, 0), torch.zeros(N - M)])
    variance = torch.full((N,), tau[0] ** 2, dtype=torch.float64)
    variance[:M] -= torch.where(known, (NOISE / S) ** 2, 0)
    moments = mean, variance.diag()
    kappa = math.sqrt(1 - eta**2)
    for i, (alpha, sigma) in enumerate(levels[:-1]):
        gain, offset = tweedie(prior, alpha, sigma)
        gain, offset, now = alpha * Vh @ gain @ Vh.mT, Vh @ offset, tau[i + 1]
        F, b, C = torch.zeros(N, N).double(), torch.zeros(N).double(), torch.zeros(N).double()
        for j in range(N):
            C[j] = (eta * now) ** 2
            if j >= M:
                ratio = kappa * now / tau[i]
                F[j] = (1 - ratio) * gain[j]
                F[j, j] += ratio
                b[j] = (1 - ratio) * offset[j]
            else:
                if now < NOISE / S[j]:
                    share = kappa * now / (NOISE / S[j])
                else:
                    share = eta_b
                    C[j] = now**2 - (eta_b * NOISE / S[j]) ** 2
                F[j], b[j] = (1 - share) * gain[j], (1 - share) * offset[j] + share * y_bar[j]
        moments = step(moments, F, b, C.diag())
    mean, covariance = moments
    last = levels[-1, 0]
    return last * Vh.mT @ mean, last**2 * Vh.mT @ covariance @ Vh


@pytest.mark.parametrize(
    ("method", "settings", "moments"),
    [
        (score_sde, {"strength": 1.0}, score_sde_moments),
        (score_sde, {"strength": 0.4}, score_sde_moments),
        (ddnm, {"eta": 0.85}, ddnm_moments),
        (ddnm, {"eta": 0.3}, ddnm_moments),
        (ddrm, {"eta": 0.85, "eta_b": 1.0}, ddrm_moments),
        (ddrm, {"eta": 0.5, "eta_b": 0.6}, ddrm_moments),
    ],
)
def test_samples_have_the_moments_of_the_recursion(method, settings, moments):
    assert_recursion(method, settings, moments, *gaussian_problem())


@pytest.mark.parametrize(("method", "moments"), [(ddnm, ddnm_moments), (ddrm, ddrm_moments)])
def test_even_the_weakest_measurements_count(method, moments):
    prior, A, y = gaussian_problem()
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    S[-1] = 1e-3  # whose noise is above that of time 1
    assert_recursion(method, {"eta": 0.5}, partial(moments, **EXTRA[method]), prior, U * S @ Vh, y)


EXTRA = {ddnm: {}, ddrm: {"eta_b": 1.0}}


def assert_recursion(method, settings, moments, prior, A, y):
    mean, covariance = moments(prior, A, y, **settings)
    counted = CountedPrior(prior)
    x = prior.schedule(torch.ones(()))[1] * normal(COUNT, N, seed=5)
    x0 = method(
        counted,
        flat(A),
        y.expand(COUNT, -1),
        x,
        seeded(6),
        noise_std=NOISE,
        steps=STEPS,
        **settings,
    )
    assert (counted.evaluations, counted.products) == (COUNT * STEPS, 0)
    errors = (covariance.diag() / COUNT).sqrt()
    assert ((x0.mean(0) - mean).abs() < 4 * errors + 1e-3).all()
    sampled = torch.cov(x0.mT)
    errors = ((covariance.diag().outer(covariance.diag()) + covariance**2) / COUNT).sqrt()
    assert ((sampled - covariance).abs() < 4.5 * errors + 1e-3).all()


@pytest.mark.parametrize("method", [ddnm, ddrm, score_sde])
def test_exact_measurements_are_met(method):
    prior, A, y = gaussian_problem()
    orthonormal = torch.linalg.qr(A.mT).Q.mT  # so that the step of Score-SDE is a projection
    x0 = method(prior, flat(orthonormal), y, normal(1, N), seeded(), noise_std=0.0, steps=STEPS)
    torch.testing.assert_close(x0 @ orthonormal.mT, y, rtol=0, atol=1e-2)
    assert not torch.allclose(x0, y @ orthonormal, atol=0.1)


def test_mcgs_gradient_is_that_of_the_norm():
    prior, A, y = gaussian_problem()
    x, y = normal(2, N), torch.cat([y, 1 - y])
    guided, free = (
        mcg(prior, flat(A), y, x, seeded(), noise_std=NOISE, steps=1, guidance=g, strength=0.4)
        for g in (0.7, 0.0)
    )
    gain, offset = tweedie(prior, *prior.schedule(torch.ones(()).double()))
    residual = (x @ gain.mT + offset) @ A.mT - y
    gradient = residual / residual.norm(dim=1, keepdim=True) @ A @ gain
    pull = torch.eye(N) - 0.4 * A.mT @ A / torch.linalg.matrix_norm(A, 2) ** 2
    # The norm of A is known to a thousandth.
    torch.testing.assert_close(guided - free, -0.7 * gradient @ pull, rtol=1e-2, atol=1e-8)


def test_mcg_without_guidance_is_score_sde():
    prior, A, y = gaussian_problem()
    counted = CountedPrior(prior)
    shared = (flat(A), y, normal(1, N))
    plain = score_sde(prior, *shared, seeded(), noise_std=NOISE, steps=9)
    guided = mcg(counted, *shared, seeded(), noise_std=NOISE, steps=9, guidance=0.0)
    torch.testing.assert_close(plain, guided)
    assert (counted.evaluations, counted.products) == (9, 9)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_pnp_admm_ends_at_the_posteriors_mean(weight):
    prior, A, y = gaussian_problem()
    counted = CountedPrior(prior)
    physics = flat(A)
    physics.tol = 1e-10
    x0 = pnp_admm(
        counted,
        physics,
        y,
        normal(1, N),
        seeded(),
        noise_std=NOISE,
        steps=150,
        first_std=0.4,
        last_std=0.4,
        weight=weight,
    )
    expected = prior.posterior(LinearMeasurement(A, y, NOISE / weight**0.5)).mean
    torch.testing.assert_close(x0, expected, rtol=0, atol=1e-5)
    assert (counted.evaluations, counted.products) == (150, 0)


def test_admm_tv_denoises_as_chambolles_algorithm_does():
    from skimage.restoration import denoise_tv_chambolle

    noisy = (normal(1, 1, 16, 16).cumsum(-1) / 4).contiguous()
    identity = LinearPhysics(A=lambda x: x, A_adjoint=lambda y: y)
    x0 = admm_tv(Half(), identity, noisy, noisy, seeded(), noise_std=0.1, weight=0.2)
    expected = denoise_tv_chambolle(noisy[0, 0].numpy(), weight=0.2, eps=1e-12, max_num_iter=20_000)
    torch.testing.assert_close(x0[0, 0], torch.from_numpy(expected), rtol=0, atol=5e-3)


# --- what all share -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["nonlinear_blur", "phase_retrieval"])
def test_nonlinear_tasks_are_refused_before_any_evaluation(method, name):
    prior = CountedPrior(gaussian_problem()[0])
    physics, x = images(name, torch.float64)
    with pytest.raises(UnsupportedTask, match="linear"):
        method(prior, physics, physics.A(x), x, seeded(), noise_std=0.1)
    assert prior.evaluations == 0


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        *[(method, {"steps": 0}, "steps is 0") for method in METHODS],
        (score_sde, {"strength": 1.5}, "strength is 1.5"),
        (mcg, {"guidance": -1.0}, "guidance is -1"),
        (ddnm, {"eta": 0.0}, "eta is 0"),
        (ddrm, {"eta_b": 2.0}, "eta_b is 2"),
        (ddrm, {"noise_std": -0.1}, "noise_std is -0.1"),
        (pnp_admm, {"noise_std": 0.0}, "noise_std is 0"),
        (pnp_admm, {"weight": 0.0}, "weight is 0"),
        (admm_tv, {"weight": 0.0}, "weight is 0"),
    ],
)
def test_settings_out_of_range_are_refused(method, settings, message):
    physics, x = images("random_inpainting", torch.float64)
    with pytest.raises(ValueError, match=message):
        method(Half(), physics, physics.A(x), x, seeded(), **{"noise_std": 0.1, **settings})
