r"""The terminal Hessian by products: its low-rank approximation, and the products themselves.

Nothing here forms the Hessian. A batch of square matrices (B, n, n) is a function that maps vectors
(B, n, c) to products (B, n, c). The approximations are those of Halko, Martinsson & Tropp 2011
(doi:10.1137/090771806), from `rank + oversampling` random directions.

For a cost :math:`\frac12 \|z(x)\|^2` with the Jacobian J of z, the full Hessian and its
Gauss-Newton part are

.. math:: H = J^T J + \sum_i z_i \nabla^2 z_i , \qquad H_{GN} = J^T J .

They agree where z is linear, or zero; the second is positive semidefinite everywhere, and the
first need not be (Nocedal & Wright 2006, doi:10.1007/978-0-387-40065-5, Sec. 10.3).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffoc.checks import check_member

Product = Callable[[Tensor], Tensor]

OVERSAMPLING = 5
"""How many directions are drawn beyond the rank."""


def check_rank(x: Tensor, rank: int | None) -> int:
    """Returns the rank, once a Hessian at states x (B, ...) can have it."""
    n = x[0].numel()
    if rank is None or not 0 <= rank <= n:
        raise ValueError(f"rank is {rank}, expected 0 to {n}")
    return rank


def random_directions(x: Tensor, count: int, seed: int = 0) -> Tensor:
    """Returns standard normal vectors (B, n, count) for states x (B, ...).

    They are the same for every problem and iteration, so that no result depends on the batch.
    """
    n, generator = x[0].numel(), torch.Generator().manual_seed(seed)
    omega = torch.randn(n, count, generator=generator, dtype=torch.float64).to(x)
    return omega.expand(len(x), n, count)


def range_finder(product: Product, directions: Tensor) -> Tensor:
    """Returns orthonormal columns whose span nearly contains a matrix's range, Algorithm 4.1.

    The directions are standard normal, (B, n, c), c at most n; so is the result's shape.
    """
    return torch.linalg.qr(product(directions)).Q


def symmetric_eigen(product: Product, directions: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns approximate eigenvectors (B, n, rank) and eigenvalues (B, rank), largest first.

    Largest means in magnitude. The symmetric matrix is compressed to its approximate range,
    Algorithm 5.3, which takes 2 c products for standard normal directions (B, n, c), c >= `rank`.
    """
    Q = range_finder(product, directions)
    small = Q.mT @ product(Q)
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    return largest(Q @ vectors, values, directions, rank)


def nystrom(product: Product, directions: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""Does as :func:`symmetric_eigen` for a positive semidefinite matrix, in c products.

    The matrix is approximated by :math:`Y (\Omega^T Y)^+ Y^T`, :math:`Y = H \Omega`, after a shift
    that keeps the core positive definite in floating point, which is taken back at the end.

    Source: Halko et al., Algorithm 5.5; the shift is of Tropp, Yurtsever, Udell & Cevher 2017
    (arXiv:1706.05736), Algorithm 3.
    """
    basis = torch.linalg.qr(directions).Q
    Y = product(basis)
    # The core is inverted: its rounding errors must stay below the shift.
    shift = 10 * torch.finfo(Y.dtype).eps * torch.linalg.matrix_norm(Y, ord="fro")[..., None, None]
    # Of a zero matrix too, even where denormal numbers are flushed to zero.
    shift = shift.clamp(min=torch.finfo(Y.dtype).tiny ** 0.5)
    shifted = Y + shift * basis
    core = basis.mT @ shifted
    L = torch.linalg.cholesky((core + core.mT) / 2)
    half = torch.linalg.solve_triangular(L, shifted.mT, upper=False).mT
    U, s, _ = torch.linalg.svd(half, full_matrices=False)
    values = (s.square() - shift[..., 0]).clamp(min=0)
    return largest(U, values, directions, rank)


def largest(
    vectors: Tensor, values: Tensor, directions: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    r"""Returns the eigenpairs largest in magnitude, chosen by `directions` where equals are cut.

    A mask's Gauss-Newton Hessian is a multiple of a projector: all its eigenvalues but zero are
    equal, a decomposition in floating point puts first whichever eigenvector rounding makes the
    largest, and what is kept would jump from one thread count to another. So of a group of equal
    eigenvalues that `rank` cuts through, with the eigenvectors V, those are kept that Gram and
    Schmidt make of the projected directions: the p-th of all, which is the group's o-th, is

    .. math:: q_p \propto (I - \sum_{r < p} q_r q_r^T) \, V V^T \omega_o ,

    which is as smooth as the projector :math:`V V^T` is. Equal are eigenvalues whose neighbours
    differ by less than the largest times the root of machine precision. Of two groups of one
    magnitude the positive one comes first. The vectors are orthonormal, (B, n, c).
    """
    order = values.abs().argsort(dim=-1, descending=True, stable=True)
    sizes = values.gather(-1, order).abs()
    jumps = -sizes.diff(dim=-1) > torch.finfo(values.dtype).eps ** 0.5 * sizes[..., :1]
    sizes = torch.nn.functional.pad(jumps.cumsum(dim=-1), (1, 0))  # the number of each one's size
    group = 2 * sizes + (values.gather(-1, order) < 0)
    group, regular = group.sort(dim=-1, stable=True)
    order = order.gather(-1, regular)
    values = values.gather(-1, order)
    vectors = vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors))

    projections = vectors.mT @ directions
    units = torch.eye(values.shape[-1]).to(values)
    cut = group[..., max(rank - 1, 0) :][..., :1]
    cut = torch.where((group[..., rank:] == cut).any(dim=-1, keepdim=True), cut, -1)
    chosen = vectors.new_zeros(*values.shape, 0)
    for p in range(rank):
        equal = group == group[..., p, None]
        o = p - equal.long().argmax(dim=-1)
        q = projections.gather(-1, o[..., None, None].expand_as(projections[..., :1]))
        q = torch.where(equal[..., None], q, 0)
        q = torch.where((group[..., p, None] == cut)[..., None], q, units[:, p, None])
        for _ in range(2):  # once leaves what it rounded
            q = q - chosen @ (chosen.mT @ q)
        chosen = torch.cat([chosen, torch.nn.functional.normalize(q, dim=-2)], dim=-1)
    return vectors @ chosen, (chosen.square() * values[..., None]).sum(dim=-2)


HESSIANS = ("full", "gauss_newton")


def terminal_products(
    cost: Callable[[Tensor], Tensor], x: Tensor, hessian: str = "full"
) -> tuple[Tensor, Product]:
    """Returns a terminal cost's gradient (B, n), and what multiplies by its Hessian.

    The cost maps states x (B, ...) to (B,) and is twice differentiable. A product takes one
    backward pass through the gradient ("full"), or two through the residual ("gauss_newton"), for
    J v and for J^T. The latter need a cost with a method `whitened_residual`, from
    states to z (B, ...), as :class:`diffoc.costs.GaussianLikelihood` has.
    """
    check_member(HESSIANS, hessian=hessian)
    x = x.detach().requires_grad_()
    if hessian == "gauss_newton":
        return _gauss_newton(cost, x)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(cost(x).sum(), x, create_graph=True)
    flat = gradient.detach().flatten(1)
    if not gradient.requires_grad:  # of a linear cost
        return flat, torch.zeros_like
    return flat, lambda X: _columns(gradient, x, _rows(X, x))


def _gauss_newton(cost: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Product]:
    residual = getattr(cost, "whitened_residual", None)
    if not callable(residual):
        raise ValueError(
            f"hessian is 'gauss_newton', but the terminal cost, {type(cost).__name__}, has no "
            "method whitened_residual: expected a GaussianLikelihood or its like"
        )
    with torch.enable_grad():
        z = residual(x)
        # J^T w is linear in w, so that its derivative in w, whatever w, is J.
        w = torch.zeros_like(z, requires_grad=True)
        (transposed,) = torch.autograd.grad(z, x, w, create_graph=True)
    (gradient,) = torch.autograd.grad(z, x, z.detach(), retain_graph=True)

    def product(X: Tensor) -> Tensor:
        (JX,) = batched_vjp(transposed, (w,), _rows(X, x))
        return _columns(z, x, JX)

    return gradient.flatten(1), product


def _rows(X: Tensor, x: Tensor) -> Tensor:
    """Returns vectors (B, n, c) as (c, B, ...), in the shape of x."""
    return X.movedim(-1, 0).reshape(-1, *x.shape)


def _columns(output: Tensor, x: Tensor, cotangents: Tensor) -> Tensor:
    """Returns J^T times cotangents (c, B, ...), (B, n, c)."""
    (grads,) = batched_vjp(output, (x,), cotangents)
    return grads.flatten(2).movedim(0, -1)


def batched_vjp(output: Tensor, inputs: tuple[Tensor, ...], cotangents: Tensor) -> list[Tensor]:
    """Returns J^T times cotangents (c, B, ...) for each input (B, ...), in one backward pass."""
    gradients = torch.autograd.grad(
        output, inputs, cotangents, is_grads_batched=True, retain_graph=True, materialize_grads=True
    )
    # torch's zeros, where the output does not depend on an input, have no dimension for them all.
    return [g.expand(len(cotangents), *x.shape) for g, x in zip(gradients, inputs, strict=True)]
