r"""Estimates of grad log p(y | x_t), side by side.

With :math:`m = E[x_0 \mid x_t]`, its Jacobian J and Tweedie's covariance
:math:`\mathrm{Cov}[x_0 \mid x_t] = (\sigma^2 / \alpha) J`, which is symmetric for an exact prior:

.. math::
    \text{Tweedie (DPS)} &: J^T A^T (y - A m) / s^2 \\
    \text{with covariance} &: J^T A^T (s^2 I + \tfrac{\sigma^2}{\alpha} A J A^T)^{-1} (y - A m) \\
    \text{rollout} &: -\nabla_{x} \ell(x_0(x)), \; x_0(x) \text{ the end of the flow} \\
    \text{Feynman-Kac} &: \tfrac{\alpha}{\sigma^2}
        \big(E[x_0 \mid x_t, y] - m\big), \text{ by weighted draws of } x_0 \mid x_t .

The second is exact for a Gaussian prior (arXiv:2405.13712). The last is the two Tweedie formulas
subtracted, see notebook 14; its weights are the likelihoods of the draws. A cost l maps x_0
(B, ...) to -log p(y | x_0), (B,).
"""

from collections.abc import Callable, Sequence

import torch
from azula.denoise import Denoiser
from torch import Tensor

from diffoc.checks import evaluating
from diffoc.priors.gaussian import GaussianMixturePrior
from diffoc.priors.mixture import GaussianMixture, with_noise
from diffoc.problems.operators import LinearMeasurement
from diffoc.process import ReverseProcess

Score = Callable[[Tensor, Tensor], Tensor]
"""Maps states (B, ...) and a scalar time to estimates of grad log p(y | x_t), (B, ...)."""


def tweedie_score(prior: Denoiser, cost: Callable[[Tensor], Tensor]) -> Score:
    """Returns the gradient of DPS, which takes x_0 for its mean; the prior may be a network."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad(), evaluating(prior, cost):
            total = cost(prior(x, t).mean).sum()
        return -torch.autograd.grad(total, x)[0]

    return score


def covariance_score(prior: Denoiser, measurement: LinearMeasurement) -> Score:
    """Returns the gradient that takes x_0 for a Gaussian of its mean and covariance.

    The states are (B, n), y is (1, m). A call costs m vector-Jacobian products.
    """
    A, y, s = measurement.matrix, measurement.y, measurement.noise_std

    def score(x: Tensor, t: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad(), evaluating(prior):
            m = prior(x, t).mean
        rows = A.unsqueeze(1).expand(-1, *x.shape)
        AJ = torch.autograd.grad(m, x, rows, is_grads_batched=True)[0].movedim(0, 1)  # (B, m, n)
        alpha, sigma = prior.schedule(t)
        S = with_noise(sigma**2 / alpha * AJ @ A.mT, s)
        whitened = torch.linalg.solve(S, (y - m.detach() @ A.mT).unsqueeze(-1))
        return (AJ.mT @ whitened).squeeze(-1)

    return score


def rollout_score(prior: Denoiser, cost: Callable[[Tensor], Tensor], steps: int = 20) -> Score:
    """Returns the paper's gradient, through `steps` steps of DDIM from t > 0 to the image."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        times = torch.linspace(float(t), 0, steps + 1, dtype=torch.float64)
        with torch.enable_grad():
            total = cost(ReverseProcess(prior, times).rollout(x)[-1]).sum()
        return -torch.autograd.grad(total, x)[0]

    return score


def feynman_kac(
    prior: GaussianMixturePrior,
    cost: Callable[[Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    count: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    r"""Estimates grad log p(y | x_t) at one state x, (n,), and time t > 0 by `count` draws.

    Eq. 26 has p(y | x_t) as an integral over x_0, which is taken by these draws:

    .. math:: \frac{\alpha}{\sigma^2} \sum_j w_j (x_0^j - m), \qquad
              w_j \propto p(y \mid x_0^j), \quad x_0^j \sim p(x_0 \mid x_t)

    The endings are exact draws: on a network they are ends of the simulated reverse process. The
    estimate is returned with its standard errors (delta method), (n,) each.
    """
    alpha, sigma = prior.schedule(t)
    belief = prior.mixture.given_noisy(x[None], alpha, sigma)
    components = torch.multinomial(
        belief.log_weights[0].exp(), count, replacement=True, generator=generator
    )
    draws = belief.sample_components(components, generator)
    w = (-cost(draws)).softmax(0)
    centre = w @ draws
    spread = (w.square() @ (draws - centre).square()).sqrt()
    scale = alpha / sigma**2
    return scale * (centre - belief.mean[0]), scale * spread


def members(mixture: GaussianMixture, labels: Sequence[int]) -> GaussianMixture:
    """Returns the mixture of the components with these labels alone, its weights normalised."""
    chosen = torch.zeros(len(mixture.basis), dtype=torch.bool)
    chosen[torch.as_tensor(labels)] = True
    return GaussianMixture(
        mixture.log_weights[:, chosen].log_softmax(1),
        mixture.means[:, chosen],
        mixture.basis[chosen],
        mixture.variances[chosen],
        mixture.floor[chosen],
    )


def label_score(prior: GaussianMixturePrior, labels: Sequence[int]) -> Score:
    """Returns the gradient of log p(label | x_t); the label says which components x_0 is from."""
    labelled = members(prior.mixture, labels)

    def score(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = prior.schedule(t)
        return labelled.score(x, alpha, sigma) - prior.mixture.score(x, alpha, sigma)

    return score


@torch.no_grad()
def conditional_rollout(process: ReverseProcess, score: Score, x: Tensor) -> Tensor:
    r"""Returns the end of a process of any method, E[x_0 | x_t, y] in the place of E[x_0 | x_t].

    .. math:: E[x_0 \mid x_t, y] = E[x_0 \mid x_t] + \frac{\sigma^2}{\alpha}
              \nabla \log p(y \mid x_t)

    Of DDPM's step it displaces the mean by exactly (v / f) grad log p(y | x_t). The states x,
    (B, ...), are those at the process's first time.
    """
    for i, t in enumerate(process.times[:-1]):
        alpha, sigma = process.denoiser.schedule(t)
        with evaluating(process.denoiser):
            mean = process.denoiser(x, t).mean
        mean = mean + sigma**2 / alpha * score(x, t)
        x = process.affine(i, x, mean)
    return x
