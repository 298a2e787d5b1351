"""The exact priors against scipy, textbook formulas in numpy, autograd and quadrature."""

import itertools
import math

import numpy as np
import pytest
import torch
from azula.denoise import Denoiser
from azula.noise import RectifiedSchedule, VESchedule, VPSchedule
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from diffoc.priors.gaussian import GaussianMixturePrior, GaussianPrior
from diffoc.priors.mixture import mixture_from_loadings
from diffoc.problems.operators import LinearMeasurement

VP, VE = VPSchedule(0.02, 0.01), VESchedule(1e-2, 20.0)
N, M = 5, 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def scales(schedule, t: float) -> tuple[float, float]:
    alpha, sigma = schedule(torch.tensor(t, dtype=torch.float64))
    return alpha.item(), sigma.item()


def measure(n: int = N, m: int = M, batch: int = 4, noise_std: float = 0.3) -> LinearMeasurement:
    return LinearMeasurement(normal(m, n, seed=21), normal(batch, m, seed=22), noise_std)


def close(got: torch.Tensor, expected, rtol: float = 1e-10, atol: float = 1e-11) -> None:
    expected = np.asarray(expected)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=rtol, atol=atol)


def gradient(f, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


# ================================================================ Gaussian


def dense(schedule):
    """The prior, its mean and its covariance as numpy arrays."""
    W, mean = normal(N, N, seed=1), normal(N, seed=2)
    cov = W @ W.mT / N + 0.2 * torch.eye(N, dtype=torch.float64)
    return GaussianPrior(mean, cov, schedule), mean.numpy(), cov.numpy()


@pytest.fixture(params=[VP, VE])
def case(request):
    return (*dense(request.param), request.param)


TIMES = [0.0, 0.1, 0.5, 1.0]


def test_matrix_is_the_covariance(case):
    prior, _, cov, _ = case
    assert isinstance(prior, Denoiser)
    close(prior.matrix, cov)


@pytest.mark.parametrize("t", TIMES)
def test_gaussian_log_prob_is_scipys(case, t):
    prior, mean, cov, schedule = case
    alpha, sigma = scales(schedule, t)
    x = normal(6, N, seed=5) * (alpha + sigma)
    rv = multivariate_normal(alpha * mean, alpha**2 * cov + sigma**2 * np.eye(N))
    close(prior.log_prob(x, t), rv.logpdf(x.numpy()))
    close(prior.log_prob(x, torch.tensor(t, dtype=torch.float64)), rv.logpdf(x.numpy()))


@pytest.mark.parametrize("t", TIMES)
def test_gaussian_score_is_the_gradient_of_log_prob(case, t):
    prior, *_, schedule = case
    x = normal(6, N, seed=5) * sum(scales(schedule, t))
    close(prior.score(x, t), gradient(lambda x: prior.log_prob(x, t), x))


@pytest.mark.parametrize("t", TIMES)
def test_gaussian_denoiser_is_conditioning(case, t):
    """E[x_0 | x_t] in information form, which the code does not use."""
    prior, mean, cov, schedule = case
    alpha, sigma = scales(schedule, t)
    x = normal(6, N, seed=5).numpy() * (alpha + sigma)
    precision = np.linalg.inv(cov) + alpha**2 / sigma**2 * np.eye(N)
    expected = np.linalg.solve(precision, (np.linalg.solve(cov, mean) + alpha * x / sigma**2).T).T
    close(prior(torch.from_numpy(x), t).mean, expected, rtol=1e-9, atol=1e-9)


def test_gaussian_posterior_is_the_textbook_s(case):
    prior, mean, cov, _ = case
    measurement = measure()
    A, y, s = measurement.matrix.numpy(), measurement.y.numpy(), measurement.noise_std
    posterior = prior.posterior(measurement)
    information = np.linalg.inv(cov) + A.T @ A / s**2
    expected = np.linalg.solve(information, (np.linalg.solve(cov, mean) + y @ A / s**2).T).T
    close(posterior.mean, expected)
    close(posterior.covariance, np.linalg.inv(information))
    evidence = multivariate_normal(A @ mean, A @ cov @ A.T + s**2 * np.eye(M)).logpdf(y)
    close(posterior.log_evidence, evidence)


@pytest.mark.parametrize("t", TIMES)
def test_gaussian_conditional_score_is_the_gradient_of_the_joint(case, t):
    """log p(y | x_t) = log p(x_t, y) - log p(x_t), from the joint covariance, by autograd."""
    prior, mean, cov, schedule = case
    alpha, sigma = scales(schedule, t)
    measurement = measure()
    A, s = measurement.matrix.numpy(), measurement.noise_std
    marginal = alpha**2 * cov + sigma**2 * np.eye(N)
    joint_cov = np.block(
        [[marginal, alpha * cov @ A.T], [alpha * A @ cov, A @ cov @ A.T + s**2 * np.eye(M)]]
    )
    joint_mean = np.concatenate([alpha * mean, A @ mean])
    joint, alone = (
        torch.distributions.MultivariateNormal(torch.from_numpy(m), torch.from_numpy(C))
        for m, C in ((joint_mean, joint_cov), (alpha * mean, marginal))
    )
    x = alpha * normal(4, N, seed=5) + sigma * normal(4, N, seed=6)
    expected = gradient(
        lambda x: joint.log_prob(torch.cat([x, measurement.y], dim=1)) - alone.log_prob(x), x
    )
    got = prior.conditional_score(x, t, measurement)
    close(got, expected, rtol=1e-7, atol=1e-9 * max(1, 1 / sigma))


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.8), (0.5, 0.1), (0.05, 0.0)])
def test_reverse_kernel_is_bayes_rule(case, t, s):
    """From the covariance of (x_s, x_t) = linear map of the independent (x_0, e_1, e_2)."""
    prior, mean, cov, schedule = case
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(schedule, t), scales(schedule, s)
    a = alpha_t / alpha_s
    root = math.sqrt(sigma_t**2 - a**2 * sigma_s**2)
    eye, zero = np.eye(N), np.zeros((N, N))
    to_s = np.hstack([alpha_s * eye, sigma_s * eye, zero])
    to_t = a * to_s + np.hstack([zero, zero, root * eye])
    sources = np.block([[cov, zero, zero], [zero, eye, zero], [zero, zero, eye]])
    ss, st, tt = (p @ sources @ q.T for p, q in ((to_s, to_s), (to_s, to_t), (to_t, to_t)))
    slope = np.linalg.solve(tt, st.T).T
    F, b, C = prior.reverse_kernel(t, s)
    close(F, slope)
    close(b, alpha_s * mean - slope @ (alpha_t * mean))
    close(C, ss - slope @ st.T, rtol=1e-8, atol=1e-10)


def test_reverse_kernels_carry_marginals_to_marginals(case):
    prior, mean, cov, schedule = case
    alpha, sigma = scales(schedule, 1.0)
    m, C = alpha * mean, alpha**2 * cov + sigma**2 * np.eye(N)
    times = np.linspace(1, 0, 21)
    for t, s in itertools.pairwise(times):
        F, b, Q = (z.numpy() for z in prior.reverse_kernel(t, s))
        m, C = F @ m + b, F @ C @ F.T + Q
    alpha, sigma = scales(schedule, 0.0)
    np.testing.assert_allclose(m, alpha * mean, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(C, alpha**2 * cov + sigma**2 * np.eye(N), rtol=1e-9, atol=1e-10)


def test_flow_transports_the_marginal_and_returns(case):
    prior, mean, cov, schedule = case
    t, s = 0.9, 0.2
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(schedule, t), scales(schedule, s)
    offset = prior.flow(torch.zeros(1, N, dtype=torch.float64), t, s)
    J = (prior.flow(torch.eye(N, dtype=torch.float64), t, s) - offset).mT.numpy()
    before = alpha_t**2 * cov + sigma_t**2 * np.eye(N)
    after = alpha_s**2 * cov + sigma_s**2 * np.eye(N)
    np.testing.assert_allclose(J @ before @ J.T, after, rtol=1e-10, atol=1e-11)
    close(prior.flow(torch.from_numpy(alpha_t * mean)[None], t, s)[0], alpha_s * mean)
    x = normal(3, N, seed=5)
    close(prior.flow(prior.flow(x, t, s), s, t), x, rtol=1e-9, atol=1e-9)


def moments_agree(samples: np.ndarray, mean, cov, z: float = 5.0) -> None:
    """Means and covariances within z standard errors, estimated from the samples themselves."""
    d = samples - mean
    products = d[:, :, None] * d[:, None, :]
    count = len(samples)
    assert (np.abs(d.mean(0)) <= z * d.std(0) / math.sqrt(count)).all()
    errors = np.abs(products.mean(0) - cov)
    assert (errors <= z * products.std(0) / math.sqrt(count)).all()


def test_gaussian_posterior_samples(case):
    prior, mean, cov, _ = case
    measurement = measure(batch=2)
    A, y, s = measurement.matrix.numpy(), measurement.y.numpy(), measurement.noise_std
    samples = prior.posterior(measurement).sample(20000, seeded(9))
    assert samples.shape == (20000, 2, N)
    assert torch.equal(samples, prior.posterior(measurement).sample(20000, seeded(9)))
    C = np.linalg.inv(np.linalg.inv(cov) + A.T @ A / s**2)
    for b in range(2):
        m = C @ (np.linalg.solve(cov, mean) + A.T @ y[b] / s**2)
        moments_agree(samples[:, b].numpy(), m, C)


def test_gaussian_prior_moves_to_another_dtype(case):
    prior = case[0]
    x = normal(4, N, seed=5)
    expected = prior(x, 0.5).mean
    single = prior.to(torch.float32)
    assert single is prior
    got = single(x.float(), torch.tensor(0.5)).mean
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("match", "mean", "covariance"),
    [
        ("^mean", torch.zeros(1, 3), torch.eye(3)),
        ("^mean", torch.zeros(()), torch.eye(3)),
        ("^covariance", torch.zeros(3), torch.eye(4)),
        ("^covariance", torch.zeros(3), torch.ones(3)),
        ("^covariance", torch.zeros(3), torch.ones(3, 4)),
        ("^covariance is not symmetric", torch.zeros(3), torch.eye(3) + torch.ones(3, 3).triu()),
        (
            "^covariance has values that are not finite",
            torch.zeros(3),
            torch.full((3, 3), math.nan),
        ),
        ("^covariance has the eigenvalue", torch.zeros(3), torch.diag(torch.tensor([1.0, 2, -1]))),
        ("^covariance has the eigenvalue", torch.zeros(3), torch.diag(torch.tensor([1.0, 2, 0]))),
    ],
)
def test_gaussian_doors(match, mean, covariance):
    with pytest.raises(ValueError, match=match):
        GaussianPrior(mean, covariance, VP)


def test_a_covariance_symmetric_up_to_rounding_is_accepted():
    """Entries that cancel to zero are rounding errors, which are not symmetric."""
    Q = torch.linalg.qr(normal(12, 12, seed=1))[0]
    C = (3 * Q) @ Q.mT
    assert not torch.equal(C, C.mT)
    close(GaussianPrior(torch.zeros(12).double(), C, VP).matrix, 3 * np.eye(12))


# ================================================================ mixtures


def parameters(K: int = 3, n: int = N, r: int = 2, apart: float = 1.0):
    log_weights = 0.5 * normal(K, seed=11)
    means, loadings = apart * normal(K, n, seed=12), normal(K, n, r, seed=13)
    return log_weights, means, loadings, 0.1 + 0.2 * normal(K, seed=14).square()


class Dense:
    """The same mixture with dense covariances, in numpy."""

    def __init__(self, log_weights, means, loadings, psi):
        self.log_weights = log_weights.numpy() - logsumexp(log_weights.numpy())
        self.means = means.numpy()
        W, eye = loadings.numpy(), np.eye(means.shape[-1])
        self.covs = np.stack([w @ w.T + p * eye for w, p in zip(W, psi.numpy(), strict=True)])

    def log_joint(self, x, alpha, sigma):
        """log p(k, x_t = x), (B, K)."""
        eye = np.eye(self.means.shape[-1])
        columns = [
            lw
            + np.atleast_1d(multivariate_normal(alpha * m, alpha**2 * C + sigma**2 * eye).logpdf(x))
            for lw, m, C in zip(self.log_weights, self.means, self.covs, strict=True)
        ]
        return np.stack(columns, axis=-1)

    def denoise(self, x, alpha, sigma):
        """E[x_0 | x_t = x], (B, n), by dense linear algebra."""
        logs = self.log_joint(x, alpha, sigma)
        weights = np.exp(logs - logsumexp(logs, axis=1, keepdims=True))
        eye = np.eye(self.means.shape[-1])
        means = np.stack(
            [
                m + alpha * (x - alpha * m) @ np.linalg.inv(alpha**2 * C + sigma**2 * eye) @ C
                for m, C in zip(self.means, self.covs, strict=True)
            ],
            axis=1,
        )
        return np.einsum("bk,bkn->bn", weights, means)


def mixture_prior(schedule=VP, shape=None, **size):
    given = parameters(**size)
    return GaussianMixturePrior(mixture_from_loadings(*given), schedule, shape), Dense(*given)


@pytest.mark.parametrize(("K", "n", "r"), [(1, 3, 1), (3, 5, 2), (2, 4, 3), (2, 3, 3)])
def test_mixture_from_loadings_has_their_covariance(K, n, r):
    log_weights, means, loadings, psi = parameters(K, n, r)
    mixture = mixture_from_loadings(log_weights, means, loadings, psi)
    U, v, w = mixture.basis, mixture.variances, mixture.floor
    eye = torch.eye(n, dtype=torch.float64)
    close(U.mT @ U, np.broadcast_to(np.eye(r), (K, r, r)))
    complement = eye - U @ U.mT
    rebuilt = (U * v[:, None]) @ U.mT + w[:, None, None] * complement
    close(rebuilt, loadings.numpy() @ loadings.mT.numpy() + psi.numpy()[:, None, None] * np.eye(n))
    expected = np.exp(log_weights.numpy()) / np.exp(log_weights.numpy()).sum()
    close(mixture.log_weights, np.log(expected)[None])
    close(mixture.mean, (expected @ means.numpy())[None])


def test_rank_deficient_loadings_keep_their_covariance():
    log_weights, means, loadings, psi = parameters()
    loadings[0, :, 1] = 2 * loadings[0, :, 0]
    loadings[1] = 0
    given = (log_weights, means, loadings, psi)
    prior, reference = GaussianMixturePrior(mixture_from_loadings(*given), VP), Dense(*given)
    x = normal(6, N, seed=5)
    close(prior(x, 0.4).mean, reference.denoise(x.numpy(), *scales(VP, 0.4)))


@pytest.mark.parametrize("schedule", [VP, VE])
@pytest.mark.parametrize("t", TIMES)
def test_mixture_log_prob_is_scipys(schedule, t):
    prior, reference = mixture_prior(schedule)
    alpha, sigma = scales(schedule, t)
    x = normal(7, N, seed=5) * (alpha + sigma)
    expected = logsumexp(reference.log_joint(x.numpy(), alpha, sigma), axis=1)
    close(prior.log_prob(x, t), expected)


@pytest.mark.parametrize("schedule", [VP, VE])
@pytest.mark.parametrize("t", TIMES)
def test_mixture_score_is_the_gradient_and_tweedie_holds(schedule, t):
    prior, reference = mixture_prior(schedule)
    alpha, sigma = scales(schedule, t)
    x = normal(7, N, seed=5) * (alpha + sigma)
    score = gradient(lambda x: prior.log_prob(x, t), x)
    close(prior.score(x, t), score)
    mean = prior(x, t).mean
    close(mean, reference.denoise(x.numpy(), alpha, sigma), rtol=1e-9, atol=1e-9)
    close(mean, ((x + sigma**2 * score) / alpha).numpy(), rtol=1e-9, atol=1e-9)


def test_score_is_a_finite_difference_of_scipys_log_prob():
    prior, reference = mixture_prior(VE)
    alpha, sigma = scales(VE, 0.5)
    x, h = normal(3, N, seed=5).numpy(), 1e-5

    def log_prob(x):
        return logsumexp(reference.log_joint(x, alpha, sigma), axis=1)

    expected = [(log_prob(x + h * e) - log_prob(x - h * e)) / (2 * h) for e in np.eye(N)]
    close(prior.score(torch.from_numpy(x), 0.5), np.stack(expected, -1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("t", [0.1, 0.6])
def test_one_component_is_the_gaussian_prior(t):
    log_weights, means, loadings, psi = parameters(K=1)
    mixture = GaussianMixturePrior(mixture_from_loadings(log_weights, means, loadings, psi), VP)
    covariance = loadings[0] @ loadings[0].mT + psi[0] * torch.eye(N, dtype=torch.float64)
    gauss = GaussianPrior(means[0], covariance, VP)
    x, measurement = normal(4, N, seed=5), measure()
    close(mixture(x, t).mean, gauss(x, t).mean)
    close(mixture.log_prob(x, t), gauss.log_prob(x, t))
    close(mixture.score(x, t), gauss.score(x, t))
    close(mixture.conditional_score(x, t, measurement), gauss.conditional_score(x, t, measurement))
    one, other = mixture.posterior(measurement), gauss.posterior(measurement)
    close(one.mean, other.mean)
    close(one.log_evidence, other.log_evidence)
    close(one.covariance, np.broadcast_to(other.covariance.numpy(), (4, N, N)))


class Quadrature:
    """Expectations under the 2-D mixture by the trapezoidal rule, with dense densities."""

    def __init__(self, reference: Dense, points: int = 1001, reach: float = 14.0):
        axis = np.linspace(-reach, reach, points)
        self.grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
        self.log_cell = 2 * math.log(axis[1] - axis[0])
        self.log_prior = logsumexp(reference.log_joint(self.grid, 1.0, 0.0), axis=1)

    def moments(self, *log_likelihoods):
        """log of the integral, mean and covariance of the product of prior and likelihoods."""
        logs = self.log_prior + sum(log_likelihoods)
        total = logsumexp(logs)
        p = np.exp(logs - total)
        mean = p @ self.grid
        d = self.grid - mean
        return total + self.log_cell, mean, (p[:, None] * d).T @ d

    def measured(self, measurement: LinearMeasurement, b: int):
        A, s = measurement.matrix.numpy(), measurement.noise_std
        d = measurement.y[b].numpy() - self.grid @ A.T
        m = len(A)
        return -(d**2).sum(1) / (2 * s**2) - m / 2 * math.log(2 * math.pi * s**2)

    def noisy(self, x, alpha, sigma):
        d = x - alpha * self.grid
        return -(d**2).sum(1) / (2 * sigma**2) - math.log(2 * math.pi * sigma**2)


@pytest.fixture(scope="module")
def planar():
    prior, reference = mixture_prior(VP, K=3, n=2, r=1)
    return prior, Quadrature(reference)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_mixture_posterior_by_quadrature(planar, m):
    prior, quadrature = planar
    measurement = measure(n=2, m=m, batch=3, noise_std=0.7)
    posterior = prior.posterior(measurement)
    for b in range(3):
        log_evidence, mean, cov = quadrature.moments(quadrature.measured(measurement, b))
        close(posterior.log_evidence[b], log_evidence, rtol=1e-8, atol=1e-9)
        close(posterior.mean[b], mean, rtol=1e-8, atol=1e-9)
        close(posterior.covariance[b], cov, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("t", [0.15, 0.4, 0.9])
def test_mixture_denoiser_and_conditional_score_by_quadrature(planar, t):
    r"""grad log p(y | x_t) = alpha / sigma^2 (E[x_0 | x_t, y] - E[x_0 | x_t])."""
    prior, quadrature = planar
    alpha, sigma = scales(VP, t)
    measurement = measure(n=2, m=1, batch=3, noise_std=0.7)
    x = alpha * normal(3, 2, seed=31) + sigma * normal(3, 2, seed=32)
    score = prior.conditional_score(x, t, measurement)
    given = prior.mixture.given_noisy(x, *VP(torch.tensor(t, dtype=torch.float64)))
    posterior = given.given(measurement)
    for b in range(3):
        noisy = quadrature.noisy(x[b].numpy(), alpha, sigma)
        measured = quadrature.measured(measurement, b)
        marginal, mean, _ = quadrature.moments(noisy)
        joint, both, _ = quadrature.moments(noisy, measured)
        close(prior.log_prob(x, t)[b], marginal, rtol=1e-8, atol=1e-9)
        close(prior(x, t).mean[b], mean, rtol=1e-8, atol=1e-9)
        close(posterior.log_evidence[b], joint - marginal, rtol=1e-8, atol=1e-9)
        close(posterior.mean[b], both, rtol=1e-8, atol=1e-9)
        close(score[b], alpha / sigma**2 * (both - mean), rtol=1e-7, atol=1e-8)


def test_mixture_posterior_covariances_are_in_information_form():
    prior, reference = mixture_prior()
    measurement = measure()
    A, s = measurement.matrix.numpy(), measurement.noise_std
    expected = [np.linalg.inv(np.linalg.inv(C) + A.T @ A / s**2) for C in reference.covs]
    close(prior.posterior(measurement).covariances, np.stack(expected))


def exact_posterior(reference: Dense, measurement: LinearMeasurement, b: int):
    """Weights, means and covariances of the components, dense."""
    A, y, s = measurement.matrix.numpy(), measurement.y[b].numpy(), measurement.noise_std
    logs, means, covs = [], [], []
    for lw, m, C in zip(reference.log_weights, reference.means, reference.covs, strict=True):
        logs.append(lw + multivariate_normal(A @ m, A @ C @ A.T + s**2 * np.eye(len(A))).logpdf(y))
        covs.append(np.linalg.inv(np.linalg.inv(C) + A.T @ A / s**2))
        means.append(covs[-1] @ (np.linalg.solve(C, m) + A.T @ y / s**2))
    weights = np.exp(logs - logsumexp(logs))
    return weights, np.stack(means), np.stack(covs)


def sampled_mixture_agrees(samples: np.ndarray, weights, means, covs, z: float = 5.0) -> None:
    mean = weights @ means
    d = means - mean
    moments_agree(samples, mean, np.einsum("k,kij->ij", weights, covs) + (weights * d.T) @ d, z)
    # E[p(k | x)] is the weight of k
    logs = np.stack(
        [
            np.log(w) + multivariate_normal(m, C).logpdf(samples)
            for w, m, C in zip(weights, means, covs, strict=True)
        ],
        axis=1,
    )
    p = np.exp(logs - logsumexp(logs, axis=1, keepdims=True))
    error = np.abs(p.mean(0) - weights)
    assert (error <= z * p.std(0) / math.sqrt(len(samples)) + 1e-12).all()


def test_mixture_posterior_samples():
    prior, reference = mixture_prior(VP)
    measurement = measure(m=2, batch=3, noise_std=1.5)
    posterior = prior.posterior(measurement)
    samples = posterior.sample(20000, seeded(17))
    assert samples.shape == (20000, 3, N)
    assert torch.equal(samples, posterior.sample(20000, seeded(17)))
    for b in range(3):
        exact = exact_posterior(reference, measurement, b)
        assert np.sort(exact[0])[-2] > 0.02  # more than one component matters
        sampled_mixture_agrees(samples[:, b].numpy(), *exact)


def test_samples_of_a_posterior_that_has_a_prior_of_its_own_for_every_state():
    """Given noisy states there is a mixture for each; one measurement serves all of them."""
    prior, reference = mixture_prior(VP)
    measurement = measure(m=2, batch=1, noise_std=1.5)
    alpha, sigma = scales(VP, 0.5)
    x = alpha * normal(2, N, seed=31) + sigma * normal(2, N, seed=32)
    given = prior.mixture.given_noisy(x, *VP(torch.tensor(0.5, dtype=torch.float64)))
    samples = given.given(measurement).sample(20000, seeded(17)).numpy()
    # Dense: the noisy state is a measurement of N more numbers, after its noise is made that of y.
    A = torch.cat([measurement.matrix, alpha * 1.5 / sigma * torch.eye(N, dtype=torch.float64)])
    y = torch.cat([measurement.y.expand(2, -1), 1.5 / sigma * x], dim=1)
    for b in range(2):
        exact = exact_posterior(reference, LinearMeasurement(A, y, 1.5), b)
        sampled_mixture_agrees(samples[:, b], *exact)
    crossed = np.corrcoef(samples[:, 0].T, samples[:, 1].T)[:N, N:]
    assert np.abs(crossed).max() < 5 / math.sqrt(20000)


def test_mixture_prior_samples():
    prior, reference = mixture_prior(VP, shape=(1, 1, N))
    samples = prior.sample(20000, seeded(18))
    assert samples.shape == (20000, 1, 1, N)
    assert torch.equal(samples, prior.sample(20000, seeded(18)))
    exact = (np.exp(reference.log_weights), reference.means, reference.covs)
    sampled_mixture_agrees(samples.flatten(1).numpy(), *exact)


# ---------------------------------------------------------------- range of noise levels

EXTREME = {
    "ve": (VESchedule(1e-3, 80.0), [0.0, 0.25, 0.5, 0.75, 1.0]),
    "vp": (VPSchedule(1e-6, 1e-3), [0.0, 0.01, 0.3, 0.7, 1.0]),
    "vp-tiny": (VPSchedule(1e-15, 1e-3), [0.7, 1.0]),
    "rectified": (RectifiedSchedule(1e-3, 1e-3), [0.0, 0.5, 1.0]),
}


def check_noise_levels(kind: str, dtype: torch.dtype, thickness: float) -> None:
    """Denoiser, score and log-density at every time, against dense float64."""
    schedule, times = EXTREME[kind]
    n = 40
    log_weights, means, loadings, psi = parameters(K=4, n=n, r=5)
    given = (log_weights, means, loadings, thickness * psi)
    prior = GaussianMixturePrior(mixture_from_loadings(*given), schedule).to(dtype)
    reference = Dense(*given)
    eps = torch.finfo(dtype).eps
    # the reference inverts matrices of condition 1e6 in float64
    relative = max(3e3 * eps, 1e-9)
    for t in times:
        alpha, sigma = scales(schedule, t)
        x0 = means + (loadings @ normal(4, 5, 1, seed=41))[..., 0]
        x = (alpha * x0 + sigma * normal(4, n, seed=42)).to(dtype)
        seen = x.double().numpy()
        mean, score, log_prob = prior(x, t).mean, prior.score(x, t), prior.log_prob(x, t)
        for value in (mean, score, log_prob):
            assert value.dtype == dtype
            assert value.isfinite().all()
        expected = reference.denoise(seen, alpha, sigma)
        close(mean.double(), expected, 0, relative * np.abs(expected).max())
        given_noisy = prior.mixture.given_noisy(x, *prior._scales(t)).mean
        close(given_noisy.double(), expected, 0, relative * np.abs(expected).max())
        # near the data the score is a difference of states, known to eps, over sigma^2
        exact_score = (alpha * expected - seen) / sigma**2
        largest = np.abs(seen).max() / sigma**2 + np.abs(exact_score).max()
        close(score.double(), exact_score, 0, relative * largest)
        exact_log_prob = logsumexp(reference.log_joint(seen, alpha, sigma), axis=1)
        close(log_prob.double(), exact_log_prob, rtol=relative, atol=relative)


@pytest.mark.parametrize("kind", sorted(EXTREME))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_noise_level_is_finite_and_right(kind, dtype):
    check_noise_levels(kind, dtype, thickness=1.0)


@pytest.mark.parametrize("kind", sorted(EXTREME))
def test_the_denoiser_of_nearly_flat_components_keeps_the_digits(kind):
    schedule, times = EXTREME[kind]
    log_weights, means, loadings, psi = parameters(K=4, n=40, r=5)
    given = (log_weights, means, loadings, 1e-3 * psi)
    prior = GaussianMixturePrior(mixture_from_loadings(*given), schedule).float()
    for t in times:
        alpha, sigma = scales(schedule, t)
        x0 = means + (loadings @ normal(4, 5, 1, seed=41))[..., 0]
        x = (alpha * x0 + sigma * normal(4, 40, seed=42)).float()
        expected = Dense(*given).denoise(x.double().numpy(), alpha, sigma)
        close(prior(x, t).mean.double(), expected, 0, 3e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *[(kind, torch.float64) for kind in sorted(EXTREME)],
        *[(kind, torch.float32) for kind in sorted(EXTREME)],
    ],
)
def test_nearly_flat_components_keep_the_digits(kind, dtype):
    """Variances of 1e2 along the basis and 1e-4 across, as images have."""
    check_noise_levels(kind, dtype, thickness=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("schedule", [VESchedule(1e-3, 80.0), VPSchedule(1e-6, 1e-3)])
def test_conditional_scores_are_finite_and_right_at_every_noise_level(schedule, dtype):
    """Against the dense joint of (x_t, y), a mixture too."""
    given = parameters(K=2)
    prior = GaussianMixturePrior(mixture_from_loadings(*given), schedule).to(dtype)
    reference, measurement = Dense(*given), measure()
    A, s = measurement.matrix.numpy(), measurement.noise_std
    single = LinearMeasurement(measurement.matrix.to(dtype), measurement.y.to(dtype), s)
    for t in (0.0, 0.3, 0.6, 1.0):
        alpha, sigma = scales(schedule, t)
        x = alpha * normal(4, N, seed=43) + sigma * normal(4, N, seed=44)
        got = prior.conditional_score(x.to(dtype), t, single)
        assert got.dtype == dtype
        assert got.isfinite().all()
        # E[x_0 | x_t, y] with x_t and y as one measurement of x_0
        stacked, noise = np.vstack([alpha * np.eye(N), A]), np.repeat([sigma, s], [N, M])
        means = []
        for z in np.hstack([x.numpy(), measurement.y.numpy()]):
            logs, components = [], []
            for lw, m, C in zip(
                reference.log_weights, reference.means, reference.covs, strict=True
            ):
                S = stacked @ C @ stacked.T + np.diag(noise**2)
                logs.append(lw + multivariate_normal(stacked @ m, S).logpdf(z))
                gain = np.linalg.solve(S, stacked @ C).T
                components.append(m + gain @ (z - stacked @ m))
            means.append(np.exp(logs - logsumexp(logs)) @ components)
        difference = np.stack(means) - reference.denoise(x.numpy(), alpha, sigma)
        expected = alpha / sigma**2 * difference
        loss = 1e-9 if dtype == torch.float64 else 2e-3
        scale = max(np.abs(expected).max(), 1e-6 * alpha)
        if dtype == torch.float64 and alpha / sigma > 10:
            loss *= (alpha / sigma) ** 2  # the reference's own difference of near equals
        # the weights' part is a difference of scores, each rounded
        floor = 2 * torch.finfo(dtype).eps * x.abs().max() / max(sigma, 1) ** 2
        assert np.abs(got.double().numpy() - expected).max() < loss * scale + floor


# ---------------------------------------------------------------- shapes, modules, doors


def test_states_may_have_the_shape_of_images():
    flat, _ = mixture_prior(n=12)
    image, _ = mixture_prior(n=12, shape=(3, 2, 2))
    x, measurement = normal(4, 3, 2, 2, seed=5), measure(n=12)
    for method in (lambda p, x: p(x, 0.3).mean, lambda p, x: p.score(x, 0.3)):
        assert method(image, x).shape == x.shape
        assert torch.equal(method(image, x).flatten(1), method(flat, x.flatten(1)))
    got = image.conditional_score(x, 0.3, measurement)
    assert torch.equal(got.flatten(1), flat.conditional_score(x.flatten(1), 0.3, measurement))
    assert image.log_prob(x, 0.3).shape == (4,)


def test_one_state_has_a_conditional_score_for_each_measurement():
    prior, _ = mixture_prior()
    x, measurement = normal(1, N, seed=5), measure()
    expected = prior.conditional_score(x.expand(4, N), 0.5, measurement)
    close(prior.conditional_score(x, 0.5, measurement), expected)


def test_mixture_buffers_travel_with_the_module():
    prior, _ = mixture_prior()
    state = prior.state_dict()
    assert sorted(state) == ["basis", "floor", "log_weights", "means", "variances"]
    assert prior.float().means.dtype == torch.float32


def test_conditional_score_works_without_gradients_and_leaves_none():
    prior, _ = mixture_prior()
    x = normal(4, N, seed=5)
    expected = prior.conditional_score(x, 0.3, measure())
    with torch.no_grad():
        got = prior.conditional_score(x, 0.3, measure())
    assert torch.equal(got, expected)
    assert not got.requires_grad


def test_no_problem_of_a_mixture_s_batch_depends_on_another():
    prior, _ = mixture_prior()
    x, measurement = normal(4, N, seed=5), measure()
    for b in range(4):
        alone = LinearMeasurement(
            measurement.matrix, measurement.y[b : b + 1], measurement.noise_std
        )
        close(prior(x[b : b + 1], 0.3).mean[0], prior(x, 0.3).mean[b])
        close(prior.posterior(alone).mean[0], prior.posterior(measurement).mean[b])
        close(
            prior.conditional_score(x[b : b + 1], 0.3, alone)[0],
            prior.conditional_score(x, 0.3, measurement)[b],
        )


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("log_weights", {"log_weights": torch.zeros(2)}),
        ("log_weights", {"log_weights": torch.zeros(1, 3)}),
        ("means", {"means": torch.zeros(3, 4)}),
        ("means", {"means": torch.zeros(2, 5)}),
        ("noise_variance", {"noise_variance": torch.ones(2)}),
        ("^noise_variance", {"noise_variance": torch.tensor([1.0, 0.0, 1.0])}),
        ("^noise_variance", {"noise_variance": torch.tensor([1.0, -1.0, 1.0])}),
        ("^noise_variance", {"noise_variance": torch.tensor([1.0, math.nan, 1.0])}),
    ],
)
def test_mixture_from_loadings_doors(match, change):
    names = ("log_weights", "means", "loadings", "noise_variance")
    given = dict(zip(names, parameters(), strict=True)) | change
    with pytest.raises(ValueError, match=match):
        mixture_from_loadings(**given)


@pytest.mark.parametrize("shape", [(4,), (1, 2, 3), ()])
def test_mixture_prior_door(shape):
    with pytest.raises(ValueError, match=r"^shape"):
        mixture_prior(shape=shape)


def test_what_would_be_broadcast_is_refused():
    """Of as many times, states and numbers the shapes fit each other by accident."""
    mixture, gauss = mixture_prior(K=1)[0], dense(VP)[0]
    x, one = normal(N, N, seed=5), torch.ones((), dtype=torch.float64)
    for prior in (mixture, gauss):
        close(prior.log_prob(x, torch.full((1,), 0.5)), prior.log_prob(x, 0.5))
        for method in (prior, prior.log_prob, prior.score):
            with pytest.raises(ValueError, match="t has shape"):
                method(x, torch.linspace(0.1, 0.9, N))
        for matrix, found in ((normal(2, 1), "has shape"), (normal(2, N).float(), "is torch")):
            measurement = LinearMeasurement(matrix, torch.ones(1, 2).to(matrix), 0.3)
            for use in (prior.posterior, lambda m, prior=prior: prior.conditional_score(x, 0.5, m)):
                with pytest.raises(ValueError, match=f"matrix {found}"):
                    use(measurement)
    for method in ("log_prob", "score", "given_noisy"):
        with pytest.raises(ValueError, match="x has shape"):
            getattr(mixture.mixture, method)(x[0], one, one)
    several = mixture.mixture.given_noisy(x, one, one)
    for use in (lambda: GaussianMixturePrior(several, VP), lambda: several.posterior_mean(x, 1, 1)):
        with pytest.raises(ValueError, match="means has shape"):
            use()
    with pytest.raises(ValueError, match=r"s is 0\.6, expected 0 to 0\.3"):
        gauss.reverse_kernel(0.3, 0.6)


def test_loadings_without_components_are_refused():
    with pytest.raises(ValueError, match="loadings has shape"):
        mixture_from_loadings(torch.zeros(1), torch.zeros(1, 4), torch.zeros(4, 2), torch.ones(1))
