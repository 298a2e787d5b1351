r"""Mixtures of low-rank Gaussians: densities and posteriors in closed form.

The algebra behind :class:`diffoc.priors.gaussian.GaussianMixturePrior`, on flat vectors and without
time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffoc.checks import check_alike, check_size, check_tensor
from diffoc.problems.operators import LinearMeasurement


@dataclass(frozen=True)
class GaussianMixture:
    r"""A mixture of K low-rank Gaussians over flat vectors, B of them at once.

    Component k has the covariance
    :math:`U_k \,\mathrm{diag}(v_k)\, U_k^T + w_k (I - U_k U_k^T)`: r variances along an orthonormal
    basis and one for all other directions. Scaling, adding isotropic noise and conditioning on it
    keep the basis, so no linear system is ever solved and no variance is a difference.

    Attributes:
        log_weights: the components' normalised log-weights, (B or 1, K).
        means: their means, (B or 1, K, n); a prior has one row, a posterior one for each problem.
        basis: the bases U with orthonormal columns, (K, n, r).
        variances: the variances v along them, (K, r).
        floor: the variance w in all other directions, (K,).
    """

    log_weights: Tensor
    means: Tensor
    basis: Tensor
    variances: Tensor
    floor: Tensor

    @property
    def mean(self) -> Tensor:
        """Returns the mean, (B, n)."""
        return torch.einsum("bk,bkn->bn", self.log_weights.exp(), self.means)

    def _split(self, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x - alpha mu_k as coordinates in the basis (B, K, r) and the rest (B, K, n).

        Every formula below treats the two apart: a component that is thin off its basis would
        lose all digits of its coordinates in a difference of large numbers.
        """
        check_size((len(x), self.means.shape[-1]), x=x)
        d = x.unsqueeze(1) - alpha * self.means
        coordinates = torch.einsum("knr,bkn->bkr", self.basis, d)
        return coordinates, d - self._lift(coordinates)

    def _lift(self, coordinates: Tensor) -> Tensor:
        """Returns vectors (B, K, n) from coordinates (B, K, r)."""
        return torch.einsum("knr,bkr->bkn", self.basis, coordinates)

    def _scales(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the noisy components' variances along the basis (K, r) and off it (K, 1)."""
        across = alpha**2 * self.floor + sigma**2
        return alpha**2 * self.variances + sigma**2, across.unsqueeze(-1)

    def _log_joint(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Returns log p(k, x) for x = alpha x_0 + sigma noise, (B, K)."""
        n, r = self.basis.shape[-2:]
        along, across = self._scales(alpha, sigma)
        coordinates, rest = self._split(x, alpha)
        quadratic = (coordinates.square() / along).sum(-1) + (rest.square() / across).sum(-1)
        logdet = along.log().sum(-1) + (n - r) * across[:, 0].log()
        return self.log_weights - (quadratic + logdet + n * math.log(2 * math.pi)) / 2

    def log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        r"""Returns the log-density of :math:`\alpha x_0 + \sigma z` at x (B, n), (B,)."""
        return self._log_joint(x, alpha, sigma).logsumexp(dim=1)

    def score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Returns the gradient of :meth:`log_prob` in x, (B, n)."""
        along, across = self._scales(alpha, sigma)
        coordinates, rest = self._split(x, alpha)
        whitened = self._lift(coordinates / along) + rest / across
        weights = self._log_joint(x, alpha, sigma).softmax(dim=1)
        return -torch.einsum("bk,bkn->bn", weights, whitened)

    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        r"""Returns the mean of a prior's :meth:`given_noisy`, (B, n), without its K means.

        All components' projections are one matrix product and so is their way back, which is what
        a Jacobian of n rows needs to be fast: nothing of size (B, K, n) is made. The price is in
        the weights, whose logarithms are off by some :math:`\epsilon \|x\|^2` / floor.
        """
        K, n, r = self.basis.shape
        check_size((1, K, n), means=self.means)
        along = alpha**2 * self.variances + sigma**2
        across = alpha**2 * self.floor + sigma**2
        basis = self.basis.movedim(0, 1).reshape(n, K * r)
        means = self.means[0]
        # Distances by the binomial formula; the centre keeps their rounding small.
        centre = self.mean[0]
        z, m = x - alpha * centre, alpha * (means - centre)
        squared = z.square().sum(-1, keepdim=True) - 2 * z @ m.mT + m.square().sum(-1)
        own = (m.unsqueeze(1) @ self.basis).squeeze(1)
        p = (z @ basis).reshape(-1, K, r) - own
        quadratic = squared / across + (p.square() * (1 / along - 1 / across[:, None])).sum(-1)
        logdet = along.log().sum(-1) + (n - r) * across.log()
        weights = (self.log_weights - (quadratic + logdet) / 2).softmax(dim=1)

        shrink = alpha * self.floor / across
        lifted = weights[..., None] * (alpha * self.variances / along - shrink[:, None]) * p
        direct = weights * shrink
        return (
            weights @ means
            + direct.sum(1, keepdim=True) * z
            - direct @ m
            + lifted.flatten(1) @ basis.mT
        )

    def given_noisy(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> GaussianMixture:
        r"""Returns the posterior of x_0 given :math:`x = \alpha x_0 + \sigma z`, (B, n)."""
        along, across = self._scales(alpha, sigma)
        coordinates, rest = self._split(x, alpha)
        gain, gain_across = self.variances / along, self.floor.unsqueeze(-1) / across
        means = self.means + alpha * (self._lift(gain * coordinates) + gain_across * rest)
        return GaussianMixture(
            self._log_joint(x, alpha, sigma).log_softmax(dim=1),
            means,
            self.basis,
            gain * sigma**2,
            gain_across[:, 0] * sigma**2,
        )

    def given(self, measurement: LinearMeasurement) -> MixturePosterior:
        """Returns the posterior of x_0 given a linear Gaussian measurement."""
        A = matrix_for(self.means, measurement)
        # Rows of A Sigma_k: (K, m, n).
        rows = torch.einsum("knr,mn->kmr", self.basis, A)
        gain = self.floor[:, None, None] * A + torch.einsum(
            "kmr,knr->kmn", rows * (self.variances - self.floor[:, None])[:, None, :], self.basis
        )
        L = torch.linalg.cholesky(with_noise(gain @ A.mT, measurement.noise_std))
        residual = measurement.y.unsqueeze(1) - self.means @ A.mT  # (B, K, m)
        log_joint = self.log_weights + log_normal(residual, L)
        solved = torch.cholesky_solve(residual.movedim(0, -1), L)  # (K, m, B)
        return MixturePosterior(
            log_weights=log_joint.log_softmax(dim=1),
            means=self.means + torch.einsum("kmb,kmn->bkn", solved, gain),
            log_evidence=log_joint.logsumexp(dim=1),
            prior=self,
            measurement=measurement,
            gain=gain,
            factor=L,
        )

    def sample_components(self, components: Tensor, generator: torch.Generator) -> Tensor:
        """Returns a sample of each named component, (..., B, n) for components (..., B).

        Where B = 1, the last of their sides may be any.
        """
        n, device = self.basis.shape[1], self.basis.device
        z = torch.randn(
            *components.shape, n, generator=generator, dtype=torch.float64, device=device
        ).to(self.basis.dtype)
        U, v, w = self.basis[components], self.variances[components], self.floor[components]
        projected = torch.einsum("...nr,...n->...r", U, z)
        scaled = (v.sqrt() - w.sqrt().unsqueeze(-1)) * projected
        deviation = w.sqrt().unsqueeze(-1) * z + torch.einsum("...nr,...r->...n", U, scaled)
        row = torch.arange(len(self.means), device=device)
        return self.means[row, components] + deviation


@dataclass(frozen=True)
class MixturePosterior:
    """The posterior of a mixture under a linear Gaussian measurement: again a mixture.

    Attributes:
        log_weights: the components' log-weights, (B, K).
        means: the components' means, (B, K, n).
        log_evidence: log p(y), (B,).
        prior: the mixture before the measurement.
        measurement: the measurement.
        gain: the products A Sigma_k, (K, m, n).
        factor: the Cholesky factors of A Sigma_k A^T + s^2 I, (K, m, m).
    """

    log_weights: Tensor
    means: Tensor
    log_evidence: Tensor
    prior: GaussianMixture
    measurement: LinearMeasurement
    gain: Tensor
    factor: Tensor

    @property
    def mean(self) -> Tensor:
        """Returns the posterior mean, (B, n)."""
        return torch.einsum("bk,bkn->bn", self.log_weights.exp(), self.means)

    @property
    def covariances(self) -> Tensor:
        """Returns the components' covariances, dense, (K, n, n)."""
        U, v, w = self.prior.basis, self.prior.variances, self.prior.floor
        identity = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        prior = (U * (v - w[:, None])[:, None, :]) @ U.mT + w[:, None, None] * identity
        return prior - self.gain.mT @ torch.cholesky_solve(self.gain, self.factor)

    @property
    def covariance(self) -> Tensor:
        """Returns the posterior's covariance, within and between components, (B, n, n)."""
        weights = self.log_weights.exp()
        d = self.means - self.mean.unsqueeze(1)
        within = torch.einsum("bk,kij->bij", weights, self.covariances)
        return within + torch.einsum("bk,bki,bkj->bij", weights, d, d)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        r"""Returns independent exact samples, (count, B, n).

        A prior sample x with its own simulated measurement becomes a posterior sample by the
        linear correction of their mismatch (Matheron's rule): no n x n matrix is formed.
        """
        (batch, _), m = self.log_weights.shape, len(self.measurement.matrix)
        weights = self.log_weights.exp()
        components = torch.multinomial(weights, count, replacement=True, generator=generator).mT
        x = self.prior.sample_components(components, generator)
        noise = torch.randn(
            count, batch, m, generator=generator, dtype=torch.float64, device=x.device
        ).to(x.dtype)
        simulated = x @ self.measurement.matrix.mT + self.measurement.noise_std * noise
        mismatch = self.measurement.y - simulated
        for k in range(len(self.gain)):  # a factor for every sample would not fit into memory
            chosen = components == k
            solved = torch.cholesky_solve(mismatch[chosen].mT, self.factor[k]).mT
            x[chosen] += solved @ self.gain[k]
        return x


def mixture_from_loadings(
    log_weights: Tensor, means: Tensor, loadings: Tensor, noise_variance: Tensor
) -> GaussianMixture:
    r"""Returns a mixture with :math:`\Sigma_k = W_k W_k^T + \psi_k I`, as in factor analysis.

    The log-weights (K,) are normalised here; the means are (K, n), the loadings W (K, n, r) with
    r at most n, and psi (K,), above 0.
    """
    given = {
        "loadings": loadings,
        "means": means,
        "log_weights": log_weights,
        "noise_variance": noise_variance,
    }
    for name, tensor in given.items():
        check_tensor(name, tensor)
    check_alike(**given)
    if loadings.ndim != 3:
        raise ValueError(f"loadings has shape {tuple(loadings.shape)}, expected (K, n, r)")
    K, n, _ = loadings.shape
    check_size((K, n), means=means)
    check_size((K,), log_weights=log_weights, noise_variance=noise_variance)
    if not (noise_variance > 0).all():
        raise ValueError("noise_variance must be above 0")
    U, singular, _ = torch.linalg.svd(loadings, full_matrices=False)
    # In memory (n, K, r), of which the posterior mean's matrix of all components is a view.
    U = U.movedim(0, 1).contiguous().movedim(1, 0)
    return GaussianMixture(
        log_weights.log_softmax(dim=0).unsqueeze(0),
        means.unsqueeze(0),
        U,
        singular**2 + noise_variance[:, None],
        noise_variance,
    )


def matrix_for(mean: Tensor, measurement: LinearMeasurement) -> Tensor:
    """Returns A, once it is for states like a mean, (..., n)."""
    A = measurement.matrix
    check_alike(mean=mean, matrix=A)
    check_size((len(A), mean.shape[-1]), matrix=A)
    return A


def with_noise(C: Tensor, noise_std: float) -> Tensor:
    """Returns covariances (..., m, m) of a measurement, with its noise."""
    return C + noise_std**2 * torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)


def log_normal(residual: Tensor, L: Tensor) -> Tensor:
    """Returns log N(residual; 0, L L^T) for residuals (B, m) and one factor, or (B, K, m) and K."""
    whitened = torch.linalg.solve_triangular(L, residual.movedim(0, -1), upper=False)
    logdet = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = residual.shape[-1] * math.log(2 * math.pi)
    return -(whitened.square().sum(-2).movedim(-1, 0) + logdet + constant) / 2
