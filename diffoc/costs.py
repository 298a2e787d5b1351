r"""Costs of a controlled reverse process, Eqs. 10, 27 and 28.

A terminal cost maps final states (B, ...) to (B,), a running cost maps a step, states and
controls to (B,). Both must be twice differentiable, and no problem of a batch may influence
another.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffoc.checks import as_numbers, check_above, check_kind, check_tensor, evaluating


@dataclass(frozen=True)
class GaussianLikelihood:
    r"""The terminal cost :math:`-\log p(y \mid x_0) = \|A(x_0) - y\|^2 / (2 s^2)` + const, Eq. 27.

    The operator A is any differentiable callable from images (B, ...) to measurements; y is
    (B, ...), or (1, ...) for one that all problems share; s > 0 is the noise's standard deviation.
    """

    operator: Callable[[Tensor], Tensor]
    y: Tensor
    noise_std: float

    def __post_init__(self) -> None:
        check_kind(Callable, operator=self.operator)
        check_tensor("y", self.y)
        check_above(0, noise_std=self.noise_std)

    def whitened_residual(self, x: Tensor) -> Tensor:
        """Returns (A(x_0) - y) / s; half of its square is the cost."""
        with evaluating(self.operator):
            return residual_of(self.operator(x), self.y) / self.noise_std

    def __call__(self, x: Tensor) -> Tensor:
        return self.whitened_residual(x).flatten(1).square().sum(dim=1) / 2


@dataclass(frozen=True)
class ClassLikelihood:
    r"""The terminal cost :math:`-\log p(c \mid x_0)` of a classifier, Section 6.

    The classifier is a twice differentiable callable from images (B, ...) to logits (B, classes);
    the labels c are (B,) int64, or (1,) for one that all problems share.
    """

    classifier: Callable[[Tensor], Tensor]
    labels: Tensor

    def __post_init__(self) -> None:
        check_kind(Callable, classifier=self.classifier)
        check_kind(Tensor, labels=self.labels)
        if self.labels.ndim != 1 or self.labels.dtype != torch.int64:
            raise ValueError(
                f"labels are {self.labels.dtype} of shape {tuple(self.labels.shape)}, expected "
                "int64 of shape (B,)"
            )
        if self.labels.is_meta or not len(self.labels) or (self.labels < 0).any():
            raise ValueError("labels must be at least one, and not negative")

    def __call__(self, x: Tensor) -> Tensor:
        with evaluating(self.classifier):
            logits = self.classifier(x)
        if logits.ndim != 2:
            raise ValueError(f"classifier gives shape {tuple(logits.shape)}, expected (B, classes)")
        largest = self.labels.max()
        if largest >= logits.shape[1]:
            raise ValueError(
                f"labels go up to {largest}, but the classifier has {logits.shape[1]} classes"
            )
        if len(self.labels) not in (1, len(x)):
            raise ValueError(f"labels are {len(self.labels)}, expected 1 or {len(x)}")
        labels = self.labels.expand(len(x))
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


@dataclass(frozen=True)
class ControlCost:
    r"""The running cost :math:`\frac{1}{2} r_i \|u_i\|^2`.

    The weights r are one number for all steps, or one per step, (T,); they are not negative. Zero
    is the paper's choice (Eq. 28), which leaves the controls to the regularisation.
    """

    weights: float | Tensor

    def __post_init__(self) -> None:
        weights = as_numbers("weights", self.weights)
        if weights.ndim > 1 or not (weights >= 0).all():
            raise ValueError("weights must be a number or of shape (T,), and not negative")

    def weight(self, i: int) -> float:
        """Returns r of step i."""
        r = torch.as_tensor(self.weights, dtype=torch.float64)
        if r.ndim and i >= len(r):
            raise ValueError(f"weights has {len(r)} steps, but there is a step {i}")
        return (r[i] if r.ndim else r).item()

    def __call__(self, i: int, x: Tensor, u: Tensor) -> Tensor:
        return 0.5 * self.weight(i) * u.flatten(1).square().sum(dim=1)


def residual_of(predicted: Tensor, y: Tensor) -> Tensor:
    """Returns A(x_0) - y; a ValueError refuses shapes that would compare each number with many."""
    check_kind(Tensor, **{"what the operator makes": predicted})
    shared = y.ndim > 0 and len(y) in (1, len(predicted))
    if not shared or predicted.shape[1:] != y.shape[1:] or predicted.device != y.device:
        raise ValueError(
            f"y has shape {tuple(y.shape)} on {y.device}, but the operator gives "
            f"{tuple(predicted.shape)} on {predicted.device}"
        )
    return predicted - y
