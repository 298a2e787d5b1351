"""How a step is made of the gains, and how far it goes.

A *rule* answers four questions of an iteration: what it remembers (`start`), which change of the
controls it tries first (`direction`), which trial is good enough (`accept`), and what is left where
all trials were refused (`retry`). It is a frozen value; what changes in a run is in the memory that
it returns. Nothing of one problem of a batch depends on another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam


class Direction(NamedTuple):
    """The change of the controls that a rule tries first.

    Attributes:
        change: of the controls of every step, (B, m) each.
        slope, curvature: s and c of the cost's expected change :math:`\\epsilon s + \\epsilon^2 c
            / 2` after a step :math:`\\epsilon`, (B,) each.
    """

    change: list[Tensor]
    slope: Tensor
    curvature: Tensor

    def decrease(self, step: float) -> Tensor:
        """The decrease of the cost that a step is expected to bring, (B,)."""
        return -(step * self.slope + step**2 * self.curvature / 2)


class Rule:
    """A rule that takes every full step, whatever it costs, as long as the cost is finite.

    The other rules are made of it by changing some of its answers.

    Attributes:
        trials, contraction: how many steps are tried, from 1 down, each `contraction` times the one
            before.
        searches: whether trials may be refused though their cost is finite.
        keeps_best: whether the cheapest iterate is the result, because costs go up and down.
        adapts: whether `direction` uses the gradients, and `retry` may find another one for the
            same expansion.
    """

    trials: int = 1
    contraction: float = 1.0
    searches: bool = False
    keeps_best: bool = False
    adapts: bool = False

    def start(self, horizon: int, iterations: int) -> Any:
        """The memory of a run of at most so many iterations over T steps.

        Raises:
            ValueError: if the rule is for another T.
        """

    def direction(
        self, memory: Any, newton: Direction, gradients: list[Tensor], controls: list[Tensor]
    ) -> Direction:
        """The change to try first.

        Args:
            memory: of `start`; it may be changed.
            newton: the feedforward gains k, and what a full step of them is expected to bring.
            gradients: of the total cost in the controls of every step, (B, m) each; none unless
                the rule `adapts`.
            controls: where they were taken, (B, ...) each.
        """
        return newton

    def accept(self, decrease: Tensor, expected: Tensor, negligible: Tensor) -> Tensor:
        """Says which trials are good enough, (B,) bool.

        Args:
            decrease: of the cost, (B,); not finite where the new cost is not.
            expected: the decrease that the step was expected to bring, (B,).
            negligible: where even a full step's drowns in rounding, (B,) bool.
        """
        return decrease.isfinite()

    def retry(self, memory: Any, refused: Tensor) -> Tensor:
        """Prepares another direction where all trials were refused.

        Args:
            memory: of `start`; it may be changed.
            refused: those problems, (B,) bool.

        Returns:
            Those of them for which nothing is left to try, (B,) bool.
        """
        return refused


@dataclass(frozen=True)
class FullStep(Rule):
    """Takes every full step, whatever it costs, as long as the cost is finite."""


@dataclass(frozen=True)
class LineSearch(Rule):
    """Backtracking: the first step, from 1 down, whose decrease is a fraction of the expected.

    Attributes:
        sufficient: the fraction, in ]0, 1/2[.
        contraction: the ratio of a step to the one before, in ]0, 1[.
        trials: the number of steps tried.

    Raises:
        ValueError: if one is out of its range.
    """

    sufficient: float = 1e-4
    contraction: float = 0.5
    trials: int = 20

    searches = True

    def __post_init__(self) -> None:
        if not 0 < self.sufficient < 0.5:
            raise ValueError(f"sufficient is {self.sufficient}, expected in ]0, 1/2[")
        if not 0 < self.contraction < 1:
            raise ValueError(f"contraction is {self.contraction}, expected in ]0, 1[")
        if self.trials < 1:
            raise ValueError(f"trials is {self.trials}, expected at least 1")

    def accept(self, decrease: Tensor, expected: Tensor, negligible: Tensor) -> Tensor:
        """Takes a sufficient decrease; where the expected one drowns in rounding, no increase."""
        return ((decrease >= self.sufficient * expected) | negligible) & (decrease >= 0)


@dataclass(frozen=True)
class Adam(Rule):
    r"""Adam on the feedforward gains in place of a line search, Eq. 80, by torch's own function.

    A gain k is treated as a negative gradient: :math:`k \to \eta\, \hat m / (\sqrt{\hat v} +
    \varepsilon)` with running means m of k and v of its square, for every step and component on
    its own. The cost need not fall from one iteration to the next.

    Attributes:
        rate: :math:`\eta > 0`, about the largest change of a control in an iteration.
        betas: decays of the two means, in [0, 1[.
        epsilon: above 0.
        anneal: whether the rate falls to zero, as half a cosine over the iterations. At a constant
            rate, as in the paper, every control keeps moving by about the rate, and a cost that
            all T steps act on does not settle.
        weight_decay: the share of a control, times the rate, that an iteration takes from it, as
            AdamW does; not negative.
        keeps_best: whether the cheapest iterate is the result, or the last whatever it costs.

    Raises:
        ValueError: if one is out of its range.

    Source: Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101.
    """

    rate: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    anneal: bool = False
    weight_decay: float = 0.0
    keeps_best: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate is {self.rate}, expected finite and above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}, expected in [0, 1[")
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon is {self.epsilon}, expected finite and above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}, expected finite and at least 0")

    def start(self, horizon: int, iterations: int) -> AdamMemory:
        """Remembers the two means, and how many iterations there will be."""
        return AdamMemory(iterations)

    def direction(
        self, memory: AdamMemory, newton: Direction, gradients: list[Tensor], controls: list[Tensor]
    ) -> Direction:
        """Preconditions the gains; what they were expected to bring says nothing of that."""
        gains, rate = newton.change, self.rate
        if not memory.count:
            memory.means = [torch.zeros_like(k) for k in gains]
            memory.squares = [torch.zeros_like(k) for k in gains]
        if self.anneal:
            rate *= (1 + math.cos(math.pi * memory.count / memory.iterations)) / 2
        changes = [torch.zeros_like(k) for k in gains]
        adam(
            changes,
            gains,
            memory.means,
            memory.squares,
            max_exp_avg_sqs=[],
            state_steps=[torch.tensor(float(memory.count)) for _ in gains],
            foreach=False,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=rate,
            weight_decay=0.0,
            eps=self.epsilon,
            maximize=True,
        )
        memory.count += 1
        if decay := rate * self.weight_decay:
            for change, u in zip(changes, controls, strict=True):
                change.sub_(u.flatten(1), alpha=decay)
        return newton._replace(change=changes)


@dataclass
class AdamMemory:
    """What Adam remembers of a run.

    Attributes:
        iterations: how many there will be.
        count: of the iterations so far.
        means, squares: running means of the gains and of their squares, of every step.
    """

    iterations: int
    count: int = 0
    means: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class LBFGS(Rule):
    """Limited-memory BFGS on the controls, with a backtracking line search.

    The feedforward gains are replaced by a quasi-Newton direction. Where a terminal Hessian of
    rank k knows k directions at k products a step, this learns one an iteration, for nothing, from
    how the gradient changed; rank 0 is what it is for.

    Attributes:
        memory: how many changes are remembered, each of 2 T n numbers.
        first: root mean square of the first change of the controls, when nothing is known yet; None
            for 0.001, and for 0.01 where there are `units`, which are the image's: less than that
            drowns in the rounding of a large cost in single precision.
        search: the line search; after the first iterations the full step nearly always passes.
            Where all its trials fail, what is remembered is forgotten.
        units: of the controls of each step, T numbers above 0, or None for 1. A control is
            measured in units of its step, in `first` as well: until something is learnt, that is a
            change of variables. It does not move the optimum.

    Raises:
        ValueError: if one is out of its range.

    Source: Nocedal & Wright 2006 (doi:10.1007/978-0-387-40065-5), Algorithm 7.4.
    """

    memory: int = 50
    first: float | None = None
    search: LineSearch = field(default_factory=lambda: LineSearch(trials=8))
    units: tuple[float, ...] | None = None

    searches = True
    adapts = True

    def __post_init__(self) -> None:
        if self.units is not None and not all(0 < unit < math.inf for unit in self.units):
            raise ValueError(f"units is {self.units}, expected finite numbers above 0")
        if self.memory < 1:
            raise ValueError(f"memory is {self.memory}, expected at least 1")
        if self.first is not None and not 0 < self.first < math.inf:
            raise ValueError(f"first is {self.first}, expected finite and above 0")

    @property
    def trials(self) -> int:  # type: ignore[override]
        """Of the line search."""
        return self.search.trials

    @property
    def contraction(self) -> float:  # type: ignore[override]
        """Of the line search."""
        return self.search.contraction

    @property
    def length(self) -> float:
        """Of the first change: what `first` says or means."""
        return self.first or (1e-3 if self.units is None else 1e-2)

    def start(self, horizon: int, iterations: int) -> LBFGSMemory:
        """Remembers changes of controls and gradients."""
        if self.units is not None and len(self.units) != horizon:
            raise ValueError(f"rule has {len(self.units)} units, expected {horizon}")
        return LBFGSMemory(self)

    def direction(
        self,
        memory: LBFGSMemory,
        newton: Direction,
        gradients: list[Tensor],
        controls: list[Tensor],
    ) -> Direction:
        """The quasi-Newton direction of all controls together."""
        gradient = torch.cat(gradients, dim=1)
        if gradient.isnan().any():
            raise ValueError(
                "rule is LBFGS, which needs the gradient: derivatives must be Dense or MatrixFree"
            )
        change = memory.direction(gradient, torch.cat([u.flatten(1) for u in controls], dim=1))
        slope = _dot(gradient, change)
        return Direction(
            list(change.split([k.shape[1] for k in newton.change], dim=1)), slope, 0 * slope
        )

    def accept(self, decrease: Tensor, expected: Tensor, negligible: Tensor) -> Tensor:
        """Accepts as its line search does."""
        return self.search.accept(decrease, expected, negligible)

    def retry(self, memory: LBFGSMemory, refused: Tensor) -> Tensor:
        """Forgets what it remembers; who had nothing to forget has nothing left."""
        return memory.forget(refused)


class LBFGSMemory:
    """What L-BFGS remembers, of each problem of the batch on its own.

    Args:
        rule: its parameters.
    """

    def __init__(self, rule: LBFGS) -> None:
        self.rule = rule
        # Changes of controls and gradient, (B, T m), and 1 / (their product), (B,).
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.last: tuple[Tensor, Tensor] | None = None

    def direction(self, gradient: Tensor, controls: Tensor) -> Tensor:
        """The change of the controls to try first, of both arguments' shape (B, T m).

        Args:
            gradient: of the total cost in the controls.
            controls: where it was taken.
        """
        if self.last is not None:
            s, y = controls - self.last[0], gradient - self.last[1]
            product = _dot(s, y)
            # Without positive curvature along a change, nothing is learnt from it.
            known = product > torch.finfo(y.dtype).eps * _dot(y, y)
            self.pairs.append((s, y, torch.where(known, 1 / product.where(known, 1), 0)))
            del self.pairs[: -self.rule.memory]
        self.last = controls, gradient

        q, factors = gradient, []
        for s, y, rho in reversed(self.pairs):
            factor = rho * _dot(s, q)
            q = q - factor[:, None] * y
            factors.append(factor)
        squares = self._squares(gradient)
        norm = _dot(gradient, squares * gradient).sqrt()
        scale = self.rule.length * gradient.shape[1] ** 0.5 / norm.where(norm > 0, 1)
        for _, y, rho in self.pairs:
            scale = torch.where(rho > 0, 1 / (rho * _dot(y, squares * y)).where(rho > 0, 1), scale)
        q = scale[:, None] * squares * q
        for (s, y, rho), factor in zip(self.pairs, reversed(factors), strict=True):
            q = q + (factor - rho * _dot(y, q))[:, None] * s
        return -q

    def _squares(self, like: Tensor) -> Tensor | float:
        """The squared unit of every number of a problem, (T m,)."""
        if self.rule.units is None:
            return 1.0
        numbers = like.shape[1] // len(self.rule.units)
        return like.new_tensor(self.rule.units).square().repeat_interleave(numbers)

    def forget(self, problems: Tensor) -> Tensor:
        """Begins anew for some `problems`, (B,) bool; returns those that had nothing to forget."""
        remembered = torch.zeros_like(problems)
        for i, (s, y, rho) in enumerate(self.pairs):
            remembered |= rho > 0
            self.pairs[i] = s, y, torch.where(problems, 0, rho)
        return problems & ~remembered


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=1)
