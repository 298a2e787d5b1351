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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.linalg.covariance import FullCovariance, IsotropicCovariance
from azula.noise import Schedule
from torch import Tensor

from diffoc.checks import check_alike, check_size, check_tensor, check_within
from diffoc.priors.mixture import (
    GaussianMixture,
    MixturePosterior,
    log_normal,
    matrix_for,
    with_noise,
)
from diffoc.problems.operators import LinearMeasurement


class GaussianPrior(Denoiser):
    r"""The prior :math:`x_0 \sim N(\mu, \Sigma)` of flat states (B, n), with its oracles.

    The mean is (n,), the covariance (n, n), symmetric and positive definite. Times are scalars.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, schedule: Schedule) -> None:
        super().__init__()
        check_tensor("mean", mean)
        check_tensor("covariance", covariance)
        check_alike(mean=mean, covariance=covariance)
        n = mean.numel()
        check_size((n,), mean=mean)
        check_size((n, n), covariance=covariance)
        if not (covariance - covariance.mT).abs().max() <= 1e-5 * covariance.abs().max():
            raise ValueError("covariance is not symmetric")
        L, Q = torch.linalg.eigh(covariance)
        if not L[0] > 0:
            raise ValueError(f"covariance has the eigenvalue {L[0]:g}, expected above 0")
        self.mean = mean
        self.covariance = FullCovariance(Q, L)
        self.schedule = schedule

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GaussianPrior:
        # What .to(), .float() and .cuda() call: the covariance's tensors are no buffers.
        super()._apply(fn, recurse=recurse)
        self.mean = fn(self.mean)
        self.covariance = FullCovariance(fn(self.covariance.Q), fn(self.covariance.L))
        return self

    def _centred(self, x_t: Tensor, alpha: Tensor) -> Tensor:
        """Returns x_t - alpha mu; broadcast shapes would be taken for states."""
        if x_t.shape[-1:] != self.mean.shape:
            raise ValueError(f"x_t has shape {tuple(x_t.shape)}, expected (B, {len(self.mean)})")
        return x_t - alpha * self.mean

    def _marginal(self, t: Tensor) -> tuple[Tensor, Tensor, FullCovariance]:
        """Returns alpha, sigma and the covariance of x_t."""
        check_size((), t=torch.as_tensor(t).squeeze())
        alpha, sigma = self.schedule(torch.as_tensor(t, dtype=self.mean.dtype))
        scaled = IsotropicCovariance(alpha**2) * self.covariance
        return alpha, sigma, scaled + IsotropicCovariance(sigma**2)

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: object) -> DiracPosterior:
        alpha, _, cov_t = self._marginal(t)
        whitened = cov_t.inv(self._centred(x_t, alpha))
        return DiracPosterior(self.mean + alpha * self.covariance(whitened))

    def log_prob(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns log p(x_t), (B,)."""
        alpha, _, cov_t = self._marginal(t)
        d = self._centred(x_t, alpha)
        constant = d.shape[-1] * math.log(2 * math.pi) + cov_t.logdet()
        return -((d * cov_t.inv(d)).sum(-1) + constant) / 2

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns grad log p(x_t), (B, n)."""
        alpha, _, cov_t = self._marginal(t)
        return -cov_t.inv(self._centred(x_t, alpha))

    def conditional_score(self, x_t: Tensor, t: Tensor, measurement: LinearMeasurement) -> Tensor:
        r"""Returns the exact :math:`\nabla_{x_t} \log p(y \mid x_t)` of Eq. 7, (B, n).

        .. math:: \alpha \Sigma_t^{-1} \Sigma A^T (A C A^T + s^2 I)^{-1} (y - A m(x_t)), \quad
                  C = \sigma^2 \Sigma \Sigma_t^{-1}
        """
        alpha, sigma, cov_t = self._marginal(t)
        A = matrix_for(self.mean, measurement)
        gain = self.covariance(cov_t.inv(A))  # rows of A Sigma_t^-1 Sigma; the two commute
        S = with_noise(sigma**2 * gain @ A.mT, measurement.noise_std)
        residual = measurement.y - self(x_t, t).mean @ A.mT
        return alpha * torch.linalg.solve(S, residual.mT).mT @ gain

    def posterior(self, measurement: LinearMeasurement) -> GaussianPosterior:
        """Returns the exact posterior of x_0 given measurements, and their evidence."""
        A = matrix_for(self.mean, measurement)
        gain = self.covariance(A)
        S = with_noise(gain @ A.mT, measurement.noise_std)
        residual = measurement.y - self.mean @ A.mT
        L = torch.linalg.cholesky(S)
        mean = self.mean + torch.cholesky_solve(residual.mT, L).mT @ gain
        covariance = self.matrix - gain.mT @ torch.cholesky_solve(gain, L)
        return GaussianPosterior(mean, covariance, log_normal(residual, L))

    @property
    def matrix(self) -> Tensor:
        """Returns the covariance as a dense matrix, (n, n)."""
        return self.covariance(torch.eye(len(self.mean)).to(self.mean))

    def _eigen(self, t: float, s: float) -> tuple[Tensor, Tensor, tuple, tuple]:
        """Returns eigenvalues and eigenvectors of the covariance, and the schedule at t and s."""
        L, Q = torch.linalg.eigh(self.matrix)
        times = torch.tensor([t, s], dtype=L.dtype, device=L.device)
        return L, Q, self.schedule(times[0]), self.schedule(times[1])

    def flow(self, x: Tensor, t: float, s: float) -> Tensor:
        r"""Returns states (B, n) at time s by the exact probability-flow ODE (Eq. 2) from time t.

        .. math:: x_s = \alpha_s \mu + \Sigma_s^{1/2} \Sigma_t^{-1/2} (x_t - \alpha_t \mu)
        """
        L, Q, (alpha_t, sigma_t), (alpha_s, sigma_s) = self._eigen(t, s)
        scale = ((alpha_s**2 * L + sigma_s**2) / (alpha_t**2 * L + sigma_t**2)).sqrt()
        return alpha_s * self.mean + (self._centred(x, alpha_t) @ Q * scale) @ Q.mT

    def reverse_kernel(self, t: float, s: float) -> tuple[Tensor, Tensor, Tensor]:
        r"""Returns F, b and C of the reverse SDE's exact :math:`x_s | x_t \sim N(F x_t + b, C)`.

        From s, at most t, the forward chain gives :math:`x_t = a x_s + N(0, q I)` with
        :math:`a = \alpha_t / \alpha_s` and :math:`q = \sigma_t^2 - a^2 \sigma_s^2`; Bayes' rule
        does the rest:

        .. math:: F = a \Sigma_s \Sigma_t^{-1}, \quad C = q \, \Sigma_s \Sigma_t^{-1}, \quad
                  b = \alpha_s \mu - F \alpha_t \mu .
        """
        check_within(0, t, s=s)
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

    The means are (B, n); one covariance, (n, n), serves all measurements; log p(y) is (B,).
    """

    mean: Tensor
    covariance: Tensor
    log_evidence: Tensor

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Returns independent exact samples, (count, B, n)."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root = vectors * values.clamp(min=0).sqrt()
        z = torch.randn(
            count, *self.mean.shape, generator=generator, dtype=root.dtype, device=root.device
        )
        return self.mean + z @ root.mT


class GaussianMixturePrior(Denoiser):
    r"""A Gaussian mixture as a diffusion prior, exact at every noise level, with its oracles.

    The mixture is of flat vectors of n numbers, with B = 1; the shape of one state, of n numbers,
    is (n,) by default. Times are scalars.
    """

    def __init__(
        self, mixture: GaussianMixture, schedule: Schedule, shape: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        K, n, _ = mixture.basis.shape
        check_size((1, K, n), means=mixture.means)
        self.shape = torch.Size([n] if shape is None else shape)
        if self.shape.numel() != n:
            raise ValueError(f"shape is {tuple(self.shape)}, but the mixture has {n} numbers")
        for name in ("log_weights", "means", "basis", "variances", "floor"):
            self.register_buffer(name, getattr(mixture, name))
        self.schedule = schedule

    @property
    def mixture(self) -> GaussianMixture:
        """Returns the prior of x_0, flat."""
        return GaussianMixture(self.log_weights, self.means, self.basis, self.variances, self.floor)

    def _flat(self, x_t: Tensor) -> Tensor:
        if x_t.shape[1:].numel() != self.shape.numel():
            raise ValueError(f"x_t has shape {tuple(x_t.shape)}, expected {('B', *self.shape)}")
        return x_t.flatten(1)

    def _scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        check_size((), t=torch.as_tensor(t).squeeze())
        return self.schedule(torch.as_tensor(t, dtype=self.means.dtype, device=self.means.device))

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: object) -> DiracPosterior:
        mean = self.mixture.posterior_mean(self._flat(x_t), *self._scales(t))
        return DiracPosterior(mean.reshape(x_t.shape))

    def log_prob(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns log p(x_t), (B,)."""
        return self.mixture.log_prob(self._flat(x_t), *self._scales(t))

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns grad log p(x_t), (B, ...)."""
        return self.mixture.score(self._flat(x_t), *self._scales(t)).reshape(x_t.shape)

    def conditional_score(self, x_t: Tensor, t: Tensor, measurement: LinearMeasurement) -> Tensor:
        r"""Returns the exact :math:`\nabla_{x_t} \log p(y | x_t)` of Eq. 7, (B, ...)."""
        rows = torch.broadcast_shapes(x_t.shape[:1], measurement.y.shape[:1])
        x = x_t.detach().expand(*rows, *x_t.shape[1:]).requires_grad_()
        with torch.enable_grad():
            posterior = self.mixture.given_noisy(self._flat(x), *self._scales(t))
            log_evidence = posterior.given(measurement).log_evidence
            return torch.autograd.grad(log_evidence.sum(), x)[0]

    def posterior(self, measurement: LinearMeasurement) -> MixturePosterior:
        """Returns the exact posterior of flat x_0 given measurements, and their evidence."""
        return self.mixture.given(measurement)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Returns independent samples of x_0, (count, ...)."""
        weights = self.log_weights[0].exp()
        components = torch.multinomial(weights, count, replacement=True, generator=generator)
        flat = self.mixture.sample_components(components, generator)
        return flat.reshape(count, *self.shape)
