"""How far a step goes: regularisation, line search, and Adam or L-BFGS beyond it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tikhonov:
    """The quadratic schedule of Tassa et al. 2012 (doi:10.1109/IROS.2012.6386025, Sec. II-F).

    After a success the constant shrinks faster and faster, to zero below `minimum`; after a
    failed factorisation or line search it grows faster and faster, up to `maximum`.
    """

    initial: float = 0.0
    minimum: float = 1e-8
    maximum: float = 1e12
    factor: float = 2.0

    def __post_init__(self) -> None:
        bounds = 0 <= self.initial <= self.maximum and 0 < self.minimum <= self.maximum
        if not bounds or not self.maximum < math.inf:
            raise ValueError(
                f"initial, minimum and maximum are {self.initial}, {self.minimum} and "
                f"{self.maximum}: expected 0 <= initial <= maximum and 0 < minimum <= maximum, "
                "all finite"
            )
        if not 1 < self.factor < math.inf:
            raise ValueError(f"factor is {self.factor}, expected finite and above 1")

    def shrink(self, a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The next constant and its factor, after a success; (B,) each."""
        delta = (delta / self.factor).clamp(max=1 / self.factor)
        a = a * delta
        return torch.where(a >= self.minimum, a, 0), delta

    def grow(self, a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The next constant and its factor, after a failure; (B,) each."""
        delta = (delta * self.factor).clamp(min=self.factor)
        return (a * delta).clamp(self.minimum, self.maximum), delta


@dataclass(frozen=True)
class LineSearch:
    """Backtracking: the first step, from 1 down, whose decrease is a fraction of the expected.

    Attributes:
        sufficient: the fraction, in ]0, 1/2[.
        contraction: the ratio of a step to the one before, in ]0, 1[.
        trials: the number of steps tried.
    """

    sufficient: float = 1e-4
    contraction: float = 0.5
    trials: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.sufficient < 0.5:
            raise ValueError(f"sufficient is {self.sufficient}, expected in ]0, 1/2[")
        if not 0 < self.contraction < 1:
            raise ValueError(f"contraction is {self.contraction}, expected in ]0, 1[")
        if self.trials < 1:
            raise ValueError(f"trials is {self.trials}, expected at least 1")


@dataclass(frozen=True)
class Adam:
    r"""Adam on the feedforward gains in place of a line search, Eq. 80.

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
        keep_best: whether the result is the cheapest iterate, or the last one whatever it costs.

    Source: Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101.
    """

    rate: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    anneal: bool = False
    weight_decay: float = 0.0
    keep_best: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate is {self.rate}, expected finite and above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}, expected in [0, 1[")
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon is {self.epsilon}, expected finite and above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}, expected finite and at least 0")


class AdamState:
    """The running means of the gains of all steps.

    Args:
        rule: its parameters.
        iterations: how many there will be.
    """

    def __init__(self, rule: Adam, iterations: int) -> None:
        self.rule = rule
        self.iterations = iterations
        self.count = 0
        self.first: list[Tensor] = []
        self.second: list[Tensor] = []

    def precondition(self, gains: list[Tensor], controls: list[Tensor]) -> list[Tensor]:
        """The changes of the controls for the feedforward gains of every step, (B, m) each.

        Args:
            gains: of every step, (B, m).
            controls: where they were taken, (B, ...).
        """
        if not self.first:
            self.first = [torch.zeros_like(k) for k in gains]
            self.second = [torch.zeros_like(k) for k in gains]
        rate = self.rule.rate
        if self.rule.anneal:
            rate *= (1 + math.cos(math.pi * self.count / self.iterations)) / 2
        self.count += 1
        one, two = self.rule.betas
        changes = []
        for k, u, m, v in zip(gains, controls, self.first, self.second, strict=True):
            m.lerp_(k, 1 - one)
            v.lerp_(k.square(), 1 - two)
            scale = (v / (1 - two**self.count)).sqrt() + self.rule.epsilon
            change = rate * m / (1 - one**self.count) / scale
            decay = rate * self.rule.weight_decay
            changes.append(change - decay * u.flatten(1) if decay else change)
        return changes


@dataclass(frozen=True)
class LBFGS:
    """Limited-memory BFGS on the controls, with a backtracking line search.

    The feedforward gains are replaced by a quasi-Newton direction. Where a terminal Hessian of
    rank k knows k directions at k products a step, this learns one a iteration, for nothing, from
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

    Source: Nocedal & Wright 2006 (doi:10.1007/978-0-387-40065-5), Algorithm 7.4.
    """

    memory: int = 50
    first: float | None = None
    search: LineSearch = field(default_factory=lambda: LineSearch(trials=8))
    units: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.units is not None and not all(0 < unit < math.inf for unit in self.units):
            raise ValueError(f"units is {self.units}, expected finite numbers above 0")
        if self.memory < 1:
            raise ValueError(f"memory is {self.memory}, expected at least 1")
        if self.first is not None and not 0 < self.first < math.inf:
            raise ValueError(f"first is {self.first}, expected finite and above 0")

    @property
    def length(self) -> float:
        """Of the first change: what `first` says or means."""
        return self.first or (1e-3 if self.units is None else 1e-2)


class LBFGSState:
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
