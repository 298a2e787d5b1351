r"""The Riccati recursion of iLQR with dense matrices, Eqs. 39-49 (Appendix B).

Around a nominal trajectory the dynamics are expanded to first order and the costs to second,

.. math::
    f(x + \delta x, u + \delta u) &\approx f + f_x \delta x + f_u \delta u , \\
    \ell(x + \delta x, u + \delta u) &\approx \ell + \ell_x^T \delta x + \ell_u^T \delta u
        + \tfrac12 \delta x^T \ell_{xx} \delta x + \delta u^T \ell_{ux} \delta x
        + \tfrac12 \delta u^T \ell_{uu} \delta u ,

and one step back in time turns the value function's gradient and Hessian at the next state into
those at the present one. Short names (Qu, Quu, Vx, k, K) are the textbook's. Vectors are (B, n),
matrices (B, n, n): a leading batch everywhere, no problem of which depends on another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffoc.checks import check_member
from diffoc.hessian import OVERSAMPLING, batched_vjp, check_rank, largest, random_directions
from diffoc.system import ControlProblem, Derivatives, StepFunction, StepGains

UPDATES = ("full", "paper")
"""The values that a step back can have, see :meth:`DenseValue.step_back`."""


class SingularControlHessianError(torch.linalg.LinAlgError):
    """The regularised control Hessian Quu + a I of a step is not positive definite."""


@dataclass(frozen=True)
class Expansion:
    """Dynamics to first and running cost to second order, at one step of the trajectory.

    Attributes:
        fx, fu: Jacobians of the dynamics, (B, n, n) and (B, n, m).
        lx, lu: gradients of the running cost, (B, n) and (B, m).
        lxx, luu, lux: its Hessians, (B, n, n), (B, m, m) and (B, m, n).
    """

    fx: Tensor
    fu: Tensor
    lx: Tensor
    lu: Tensor
    lxx: Tensor
    luu: Tensor
    lux: Tensor


@dataclass(frozen=True)
class Gains(StepGains):
    """Gains with the feedback K as a matrix, (B, m, n)."""

    K: Tensor

    def feedback(self, dx: Tensor) -> Tensor:
        return matvec(self.K, dx)


@dataclass(frozen=True)
class DenseValue:
    """The value function's gradient Vx (B, n) and Hessian Vxx (B, n, n) at one state."""

    Vx: Tensor
    Vxx: Tensor

    def step_back(self, e: Expansion, a: Tensor, update: str) -> tuple[Gains, DenseValue]:
        r"""Returns the gains of a step and the value at its state, from the one at the next.

        For the gains Tikhonov's constants a, (B,), a >= 0, are added to Quu's diagonal. The update
        "paper" is Eqs. 48 and 49, which drop terms that cancel only for the unregularised gains;
        "full" is the value of the policy (k, K) whatever made it (Tassa et al. 2012,
        doi:10.1109/IROS.2012.6386025, Eq. 11).
        """
        check_member(UPDATES, update=update)
        fxT, fuT = e.fx.mT, e.fu.mT
        Qx = e.lx + matvec(fxT, self.Vx)  # Eq. 40
        Qu = e.lu + matvec(fuT, self.Vx)  # Eq. 41
        Vfx = self.Vxx @ e.fx
        xVx = uVu = uVx = fxT @ Vfx
        if not torch.equal(e.fu, e.fx):  # else controls are added to the state, input perturbation
            uVu, uVx = fuT @ (self.Vxx @ e.fu), fuT @ Vfx
        Qxx = e.lxx + xVx  # Eq. 42
        Quu = e.luu + uVu  # Eq. 43
        Qux = e.lux + uVx  # Eq. 44

        eye = torch.eye(Quu.shape[-1], dtype=Quu.dtype, device=Quu.device)
        L, definite = _cholesky(Quu + a[:, None, None] * eye)
        solved = -torch.cholesky_solve(torch.cat([Qu.unsqueeze(-1), Qux], dim=-1), L)
        solved = torch.where(definite[:, None, None], solved, 0)
        k, K = solved[..., 0], solved[..., 1:]  # Eqs. 46 and 47

        QuuK = Quu @ K
        if update == "paper":
            Vx = Qx - matvec(QuuK.mT, k)  # Eq. 48
            Vxx = Qxx - K.mT @ QuuK  # Eq. 49
        else:
            Vx = Qx + matvec(QuuK.mT, k) + matvec(K.mT, Qu) + matvec(Qux.mT, k)
            # K'Qux + Qux'K is twice the symmetric part of K'Qux, which is what is kept below.
            Vxx = Qxx + K.mT @ (QuuK + 2 * Qux)
        gains = Gains(k, (k * Qu).sum(-1), (k * matvec(Quu, k)).sum(-1), definite, K)
        return gains, DenseValue(Vx, (Vxx + Vxx.mT) / 2)


@dataclass(frozen=True)
class Dense(Derivatives):
    """Derivatives as matrices, for some thousand states at most; Jacobians are not counted."""

    def step(
        self, problem: ControlProblem, i: int, x: Tensor, u: Tensor
    ) -> tuple[Tensor, Callable[[], Expansion]]:
        self.counts.evaluations += 1
        y = problem.dynamics(i, x, u)
        return y, lambda: expand_step(problem.dynamics, problem.running_cost, i, x, u)

    def terminal(self, problem: ControlProblem, x: Tensor, rank: int | None) -> DenseValue:
        return terminal_value(problem.terminal_cost, x, rank)

    def gradients(self, expansions: list[Expansion], value: DenseValue) -> list[Tensor]:
        return list(control_gradient(expansions, value.Vx))


def expand_step(
    dynamics: StepFunction, running_cost: StepFunction, i: int, x: Tensor, u: Tensor
) -> Expansion:
    """Returns the expansion of dynamics and running cost at step i, states x and controls u."""
    inputs = x.detach().requires_grad_(), u.detach().requires_grad_()
    with torch.enable_grad():
        fx, fu = _jacobians(dynamics(i, *inputs).flatten(1), inputs)
        lx, lu = _gradients(running_cost(i, *inputs), inputs)
        (lxx, _), (lux, luu) = _jacobians(lx, inputs), _jacobians(lu, inputs)
    return Expansion(fx, fu, lx.detach(), lu.detach(), lxx, luu, lux)


def terminal_value(
    cost: Callable[[Tensor], Tensor], x: Tensor, rank: int | None = None
) -> DenseValue:
    """Returns gradient and Hessian of the terminal cost at the final states, (B, ...).

    Of the Hessian only the `rank` eigenvalues that are largest in magnitude are kept, equal ones as
    :func:`diffoc.hessian.largest` chooses; None keeps all, and 0 makes the recursion first order.
    """
    inputs = (x.detach().requires_grad_(),)
    with torch.enable_grad():
        (Vx,) = _gradients(cost(*inputs), inputs)
        (Vxx,) = _jacobians(Vx, inputs)
    Vxx = (Vxx + Vxx.mT) / 2
    if rank is not None:
        omega = random_directions(x, min(x[0].numel(), check_rank(x, rank) + OVERSAMPLING))
        values, vectors = torch.linalg.eigh(Vxx)
        vectors, values = largest(vectors, values, omega, rank)
        Vxx = (vectors * values.unsqueeze(-2)) @ vectors.mT
    return DenseValue(Vx.detach(), Vxx)


def control_gradient(expansions: list[Expansion], terminal_gradient: Tensor) -> Tensor:
    """Returns the total cost's gradient in the controls, by the adjoint recursion, (T, B, m).

    Unlike Qu, which belongs to a policy with feedback, this is the derivative of the open-loop
    cost and vanishes exactly at a local optimum. The terminal cost's gradient is (B, n).
    """
    costate, gradient = terminal_gradient, []
    for e in reversed(expansions):
        gradient.append(e.lu + matvec(e.fu.mT, costate))
        costate = e.lx + matvec(e.fx.mT, costate)
    return torch.stack(gradient[::-1])


def matvec(A: Tensor, v: Tensor) -> Tensor:
    """Returns A v for matrices (B, p, n) and vectors (B, n).

    As a row times A^T, for which torch on a CPU takes a tenth of the time of A times a column.
    """
    return (v.unsqueeze(-2) @ A.mT).squeeze(-2)


def _cholesky(A: Tensor) -> tuple[Tensor, Tensor]:
    """Returns factors (B, m, m), and which are positive definite beyond rounding, (B,).

    A matrix that is singular in exact arithmetic often has a factor with tiny pivots; the gains
    computed from it would be rounding errors divided by rounding errors. The identity stands in
    for a factor that failed.
    """
    L, info = torch.linalg.cholesky_ex(A)
    pivots = L.diagonal(dim1=-2, dim2=-1).square()
    floor = A.shape[-1] * torch.finfo(A.dtype).eps * pivots.amax(-1)
    definite = (info == 0) & (pivots.amin(-1) > floor)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.where(definite[:, None, None], L, eye), definite


def _gradients(cost: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Returns the gradients (B, n_j) of costs (B,) in each input (B, ...), differentiable again."""
    if not cost.requires_grad:
        return [torch.zeros_like(x).flatten(1) for x in inputs]
    gradients = torch.autograd.grad(cost.sum(), inputs, create_graph=True, materialize_grads=True)
    return [g.flatten(1) for g in gradients]


def _jacobians(output: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Returns the Jacobians (B, p, n_j) of an output (B, p) in each input (B, ...).

    Problems are independent, so that row p of all Jacobians of a batch comes from one backward
    pass. Of small systems this takes a third of the time that `torch.func.jacrev` takes.
    """
    batch, p = output.shape
    if not output.requires_grad:
        return [output.new_zeros(batch, p, x[0].numel()) for x in inputs]
    rows = torch.eye(p, dtype=output.dtype, device=output.device).unsqueeze(1)
    jacobians = batched_vjp(output, inputs, rows.expand(p, batch, p))
    return [J.detach().movedim(0, 1).flatten(2) for J in jacobians]
