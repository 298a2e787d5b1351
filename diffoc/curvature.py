r"""Gradient of a terminal cost and products with its Hessian, full or Gauss-Newton.

The Hessian is never formed: a function maps vectors (B, n, c) to products (B, n, c). For a cost
:math:`\frac12 \|z(x)\|^2` with the Jacobian J of z, the full Hessian and its Gauss-Newton part are

.. math:: H = J^T J + \sum_i z_i \nabla^2 z_i , \qquad H_{GN} = J^T J .

They agree where z is linear, or zero; the second is positive semidefinite everywhere, and the
first need not be (Nocedal & Wright 2006, doi:10.1007/978-0-387-40065-5, Sec. 10.3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffoc.randomized import Product

HESSIANS = ("full", "gauss_newton")


def terminal_products(
    cost: Callable[[Tensor], Tensor], x: Tensor, hessian: str = "full"
) -> tuple[Tensor, Product]:
    """The gradient of a terminal cost, and the function that multiplies by its Hessian.

    A product takes one backward pass through the gradient ("full"), or one through the residual
    for J v, by differentiating its transpose, and one for J^T ("gauss_newton").

    Args:
        cost: maps states (B, ...) to (B,), twice differentiable; for "gauss_newton" it needs a
            method `whitened_residual`, from states to z (B, ...), half of whose square is the
            cost, as :class:`diffoc.costs.GaussianLikelihood` has.
        x: states, (B, ...), with n numbers each.
        hessian: a member of :data:`HESSIANS`.

    Returns:
        The gradient, (B, n), and the product.

    Raises:
        ValueError: if `hessian` is unknown, or "gauss_newton" of a cost without
            `whitened_residual`.
    """
    if hessian not in HESSIANS:
        raise ValueError(f"hessian is {hessian!r}, expected one of {', '.join(HESSIANS)}")
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
        (JX,) = torch.autograd.grad(
            transposed, w, _rows(X, x), is_grads_batched=True, retain_graph=True
        )
        return _columns(z, x, JX)

    return gradient.flatten(1), product


def _rows(X: Tensor, x: Tensor) -> Tensor:
    """Vectors (B, n, c) as (c, B, ...), in the shape of x."""
    return X.movedim(-1, 0).reshape(-1, *x.shape)


def _columns(output: Tensor, x: Tensor, cotangents: Tensor) -> Tensor:
    """Transposed Jacobian times cotangents (c, B, ...), in one backward pass, (B, n, c)."""
    (grads,) = torch.autograd.grad(
        output, x, cotangents, is_grads_batched=True, retain_graph=True, materialize_grads=True
    )
    return grads.flatten(2).movedim(0, -1)
