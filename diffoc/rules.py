r"""How a step is made of the gains, how far it goes, and how much Quu is damped.

A *rule* answers four questions of an iteration: what it remembers (`start`), which change of the
controls it tries first (`direction`), which trial is good enough (`accept`), and what is left where
all trials were refused (`retry`). A *damping* says what Tikhonov's constants a of Quu + a I are,
and how they move with success and failure. Both are frozen values; what changes in a run is in what
they return. Nothing of one problem of a batch depends on another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot
from torch.optim.adam import adam

from diffoc.checks import as_numbers, check_above, check_at_least, check_whole

PerStep = list[Tensor]
"""A tensor for each step of the trajectory."""


class Direction(NamedTuple):
    r"""The change of the controls that a rule tries first, (B, m) for each step.

    After a step :math:`\epsilon` in it the cost is expected to change by :math:`\epsilon s +
    \epsilon^2 c / 2`, with the slope s and the curvature c, (B,) each.
    """

    change: PerStep
    slope: Tensor
    curvature: Tensor

    def decrease(self, step: float) -> Tensor:
        return -(step * self.slope + step**2 * self.curvature / 2)


@dataclass(frozen=True)
class Rule:
    """What the rules are made of, by changing some of its answers.

    `trials` steps are tried, from 1 down, each `contraction` times the one before. A rule
    `searches` if it may refuse trials whose cost is finite; it `keeps_best` if the cheapest iterate
    is the result, because costs go up and down; it `adapts` if `direction` uses the gradients, and
    `retry` may find another one for the same expansion.
    """

    trials = 1
    contraction = 1.0
    searches = False
    keeps_best = False
    adapts = False

    def start(self, horizon: int) -> Any:
        """Returns the memory of a run over T steps."""

    def direction(
        self, memory: Any, newton: Direction, gradients: PerStep, controls: PerStep
    ) -> Direction:
        """Returns the change to try first, and may change the memory.

        `newton` is made of the feedforward gains k. The gradients are the total cost's in the
        controls, (B, m) each, none unless the rule adapts; the controls are where they were taken,
        (B, ...) each.
        """
        return newton

    def accept(self, decrease: Tensor, expected: Tensor, negligible: Tensor) -> Tensor:
        """Returns which trials are good enough, (B,) bool.

        All arguments are (B,): the cost's decrease, which is not finite where the new cost is not,
        the decrease that was expected, and where even a full step's drowns in rounding.
        """
        return decrease.isfinite()

    def retry(self, memory: Any, refused: Tensor) -> Tensor:
        """Prepares another direction for the problems that refused all trials, (B,) bool.

        It returns those of them for which nothing is left to try, (B,) bool.
        """
        return refused


@dataclass(frozen=True)
class FullStep(Rule):
    """Takes every full step, whatever it costs, as long as the cost is finite."""


@dataclass(frozen=True)
class LineSearch(Rule):
    """Backtracks: takes the first of `trials` steps whose decrease is a 1e-4 of the expected.

    Where that drowns in rounding, it takes the first that is no increase. Each step is
    `contraction`, in ]0, 1[, times the one before.
    """

    contraction: float = 0.5
    trials: int = 20

    searches = True

    def __post_init__(self) -> None:
        check_above(0, contraction=self.contraction)
        if self.contraction >= 1:
            raise ValueError(f"contraction is {self.contraction}, expected in ]0, 1[")
        check_whole(1, trials=self.trials)

    def accept(self, decrease: Tensor, expected: Tensor, negligible: Tensor) -> Tensor:
        return ((decrease >= 1e-4 * expected) | negligible) & (decrease >= 0)


@dataclass(frozen=True)
class Adam(Rule):
    r"""Adam on the feedforward gains in place of a line search, Eq. 80, by torch's own function.

    A gain k is treated as a negative gradient: :math:`k \to \eta\, \hat m / (\sqrt{\hat v} +
    10^{-8})` with running means m of k and v of its square, which decay by 0.9 and 0.999, for every
    step and component on its own. The cost need not fall from one iteration to the next, and at a
    constant rate, as in the paper, every control keeps moving by about the rate.

    Attributes:
        rate: the rate :math:`\eta > 0`, about the largest change of a control in an iteration.
        weight_decay: the share of a control, times the rate, that an iteration takes from it, as
            AdamW does; not negative.
        keeps_best: whether the cheapest iterate is the result, or the last whatever it costs.

    Source: Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101.
    """

    rate: float = 5e-3
    weight_decay: float = 0.0
    keeps_best: bool = True

    def __post_init__(self) -> None:
        check_above(0, rate=self.rate)
        check_at_least(0, weight_decay=self.weight_decay)

    def start(self, horizon: int) -> list[PerStep]:
        return []  # the two means and the counts, once there are gains

    def direction(
        self, memory: list[PerStep], newton: Direction, gradients: PerStep, controls: PerStep
    ) -> Direction:
        gains = newton.change
        if not memory:
            memory += [[torch.zeros_like(k) for k in gains] for _ in range(2)]
            memory += [[torch.zeros(()) for _ in gains]]
        means, squares, counts = memory
        changes = [torch.zeros_like(k) for k in gains]
        adam(
            changes, gains, means, squares, [], counts, foreach=False, lr=self.rate, maximize=True,
            beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=False,
        )  # fmt: skip
        if decay := self.rate * self.weight_decay:
            for change, u in zip(changes, controls, strict=True):
                change.sub_(u.flatten(1), alpha=decay)
        return newton._replace(change=changes)  # the expected decrease stays the gains' own


MEMORY = 50
"""How many changes L-BFGS remembers, each of 2 T n numbers."""


@dataclass(frozen=True)
class LBFGS(LineSearch):
    """Limited-memory BFGS on the controls, with a backtracking line search.

    The feedforward gains are replaced by a quasi-Newton direction. Where a terminal Hessian of
    rank k knows k directions at k products a step, this learns one an iteration, for nothing, from
    how the gradient changed; rank 0 is what it is for. After the first iterations the full step
    nearly always passes; where all trials fail, what is remembered is forgotten.

    Attributes:
        first: the root mean square of the first change of the controls, when nothing is known yet;
            None for 0.001, and for 0.01 where there are `units`, which are the image's: less than
            that drowns in the rounding of a large cost in single precision.
        units: the units in which the controls of each step are measured, by `first` as well: T
            numbers above 0, or None for 1 each. Until something is learnt, that is a change of
            variables. It does not move the optimum.

    Source: Nocedal & Wright 2006 (doi:10.1007/978-0-387-40065-5), Algorithm 7.4.
    """

    trials: int = 8
    first: float | None = None
    units: tuple[float, ...] | None = None

    adapts = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.units is not None:
            units = as_numbers("units", self.units)
            if units.ndim != 1 or not (units > 0).all():
                raise ValueError(f"units is {self.units}, expected finite numbers above 0")
        check_above(0, first=self.length)

    @property
    def length(self) -> float:
        """Returns the root mean square of the first change: what `first` says or means."""
        if self.first is not None:
            return self.first
        return 1e-3 if self.units is None else 1e-2

    def start(self, horizon: int) -> LBFGSMemory:
        if self.units is not None and len(self.units) != horizon:
            raise ValueError(f"rule has {len(self.units)} units, expected {horizon}")
        return LBFGSMemory(self)

    def direction(
        self, memory: LBFGSMemory, newton: Direction, gradients: PerStep, controls: PerStep
    ) -> Direction:
        gradient = torch.cat(gradients, dim=1)
        if gradient.isnan().any():
            raise ValueError(
                "rule is LBFGS, which needs the gradient: derivatives must be Dense or MatrixFree"
            )
        change = memory.direction(gradient, torch.cat([u.flatten(1) for u in controls], dim=1))
        slope = vecdot(gradient, change)
        changes = change.split([k.shape[1] for k in newton.change], dim=1)
        return Direction(list(changes), slope, 0 * slope)

    def retry(self, memory: LBFGSMemory, refused: Tensor) -> Tensor:
        return memory.forget(refused)


class LBFGSMemory:
    """What L-BFGS remembers, of each problem of the batch on its own."""

    def __init__(self, rule: LBFGS) -> None:
        self.rule = rule
        # Changes of controls and gradient, (B, T m), and 1 / (their product), (B,).
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.last: tuple[Tensor, Tensor] | None = None
        # The least inverse curvature of what was forgotten, (B,).
        self.least: Tensor | float = math.inf

    def direction(self, gradient: Tensor, controls: Tensor) -> Tensor:
        """Returns the change to try first where the total cost has this gradient, (B, T m) each."""
        if self.last is not None:
            s, y = controls - self.last[0], gradient - self.last[1]
            product = vecdot(s, y)
            # Without positive curvature along a change, nothing is learnt from it.
            known = product > torch.finfo(y.dtype).eps * vecdot(y, y)
            self.pairs.append((s, y, torch.where(known, 1 / product.where(known, 1), 0)))
            del self.pairs[:-MEMORY]
        self.last = controls, gradient

        q, factors = gradient, []
        for s, y, rho in reversed(self.pairs):
            factor = rho * vecdot(s, q)
            q = q - factor[:, None] * y
            factors.append(factor)
        squares = self._squares(gradient)
        norm = vecdot(gradient, squares * gradient).sqrt()
        scale = self.rule.length * gradient.shape[1] ** 0.5 / norm.where(norm > 0, 1)
        scale = scale.clamp(max=self.least)
        for _, y, rho in self.pairs:
            scale = torch.where(rho > 0, self._inverse_curvature(y, rho), scale)
        q = scale[:, None] * squares * q
        for (s, y, rho), factor in zip(self.pairs, reversed(factors), strict=True):
            q = q + (factor - rho * vecdot(y, q))[:, None] * s
        return -q

    def _squares(self, like: Tensor) -> Tensor | float:
        """Returns the squared unit of every number of a problem, (T m,)."""
        if self.rule.units is None:
            return 1.0
        numbers = like.shape[1] // len(self.rule.units)
        return like.new_tensor(self.rule.units).square().repeat_interleave(numbers)

    def _inverse_curvature(self, y: Tensor, rho: Tensor) -> Tensor:
        """Returns it along a change, (B,), infinite where nothing was learnt."""
        return 1 / (rho * vecdot(y, self._squares(y) * y))

    def forget(self, problems: Tensor) -> Tensor:
        """Begins anew for some `problems`, (B,) bool; returns those that had nothing to forget.

        Their next step is short enough for the steepest direction that they knew.
        """
        remembered = torch.zeros_like(problems)
        for i, (s, y, rho) in enumerate(self.pairs):
            shorter = self._inverse_curvature(y, rho).clamp(max=self.least)
            self.least = torch.where(problems, shorter, self.least)
            remembered |= rho > 0
            self.pairs[i] = s, y, torch.where(problems, 0, rho)
        return problems & ~remembered


@dataclass(frozen=True)
class Damping:
    """Keeps Tikhonov's constants as they are: one for all steps, or one for each, (T,); a >= 0.

    The controller holds the constants a, (T, B), and the factor of their next change, (B,).
    """

    value: float | Tensor = 0.0

    adapts = False

    def __post_init__(self) -> None:
        value = as_numbers("regularization", self.value)
        if value.ndim > 1 or not (value >= 0).all():
            raise ValueError("regularization must be a number or one for each step, not negative")

    def start(self, horizon: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the first constants and factors, for T steps and states x (B, ...)."""
        a = torch.as_tensor(self.value, dtype=x.dtype, device=x.device).reshape(-1, 1)
        if len(a) not in (1, horizon):
            raise ValueError(f"regularization has {len(a)} numbers, expected 1 or {horizon}")
        return a.expand(horizon, len(x)), x.new_ones(len(x))

    def grow(self, a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the next constants and factors after a failure, as `shrink` after a success."""
        return a, delta

    shrink = grow

    def exhausted(self, a: Tensor) -> Tensor:
        """Returns the problems whose constants cannot grow, (B,) bool."""
        return torch.ones(a.shape[1], dtype=torch.bool, device=a.device)


SMALLEST, GREATEST, FACTOR = 1e-8, 1e12, 2.0


@dataclass(frozen=True)
class Tikhonov(Damping):
    """The quadratic schedule of Tassa et al. 2012 (doi:10.1109/IROS.2012.6386025, Sec. II-F).

    After a success the constant shrinks faster and faster, to zero below 1e-8; after a failed
    factorisation or line search it grows faster and faster, up to 1e12.
    """

    adapts = True

    def exhausted(self, a: Tensor) -> Tensor:
        return (a >= GREATEST).all(dim=0)

    def shrink(self, a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        delta = (delta / FACTOR).clamp(max=1 / FACTOR)
        a = a * delta
        return torch.where(a >= SMALLEST, a, 0), delta

    def grow(self, a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        delta = (delta * FACTOR).clamp(min=FACTOR)
        return (a * delta).clamp(SMALLEST, GREATEST), delta
