r"""The controller as the authors' released code has it, which is not the paper's.

=============  ===================================  ===========================================
.              the paper                            the released code
=============  ===================================  ===========================================
process        T deterministic steps (Eq. 3)        T - 1 ancestral ones with frozen noise and
                                                    clipped image
terminal cost  half the squared residual over s^2   the norm of the residual
control cost   none (Eq. 28)                        :func:`released_weights`
derivatives    rank 1                               rank 0, so that all feedback vanishes
update         Adam on the gains                    AdamW on the gains, weight decay 0.01
result         not said                             the last iterate
=============  ===================================  ===========================================

A step of the process is, at the levels of noise of :func:`respaced_levels`,

.. math:: x_{i+1} = a_i x + b_i \, \mathrm{clip}(m(x)) + c_i \, \varepsilon_i , \quad x = x_i + u_i,

where m(x) is the prior's estimate of the image, clipped to [-1, 1], a_i, b_i and c_i are those of
DDPM, and the noise is frozen. Its gain is :math:`k = -Q_u / (r + 0.001)`. Adam divides that by its
own size, so that only the direction of :math:`Q_u = r u + f_u^T p` counts. What the code's inverse
takes from the gain is left out by default, see :class:`ShrinkingValue`. The code also evaluates the
prior three times in each step of an iteration, of which ours needs one.

Source: github.com/lihenryhfl/diffusion_optimal_control, commit f20ebff; Ho et al. 2020
(arXiv:2006.11239); Nichol & Dhariwal 2021 (arXiv:2102.09672) for respacing and for the learned
variance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from azula.denoise import Denoiser, GaussianPosterior, Posterior
from azula.noise import Schedule
from torch import Tensor

from diffoc.baselines import Given, Method, method
from diffoc.baselines.noise_level import times_of_levels
from diffoc.checks import check_tensor, check_whole
from diffoc.costs import residual_of
from diffoc.lowrank import LowRankExpansion, LowRankGains, LowRankValue, MatrixFree
from diffoc.problem import Problem
from diffoc.process import METHODS, ReverseProcess, draw_noise
from diffoc.recipe import Recipe
from diffoc.rules import Adam
from diffoc.system import ControlProblem

LEVELS = 1000
"""Of the chain that is respaced."""


def respaced_levels(steps: int) -> Tensor:
    r"""Returns the levels :math:`\bar\alpha` of T points of DDPM's chain, the least noisy first.

    .. math:: \bar\alpha_j = \prod_{i \le j} (1 - \beta_i), \qquad
              j = \mathrm{round}(999 \, k / (T - 1)), \quad k = 0 \dots T - 1

    with :math:`\beta` linear from 0.0001 to 0.02, in float64; T is 2 to 1000.
    """
    if not 2 <= steps <= LEVELS:
        raise ValueError(f"steps is {steps}, expected 2 to {LEVELS}")
    bar = (1 - torch.linspace(1e-4, 0.02, LEVELS, dtype=torch.float64)).cumprod(0)
    return bar[[round((LEVELS - 1) / (steps - 1) * k) for k in range(steps)]]


class AncestralProcess(ReverseProcess):
    r"""The released code's process, in input mode (Eq. 17), for any prior.

    Its T points in time give T - 1 steps, the first of which is for the second noisiest level: the
    noisiest is never used. The last step returns the clipped image and adds no noise. The state has
    unit variance at every level whatever the prior's schedule: :attr:`scales` converts.

    Args:
        denoiser: the prior, any azula denoiser.
        steps: the number T of points in time, 2 to 1000; the horizon is T - 1.
        noise: the frozen standard normal noise, (T - 1, B, ...), see
            :func:`diffoc.process.draw_noise`; the last step's is not used.
        learned_variance: whether the variance of a step is that of the prior's own head, between
            the smallest and the largest possible one; by default it is the smallest. The prior must
            then be an azula `AblatedDenoiser` with `learn_var`, whose posterior has the variance
            :math:`(1 - \bar\alpha) e^v` for the head's output v.
    """

    noise: Tensor

    def __init__(
        self, denoiser: Denoiser, steps: int, noise: Tensor, learned_variance: bool = False
    ) -> None:
        bar = respaced_levels(steps)[:-1].flip(0)
        ratios = (1 / bar - 1).sqrt()
        alpha, sigma = denoiser.schedule(torch.ones((), dtype=torch.float64))
        if ratios[0] > sigma / alpha:
            raise ValueError(
                f"steps is {steps}, which begins at {ratios[0]:.4g} times as much noise as image, "
                f"but the prior's schedule ends at {sigma / alpha:.4g}: take fewer steps, or "
                "another schedule for the prior"
            )
        times = torch.cat([times_of_levels(denoiser.schedule, ratios), torch.zeros(1)])
        super().__init__(denoiser, times, "ddpm", "input", noise)
        # After the last step nothing is noise.
        bar = torch.cat([bar, torch.ones(1)])

        def schedule(i: Tensor) -> tuple[Tensor, Tensor]:
            return bar[i].sqrt(), (1 - bar[i]).sqrt()

        first = torch.arange(steps - 1)
        self.coefficients = torch.stack(
            METHODS["ddpm"](schedule, first, first + 1), dim=-1
        ).tolist()
        alpha, sigma = denoiser.schedule(times[:-1])
        self.scales: list[float] = (alpha.square() + sigma.square()).sqrt().tolist()
        self.learned_variance = learned_variance
        self._levels = (1 - bar[:-1]).tolist()
        self._largest = (1 - bar[:-1] / bar[1:]).sqrt().tolist()

    def initial_state(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draws a state from N(0, I), of a shape (B, ...), in float64 on the generator's device."""
        return draw_noise(1, shape, generator)[0]

    def step(self, i: int, x: Tensor, u: Tensor | None = None) -> Tensor:
        if u is not None:
            x = x + u
        t = self.times[i].to(dtype=x.dtype, device=x.device)
        posterior = self.denoiser(self.scales[i] * x, t)
        a, b, c = self.coefficients[i]
        std = self._learned_std(i, posterior) if self.learned_variance and c else c
        y = a * x + b * posterior.mean.clamp(-1, 1)
        return y + std * self.noise[i].to(y.dtype)

    def _learned_std(self, i: int, posterior: Posterior) -> Tensor:
        """Returns step i's: the smallest for v = -1, the largest for 1, by logarithms between."""
        _, _, smallest = self.coefficients[i]
        # Without the head azula's networks have one variance for all pixels.
        has_head = isinstance(posterior, GaussianPosterior)
        if not has_head or posterior.var.shape != posterior.mean.shape:
            raise ValueError(
                "learned_variance is True, but the prior has no head for the variance: see "
                "load_prior(..., learned_variance=True)"
            )
        v = (posterior.var / self._levels[i]).log()
        return smallest * (self._largest[i] / smallest) ** ((v + 1) / 2)


def released_weights(steps: int) -> Tensor:
    r"""Returns weights of the control cost as in the released code, (T - 1,), float64, T >= 2.

    .. math:: r_i = \frac{1}{dt^2} \sqrt{\frac{1 - \beta_i}{\beta_i + 10^{-7}}}, \qquad
              dt = \frac{1 - 10^{-3}}{T}

    :math:`\beta_i` is one of DDPM's 1000 steps, at the time :math:`t_i` of the T from 1 to 0.001.
    What the root is called there is a signal-to-noise ratio, which would have the product of all
    steps in place of the one. With that, :func:`diffoc.baselines.paper.snr_weights`, weights are
    hundreds of times less in the first of 20 steps, and five to ten times in the last.
    """
    check_whole(2, steps=steps)
    # In single precision, as there: the index is a product that is cut off.
    index = (torch.linspace(1, 1e-3, steps)[:-1] * (LEVELS - 1)).long()
    beta = torch.linspace(1e-4, 0.02, LEVELS, dtype=torch.float64)[index]
    dt = (1 - 1e-3) / steps
    return 1 / dt**2 * ((1 - beta) / (beta + 1e-7)).sqrt()


@dataclass(frozen=True)
class ResidualNorm:
    r"""The terminal cost :math:`\|A(x_0) - y\|` of the authors' released code, not its square.

    Its gradient has the length of the operator's derivative however small the residual is, so
    that an iteration does not slow down towards y, nor does it settle there. It is twice
    differentiable but for a residual of zero, where its derivatives count as zero. The operator A
    is a differentiable callable; y is (B, ...), or (1, ...) for one that all problems share.
    """

    operator: Callable[[Tensor], Tensor]
    y: Tensor

    def __post_init__(self) -> None:
        check_tensor("y", self.y)

    def __call__(self, x: Tensor) -> Tensor:
        squared = residual_of(self.operator(x), self.y).flatten(1).square().sum(dim=1)
        zero = squared == 0
        # The root's derivative at zero is infinite, and infinity times zero not a number.
        return torch.where(zero, 0, torch.where(zero, 1, squared).sqrt())


def released_process(
    prior: Denoiser,
    steps: int,
    x: Tensor,
    generator: torch.Generator,
    learned_variance: bool = False,
) -> AncestralProcess:
    """Returns the process with noise of its own for each of the states `x`, (B, ...)."""
    check_whole(2, steps=steps)
    noise = draw_noise(steps - 1, x.shape, generator).to(x.device)
    return AncestralProcess(prior, steps, noise, learned_variance)


def _weights(schedule: Schedule, times: Tensor) -> Tensor:
    return released_weights(len(times))


def _cost(problem: Problem) -> ResidualNorm:
    return ResidualNorm(problem.operator, problem.y)


def _adam_w(rate: float) -> Adam:
    return Adam(rate, weight_decay=0.01, keeps_best=False)


RELEASED = Recipe(
    "released",
    steps=20,
    iterations=50,
    rule=_adam_w(5e-3),
    derivatives=MatrixFree(),
    regularization=1e-3,
    weight=1e-6,
    weights=_weights,
    from_noise=True,
    process=released_process,
    cost=_cost,
    by_task={
        ("gaussian_blur", 1000): {"rule": _adam_w(1e-2), "weight": 1e-5},
        ("nonlinear_blur", 1000): {"rule": _adam_w(1e-2)},
        ("phase_retrieval", 1000): {"rule": _adam_w(1e-2)},
    },
)
"""What the authors' released code does by default, "NFE 1000"."""


@dataclass(frozen=True)
class ShrinkingValue(LowRankValue):
    r"""A value of rank 0 whose gains lose a share in a random subspace Q.

    The released code inverts the matrix :math:`r I` of rank 0 by Woodbury's identity with
    0 + 0.001 I for the part of rank 16, on a random subspace of that `dimension`, so that

    .. math::
        k = -\frac{1}{\rho} \Big(I - \frac{Q Q^T}{1 + \rho / e + e \rho}\Big) Q_u , \quad
        \rho = r + e , \quad e = 0.001 .

    The share lost is a fifth in the first step and a fourteenth in the last of T = 20. Each step of
    each iteration draws its own Q, the same for all images.
    """

    dimension: int = 16
    generator: torch.Generator = field(default_factory=torch.Generator)

    def step_back(
        self, e: LowRankExpansion, a: Tensor, update: str
    ) -> tuple[LowRankGains, LowRankValue]:
        gains, value = super().step_back(e, a, update)
        k, rho = gains.k, (e.r + a)[:, None]
        drawn = torch.randn(k.shape[1], self.dimension, generator=self.generator)
        Q = torch.linalg.qr(drawn).Q.to(k)
        k = k - (k @ Q) @ Q.mT / (1 + rho / 1e-3 + 1e-3 * rho)
        return replace(gains, k=k), replace(self, p=value.p, Z=value.Z, S=value.S, c=value.c)


@dataclass(frozen=True)
class Shrinking(MatrixFree):
    """Derivatives of rank 0 whose values are :class:`ShrinkingValue`."""

    dimension: int = 16
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def terminal(self, problem: ControlProblem, x: Tensor, rank: int | None) -> LowRankValue:
        if rank != 0:
            raise ValueError(f"rank is {rank}, expected 0: the side effect is that of no factor")
        v = super().terminal(problem, x, rank)
        return ShrinkingValue(v.p, v.Z, v.S, v.c, self.dimension, self.generator)


@method
def released(
    given: Given,
    *,
    steps: int = RELEASED.steps,
    iterations: int = 50,
    rate: float = 5e-3,
    weight_scale: float = RELEASED.weight,
    learned_variance: bool = False,
    keep_activations: bool = True,
    side_effect: bool = False,
) -> Tensor:
    """Returns images by :data:`RELEASED`, which does not use the noise's level.

    Args:
        steps: the number T of points in time, 2 to 1000; at most 22 where the prior's schedule ends
            at 100 times as much noise as image.
        rate: AdamW's learning rate.
        weight_scale: the factor of :func:`released_weights`.
        learned_variance: whether a step's variance is that of the prior's own head.
        keep_activations: whether activations are kept, for speed, or recomputed, for memory.
        side_effect: whether gains shrink in a random subspace, see :class:`ShrinkingValue`.
    """
    recipe = replace(
        RELEASED,
        steps=steps,
        iterations=iterations,
        rule=_adam_w(rate),
        weight=weight_scale,
        process=partial(released_process, learned_variance=learned_variance),
        derivatives=(Shrinking if side_effect else MatrixFree)(keep_activations=keep_activations),
    )
    # Its states have unit variance at every level.
    _, sigma = given.prior.schedule(torch.ones((), dtype=torch.float64))
    return given.reconstruct(recipe, given.x / sigma.item())


def _settings(task: str, nfe: int) -> dict:
    if nfe != 1000:
        raise ValueError(f"nfe is {nfe}: the released code's settings are for 1000 only")
    recipe = RELEASED.at(task, nfe)
    settings = {"steps": recipe.steps, "iterations": recipe.iterations}
    return settings | {"rate": cast(Adam, recipe.rule).rate, "weight_scale": recipe.weight}


METHOD = Method(
    "RELEASED",
    released,
    _settings,
    lambda s: ((s["steps"] - 1) * (1 + s["iterations"]), (s["steps"] - 1) * s["iterations"]),
    tuned={"rate": (1e-3, 5e-3, 2e-2, 1e-1), "weight_scale": (1e-6, 1e-4)},
    recipe=RELEASED,
)
