"""Mixtures of probabilistic principal component analysers, fitted by EM; those that ship.

The small priors of the notebooks are mixtures of K Gaussians on R^n whose covariances are of low
rank plus a constant::

    p(x) = sum_k pi_k N(x; mu_k, Sigma_k),    Sigma_k = W_k W_k^T + psi_k I,   W_k of shape (n, r).

Every density, posterior mean and score that diffusion needs has a closed form under such a prior,
which is why they serve as oracles. No n x n matrix is formed after the start: with ::

    M_k = psi_k I + W_k^T W_k = L_k L_k^T      and      V_k = W_k L_k^-T

Woodbury's identity and the determinant lemma read ::

    (x - mu_k)^T Sigma_k^-1 (x - mu_k) = (|x - mu_k|^2 - |V_k^T (x - mu_k)|^2) / psi_k,
    log det Sigma_k = (n - r) log psi_k + log det M_k.

Source: M. E. Tipping and C. M. Bishop, Mixtures of probabilistic principal component analysers,
Neural Computation 11(2), 1999, doi 10.1162/089976699300016728.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffoc.data import faces, mnist
from diffoc.data.manifest import LICENSES, store_weights
from diffoc.priors.weights import read_weights
from diffoc.training.evaluation import write_unless_worse

# Variance of the rounding of 8-bit images on the [-1, 1] scale: no fit can know more.
NOISE_FLOOR = (2 / 255) ** 2 / 12
# EM ends where a step gains less, in nats a datum.
TOLERANCE = 1e-4
_CHUNK = 2000
# Responsibilities below this add less than float32 can hold; skipping them saves most of a sweep.
_NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class PPCAMixture:
    """The module's mixture: log pi_k (K,), mu_k (K, n), W_k (K, n, r) and psi_k > 0 (K,).

    Its history is the mean log-likelihood of a datum before each EM step and after the last.
    """

    log_weights: Tensor
    means: Tensor
    loadings: Tensor
    noise_variance: Tensor
    history: tuple[float, ...] = ()


def log_likelihood(mixture: PPCAMixture, data: Tensor) -> Tensor:
    """Returns log sum_k pi_k N(x; mu_k, W_k W_k^T + psi_k I) of each datum, (N,), in nats."""
    joint = [_log_joint(mixture, chunk) for chunk in data.split(_CHUNK)]
    return torch.cat(joint).logsumexp(dim=1)


def fit_mixture(
    data: Tensor,
    components: int,
    rank: int,
    *,
    iterations: int = 100,
    generator: torch.Generator,
) -> PPCAMixture:
    """Maximises the likelihood of a mixture of probabilistic PCA by EM.

    The start is k-means++ with Lloyd steps, and in each cluster the closed-form solution for one
    component. The likelihood then never decreases, and the mixture has its history.

    The data are (N, n) float32 or float64. Of K = `components`, 1 <= K <= N, each has the rank r,
    1 <= r < n. It ends after so many iterations, or where one gains less than :data:`TOLERANCE`. No
    noise variance psi_k is below :data:`NOISE_FLOOR`, which keeps a component from collapsing. The
    likelihood before each step is printed.

    Source: Tipping and Bishop 1999, appendix C.
    """
    mixture = initial_mixture(data, components, rank, generator)
    history: list[float] = []
    for step in range(iterations):
        updated, likelihood = em_step(mixture, data)
        history.append(likelihood)
        print(f"step {step:3d}  log-likelihood {likelihood:.3f}", flush=True)
        if step and likelihood - history[-2] < TOLERANCE:
            break
        mixture = updated
    else:
        history.append(log_likelihood(mixture, data).double().mean().item())
    return replace(mixture, history=tuple(history))


def em_step(mixture: PPCAMixture, data: Tensor) -> tuple[PPCAMixture, float]:
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
    n, r = mixture.loadings.shape[1:]
    log_p = torch.cat([_log_joint(mixture, chunk) for chunk in data.split(_CHUNK)])
    evidence = log_p.logsumexp(dim=1, keepdim=True)
    R = (log_p - evidence).exp()
    mass = R.sum(dim=0, dtype=torch.float64)
    means, loadings, noise = (
        part.clone() for part in (mixture.means, mixture.loadings, mixture.noise_variance)
    )
    identity = torch.eye(r, dtype=torch.float64)
    for k in (mass >= r + 2).nonzero()[:, 0].tolist():
        rows = R[:, k] > _NEGLIGIBLE
        x, share = data[rows].double(), R[rows, k].double() / mass[k]
        means[k] = mean = share @ x
        d, W, psi = x - mean, loadings[k].double(), noise[k].double()
        SW = d.mT @ (share[:, None] * (d @ W))
        L = torch.linalg.cholesky(psi * identity + W.mT @ W)  # of M
        W_new = torch.linalg.solve(
            psi * identity + torch.cholesky_solve(W.mT @ SW, L), SW, left=False
        )
        explained = (SW * torch.cholesky_solve(W_new.mT, L).mT).sum()
        loadings[k] = W_new
        noise[k] = ((share @ d.square().sum(dim=1) - explained) / n).clamp(min=NOISE_FLOOR)
    weights = (mass / mass.sum()).clamp(min=torch.finfo(data.dtype).tiny)
    updated = PPCAMixture(weights.log().to(data.dtype), means, loadings, noise)
    return updated, evidence.double().mean().item()


def initial_mixture(
    data: Tensor, components: int, rank: int, generator: torch.Generator
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
        noise[k] = values[rank:].mean().clamp(min=NOISE_FLOOR)
        loadings[k] = vectors[:, :rank] * (values[:rank] - noise[k]).clamp(min=0).sqrt()
    weights = counts.clamp(min=1).to(data.dtype)
    return PPCAMixture((weights / weights.sum()).log(), means, loadings, noise)


def _log_joint(mixture: PPCAMixture, x: Tensor) -> Tensor:
    """Returns log pi_k N(x; mu_k, Sigma_k) of data (N, n), (N, K)."""
    K, n, r = mixture.loadings.shape
    W, psi = mixture.loadings.double(), mixture.noise_variance.double()
    L = torch.linalg.cholesky(psi[:, None, None] * torch.eye(r, dtype=torch.float64) + W.mT @ W)
    V = torch.linalg.solve_triangular(L, W.mT, upper=False).mT.to(x)
    centre = mixture.log_weights.exp() @ mixture.means  # which saves digits
    x, means = x - centre, mixture.means - centre
    # One product with [V_1 ... V_K] is that of all components.
    p = (x @ V.movedim(0, 1).reshape(n, K * r)).view(len(x), K, r)
    p = p - (means[:, None] @ V)[:, 0]
    mahalanobis = (_squared_distance(x, means) - p.square().sum(dim=2)) / mixture.noise_variance
    log_det = (n - r) * psi.log() + 2 * L.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    constant = mixture.log_weights.double() - 0.5 * (n * math.log(2 * math.pi) + log_det)
    return constant.to(x) - 0.5 * mahalanobis


def _squared_distance(x: Tensor, centres: Tensor) -> Tensor:
    squares = x.square().sum(dim=1, keepdim=True) + centres.square().sum(dim=1)
    return (squares - 2 * x @ centres.T).clamp(min=0)


def _kmeans(data: Tensor, components: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres (K, n) and labels (N,) by k-means++ and Lloyd's steps; an empty cluster stays put."""
    shift = data.mean(dim=0)
    x = data - shift
    first = torch.randint(len(x), (1,), generator=generator)
    centres = x[first]
    nearest = _squared_distance(x, centres)[:, 0]
    for _ in range(1, components):
        # torch.multinomial stops at 2^24 categories and at float32; the inverse CDF does not.
        cumulative = nearest.double().cumsum(dim=0)
        u = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
        chosen = x[torch.searchsorted(cumulative, u, right=True)]
        centres = torch.cat([centres, chosen])
        nearest = torch.minimum(nearest, _squared_distance(x, chosen)[:, 0])
    for _ in range(10):
        labels = _squared_distance(x, centres).argmin(dim=1)
        counts = torch.bincount(labels, minlength=components)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, labels, x)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres + shift, labels


class _Mixture(NamedTuple):
    shape: tuple[int, int, int]
    components: int
    rank: int
    data: str


MIXTURES = {
    "mnist": _Mixture((1, 28, 28), components=20, rank=60, data="mnist"),
    "faces32": _Mixture((1, 32, 32), components=10, rank=97, data="faces"),
}


def fit_mixture_prior(name: str, out_dir: Path, seed: int = 0) -> dict[str, float]:
    """Fits one of the shipped mixtures on its whole training split, writes and registers it.

    Images are dequantised, v -> (v + u) / 127.5 - 1 with u uniform in [-1/2, 1/2), so that the
    density of 8-bit data is bounded and bits per dimension bound the code length of the bytes.

    The name is a key of :data:`MIXTURES`; mixture_<name>.safetensors and its entry in manifest.json
    go to an existing folder. The seed is that of the start and of the dequantisation. What is
    returned are the numbers of the fit: sizes, steps, seconds, and the test split's log-likelihood
    in nats and bits per pixel. A FileNotFoundError says that the data set is missing, a ValueError
    that the mixture that is there is better, or none of such images.
    """
    sizes = MIXTURES[name]
    generator = torch.Generator().manual_seed(seed)
    train = dequantise(training_images(name, "train"), generator)
    test = dequantise(training_images(name, "test"), generator)
    n = test.shape[1]
    file = f"mixture_{name}"
    before = _worth_of_file(out_dir / f"{file}.safetensors", test)
    start = perf_counter()
    mixture = fit_mixture(train, sizes.components, sizes.rank, generator=generator)
    seconds = perf_counter() - start
    tensors = {
        "log_weights": mixture.log_weights,
        "means": mixture.means.half(),  # costs 2e-6 nats a pixel, and is half as large
        "loadings": mixture.loadings.half(),
        "noise_variance": mixture.noise_variance,
    }
    shape = {"shape": ",".join(map(str, sizes.shape))}
    source = f"python -m diffoc fit {name}"
    nats = _nats_per_pixel(mixture, test)

    def write(folder: Path) -> Path:
        return store_weights(file, tensors, LICENSES[sizes.data], source, folder, shape)

    write_unless_worse(write, out_dir, before - nats)
    return {
        "components": sizes.components,
        "rank": sizes.rank,
        "images": len(train),
        "steps": len(mixture.history) - 1,
        "seconds": seconds,
        "train_nats_per_pixel": mixture.history[-1] / n,
        "test_nats_per_pixel": nats,
        "test_bits_per_pixel": bits_per_pixel(nats),
    }


def _worth_of_file(path: Path, images: Tensor) -> float:
    """Returns the nats per pixel of images (N, n) under a mixture, minus infinity without a file.

    A ValueError says that the file holds no mixture on R^n.
    """
    if not path.exists():
        return -math.inf
    tensors = read_weights(path)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    K, n, r = (*shapes.get("loadings", ()), 0, 0, 0)[:3]
    mixture = {"log_weights": (K,), "means": (K, n), "loadings": (K, n, r), "noise_variance": (K,)}
    if shapes != mixture or n != images.shape[1]:
        raise ValueError(
            f"path {path} holds no mixture of {images.shape[1]} pixels: name another --out"
        )
    return _nats_per_pixel(PPCAMixture(**tensors), images)  # type: ignore[arg-type]  # no history


def _nats_per_pixel(mixture: PPCAMixture, images: Tensor) -> float:
    return log_likelihood(mixture, images).double().mean().item() / images.shape[1]


def training_images(name: str, split: str) -> np.ndarray:
    """Returns the 8-bit images a shipped mixture is fitted to, flat, (N, n).

    The name is a key of :data:`MIXTURES`. Faces of the split "train" are there mirrored, too.
    """
    images = mnist(split)[0] if name == "mnist" else faces(split, MIXTURES[name].shape[-1])
    if name == "faces32" and split == "train":
        images = np.concatenate([images, images[:, :, ::-1]])
    return images.reshape(len(images), -1)


def dequantise(images: np.ndarray, generator: torch.Generator) -> Tensor:
    """Returns uint8 images with uniform noise, (v + u) / 127.5 - 1, u in [-1/2, 1/2), float32."""
    u = torch.rand(images.shape, generator=generator) - 0.5
    return (torch.from_numpy(images) + u) / 127.5 - 1


def bits_per_pixel(nats_per_pixel: float) -> float:
    """Returns a bound on the bits a pixel of 8-bit data, -(nats + log(2/255)) / log 2.

    The density of dequantised data, integrated over a grey level of width 2/255, is at most the
    probability of the byte (Theis, van den Oord and Bethge, arXiv 1511.01844).
    """
    return -(nats_per_pixel + math.log(2 / 255)) / math.log(2)
