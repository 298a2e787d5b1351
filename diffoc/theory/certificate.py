r"""How far a guided sampler is from the posterior, without knowing the posterior.

A chain :math:`x_{i+1} \sim N(\mu_i(x_i), c_i^2 I)` is guided by shifting its means by
:math:`u_i(x_i)`. Let l be -log p(y | x_0), Z the mean of e^{-l} over the chain that is not guided
(the p(y) of the chain), and call the unguided paths weighted by e^{-l} / Z the posterior's. Then

.. math:: E\Big[\sum_i \frac{|u_i|^2}{2 c_i^2} + l(x_T)\Big] + \log Z
          = \mathrm{KL}(\text{guided paths} \,\|\, \text{posterior's})
          \ge \mathrm{KL}(\text{law of } x_T \,\|\, \text{its posterior}) \ge 0 ,

for any guidance whatever (Girsanov's theorem in discrete time; the inequality is that of data
processing). The expectation on the left, the work, is an average over runs of the sampler. Z does
not depend on the guidance, so that it cancels where methods are compared on one chain.

Each run has a weight :math:`w = e^{-l} \, dP / dQ` whose mean is Z, with P the unguided paths and Q
the guided. For the noise :math:`\epsilon_i` of the run

.. math:: -\log w = l(x_T) + \sum_i \Big[
          \frac{|u_i|^2}{2 c_i^2} + \frac{u_i \cdot \epsilon_i}{c_i}\Big]

has the work's mean, since :math:`u_i` does not know :math:`\epsilon_i`, and the less variance the
closer the guided paths are to the posterior's. So it is this that is averaged. The effective
sample size :math:`(\sum w)^2 / \sum w^2` looks the other way, whether the guided paths are
everywhere where the posterior's are (Thijssen & Kappen 2015, doi:10.1103/PhysRevE.91.032104).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffoc.checks import check_size
from diffoc.process import ReverseProcess
from diffoc.theory.guidance import Score

Guidance = Callable[[int, Tensor, Tensor], Tensor]
"""Maps a step i, states x (B, ...) and the means of their kernels (B, ...) to shifts (B, ...)."""


@dataclass(frozen=True)
class Certificate:
    """Independent runs of a guided chain and what they cost.

    Attributes:
        x0: the images that the runs end in, (B, ...).
        work: the sum of :math:`|u|^2 / (2 c^2)` and l(x_0), (B,).
        log_weights: the logarithm of the weight w, (B,).
    """

    x0: Tensor
    work: Tensor
    log_weights: Tensor

    @property
    def mean_work(self) -> tuple[float, float]:
        """Returns the mean of -log w, the expected work, and its standard error, in nats."""
        count = len(self.log_weights)
        return -self.log_weights.mean().item(), self.log_weights.std().item() / count**0.5

    @property
    def log_evidence(self) -> tuple[float, float]:
        """Returns the mean weight's logarithm, which estimates log Z, and its standard error."""
        count = len(self.log_weights)
        w = self.log_weights.softmax(0) * count
        log_mean = self.log_weights.logsumexp(0).item() - math.log(count)
        return log_mean, w.std().item() / count**0.5

    @property
    def effective(self) -> float:
        """Returns the effective sample size as a share of the runs, in ]0, 1]."""
        w = self.log_weights.softmax(0)
        return 1 / (len(w) * w.square().sum().item())

    def divergence(self, log_evidence: tuple[float, float]) -> tuple[float, float]:
        """Returns KL(guided paths || posterior's) in nats, with its standard error.

        Log Z and its standard error are best those of a well guided run of the chain.
        """
        (work, work_error), (log_Z, error) = self.mean_work, log_evidence
        return work + log_Z, math.hypot(work_error, error)


@torch.no_grad()
def certify(
    process: ReverseProcess, cost: Callable[[Tensor], Tensor], guidance: Guidance, x: Tensor
) -> Certificate:
    """Runs a guided chain and accounts for it.

    The process is "ddpm", with the noise of all runs; its prior may be a network. The cost l maps
    x_0 (B, ...) to (B,). The guidance is zero where the chain has no noise. The starts x, (B, ...),
    are drawn as :meth:`ReverseProcess.initial_state` does.
    """
    if process.noise is None:
        raise ValueError("process has no noise: a certificate needs method 'ddpm'")
    process.check_noise(x)
    control = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    log_ratio = torch.zeros_like(control)  # log dP / dQ
    for i, (a, b, c) in enumerate(process.coefficients):
        t = process.times[i].to(x)
        mean = a * x + b * process.denoiser(x, t).mean
        u = guidance(i, x, mean)
        check_size(x.shape, guidance=u)
        x = mean + u
        if c > 0:
            noise = process.noise[i].to(x)
            price = (u / c).flatten(1).square().sum(1) / 2
            control = control + price
            log_ratio = log_ratio - price - (u / c * noise).flatten(1).sum(1)
            x = x + c * noise
        elif u.any():
            raise ValueError(f"step {i} has no noise, but guidance shifts it")
    terminal = cost(x)
    check_size((len(x),), cost=terminal)
    return Certificate(x, control + terminal, log_ratio - terminal)


def noise_priced(process: ReverseProcess, score: Score) -> Guidance:
    r"""Returns the shift :math:`c_i^2 \hat g(\mu_i(x), t_{i+1})` of an estimate of the score.

    It is what the quadratic price :math:`|u|^2 / (2 c^2)` makes of V = -log h to first order, with
    the gradient taken where the control acts, as in Theorem 4.1's output mode. The estimate is not
    asked at time 0 if no noise is left there.
    """

    def guidance(i: int, x: Tensor, mean: Tensor) -> Tensor:
        c = process.coefficients[i][2]
        if c == 0:
            return torch.zeros_like(mean)
        return c**2 * score(mean, process.times[i + 1].to(mean))

    return guidance
