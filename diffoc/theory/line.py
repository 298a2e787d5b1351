r"""Inverse problems on the real line, where every conditional is an integral that can be computed.

A prior and a likelihood are functions of :math:`x_0`; neither has to be Gaussian, nor smooth.
With :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` and :math:`h_0(x_0) = p(y \mid x_0)`,

.. math::
    h_t(x) = p(y \mid x_t = x) = \int h_0(x_0) \, p(x_0 \mid x_t = x) \, dx_0 .

Integrals are sums over Gauss-Legendre points of panels that end where a function has a kink or a
jump, so that they converge as fast as for smooth functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from azula.noise import Schedule, VPSchedule
from torch import Tensor

from diffoc.checks import check_above

POINTS = 16
"""Gauss-Legendre points of one panel."""

PANEL = 0.4
"""The largest width of a panel; what is narrower than half of it, a kernel or another function, is
not resolved."""

TAIL = 9.0
"""How many standard deviations of a Gaussian are integrated over on either side."""


@dataclass(frozen=True)
class Function:
    """The logarithm of a function on the line, and where it is not smooth.

    `log` maps points of any shape to values of that shape, -inf where the function is zero. The
    breaks increase; a prior's first and last are the ends of what is integrated over.
    """

    log: Callable[[Tensor], Tensor]
    breaks: tuple[float, ...]
    name: str


def bimodal(centre: float = 0.8, spread: float = 0.2, weight: float = 0.6) -> Function:
    """Returns two normals at `centre` (with its `weight`) and `-centre`, not normalised."""
    check_above(0, spread=spread)

    def log(x: Tensor) -> Tensor:
        right = math.log(weight) - ((x - centre) / spread).square() / 2
        left = math.log1p(-weight) - ((x + centre) / spread).square() / 2
        return torch.logaddexp(right, left)

    end = abs(centre) + TAIL * spread
    return Function(log, (-end, end), "bimodal")


def uniform() -> Function:
    """Returns the uniform prior on an interval, not normalised."""
    return Function(torch.zeros_like, (-0.8, 1.0), "uniform")


def laplace() -> Function:
    """Returns the Laplace prior, not normalised, cut off at 30 scales, where it is 1e-13."""
    return Function(lambda x: -(x - 0.1).abs() / 0.3, (-8.9, 0.1, 9.1), "Laplace")


def linear(y: float = 0.4, noise_std: float = 0.3) -> Function:
    """Returns the likelihood of y = x_0 + s noise, up to a constant."""
    return Function(lambda x: -((y - x) / noise_std).square() / 2, (), "linear")


def square() -> Function:
    """Returns the likelihood of x_0^2 + 0.2 noise = 0.5, up to a constant."""
    return Function(lambda x: -((0.5 - x.square()) / 0.2).square() / 2, (), "square")


def label() -> Function:
    """Returns the probability that a logistic classifier says "positive" of x_0."""
    return Function(lambda x: torch.nn.functional.logsigmoid(5 * (x - 0.2)), (), "label")


def indicator() -> Function:
    """Returns the event that x_0 lies in an interval."""

    def log(x: Tensor) -> Tensor:
        return torch.zeros_like(x).masked_fill((x < 0.15) | (x > 0.7), -math.inf)

    return Function(log, (0.15, 0.7), "indicator")


PRIORS = (bimodal, uniform, laplace)
"""None is symmetric around zero, where the gradient of a squared measurement would vanish."""

LIKELIHOODS = (linear, square, label, indicator)


def nodes(breaks: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Returns points and log-weights, (N,) each, of composite Gauss-Legendre quadrature.

    Panels end at each of two or more increasing breaks.
    """
    edges = [np.linspace(a, b, math.ceil((b - a) / PANEL) + 1)[:-1] for a, b in pairwise(breaks)]
    left = np.append(np.concatenate(edges), breaks[-1])
    unit, weights = np.polynomial.legendre.leggauss(POINTS)
    half = np.diff(left)[:, None] / 2
    points = left[:-1, None] + half * (unit + 1)
    return torch.from_numpy(points.ravel()), torch.from_numpy((half * weights).ravel()).log()


@dataclass(frozen=True)
class LineProblem:
    """A prior and a likelihood of x_0, up to constants, and a schedule with sigma = 0 at t = 0."""

    prior: Function
    likelihood: Function
    schedule: Schedule = field(default_factory=lambda: VPSchedule(sigma_min=0.0))

    def scales(self, t: float) -> tuple[float, float]:
        """Returns alpha and sigma at time t."""
        alpha, sigma = self.schedule(torch.tensor(t, dtype=torch.float64))
        return alpha.item(), sigma.item()

    def forward_kernel(self, t: float, s: float) -> tuple[float, float]:
        r"""Returns f and v of :math:`x_t = f x_s + \sqrt v \, \epsilon`, for s < t."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.scales(t), self.scales(s)
        f = alpha_t / alpha_s
        return f, sigma_t**2 - f**2 * sigma_s**2

    def log_h(self, x: Tensor, t: float) -> Tensor:
        """Returns log p(y | x_t = x), of the shape of x, by one integral over x_0 for each."""
        if t == 0:
            return self.likelihood.log(x)
        z, log_w, log_prior, log_likelihood = self._clean
        # p(x_0, x_t) over x_0: one row a state
        log_joint = log_w + log_prior + _log_normal(x, *self.scales(t), z)
        return (log_joint + log_likelihood).logsumexp(-1) - log_joint.logsumexp(-1)

    @torch.enable_grad()
    def score(self, x: Tensor, t: float) -> Tensor:
        """Returns the derivative of :meth:`log_h` by automatic differentiation, of x's shape."""
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.log_h(x, t).sum(), x)[0]

    def reverse_step(self, x: Tensor, t: float, s: float) -> ReverseStep:
        """Returns the kernel p(x_s | x_t = x), discretised, and h_s at its points.

        The states x are (B,), and 0 <= s < t. The density of x_s is an integral over x_0 of
        its own, so that a mean over this kernel and the derivative of :meth:`log_h` have no sum in
        common.
        """
        points, log_w, log_density, log_h = z, log_v, log_prior, log_likelihood = self._clean
        if s > 0:
            alpha, sigma = self.scales(s)
            low, high = self.prior.breaks[0], self.prior.breaks[-1]
            points, log_w = nodes((alpha * low - TAIL * sigma, alpha * high + TAIL * sigma))
            log_joint = log_v + log_prior + _log_normal(points, alpha, sigma, z)
            log_density = log_joint.logsumexp(1)
            log_h = (log_joint + log_likelihood).logsumexp(1) - log_density
        f, v = self.forward_kernel(t, s)
        log_kernel = log_w + log_density + _log_normal(x, f, v**0.5, points)
        return ReverseStep(points, log_w, log_kernel.log_softmax(-1), log_h)

    @property
    def _clean(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns points for x_0, their log-weights, log-prior and log-likelihood, (N,) each."""
        low, high = self.prior.breaks[0], self.prior.breaks[-1]
        inner = (b for b in self.likelihood.breaks if low < b < high)
        z, log_w = nodes(tuple(sorted({*self.prior.breaks, *inner})))
        return z, log_w, self.prior.log(z), self.likelihood.log(z)


@dataclass(frozen=True)
class ReverseStep:
    """One step of the reverse chain as probabilities of points: the transition of B states.

    Attributes:
        points: the points x_s, (N,).
        log_weights: their log-weights in the quadrature, (N,).
        log_prob: their log-probabilities given x_t, (B, N).
        log_h: log p(y | x_s) at the points, (N,).
    """

    points: Tensor
    log_weights: Tensor
    log_prob: Tensor
    log_h: Tensor

    @property
    def mean(self) -> Tensor:
        """Returns E[x_s | x_t], (B,)."""
        return self.log_prob.exp() @ self.points

    @property
    def density(self) -> Tensor:
        """Returns p(x_s | x_t) at the points, (B, N)."""
        return (self.log_prob - self.log_weights).exp()

    @property
    def conditional_density(self) -> Tensor:
        """Returns p(x_s | x_t, y) at the points, (B, N): the kernel tilted by h_s."""
        return ((self.log_prob + self.log_h).log_softmax(-1) - self.log_weights).exp()

    @property
    def conditional_mean(self) -> Tensor:
        """Returns E[x_s | x_t, y], (B,)."""
        return (self.log_prob + self.log_h).softmax(-1) @ self.points

    @property
    def log_h_before(self) -> Tensor:
        """Returns log p(y | x_t), (B,), by the recursion h_t(x) = E[h_s(x_s) | x_t = x]."""
        return (self.log_prob + self.log_h).logsumexp(-1)

    def cost(self, log_kernel: Tensor) -> Tensor:
        """Returns what any kernel q pays: KL(q || p(x_s | x_t)) - E_q[log h_s], (B,).

        Its log-probabilities are (B, N).
        """
        q = log_kernel.exp()
        terms = log_kernel - self.log_prob - self.log_h
        return torch.where(q > 0, q * terms, 0).sum(-1)


def _log_normal(x: Tensor, scale: float, std: float, z: Tensor) -> Tensor:
    """Returns log N(x; scale z, std^2) up to a constant, states (B, ...) by points (N,)."""
    return -((x[..., None] - scale * z) / std).square() / 2
