"""How far a step goes: regularisation, line search, and Adam in its place."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
        if not 0 <= self.initial <= self.maximum or not 0 < self.minimum <= self.maximum:
            raise ValueError(
                f"initial, minimum and maximum are {self.initial}, {self.minimum} and "
                f"{self.maximum}: expected 0 <= initial <= maximum and 0 < minimum <= maximum"
            )
        if not self.factor > 1:
            raise ValueError(f"factor is {self.factor}, expected above 1")

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

    Source: Kingma & Ba 2015, arXiv:1412.6980.
    """

    rate: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    anneal: bool = False

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"rate is {self.rate}, expected above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}, expected in [0, 1[")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon is {self.epsilon}, expected above 0")


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

    def precondition(self, gains: list[Tensor]) -> list[Tensor]:
        """The changes of the controls for the feedforward gains of every step, (B, m) each."""
        if not self.first:
            self.first = [torch.zeros_like(k) for k in gains]
            self.second = [torch.zeros_like(k) for k in gains]
        rate = self.rule.rate
        if self.rule.anneal:
            rate *= (1 + math.cos(math.pi * self.count / self.iterations)) / 2
        self.count += 1
        one, two = self.rule.betas
        changes = []
        for k, m, v in zip(gains, self.first, self.second, strict=True):
            m.lerp_(k, 1 - one)
            v.lerp_(k.square(), 1 - two)
            scale = (v / (1 - two**self.count)).sqrt() + self.rule.epsilon
            changes.append(rate * m / (1 - one**self.count) / scale)
        return changes
