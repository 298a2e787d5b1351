"""Mixtures of probabilistic principal component analysers, fitted by EM.

The small priors of the notebooks are mixtures of K Gaussians on R^n whose covariances are of low
rank plus a constant::

    p(x) = sum_k pi_k N(x; mu_k, Sigma_k),    Sigma_k = W_k W_k^T + psi_k I,   W_k of shape (n, r).

Every density, posterior mean and score that diffusion needs has a closed form under such a prior,
which is why they serve as oracles. No n x n matrix is formed after the start: with ::

    M_k = psi_k I + W_k^T W_k = L_k L_k^T      and      V_k = W_k L_k^-T

Woodbury's identity and the determinant lemma read ::

    (x - mu_k)^T Sigma_k^-1 (x - mu_k) = (|x - mu_k|^2 - |V_k^T (x - mu_k)|^2) / psi_k,
    log det Sigma_k = (n - r) log psi_k + log det M_k,

so that one matrix product with all [V_1 ... V_K] gives every component's density.

Source: M. E. Tipping and C. M. Bishop, Mixtures of probabilistic principal component analysers,
Neural Computation 11(2), 1999, doi 10.1162/089976699300016728.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffoc.checks import check_above, check_alike, check_at_least, check_tensor

# Variance of the rounding of 8-bit images on the [-1, 1] scale: no fit can know more.
NOISE_FLOOR = (2 / 255) ** 2 / 12
_CHUNK = 2000
# Responsibilities below this add less than float32 can hold; skipping them saves most of a sweep.
_NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class PPCAMixture:
    """A mixture of probabilistic principal component analysers.

    Attributes:
        log_weights: (K,), log pi_k; the exponentials sum to one.
        means: (K, n).
        loadings: (K, n, r), W_k.
        noise_variance: (K,), psi_k > 0.
        history: mean log-likelihood of a datum before each EM step and after the last.
    """

    log_weights: Tensor
    means: Tensor
    loadings: Tensor
    noise_variance: Tensor
    history: tuple[float, ...] = ()


def log_likelihood(mixture: PPCAMixture, data: Tensor) -> Tensor:
    """Returns log sum_k pi_k N(x; mu_k, W_k W_k^T + psi_k I) of each datum, (N,), in nats.

    A ValueError refuses data that are not (N, n), of the mixture's dtype, and finite.
    """
    _check_data(data, mixture.means.shape[1])
    check_alike(data=data, means=mixture.means)
    evaluator = _evaluator(mixture)
    joint = [_log_joint(evaluator, chunk - evaluator.centre)[0] for chunk in data.split(_CHUNK)]
    return torch.cat([log_p.logsumexp(dim=1) for log_p in joint])


def fit_mixture(
    data: Tensor,
    components: int,
    rank: int,
    *,
    iterations: int = 100,
    tolerance: float = 1e-4,
    floor: float = NOISE_FLOOR,
    generator: torch.Generator,
    progress: Callable[[int, float], None] | None = None,
) -> PPCAMixture:
    """Maximises the likelihood of a mixture of probabilistic PCA by EM.

    The start is k-means++ with Lloyd steps, and in each cluster the closed-form solution for one
    component. The likelihood then never decreases, and the mixture has its history.

    Args:
        data: (N, n) float32 or float64, with N >= components.
        components, rank: K, at least 1, and r, 1 <= r < n.
        iterations: the most steps of EM, at least 0.
        tolerance: steps end when one gains less than this many nats a datum; at least 0.
        floor: the smallest noise variance psi_k, positive; keeps a component from collapsing.
        generator: the source of the start's randomness.
        progress: called with the step's number and the mean log-likelihood before it.

    Source: Tipping and Bishop 1999, appendix C.
    """
    _check_data(data)
    n = data.shape[1]
    if not 1 <= components <= len(data):
        raise ValueError(f"components must be in [1, {len(data)}], got {components}")
    if not 1 <= rank < n:
        raise ValueError(f"rank must be in [1, {n - 1}], got {rank}")
    check_at_least(0, iterations=iterations, tolerance=tolerance)
    check_above(0, floor=floor)
    mixture = initial_mixture(data, components, rank, floor=floor, generator=generator)
    history: list[float] = []
    for step in range(iterations):
        updated, likelihood = em_step(mixture, data, floor=floor)
        history.append(likelihood)
        if progress is not None:
            progress(step, likelihood)
        if step and likelihood - history[-2] < tolerance:
            break
        mixture = updated
    else:
        history.append(log_likelihood(mixture, data).double().mean().item())
    return replace(mixture, history=tuple(history))


def em_step(
    mixture: PPCAMixture, data: Tensor, *, floor: float = NOISE_FLOOR
) -> tuple[PPCAMixture, float]:
    """Takes one step of EM in the two stages of Tipping and Bishop.

    With responsibilities R_ik = p(k | x_i), N_k = sum_i R_ik and the local covariance
    S_k = sum_i R_ik (x_i - mu_k)(x_i - mu_k)^T / N_k about the new mean,

        pi_k  <- N_k / N,      mu_k <- sum_i R_ik x_i / N_k,
        W_k   <- S_k W_k (psi_k I + M_k^-1 W_k^T S_k W_k)^-1,
        psi_k <- tr(S_k - S_k W_k(old) M_k^-1 W_k(new)^T) / n.

    A component left with fewer than r + 2 data, which r directions and a mean could explain without
    noise, keeps its shape and loses only weight: it can neither collapse nor lower the likelihood.

    Arguments as in `fit_mixture`. Returns the new mixture and the mean log-likelihood of the old.
    """
    evaluator = _evaluator(mixture)
    K, n, r = mixture.loadings.shape
    dtype = data.dtype
    # Sums over the data with weights R, of x about the centre and of p = V^T (x - mu_old).
    mass = torch.zeros(K, dtype=torch.float64)
    sum_x = torch.zeros(K, n, dtype=torch.float64)
    sum_distance = torch.zeros(K, dtype=torch.float64)
    sum_p = torch.zeros(K, r, dtype=torch.float64)
    sum_xp = torch.zeros(K, n, r, dtype=dtype)
    total = 0.0
    for chunk in data.split(_CHUNK):
        x = chunk - evaluator.centre
        log_p, distance, p = _log_joint(evaluator, x)
        evidence = log_p.logsumexp(dim=1, keepdim=True)
        total += evidence.sum(dtype=torch.float64).item()
        R = (log_p - evidence).exp()
        mass += R.sum(dim=0, dtype=torch.float64)
        sum_x += R.T @ x
        sum_distance += (R * distance).sum(dim=0, dtype=torch.float64)
        for k in range(K):
            rows = (R[:, k] > _NEGLIGIBLE).nonzero()[:, 0]
            weighted = R[rows, k, None] * p[rows, k]
            sum_p[k] += weighted.sum(dim=0, dtype=torch.float64)
            sum_xp[k] += x[rows].T @ weighted

    alive = mass >= r + 2
    N = mass.clamp(min=torch.finfo(dtype).tiny)[:, None]
    means = sum_x / N
    trace = (sum_distance / N[:, 0]) - (means - evaluator.means).square().sum(dim=1)
    SV = sum_xp / N[..., None] - means[:, :, None] * (sum_p / N)[:, None, :]

    W, psi = mixture.loadings.double(), mixture.noise_variance.double()
    L = evaluator.cholesky
    SW = SV @ L.mT
    noise = psi[:, None, None] * torch.eye(r, dtype=torch.float64)
    W_new = torch.linalg.solve(noise + torch.cholesky_solve(W.mT @ SW, L), SW, left=False)
    explained = (SW * torch.cholesky_solve(W_new.mT, L).mT).sum(dim=(1, 2))
    psi_new = ((trace - explained) / n).clamp(min=floor)
    updated = PPCAMixture(
        log_weights=(mass / mass.sum()).clamp(min=torch.finfo(dtype).tiny).log().to(dtype),
        means=torch.where(alive[:, None], means + evaluator.centre, mixture.means).to(dtype),
        loadings=torch.where(alive[:, None, None], W_new, W).to(dtype),
        noise_variance=torch.where(alive, psi_new, psi).to(dtype),
    )
    return updated, total / len(data)


def initial_mixture(
    data: Tensor, components: int, rank: int, *, floor: float, generator: torch.Generator
) -> PPCAMixture:
    """Returns k-means clusters, each with the closed-form maximum-likelihood probabilistic PCA.

    With the eigenvalues l_1 >= ... >= l_n and eigenvectors u_j of a cluster's covariance,
    psi = (l_{r+1} + ... + l_n) / (n - r) and W = [u_j sqrt(l_j - psi)] for j <= r.

    Arguments as in `fit_mixture`. A cluster with fewer than r + 2 data takes the covariance of all.
    """
    means, labels = _kmeans(data, components, generator)
    counts = torch.bincount(labels, minlength=components)
    loadings = torch.empty(components, data.shape[1], rank, dtype=data.dtype)
    noise = torch.empty(components, dtype=data.dtype)
    for k in range(components):
        members = data[labels == k] if counts[k] >= rank + 2 else data
        values, vectors = torch.linalg.eigh(torch.cov(members.T, correction=0))
        values, vectors = values.flip(0), vectors.flip(1)
        noise[k] = values[rank:].mean().clamp(min=floor)
        loadings[k] = vectors[:, :rank] * (values[:rank] - noise[k]).clamp(min=0).sqrt()
    weights = counts.clamp(min=1).to(data.dtype)
    return PPCAMixture((weights / weights.sum()).log(), means, loadings, noise)


class _Evaluator(NamedTuple):
    """What the densities of all components need, about a common centre that saves digits."""

    centre: Tensor  # (n,)
    means: Tensor  # (K, n), mu_k - centre
    matrix: Tensor  # (n, K r), [V_1 ... V_K]
    offset: Tensor  # (K r,), V_k^T (mu_k - centre)
    cholesky: Tensor  # (K, r, r), L_k in float64
    constant: Tensor  # (K,), log pi_k - log det(2 pi Sigma_k) / 2
    noise_variance: Tensor  # (K,)


def _evaluator(mixture: PPCAMixture) -> _Evaluator:
    K, n, r = mixture.loadings.shape
    dtype = mixture.means.dtype
    W, psi = mixture.loadings.double(), mixture.noise_variance.double()
    L = torch.linalg.cholesky(psi[:, None, None] * torch.eye(r, dtype=torch.float64) + W.mT @ W)
    V = torch.linalg.solve_triangular(L, W.mT, upper=False).mT
    centre = mixture.log_weights.exp() @ mixture.means
    means = mixture.means - centre
    log_det = (n - r) * psi.log() + 2 * L.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    constant = mixture.log_weights.double() - 0.5 * (n * math.log(2 * math.pi) + log_det)
    return _Evaluator(
        centre=centre,
        means=means,
        matrix=V.permute(1, 0, 2).reshape(n, K * r).to(dtype),
        offset=torch.einsum("knr,kn->kr", V, means.double()).reshape(K * r).to(dtype),
        cholesky=L,
        constant=constant.to(dtype),
        noise_variance=mixture.noise_variance,
    )


def _log_joint(evaluator: _Evaluator, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns for x about the centre log pi_k N(x; k), |x - mu_k|^2, V_k^T (x - mu_k)."""
    K = len(evaluator.means)
    p = (x @ evaluator.matrix - evaluator.offset).view(len(x), K, -1)
    distance = _squared_distance(x, evaluator.means)
    mahalanobis = (distance - p.square().sum(dim=2)) / evaluator.noise_variance
    return evaluator.constant - 0.5 * mahalanobis, distance, p


def _squared_distance(x: Tensor, centres: Tensor) -> Tensor:
    squares = x.square().sum(dim=1, keepdim=True) + centres.square().sum(dim=1)
    return (squares - 2 * x @ centres.T).clamp(min=0)


def _kmeans(
    data: Tensor, components: int, generator: torch.Generator, steps: int = 10
) -> tuple[Tensor, Tensor]:
    """Centres (K, n) and labels (N,) by k-means++ and Lloyd's steps; an empty cluster stays put."""
    shift = data.mean(dim=0)
    x = data - shift
    first = torch.randint(len(x), (1,), generator=generator)
    centres = x[first]
    nearest = _squared_distance(x, centres)[:, 0]
    for found in range(1, components):
        # torch.multinomial stops at 2^24 categories and at float32; the inverse CDF does not.
        cumulative = nearest.double().cumsum(dim=0)
        if not cumulative[-1] > 0:
            raise ValueError(f"components is {components}, but data has {found} distinct rows")
        u = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
        chosen = x[torch.searchsorted(cumulative, u, right=True)]
        centres = torch.cat([centres, chosen])
        nearest = torch.minimum(nearest, _squared_distance(x, chosen)[:, 0])
    for _ in range(steps):
        labels = _squared_distance(x, centres).argmin(dim=1)
        counts = torch.bincount(labels, minlength=components)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, labels, x)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres + shift, labels


def _check_data(data: Tensor, n: int | None = None) -> None:
    if data.ndim != 2 or len(data) == 0 or (n is not None and data.shape[1] != n):
        expected = "(N, n)" if n is None else f"(N, {n})"
        raise ValueError(f"data must have shape {expected} with N > 0, got {tuple(data.shape)}")
    check_alike(data=data)
    check_tensor("data", data)
