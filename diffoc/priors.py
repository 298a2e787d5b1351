r"""Priors whose every conditional is known: Gaussians and Gaussian mixtures.

Both are azula denoisers, so whatever works on a network works on them; and both have oracles for
linear Gaussian measurements :math:`y \sim N(A x_0, s^2 I)`, so that whatever approximates a
posterior can be compared with it. The identities behind them, for
:math:`x_0 \sim N(\mu, \Sigma)` and :math:`x_t \sim N(\alpha x_0, \sigma^2 I)`:

.. math::
    x_t &\sim N(\alpha \mu, \; \Sigma_t), \qquad \Sigma_t = \alpha^2 \Sigma + \sigma^2 I \\
    x_0 \mid x_t &\sim N(\mu + \alpha \Sigma \Sigma_t^{-1} (x_t - \alpha \mu), \;
        \sigma^2 \Sigma \Sigma_t^{-1}) \\
    y \mid x_0 \sim N(m, C) &\sim N(A m, \; A C A^T + s^2 I) .

A mixture adds responsibilities, computed as differences of log-densities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.linalg.covariance import Covariance, FullCovariance, IsotropicCovariance
from azula.noise import Schedule
from torch import Tensor

from diffoc.operators import LinearMeasurement


class GaussianPrior(Denoiser):
    r"""The prior :math:`x_0 \sim N(\mu, \Sigma)` of flat states (B, n), with its oracles.

    Args:
        mean: :math:`\mu`, shape (n,).
        covariance: :math:`\Sigma`, a positive definite matrix (n, n), or one of azula's
            structured covariances over (n,), such as `DPLRCovariance` (diagonal + low rank).
        schedule: the noise schedule.

    Raises:
        ValueError: if the shapes disagree, or a matrix is not symmetric and positive definite.
    """

    def __init__(self, mean: Tensor, covariance: Tensor | Covariance, schedule: Schedule) -> None:
        super().__init__()
        if mean.ndim != 1:
            raise ValueError(f"mean has shape {tuple(mean.shape)}, expected (n,)")
        if isinstance(covariance, Tensor):
            n = len(mean)
            if covariance.shape != (n, n):
                raise ValueError(
                    f"covariance has shape {tuple(covariance.shape)}, expected ({n}, {n})"
                )
            if not (covariance - covariance.mT).abs().max() <= 1e-5 * covariance.abs().max():
                raise ValueError("covariance is not symmetric")
            L, Q = torch.linalg.eigh(covariance)
            if not L[0] > 0:
                raise ValueError(f"covariance has the eigenvalue {L[0]:g}, expected above 0")
            covariance = FullCovariance(Q, L)
        self.mean = mean
        self.covariance = covariance
        self.schedule = schedule

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse=recurse)
        self.mean, self.covariance = fn(self.mean), fn(self.covariance)
        return self

    def _marginal(self, t: Tensor) -> tuple[Tensor, Tensor, Covariance]:
        """alpha, sigma and the covariance of x_t."""
        alpha, sigma = self.schedule(torch.as_tensor(t, dtype=self.mean.dtype))
        scaled = IsotropicCovariance(alpha**2) * self.covariance
        return alpha, sigma, scaled + IsotropicCovariance(sigma**2)

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: object) -> DiracPosterior:
        """The posterior mean of x_0 given x_t (B, n) at time t, a scalar."""
        alpha, _, cov_t = self._marginal(t)
        whitened = cov_t.inv(x_t - alpha * self.mean)
        return DiracPosterior(self.mean + alpha * self.covariance(whitened))

    def log_prob(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p(x_t), (B,), for x_t (B, n) at time t, a scalar."""
        alpha, _, cov_t = self._marginal(t)
        d = x_t - alpha * self.mean
        constant = d.shape[-1] * math.log(2 * math.pi) + cov_t.logdet()
        return -((d * cov_t.inv(d)).sum(-1) + constant) / 2

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log p(x_t), (B, n), for x_t (B, n) at time t, a scalar."""
        alpha, _, cov_t = self._marginal(t)
        return -cov_t.inv(x_t - alpha * self.mean)

    def conditional_score(self, x_t: Tensor, t: Tensor, measurement: LinearMeasurement) -> Tensor:
        r"""The exact :math:`\nabla_{x_t} \log p(y \mid x_t)` of Eq. 7, (B, n).

        .. math:: \alpha \Sigma_t^{-1} \Sigma A^T (A C A^T + s^2 I)^{-1} (y - A m(x_t)), \quad
                  C = \sigma^2 \Sigma \Sigma_t^{-1}

        Args:
            x_t: (B, n).
            t: a scalar time.
            measurement: of x_0.
        """
        alpha, sigma, cov_t = self._marginal(t)
        A = measurement.matrix
        gain = self.covariance(cov_t.inv(A))  # rows of A Sigma_t^-1 Sigma; the two commute
        S = _with_noise(sigma**2 * gain @ A.mT, measurement.noise_std)
        residual = measurement.y - self(x_t, t).mean @ A.mT
        return alpha * torch.linalg.solve(S, residual.mT).mT @ gain

    def posterior(self, measurement: LinearMeasurement) -> GaussianPosterior:
        """The exact posterior of x_0 given measurements, and their evidence."""
        A = measurement.matrix
        gain = self.covariance(A)
        S = _with_noise(gain @ A.mT, measurement.noise_std)
        residual = measurement.y - self.mean @ A.mT
        L = torch.linalg.cholesky(S)
        mean = self.mean + torch.cholesky_solve(residual.mT, L).mT @ gain
        covariance = self.matrix - gain.mT @ torch.cholesky_solve(gain, L)
        return GaussianPosterior(mean, covariance, _log_normal(residual, L))

    @property
    def matrix(self) -> Tensor:
        """The covariance as a dense matrix, (n, n)."""
        return self.covariance(torch.eye(len(self.mean)).to(self.mean))

    def _eigen(self, t: float, s: float) -> tuple[Tensor, Tensor, tuple, tuple]:
        """Eigenvalues and eigenvectors of the covariance, and the schedule at t and s."""
        L, Q = torch.linalg.eigh(self.matrix)
        times = torch.tensor([t, s], dtype=L.dtype, device=L.device)
        return L, Q, self.schedule(times[0]), self.schedule(times[1])

    def flow(self, x: Tensor, t: float, s: float) -> Tensor:
        r"""The probability-flow ODE (Eq. 2) solved exactly from time t to s, (B, n).

        .. math:: x_s = \alpha_s \mu + \Sigma_s^{1/2} \Sigma_t^{-1/2} (x_t - \alpha_t \mu)

        Args:
            x: states at t, (B, n).
            t, s: times in [0, 1].
        """
        L, Q, (alpha_t, sigma_t), (alpha_s, sigma_s) = self._eigen(t, s)
        scale = ((alpha_s**2 * L + sigma_s**2) / (alpha_t**2 * L + sigma_t**2)).sqrt()
        return alpha_s * self.mean + ((x - alpha_t * self.mean) @ Q * scale) @ Q.mT

    def reverse_kernel(self, t: float, s: float) -> tuple[Tensor, Tensor, Tensor]:
        r"""The exact transition :math:`x_s \mid x_t \sim N(F x_t + b, C)` of the reverse SDE.

        The forward chain gives :math:`x_t = a x_s + N(0, q I)` with
        :math:`a = \alpha_t / \alpha_s` and :math:`q = \sigma_t^2 - a^2 \sigma_s^2`; Bayes' rule
        does the rest:

        .. math:: F = a \Sigma_s \Sigma_t^{-1}, \quad C = q \, \Sigma_s \Sigma_t^{-1}, \quad
                  b = \alpha_s \mu - F \alpha_t \mu .

        Args:
            t, s: times, 0 <= s < t <= 1.

        Returns:
            F (n, n), b (n,) and C (n, n).
        """
        L, Q, (alpha_t, sigma_t), (alpha_s, sigma_s) = self._eigen(t, s)
        a = alpha_t / alpha_s
        q = sigma_t**2 - a**2 * sigma_s**2
        # In the eigenbasis: products of dense factors would lose two digits over 1000 steps.
        ratio = (alpha_s**2 * L + sigma_s**2) / (alpha_t**2 * L + sigma_t**2)
        F = (Q * (a * ratio)) @ Q.mT
        return F, alpha_s * self.mean - F @ (alpha_t * self.mean), (Q * (q * ratio)) @ Q.mT


@dataclass(frozen=True)
class GaussianPosterior:
    """The posterior of a Gaussian prior under a linear Gaussian measurement.

    Attributes:
        mean: (B, n).
        covariance: the same for all measurements, (n, n).
        log_evidence: log p(y), (B,).
    """

    mean: Tensor
    covariance: Tensor
    log_evidence: Tensor

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent exact samples, (count, B, n)."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root = vectors * values.clamp(min=0).sqrt()
        z = torch.randn(
            count, *self.mean.shape, generator=generator, dtype=root.dtype, device=root.device
        )
        return self.mean + z @ root.mT


@dataclass(frozen=True)
class GaussianMixture:
    r"""A mixture of K low-rank Gaussians over flat vectors, B of them at once.

    Component k has the covariance
    :math:`U_k \,\mathrm{diag}(v_k)\, U_k^T + w_k (I - U_k U_k^T)`: r variances along an orthonormal
    basis and one for all other directions. Scaling, adding isotropic noise and conditioning on it
    keep the basis, so no linear system is ever solved and no variance is a difference.

    Attributes:
        log_weights: normalised, (B or 1, K).
        means: (B or 1, K, n); a prior has one row, a posterior one for each problem.
        basis: U, orthonormal columns, (K, n, r).
        variances: v, (K, r).
        floor: w, (K,).
    """

    log_weights: Tensor
    means: Tensor
    basis: Tensor
    variances: Tensor
    floor: Tensor

    @property
    def mean(self) -> Tensor:
        """(B, n)."""
        return torch.einsum("bk,bkn->bn", self.log_weights.exp(), self.means)

    def _apply(self, along: Tensor, across: Tensor, d: Tensor) -> Tensor:
        """Applies U diag(along) U^T + across (I - U U^T) to d (B, K, n)."""
        projected = torch.einsum("knr,bkn->bkr", self.basis, d)
        lifted = torch.einsum("knr,bkr->bkn", self.basis, (along - across[:, None]) * projected)
        return across[:, None] * d + lifted

    def _joint(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log p(k, x) (B, K) and -grad log p(x | k) (B, K, n), for x = alpha x_0 + sigma noise."""
        n, r = self.basis.shape[-2:]
        along = alpha**2 * self.variances + sigma**2
        across = alpha**2 * self.floor + sigma**2
        d = x.unsqueeze(1) - alpha * self.means
        whitened = self._apply(1 / along, 1 / across, d)
        logdet = along.log().sum(-1) + (n - r) * across.log()
        quadratic = (d * whitened).sum(-1)
        log_density = -(quadratic + logdet + n * math.log(2 * math.pi)) / 2
        return self.log_weights + log_density, whitened

    def log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        r"""The log-density of :math:`\alpha x_0 + \sigma z` at x (B, n), (B,)."""
        return self._joint(x, alpha, sigma)[0].logsumexp(dim=1)

    def score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The gradient of :meth:`log_prob` in x, (B, n)."""
        log_joint, whitened = self._joint(x, alpha, sigma)
        return -torch.einsum("bk,bkn->bn", log_joint.softmax(dim=1), whitened)

    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        r"""The mean of :meth:`given_noisy`, (B, n), without its K means.

        All components' projections are one matrix product and so is their way back, which is what
        a Jacobian of n rows needs to be fast: nothing of size (B, K, n) is made.
        """
        K, n, r = self.basis.shape
        along = alpha**2 * self.variances + sigma**2
        across = alpha**2 * self.floor + sigma**2
        basis = self.basis.movedim(0, 1).reshape(n, K * r)
        means = self.means[0]
        # Distances by the binomial formula; the centre keeps their rounding small.
        centre = self.mean[0]
        z, m = x - alpha * centre, alpha * (means - centre)
        squared = z.square().sum(-1, keepdim=True) - 2 * z @ m.mT + m.square().sum(-1)
        own = torch.einsum("knr,kn->kr", self.basis, m)
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
        r"""The posterior of x_0 given :math:`x = \alpha x_0 + \sigma z`, (B, n)."""
        log_joint, whitened = self._joint(x, alpha, sigma)
        means = self.means + alpha * self._apply(self.variances, self.floor, whitened)
        return GaussianMixture(
            log_joint.log_softmax(dim=1),
            means,
            self.basis,
            self.variances * sigma**2 / (alpha**2 * self.variances + sigma**2),
            self.floor * sigma**2 / (alpha**2 * self.floor + sigma**2),
        )

    def given(self, measurement: LinearMeasurement) -> MixturePosterior:
        """The posterior of x_0 given a linear Gaussian measurement."""
        A = measurement.matrix
        # Rows of A Sigma_k: (K, m, n).
        rows = torch.einsum("knr,mn->kmr", self.basis, A)
        gain = self.floor[:, None, None] * A + torch.einsum(
            "kmr,knr->kmn", rows * (self.variances - self.floor[:, None])[:, None, :], self.basis
        )
        L = torch.linalg.cholesky(_with_noise(gain @ A.mT, measurement.noise_std))
        residual = measurement.y.unsqueeze(1) - self.means @ A.mT  # (B, K, m)
        log_joint = self.log_weights + _log_normal(residual, L)
        return MixturePosterior(
            log_weights=log_joint.log_softmax(dim=1),
            means=self.means + _correction(residual, L, gain),
            log_evidence=log_joint.logsumexp(dim=1),
            prior=self,
            measurement=measurement,
            gain=gain,
            factor=L,
        )

    def sample_components(self, components: Tensor, generator: torch.Generator) -> Tensor:
        """One sample of each named component, (..., n) for components (...); needs B = 1."""
        n, device = self.basis.shape[1], self.basis.device
        z = torch.randn(
            *components.shape, n, generator=generator, dtype=torch.float64, device=device
        ).to(self.basis.dtype)
        U, v, w = self.basis[components], self.variances[components], self.floor[components]
        projected = torch.einsum("...nr,...n->...r", U, z)
        scaled = (v.sqrt() - w.sqrt().unsqueeze(-1)) * projected
        deviation = w.sqrt().unsqueeze(-1) * z + torch.einsum("...nr,...r->...n", U, scaled)
        return self.means[0, components] + deviation


@dataclass(frozen=True)
class MixturePosterior:
    """The posterior of a mixture under a linear Gaussian measurement: again a mixture.

    Attributes:
        log_weights: of the components, (B, K).
        means: of the components, (B, K, n).
        log_evidence: log p(y), (B,).
        prior: the mixture before the measurement.
        measurement: what was measured.
        gain: A Sigma_k, (K, m, n).
        factor: Cholesky factor of A Sigma_k A^T + s^2 I, (K, m, m).
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
        """The posterior mean, (B, n)."""
        return torch.einsum("bk,bkn->bn", self.log_weights.exp(), self.means)

    @property
    def covariances(self) -> Tensor:
        """The components' covariances, dense, (K, n, n)."""
        U, v, w = self.prior.basis, self.prior.variances, self.prior.floor
        identity = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        prior = (U * (v - w[:, None])[:, None, :]) @ U.mT + w[:, None, None] * identity
        return prior - self.gain.mT @ torch.cholesky_solve(self.gain, self.factor)

    @property
    def covariance(self) -> Tensor:
        """The posterior's covariance, within and between components, (B, n, n)."""
        weights = self.log_weights.exp()
        d = self.means - self.mean.unsqueeze(1)
        within = torch.einsum("bk,kij->bij", weights, self.covariances)
        return within + torch.einsum("bk,bki,bkj->bij", weights, d, d)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        r"""Independent exact samples, (count, B, n).

        A prior sample x with its own simulated measurement becomes a posterior sample by the
        linear correction of their mismatch (Matheron's rule): no n x n matrix is formed.
        """
        batch, m = self.measurement.y.shape
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


class GaussianMixturePrior(Denoiser):
    r"""A Gaussian mixture as a diffusion prior, exact at every noise level, with its oracles.

    Args:
        mixture: of flat vectors of n numbers, with B = 1.
        schedule: the noise schedule.
        shape: the shape of one state, of n numbers; (n,) by default.

    Raises:
        ValueError: if the shape does not have n numbers.
    """

    def __init__(
        self, mixture: GaussianMixture, schedule: Schedule, shape: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        n = mixture.means.shape[-1]
        self.shape = torch.Size([n] if shape is None else shape)
        if self.shape.numel() != n:
            raise ValueError(f"shape is {tuple(self.shape)}, but the mixture has {n} numbers")
        for name in ("log_weights", "means", "basis", "variances", "floor"):
            self.register_buffer(name, getattr(mixture, name))
        self.schedule = schedule

    @property
    def mixture(self) -> GaussianMixture:
        """The prior of x_0, flat."""
        return GaussianMixture(self.log_weights, self.means, self.basis, self.variances, self.floor)

    def _scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule(torch.as_tensor(t, dtype=self.means.dtype, device=self.means.device))

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: object) -> DiracPosterior:
        """The posterior mean of x_0 given x_t (B, ...) at time t, a scalar."""
        mean = self.mixture.posterior_mean(x_t.flatten(1), *self._scales(t))
        return DiracPosterior(mean.reshape(x_t.shape))

    def log_prob(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p(x_t), (B,), for x_t (B, ...) at time t, a scalar."""
        return self.mixture.log_prob(x_t.flatten(1), *self._scales(t))

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log p(x_t), shape of x_t (B, ...), at time t, a scalar."""
        return self.mixture.score(x_t.flatten(1), *self._scales(t)).reshape(x_t.shape)

    def conditional_score(self, x_t: Tensor, t: Tensor, measurement: LinearMeasurement) -> Tensor:
        r"""The exact :math:`\nabla_{x_t} \log p(y \mid x_t)` of Eq. 7, shape of x_t (B, ...).

        The evidence of y under p(x_0 | x_t), differentiated automatically.

        Args:
            x_t: (B, ...).
            t: a scalar time.
            measurement: of x_0.
        """
        x = x_t.detach().requires_grad_()
        with torch.enable_grad():
            posterior = self.mixture.given_noisy(x.flatten(1), *self._scales(t))
            log_evidence = posterior.given(measurement).log_evidence
            return torch.autograd.grad(log_evidence.sum(), x)[0]

    def posterior(self, measurement: LinearMeasurement) -> MixturePosterior:
        """The exact posterior of flat x_0 given measurements, and their evidence."""
        return self.mixture.given(measurement)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent samples of x_0, (count, ...)."""
        weights = self.log_weights[0].exp()
        components = torch.multinomial(weights, count, replacement=True, generator=generator)
        flat = self.mixture.sample_components(components, generator)
        return flat.reshape(count, *self.shape)


def mixture_from_loadings(
    log_weights: Tensor, means: Tensor, loadings: Tensor, noise_variance: Tensor
) -> GaussianMixture:
    r"""A mixture from factor-analysis parameters, :math:`\Sigma_k = W_k W_k^T + \psi_k I`.

    Args:
        log_weights: (K,), normalised here.
        means: (K, n).
        loadings: W, (K, n, r) with r < n.
        noise_variance: psi > 0, (K,).

    Raises:
        ValueError: if the shapes disagree or a noise variance is not positive.
    """
    K, n, r = loadings.shape
    if means.shape != (K, n) or log_weights.shape != (K,) or noise_variance.shape != (K,):
        raise ValueError(
            f"loadings has shape {(K, n, r)}, which does not fit log_weights "
            f"{tuple(log_weights.shape)}, means {tuple(means.shape)}, noise_variance "
            f"{tuple(noise_variance.shape)}"
        )
    if not (noise_variance > 0).all():
        raise ValueError("noise_variance must be above 0")
    U, singular, _ = torch.linalg.svd(loadings, full_matrices=False)
    return GaussianMixture(
        log_weights.log_softmax(dim=0).unsqueeze(0),
        means.unsqueeze(0),
        U,
        singular**2 + noise_variance[:, None],
        noise_variance,
    )


def _with_noise(C: Tensor, noise_std: float) -> Tensor:
    return C + noise_std**2 * torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)


def _log_normal(residual: Tensor, L: Tensor) -> Tensor:
    """log N(residual; 0, L L^T) for residuals (B, m) and one factor, or (B, K, m) and K."""
    whitened = torch.linalg.solve_triangular(L, residual.movedim(0, -1), upper=False)
    logdet = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = residual.shape[-1] * math.log(2 * math.pi)
    return -(whitened.square().sum(-2).movedim(-1, 0) + logdet + constant) / 2


def _correction(residual: Tensor, L: Tensor, gain: Tensor) -> Tensor:
    """Sigma A^T S^-1 residual of every component, (B, K, n)."""
    solved = torch.cholesky_solve(residual.movedim(0, -1), L)  # (K, m, B)
    return torch.einsum("kmb,kmn->bkn", solved, gain)
