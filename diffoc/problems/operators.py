r"""Measurement operators, Eq. 5: :math:`y = A(x_0) + \eta`, :math:`\eta \sim N(0, s^2 I)`.

An operator is any callable from images (B, C, H, W) to measurements (B, ...), differentiable
where the controller is to use it. The exact oracles of the priors need linear ones as a matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffoc.checks import check_above, check_alike, check_shape, check_tensor, check_whole

Operator = Callable[[Tensor], Tensor]


def average_pool(factor: int) -> Operator:
    """Returns down-sampling to (B, C, H / factor, W / factor) by the mean of squares of pixels."""
    check_whole(1, factor=factor)

    def operator(x: Tensor) -> Tensor:
        if x.shape[-2] % factor or x.shape[-1] % factor:
            raise ValueError(f"x is {x.shape[-2]} x {x.shape[-1]}, not a multiple of {factor}")
        return torch.nn.functional.avg_pool2d(x, factor)

    return operator


def random_mask(shape: Sequence[int], dropped: float, generator: torch.Generator) -> Operator:
    """Returns random inpainting, (B, C, H, W) to (B, C, kept), by one mask (H, W) for all.

    A fraction of the pixels is dropped, in [0, 1[.
    """
    if not 0 <= dropped < 1:
        raise ValueError(f"dropped is {dropped}, expected 0 <= dropped < 1")
    check_shape(shape, "HW")
    height, width = shape
    pixels = height * width
    order = torch.randperm(pixels, generator=generator)
    kept = order[: pixels - round(dropped * pixels)].sort().values
    if not len(kept):
        raise ValueError(f"dropped is {dropped}, which keeps none of {pixels} pixels")

    def operator(x: Tensor) -> Tensor:
        if x.shape[-2:] != (height, width):
            raise ValueError(f"x is {x.shape[-2]} x {x.shape[-1]}, expected {height} x {width}")
        return x.flatten(-2)[..., kept.to(x.device)]

    return operator


def as_matrix(operator: Operator, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns the matrix (m, n) of a linear operator, from its action on the n unit images.

    The shape is that of one image. Linearity is tried on zero and on a ramp.
    """
    check_shape(shape, "n" * len(shape))
    ramp = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=dtype).reshape(1, *shape)
    if operator(0 * ramp).any() or not torch.allclose(operator(2 * ramp), 2 * operator(ramp)):
        raise ValueError("operator is not linear: it does not scale with its input")
    n = torch.Size(shape).numel()
    return operator(torch.eye(n, dtype=dtype).reshape(n, *shape)).flatten(1).mT.contiguous()


@dataclass(frozen=True)
class LinearMeasurement:
    r"""Linear Gaussian measurements :math:`y \sim N(A x_0, s^2 I)` of flat states.

    The matrix A is (m, n), the measurements y are (B, m), and `noise_std` is s > 0.
    """

    matrix: Tensor
    y: Tensor
    noise_std: float

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2:
            raise ValueError(f"matrix has shape {tuple(self.matrix.shape)}, expected (m, n)")
        if self.y.ndim != 2 or self.y.shape[1] != len(self.matrix):
            raise ValueError(f"y has shape {tuple(self.y.shape)}, expected (B, {len(self.matrix)})")
        check_tensor("matrix", self.matrix)
        check_tensor("y", self.y)
        check_alike(matrix=self.matrix, y=self.y)
        check_above(0, noise_std=self.noise_std)
