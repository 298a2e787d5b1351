r"""Exact singular value decompositions of linear tasks, for the methods that work in their basis.

.. math:: A = U S V^T, \quad S = \mathrm{diag}(s_1, \dots, s_n), \quad s_i \geq 0

V is orthogonal on all of image space. U has a column for every column of V, zero where a singular
value has no measurement, so that coefficients of images and measurements share one shape. Operators
act on every channel alike; one channel is decomposed. There are three ways, and an UnsupportedTask
for other operators:

- inpainting: U = V = I, and the mask has the singular values;
- :math:`A(X) = L X R^T`, what bicubic down-sampling and a Gaussian blur do: Kronecker products of
  the factors of L and R, which are those of a blur's kernel, or else found by probing A with
  images of rank one;
- else the dense matrix of one channel, if that has at most 4096 numbers.

Factors are decomposed in double precision, and only what comes of it is rounded. The operator
itself is asked in the precision of the images, without the shortened products of a GPU.
"""

from collections.abc import Callable
from functools import partial
from itertools import cycle
from weakref import WeakKeyDictionary

import torch
from deepinv.physics import Blur, DecomposablePhysics, Inpainting, LinearPhysics, Physics
from torch import Tensor

from diffoc.greedy import correction
from diffoc.problems.tasks import UnsupportedTask, parts_of

LARGEST = 4096  # numbers of a channel whose dense matrix is decomposed
_TOLERANCE = 1e-5  # relative, of what A does to random images: kernels are in single precision

# A dense decomposition takes most of a minute, and a task is asked many times.
_known: WeakKeyDictionary[Physics, dict] = WeakKeyDictionary()


def require_linear(physics: Physics) -> LinearPhysics:
    """Returns the physics itself, if it has an adjoint."""
    if not isinstance(physics, LinearPhysics):
        kind = type(physics).__name__
        raise UnsupportedTask(f"the method needs a linear operator and its adjoint, not a {kind}")
    return physics


def pseudo_inverse(physics: LinearPhysics, y: Tensor) -> Tensor:
    """Returns the images (B, ...) of least squares and least norm of measurements (B, ...).

    They are inverted one by one: deepinv's iterations stop by the whole batch. One measurement that
    was expanded to a batch is inverted once.
    """
    parts = parts_of(physics)
    if len(parts) == 1 and y.stride(0) == 0:
        x = parts[0].A_dagger(y[:1])
        return x.expand(len(y), *x.shape[1:])
    pairs = zip(cycle(parts), y.split(1), strict=False)
    return torch.cat([part.A_dagger(each) for part, each in pairs])


@torch.no_grad()
def decompose(physics: Physics, x: Tensor) -> DecomposablePhysics:
    """Returns the operator with `U`, `U_adjoint`, `V`, `V_adjoint`, and its values in `mask`.

    It is decomposed once for every shape, dtype and device of images (B, C, H, W), or flat states
    (B, n), like `x`, and must not change after.
    """
    require_linear(physics)
    if isinstance(physics, Inpainting):
        return physics
    if len(parts := parts_of(physics)) > 1:
        return _together([decompose(part, x) for part in parts])
    known = _known.setdefault(physics, {})
    kind = (x.shape[1:], x.dtype, x.device)
    if kind not in known:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            known[kind] = _decompose(physics, x)
    return known[kind]


def corrections(physics: LinearPhysics, x: Tensor) -> Callable[[Tensor, Tensor, float], Tensor]:
    r"""Returns the function d(y, x, r) that minimises :math:`r \|A (x + d) - y\|^2 + \|d\|^2`.

    It is exact where the operator is decomposed for images like `x`, and else by the conjugate
    gradients of :func:`diffoc.greedy.correction`; no image of a batch decides for another.
    """
    try:
        svd = decompose(physics, x)
    except UnsupportedTask:
        return partial(correction, physics, trials=100, tol=1e-5)

    def exact(y: Tensor, x: Tensor, ratio: float) -> Tensor:
        # (I + r S^2) V^T d = r S U^T (y - A x)
        gain = ratio * svd.mask / (1 + ratio * svd.mask**2)
        return svd.V(gain * svd.U_adjoint(y - physics.A(x)))

    return exact


def _together(parts: list[DecomposablePhysics]) -> DecomposablePhysics:
    """Returns the decomposition of a batch, whose image i has that of `parts[i]`."""

    def each(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat(
            [getattr(part, name)(one) for part, one in zip(parts, x.split(1), strict=True)]
        )

    maps = {name: each(name) for name in ("U", "U_adjoint", "V", "V_adjoint")}
    mask = torch.cat([part.mask for part in parts])
    return DecomposablePhysics(**maps, mask=mask, device=mask.device)


def _decompose(physics: LinearPhysics, x: Tensor) -> DecomposablePhysics:
    A, generator = physics.A, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(x) + 0.5

    probe = random(2, *x.shape[1:]) - 1
    expected = A(probe)
    # Rounding of A(x) grows like a side's root in float32.
    tolerance = max(_TOLERANCE, 8 * torch.finfo(x.dtype).eps * max(x.shape[1:]) ** 0.5)

    def is_right(candidate: DecomposablePhysics) -> bool:
        error = torch.linalg.vector_norm(candidate.A(probe) - expected)
        return bool(error <= tolerance * torch.linalg.vector_norm(expected))

    if x.ndim == 4 and expected.ndim == 4:
        if isinstance(physics, Blur):
            separable = _kronecker(*_factors_of_blur(physics, x), x)
        else:
            separable = _kronecker(*_factors(A, random(x.shape[-2]), random(x.shape[-1])), x)
        if is_right(separable):
            return separable
    channel = x.shape[-2:] if x.ndim == 4 else x.shape[1:]
    n = channel.numel()
    if n > LARGEST:
        raise UnsupportedTask(
            f"the operator is not separable, and a channel has {n} numbers: "
            f"dense decompositions are made of up to {LARGEST}"
        )
    units = torch.eye(n).to(x)
    responses = A(units.reshape(n, 1, *channel) if x.ndim == 4 else units)
    measured = responses.shape[2:] if x.ndim == 4 else responses.shape[1:]
    dense = _dense(responses.reshape(n, -1).mT, channel, measured, x)
    if not is_right(dense):
        raise UnsupportedTask("the operator does not act on every channel alike")
    return dense


def _factors_of_blur(blur: Blur, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns L and R of a blur with the kernel column row^T: what these do to the columns of I.

    Of another kernel they are those of the nearest such one, and seen not to be right.
    """
    U, s, Vh = torch.linalg.svd(blur.filter[0, 0].double())
    L, R = (
        Blur(filter=line[None, None], padding=blur.padding, device=x.device).A(
            torch.eye(length).to(line)[None, None]
        )[0, 0]
        for line, length in ((s[0] * U[:, :1], x.shape[-2]), (Vh[0][:, None], x.shape[-1]))
    )
    return L, R


def _factors(A: Callable[[Tensor], Tensor], column: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Returns L (h, H) and R (w, W), if A(X) = L X R^T, of vectors (H,) and (W,) that they keep."""
    # A(column row^T) = (L column) (R row)^T has one singular value.
    U, S, Vh = torch.linalg.svd(A(torch.outer(column, row)[None, None])[0, 0])
    rows_one_by_one = torch.eye(len(column)).to(row)[:, None, :, None] * row
    columns_one_by_one = torch.eye(len(row)).to(row)[:, None, None, :] * column[:, None]
    L = (A(rows_one_by_one)[:, 0] @ Vh[0]).mT
    R = (U[:, 0] @ A(columns_one_by_one)[:, 0]).mT / S[0]
    return L, R


def _full_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U (m, n), s (n,) and V (n, n) of a matrix (m, n), with zeros where m < n."""
    m, n = matrix.shape
    if m == n:
        return _square_svd(matrix)
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=m < n)
    missing = max(n - m, 0)
    return torch.nn.functional.pad(U, (0, missing)), torch.nn.functional.pad(s, (0, missing)), Vh.mT


def _square_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the same of a square matrix, in a fifth of the library's time at 4096 numbers.

    A V = U S with the eigenvectors V of A^T A, which are right but for singular values so small
    that their squares are rounding: among those, the library decomposes what A does.
    """
    squares, V = torch.linalg.eigh(matrix.mT @ matrix)
    V = V.flip(1)
    large = int((squares > 1e-6 * squares[-1]).sum())
    U, R = torch.linalg.qr(matrix @ V)
    rest, s, Vh = torch.linalg.svd(R[large:, large:])
    of_large = R.diagonal()[:large]
    U = torch.cat([U[:, :large] * of_large.sign(), U[:, large:] @ rest], dim=1)
    V = torch.cat([V[:, :large], V[:, large:] @ Vh.mT], dim=1)
    return U, torch.cat([of_large.abs(), s]), V


def _without_rounding(s: Tensor, x: Tensor) -> Tensor:
    """Returns singular values in the precision of `x`; those that are mere rounding are zero."""
    return torch.where(s > torch.finfo(x.dtype).eps * s.max(), s, 0).to(x)


def _kronecker(L: Tensor, R: Tensor, x: Tensor) -> DecomposablePhysics:
    (UL, sL, VL), (UR, sR, VR) = (_full_svd(matrix.double()) for matrix in (L, R))
    s = _without_rounding(torch.outer(sL, sR), x)
    UL, VL, UR, VR = (part.to(x) for part in (UL, VL, UR, VR))
    return DecomposablePhysics(
        U=lambda c: UL @ c @ UR.mT,
        U_adjoint=lambda y: UL.mT @ y @ UR,
        V=lambda c: VL @ c @ VR.mT,
        V_adjoint=lambda x: VL.mT @ x @ VR,
        mask=s[None, None],
        device=x.device,
    )


def _dense(
    matrix: Tensor, channel: torch.Size, measured: torch.Size, x: Tensor
) -> DecomposablePhysics:
    # What is lost to rounding in single precision is too much for matrices of this size.
    U, s, V = _full_svd(matrix.double())
    U, s, V = (part.to(x) for part in (U, _without_rounding(s, x), V))

    def apply(factor: Tensor, x: Tensor, before: torch.Size, after: torch.Size) -> Tensor:
        batch = x.shape[: x.ndim - len(before)]
        return (x.reshape(*batch, -1) @ factor.mT).reshape(*batch, *after)

    return DecomposablePhysics(
        U=lambda c: apply(U, c, channel, measured),
        U_adjoint=lambda y: apply(U.mT, y, measured, channel),
        V=lambda c: apply(V, c, channel, channel),
        V_adjoint=lambda x: apply(V.mT, x, channel, channel),
        mask=s.reshape(1, *([1] * (len(channel) > 1)), *channel),
        device=x.device,
    )
