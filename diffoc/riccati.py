r"""The Riccati recursion of iLQR with dense matrices, Eqs. 39-49 (Appendix B).

Around a nominal trajectory the dynamics are expanded to first order and the costs to second,

.. math::
    f(x + \delta x, u + \delta u) &\approx f + f_x \delta x + f_u \delta u , \\
    \ell(x + \delta x, u + \delta u) &\approx \ell + \ell_x^T \delta x + \ell_u^T \delta u
        + \tfrac12 \delta x^T \ell_{xx} \delta x + \delta u^T \ell_{ux} \delta x
        + \tfrac12 \delta u^T \ell_{uu} \delta u ,

and one step back in time turns the value function's gradient and Hessian at the next state into
those at the present one. This module knows one step; :mod:`diffoc.ilqr` knows the sweep. Short
names (Qu, Quu, Vx, k, K) are the textbook's. Vectors are (B, n), matrices (B, n, n): a leading
batch everywhere, no problem of which depends on another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

VALUE_UPDATES = ("full", "paper")


class System(Protocol):
    """What is differentiated: the callables of :class:`diffoc.ilqr.ControlProblem`."""

    @property
    def dynamics(self) -> Callable[[int, Tensor, Tensor], Tensor]:
        """See there, as for the others."""

    @property
    def running_cost(self) -> Callable[[int, Tensor, Tensor], Tensor]:
        """The cost of a step."""

    @property
    def terminal_cost(self) -> Callable[[Tensor], Tensor]:
        """The cost of final states."""


@dataclass
class Counts:
    """Work done by a batch, in units of one problem: evaluations and products are those of a batch.

    Attributes:
        evaluations: of the dynamics.
        products: vector-Jacobian products of the dynamics.
        tangents: Jacobian-vector products of the dynamics, which only
            :class:`diffoc.theory.projected.Projected` takes.
    """

    evaluations: int = 0
    products: int = 0
    tangents: int = 0


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
class Gains:
    r"""The locally optimal control of one step, :math:`\delta u = \epsilon k + K \delta x`.

    Attributes:
        k: feedforward, (B, m).
        K: feedback, (B, m, n).
        slope, curvature: :math:`k^T Q_u` and :math:`k^T Q_{uu} k`, (B,): this step's share of the
            expected change :math:`\epsilon\, k^T Q_u + \tfrac12 \epsilon^2 k^T Q_{uu} k`.
        definite: whether Quu + a I was positive definite, (B,) bool; where it was not, k and K
            are zero.
    """

    k: Tensor
    K: Tensor
    slope: Tensor
    curvature: Tensor
    definite: Tensor

    def feedback(self, dx: Tensor) -> Tensor:
        """K dx, for flat deviations dx (B, n)."""
        return (self.K @ dx.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class DenseValue:
    """The value function's gradient Vx (B, n) and Hessian Vxx (B, n, n) at one state."""

    Vx: Tensor
    Vxx: Tensor

    def step_back(self, e: Expansion, a: Tensor, update: str) -> tuple[Gains, DenseValue]:
        r"""One Riccati step, from the value at the next state to gains and value at this one.

        Args:
            e: the expansion at this step.
            a: Tikhonov's constant, added to the diagonal of Quu for the gains, (B,), a >= 0.
            update: "paper" for Eqs. 48 and 49, which drop terms that cancel only for the
                unregularised gains; "full" for the value of the policy (k, K) whatever made it
                (Tassa et al. 2012, doi:10.1109/IROS.2012.6386025, Eq. 11).

        Returns:
            The gains and the value at this step's state.
        """
        fxT, fuT = e.fx.mT, e.fu.mT
        Qx = e.lx + _matvec(fxT, self.Vx)  # Eq. 40
        Qu = e.lu + _matvec(fuT, self.Vx)  # Eq. 41
        xVx, uVu, uVx = _quadratic_forms(self.Vxx, e.fx, e.fu)
        Qxx = e.lxx + xVx  # Eq. 42
        Quu = e.luu + uVu  # Eq. 43
        Qux = e.lux + uVx  # Eq. 44

        L, definite = _cholesky(Quu + a[:, None, None] * _eye_like(Quu))
        solved = -torch.cholesky_solve(torch.cat([Qu.unsqueeze(-1), Qux], dim=-1), L)
        solved = torch.where(definite[:, None, None], solved, 0)
        k, K = solved[..., 0], solved[..., 1:]  # Eqs. 46 and 47

        QuuK = Quu @ K
        if update == "paper":
            Vx = Qx - _matvec(QuuK.mT, k)  # Eq. 48
            Vxx = Qxx - K.mT @ QuuK  # Eq. 49
        else:
            Vx = Qx + _matvec(QuuK.mT, k) + _matvec(K.mT, Qu) + _matvec(Qux.mT, k)
            # K'Qux + Qux'K is twice the symmetric part of K'Qux, which is what is kept below.
            Vxx = Qxx + K.mT @ (QuuK + 2 * Qux)
        gains = Gains(k, K, (k * Qu).sum(-1), (k * _matvec(Quu, k)).sum(-1), definite)
        return gains, DenseValue(Vx, (Vxx + Vxx.mT) / 2)


@dataclass(frozen=True)
class Dense:
    """Derivatives as matrices, for the controller; suits some thousand states at most.

    Attributes:
        counts: of the evaluations done with this object; Jacobians are not counted.
    """

    counts: Counts = field(default_factory=Counts)

    def fresh(self) -> Dense:
        """The same, with counts of its own that begin at zero."""
        return replace(self, counts=Counts())

    def step(
        self, problem: System, i: int, x: Tensor, u: Tensor
    ) -> tuple[Tensor, Callable[[], Expansion]]:
        """The next states, and what expands this step."""
        self.counts.evaluations += 1

        def expand() -> Expansion:
            return expand_step(problem.dynamics, problem.running_cost, i, x, u)

        return problem.dynamics(i, x, u), expand

    def terminal(self, problem: System, x: Tensor, rank: int | None) -> DenseValue:
        """The value at the final states, see :func:`terminal_value`."""
        return terminal_value(problem.terminal_cost, x, rank)

    def expand(self, steps: list[Callable[[], Expansion]], value: DenseValue) -> list[Expansion]:
        """The trajectory's expansion, from its steps'."""
        return [step() for step in steps]

    def gradients(self, expansions: list[Expansion], value: DenseValue) -> list[Tensor]:
        """The derivatives of the total cost in the controls of every step, (B, m) each."""
        return list(control_gradient(expansions, value.Vx))


def expand_step(
    dynamics: Callable[[int, Tensor, Tensor], Tensor],
    running_cost: Callable[[int, Tensor, Tensor], Tensor],
    i: int,
    x: Tensor,
    u: Tensor,
) -> Expansion:
    """The expansion of dynamics and running cost at step `i`, by reverse differentiation.

    Args:
        dynamics: maps (i, x, u) to the next states.
        running_cost: maps (i, x, u) to costs, (B,).
        i: the step.
        x, u: states and controls, (B, ...).
    """
    x, u = x.detach().requires_grad_(), u.detach().requires_grad_()
    with torch.enable_grad():
        fx, fu = _jacobian(dynamics(i, x, u).flatten(1), (x, u))
        (lx, lu), ((lxx, _), (lux, luu)) = _gradient_and_hessian(running_cost(i, x, u), (x, u))
    return Expansion(fx, fu, lx, lu, lxx, luu, lux)


def terminal_value(
    cost: Callable[[Tensor], Tensor], x: Tensor, rank: int | None = None
) -> DenseValue:
    """The value function at the final state: gradient and Hessian of the terminal cost.

    Args:
        cost: maps states (B, ...) to (B,).
        x: final states, (B, ...).
        rank: keep only so many eigenvalues of the Hessian, largest in magnitude; None keeps all,
            0 makes the recursion first order.

    Raises:
        ValueError: if `rank` is not between 0 and n.
    """
    n = x[0].numel()
    if rank is not None and not 0 <= rank <= n:
        raise ValueError(f"rank is {rank}, expected 0 to {n}")
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (Vx,), ((Vxx,),) = _gradient_and_hessian(cost(x), (x,))
    Vxx = (Vxx + Vxx.mT) / 2
    if rank == 0:
        Vxx = torch.zeros_like(Vxx)
    elif rank is not None:
        values, vectors = torch.linalg.eigh(Vxx)
        keep = values.abs().topk(rank, dim=-1).indices
        values = values.gather(-1, keep)
        vectors = vectors.gather(-1, keep.unsqueeze(-2).expand(*vectors.shape[:-1], rank))
        Vxx = (vectors * values.unsqueeze(-2)) @ vectors.mT
    return DenseValue(Vx, Vxx)


def control_gradient(expansions: list[Expansion], terminal_gradient: Tensor) -> Tensor:
    """The total cost's gradient in the controls, by the adjoint recursion, (T, B, m).

    Unlike Qu, which belongs to a policy with feedback, this is the derivative of the open-loop
    cost and vanishes exactly at a local optimum.

    Args:
        expansions: of the steps 0 to T - 1.
        terminal_gradient: of the terminal cost at the final state, (B, n).
    """
    costate, gradient = terminal_gradient, []
    for e in reversed(expansions):
        gradient.append(e.lu + _matvec(e.fu.mT, costate))
        costate = e.lx + _matvec(e.fx.mT, costate)
    return torch.stack(gradient[::-1])


def _quadratic_forms(V: Tensor, fx: Tensor, fu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fx'V fx, fu'V fu and fu'V fx.

    Two products do instead of five where the controls are added to the state, before a step
    (fu = fx, input perturbation) or after it (fu = I, output perturbation).
    """
    Vfx = V @ fx
    xVx = fx.mT @ Vfx
    if torch.equal(fu, fx):
        return xVx, xVx, xVx
    if torch.equal(fu, _eye_like(fu).expand(len(fu), -1, -1)):
        return xVx, V, Vfx
    return xVx, fu.mT @ (V @ fu), fu.mT @ Vfx


def _matvec(A: Tensor, v: Tensor) -> Tensor:
    return (A @ v.unsqueeze(-1)).squeeze(-1)


def _eye_like(A: Tensor) -> Tensor:
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)


def _cholesky(A: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (B, m, m), and which are positive definite beyond rounding, (B,).

    A matrix that is singular in exact arithmetic often has a factor with tiny pivots; the gains
    computed from it would be rounding errors divided by rounding errors. The identity stands in
    for a factor that failed.
    """
    L, info = torch.linalg.cholesky_ex(A)
    pivots = L.diagonal(dim1=-2, dim2=-1).square()
    floor = A.shape[-1] * torch.finfo(A.dtype).eps * pivots.amax(-1)
    definite = (info == 0) & (pivots.amin(-1) > floor)
    return torch.where(definite[:, None, None], L, _eye_like(A)), definite


def _jacobian(output: Tensor, inputs: tuple[Tensor, ...], keep: bool = False) -> list[Tensor]:
    """Jacobians (B, p, n_j) of a batched function's output (B, p) in each input (B, ...).

    Problems are independent, so row p of all Jacobians of a batch comes from one backward pass.
    """
    batch, p = output.shape
    if not output.requires_grad:
        return [output.new_zeros(batch, p, x[0].numel()) for x in inputs]
    rows = torch.eye(p, dtype=output.dtype, device=output.device).unsqueeze(1)
    grads = torch.autograd.grad(
        output,
        inputs,
        rows.expand(p, batch, p),
        is_grads_batched=True,
        retain_graph=keep,
        allow_unused=True,
    )
    return [
        output.new_zeros(batch, p, x[0].numel())
        if g is None
        else g.movedim(0, 1).flatten(2).detach()
        for g, x in zip(grads, inputs, strict=True)
    ]


def _gradient_and_hessian(
    cost: Tensor, inputs: tuple[Tensor, ...]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Gradients (B, n_j) and Hessian blocks [i][j] (B, n_i, n_j) of a batched cost (B,)."""
    grads: Sequence[Tensor]
    if cost.requires_grad:
        grads = torch.autograd.grad(cost.sum(), inputs, create_graph=True, materialize_grads=True)
    else:
        grads = [torch.zeros_like(x) for x in inputs]
    flat = [g.flatten(1) for g in grads]
    hessian = [_jacobian(g, inputs, keep=True) for g in flat]
    return [g.detach() for g in flat], hessian
