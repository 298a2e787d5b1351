"""EM for mixtures of probabilistic PCA, against scipy, closed forms and known truth."""

import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.linalg import subspace_angles
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from diffoc.data.manifest import checked_bytes
from diffoc.training import mixtures
from diffoc.training.mixtures import PPCAMixture, em_step, fit_mixture, log_likelihood


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_mixture(K: int, n: int, r: int, apart: float = 1.0, seed: int = 0) -> PPCAMixture:
    g = seeded(seed)
    weights = torch.rand(K, generator=g, dtype=torch.float64) + 0.5
    return PPCAMixture(
        log_weights=(weights / weights.sum()).log(),
        means=apart * torch.randn(K, n, generator=g, dtype=torch.float64),
        loadings=torch.randn(K, n, r, generator=g, dtype=torch.float64),
        noise_variance=0.05 + 0.1 * torch.rand(K, generator=g, dtype=torch.float64),
    )


def sample(mixture: PPCAMixture, N: int, seed: int = 1) -> torch.Tensor:
    g = seeded(seed)
    _, n, r = mixture.loadings.shape
    k = torch.multinomial(mixture.log_weights.exp(), N, replacement=True, generator=g)
    z = torch.randn(N, r, 1, generator=g, dtype=torch.float64)
    noise = torch.randn(N, n, generator=g, dtype=torch.float64)
    along = (mixture.loadings[k] @ z)[..., 0]
    return mixture.means[k] + along + mixture.noise_variance[k, None].sqrt() * noise


def covariance(mixture: PPCAMixture, k: int) -> np.ndarray:
    W = mixture.loadings[k].numpy()
    return W @ W.T + mixture.noise_variance[k].item() * np.eye(len(W))


@pytest.mark.parametrize(("K", "n", "r"), [(1, 3, 1), (3, 7, 2), (4, 5, 4)])
def test_log_likelihood_is_scipys(K, n, r):
    mixture = random_mixture(K, n, r)
    x = sample(mixture, 50)
    components = [
        multivariate_normal(mixture.means[k].numpy(), covariance(mixture, k)).logpdf(x.numpy())
        + mixture.log_weights[k].item()
        for k in range(K)
    ]
    expected = logsumexp(np.stack(components), axis=0)
    np.testing.assert_allclose(log_likelihood(mixture, x).numpy(), expected, rtol=1e-11, atol=1e-11)


def test_float32_agrees_with_float64_far_from_the_origin():
    exact = random_mixture(3, 40, 5)
    x = sample(exact, 200)
    moved = PPCAMixture(
        exact.log_weights.float(),
        (exact.means + 30).float(),
        exact.loadings.float(),
        exact.noise_variance.float(),
    )
    single = log_likelihood(moved, (x + 30).float()).double()
    assert (single - log_likelihood(exact, x)).abs().max() < 0.05


def test_one_step_is_the_textbooks():
    """Tipping and Bishop's appendix C with every n x n matrix written out."""
    mixture = random_mixture(3, 6, 2, apart=0.5)
    x = sample(mixture, 300)
    start = random_mixture(3, 6, 2, apart=0.5, seed=5)
    updated, likelihood = em_step(start, x)

    X, log_p = x.numpy(), []
    for k in range(3):
        density = multivariate_normal(start.means[k].numpy(), covariance(start, k))
        log_p.append(start.log_weights[k].item() + density.logpdf(X))
    evidence = logsumexp(log_p, axis=0)
    R = np.exp(np.stack(log_p) - evidence)
    assert likelihood == pytest.approx(evidence.mean(), rel=1e-12)
    for k in range(3):
        N = R[k].sum()
        mu = R[k] @ X / N
        S = (R[k, :, None] * (X - mu)).T @ (X - mu) / N
        W, psi = start.loadings[k].numpy(), start.noise_variance[k].item()
        Minv = np.linalg.inv(psi * np.eye(2) + W.T @ W)
        W_new = S @ W @ np.linalg.inv(psi * np.eye(2) + Minv @ W.T @ S @ W)
        psi_new = np.trace(S - S @ W @ Minv @ W_new.T) / 6
        # Responsibilities below 1e-9 are skipped, which the tolerance covers.
        assert math.exp(updated.log_weights[k]) == pytest.approx(N / 300, rel=1e-9)
        np.testing.assert_allclose(updated.means[k], mu, rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(updated.loadings[k], W_new, rtol=1e-6, atol=1e-7)
        assert updated.noise_variance[k].item() == pytest.approx(psi_new, rel=1e-6)


def test_one_component_is_the_closed_form():
    """W W^T + psi I has the leading eigenpairs of the covariance, and their mean for the rest."""
    n, r = 8, 3
    x = sample(random_mixture(1, n, r), 400)
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T, bias=True))
    psi = values[: n - r].mean()
    expected = psi * np.eye(n) + vectors[:, -r:] @ np.diag(values[-r:] - psi) @ vectors[:, -r:].T

    start = fit_mixture(x, 1, r, iterations=0, generator=seeded())
    np.testing.assert_allclose(covariance(start, 0), expected, rtol=1e-9, atol=1e-10)
    # EM from a wrong start arrives at the same place.
    mixture = PPCAMixture(
        torch.zeros(1, dtype=torch.float64),
        torch.zeros(1, n, dtype=torch.float64),
        torch.randn(1, n, r, generator=seeded(3), dtype=torch.float64),
        torch.ones(1, dtype=torch.float64),
    )
    for _ in range(800):  # linear convergence, at the rate of the eigengap
        mixture, _ = em_step(mixture, x)
    np.testing.assert_allclose(mixture.means[0], x.mean(dim=0), atol=1e-12)
    np.testing.assert_allclose(covariance(mixture, 0), expected, atol=1e-8)


def test_rank_n_minus_one_is_the_full_gaussian():
    x = sample(random_mixture(2, 5, 2), 100)
    fit = fit_mixture(x, 1, 4, iterations=0, generator=seeded())
    np.testing.assert_allclose(covariance(fit, 0), np.cov(x.numpy().T, bias=True), atol=1e-10)


def test_known_mixture_is_recovered(monkeypatch):
    monkeypatch.setattr(mixtures, "TOLERANCE", 1e-6)
    truth = random_mixture(3, 20, 2, apart=2.0)
    fit = fit_mixture(sample(truth, 6000), 3, 2, iterations=60, generator=seeded(2))
    order = torch.cdist(truth.means, fit.means).argmin(dim=1)
    assert sorted(order.tolist()) == [0, 1, 2]
    for k, j in enumerate(order.tolist()):
        assert (fit.log_weights[j].exp() - truth.log_weights[k].exp()).abs() < 0.02
        assert (fit.means[j] - truth.means[k]).abs().max() < 0.15
        assert (fit.noise_variance[j] / truth.noise_variance[k] - 1).abs() < 0.03
        angles = subspace_angles(fit.loadings[j].numpy(), truth.loadings[k].numpy())
        assert np.rad2deg(angles.max()) < 2
        error = covariance(fit, j) - covariance(truth, k)
        assert np.linalg.norm(error) < 0.1 * np.linalg.norm(covariance(truth, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_likelihood_never_decreases(dtype, monkeypatch):
    monkeypatch.setattr(mixtures, "TOLERANCE", 0)
    x = sample(random_mixture(4, 15, 3, apart=0.3), 900).to(dtype)
    fit = fit_mixture(x, 6, 2, iterations=40, generator=seeded())
    gains = np.diff(fit.history)
    slack = 1e-9 if dtype == torch.float64 else 1e-5
    assert gains.min() > -slack
    assert gains[0] > 1e-3
    assert fit.history[-1] == pytest.approx(log_likelihood(fit, x).mean().item(), abs=1e-5)


def test_tolerance_stops_and_history_ends_at_the_result():
    x = sample(random_mixture(2, 10, 2, apart=2.0), 500)
    fit = fit_mixture(x, 2, 2, iterations=200, generator=seeded())
    assert len(fit.history) < 100
    assert fit.history[-1] == pytest.approx(log_likelihood(fit, x).mean().item(), rel=1e-12)


def test_same_seed_same_bits():
    x = sample(random_mixture(3, 10, 2), 300).float()
    first, second = (fit_mixture(x, 4, 2, iterations=5, generator=seeded(7)) for _ in range(2))
    assert torch.equal(first.loadings, second.loadings)
    assert torch.equal(first.log_weights, second.log_weights)


def test_starved_components_and_the_floor(monkeypatch):
    """A far outlier owns a component, and data in a subspace leave no noise: neither collapses."""
    monkeypatch.setattr(mixtures, "TOLERANCE", 0)
    monkeypatch.setattr(mixtures, "NOISE_FLOOR", 1e-3)
    g = seeded(4)
    plane = torch.randn(200, 2, generator=g) @ torch.randn(2, 6, generator=g)
    x = torch.cat([plane, torch.full((1, 6), 50.0)])
    fit = fit_mixture(x, 3, 2, iterations=30, generator=seeded())
    assert fit.noise_variance.min() >= 1e-3
    assert all(t.isfinite().all() for t in (fit.means, fit.loadings, fit.log_weights))
    assert fit.log_weights.exp().sum() == pytest.approx(1, abs=1e-5)
    assert np.diff(fit.history).min() > -1e-4


# --- the shipped fits -----------------------------------------------------------------------------


def test_dequantise_fills_one_grey_level():
    images = np.tile(np.array([0, 100, 255], np.uint8), (4000, 1))
    x = mixtures.dequantise(images, seeded())
    centres = torch.tensor([0, 100, 255]) / 127.5 - 1
    assert (x - centres).abs().max() <= 1 / 255 + 1e-6
    assert (x - centres).var() == pytest.approx(mixtures.NOISE_FLOOR, rel=0.05)


def test_bits_of_a_uniform_image_are_eight():
    assert mixtures.bits_per_pixel(-math.log(256 * 2 / 255)) == pytest.approx(8)


@pytest.fixture
def small_faces(tmp_path, monkeypatch):
    faces = np.random.default_rng(0).integers(0, 256, (60, 64, 64), dtype=np.uint8)
    np.savez(tmp_path / "faces64.npz", train=faces, test=faces[:7])
    monkeypatch.setenv("DIFFOC_DATA", str(tmp_path))
    recipe = mixtures.MIXTURES["faces32"]._replace(components=2, rank=3)
    monkeypatch.setitem(mixtures.MIXTURES, "faces32", recipe)
    return tmp_path


def test_prior_is_written_registered_and_reproducible(small_faces):
    first, second = small_faces / "a", small_faces / "b"
    for out in (first, second):
        out.mkdir()
        numbers = mixtures.fit_mixture_prior("faces32", out, seed=3)
    assert numbers["images"] == 120  # each face and its mirror image
    assert numbers["components"] == 2
    file = "mixture_faces32.safetensors"
    assert checked_bytes(file, first) == checked_bytes(file, second)
    with safe_open(first / file, "pt") as weights:
        assert weights.metadata() == {"shape": "1,32,32"}
        shapes = {k: tuple(weights.get_slice(k).get_shape()) for k in weights.keys()}  # noqa: SIM118
    assert shapes == {
        "log_weights": (2,),
        "means": (2, 1024),
        "loadings": (2, 1024, 3),
        "noise_variance": (2,),
    }
