"""Tikhonov's constant a of Quu + a I: one that stays, or one that moves with success and failure.

A damping is a frozen value; the controller holds its constants, (T, B), and the factor of their
next change, (B,). Nothing of one problem of a batch depends on another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffoc.checks import check_tensor


@dataclass(frozen=True)
class Constant:
    """Tikhonov's constant, which stays as it is.

    Attributes:
        value: a number for all steps, or one for each, (T,), not negative.

    Raises:
        ValueError: if it is negative or not finite.
    """

    value: float | Tensor = 0.0

    adapts = False

    def __post_init__(self) -> None:
        value = torch.as_tensor(self.value, dtype=torch.float64)
        check_tensor("regularization", value)
        if value.ndim > 1 or not (value >= 0).all():
            raise ValueError("regularization must be a number or one for each step, not negative")

    def start(self, horizon: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The constants, (T, B), and a factor that is not used, (B,).

        Args:
            horizon: T.
            x: states (B, ...), whose dtype and device the constants have.

        Raises:
            ValueError: if there is neither one for all steps nor one for each.
        """
        a = torch.as_tensor(self.value, dtype=x.dtype, device=x.device).reshape(-1, 1)
        if len(a) not in (1, horizon):
            raise ValueError(f"regularization has {len(a)} numbers, expected 1 or {horizon}")
        return a.expand(horizon, len(x)), x.new_ones(len(x))

    def grow(self, a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Leaves them as they are."""
        return a, delta

    def shrink(self, a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Leaves them as they are."""
        return a, delta

    def exhausted(self, a: Tensor) -> Tensor:
        """All of them, always."""
        return torch.ones(a.shape[1], dtype=torch.bool, device=a.device)


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

    adapts = True

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

    def start(self, horizon: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The initial constants, (T, B), and the neutral factor, (B,)."""
        return x.new_full((horizon, len(x)), self.initial), x.new_ones(len(x))

    def exhausted(self, a: Tensor) -> Tensor:
        """Those at the maximum."""
        return (a >= self.maximum).all(dim=0)

    def shrink(self, a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The next constant and its factor, after a success; shapes as of `start`."""
        delta = (delta / self.factor).clamp(max=1 / self.factor)
        a = a * delta
        return torch.where(a >= self.minimum, a, 0), delta

    def grow(self, a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The next constant and its factor, after a failure; shapes as of `start`."""
        delta = (delta * self.factor).clamp(min=self.factor)
        return (a * delta).clamp(self.minimum, self.maximum), delta


Damping = Constant | Tikhonov
"""What :func:`diffoc.ilqr.ilqr` takes beside a bare number."""
