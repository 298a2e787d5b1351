r"""The paper's own high-dimensional recursion, Appendices D.1 and D.2: Jacobians of rank r.

Eq. 79 keeps a matrix A as a basis P of its range, (n, r) with orthonormal columns, and the
projection :math:`P^T A`, so that :math:`A \approx P P^T A`; the basis is that of a randomised SVD
(Halko et al. 2011, doi:10.1137/090771806). With P of the step's Jacobian :math:`h_x`, the value
Hessian :math:`V'_{xx} = Z S Z^T` at the next state, :math:`\rho = r_t + a`, and
:math:`h_u = h_x` (input mode) or I (output mode),

.. math::
    Q_x &= h_x^T V'_x, \qquad Q_u = r_t u + h_u^T V'_x, \text{ exact,} \\
    P^T Q_{xx} P &= (P^T h_x P)^T \, C \, (P^T h_x P), \qquad C = P^T V'_{xx} P, \\
    P^T (Q_{uu} - r_t I) P &= (P^T h_u P)^T \, C \, (P^T h_u P), \\
    P^T Q_{ux} P &= (P^T h_u P)^T \, C \, (P^T h_x P), \\
    (Q_{uu} + a I)^{-1} &= \tfrac1\rho (I - P P^T)
        + P \, (\rho I + P^T (Q_{uu} - r_t I) P)^{-1} P^T .

The first four are Eqs. 81-84, the fifth is Eq. 85. Eqs. 86-89 are Eqs. 46-49 with these: k, K and
:math:`V_x` take the exact gradients, and :math:`V_{xx}` is kept as P and :math:`P^T V_{xx} P`.

What the paper leaves open, and what is done here:

- *Whose P?* The equations write one P and say that it "need not be" one. With two passes every
  matrix has its own, as Eq. 79 asks: that of step i spans :math:`h_x \Omega`, that of the terminal
  Hessian H spans :math:`H \Omega`. With one pass P spans the random :math:`\Omega` itself, and
  serves all matrices, as the equations are written. The released code's bases are random by
  default, too, but new for every matrix and step, which forgets all but some r / n of V at each;
  its Jacobians are projected from the left. (As released its rank is 0.)
- *The dropped leading factor.* "We drop the leading P" keeps a product of matrices as a pair.
  The next product projects it again: C needs :math:`P^T Z`, and what of Z lies outside the span of
  P is lost. That is an approximation in every step, of which the paper gives no bound.
- *One side or two?* Eq. 79 projects from the left, :math:`h_x \approx P P^T h_x`, Eqs. 81-84 from
  both sides, :math:`h_x \approx P (P^T h_x P) P^T`, which makes their matrices r x r by the same
  products.

There is a charitable reading. A step :math:`h(x) = a x + b\,m(x)` of a network m has the
Jacobian :math:`h_x = a I + N`. The first part is known, and has all n directions; the second is
the network's, and it is what may be of low rank. With `kept` the first stays as it is, and only N
is sketched, from the left:

.. math:: h_x \approx a I + P P^T N, \qquad
          h_x^T Z \approx a Z + (N^T P)(P^T Z) \quad\text{for}\quad V'_{xx} = Z S Z^T .

No factor of the value Hessian is projected then.

The recursion of :mod:`diffoc.lowrank` needs none of these choices: a value Hessian of rank k stays
one. Everything here is that recursion with :math:`h_x^T Z` replaced by its projection, so what the
two give differs by the projections alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffoc.checks import check_member, check_whole
from diffoc.hessian import (
    HESSIANS,
    check_rank,
    random_directions,
    range_finder,
    terminal_products,
)
from diffoc.lowrank import LowRankGains, control_weight, linearize_step, low_rank_step
from diffoc.riccati import matvec
from diffoc.system import ControlProblem, Derivatives


@dataclass(frozen=True)
class ProjectedStep:
    """Dynamics and control cost at one step of the trajectory, for projected products.

    Attributes:
        basis: a function that computes P, (B, n, r), with orthonormal columns.
        pullback: the step's vector-Jacobian products, see :data:`diffoc.lowrank.Pullback`.
        u: the nominal control, flat, (B, m).
        r: the weight of the control cost.
        sides: the number of sides, 1 or 2, from which the Jacobians are projected.
        kept: the multiple of the identity that is not projected; None for D.1 to the letter.
    """

    basis: Callable[[], Tensor]
    pullback: Callable[[Tensor], tuple[Tensor, Tensor]]
    u: Tensor
    r: float
    sides: int
    kept: float | None = None


@dataclass(frozen=True)
class ProjectedValue:
    """The value function's gradient Vx (B, n) and Hessian Z S Z^T, (B, n, k) and (B, k, k)."""

    Vx: Tensor
    Z: Tensor
    S: Tensor

    def step_back(
        self, e: ProjectedStep, a: Tensor, update: str
    ) -> tuple[LowRankGains, ProjectedValue]:
        """Steps back by Eqs. 81-89, as :meth:`diffoc.riccati.DenseValue.step_back` does."""
        P = e.basis()
        PTZ = P.mT @ self.Z
        Qx, Qu = (g[0] for g in e.pullback(self.Vx.unsqueeze(0)))
        W, U = (g.movedim(0, -1) for g in e.pullback(P.movedim(-1, 0)))
        if e.kept is not None:
            if not torch.equal(W, U):
                raise ValueError("kept needs the control before the step: use input mode")
            # a Z + (N^T P) (P^T Z), with N^T P = h_x^T P - a P
            W = U = e.kept * self.Z + (W - e.kept * P) @ PTZ
            C = self.S
        else:
            C = PTZ @ self.S @ PTZ.mT
            if e.sides == 2:
                W, U = P @ (P.mT @ W), P @ (P.mT @ U)
        gains, c, S = low_rank_step(e.r * e.u + Qu, W, U, C, e.r, a, update)
        return gains, ProjectedValue(Qx + matvec(W, c), W, S)


@dataclass(frozen=True)
class Projected(Derivatives):
    """Derivatives as Appendix D.1 has them, for the controller; for comparison.

    An iteration costs :math:`T (2 F + r J + (1 + r) B)` with two passes, F and B being as
    for :class:`diffoc.lowrank.MatrixFree` and J one Jacobian-vector product, and
    :math:`T (F + (1 + r) B)` with one. The running cost must be a
    :class:`diffoc.costs.ControlCost`. The terminal Hessian is projected in the same way as the
    Jacobians, on as many columns as `rank` says; with one pass, give the two ranks the same number
    for the same P.

    Attributes:
        rank: the number r of columns of P, from 0, which is the first order, to n.
        passes: 2 for a range finder, 1 for a random projection.
        sides: 2 for Eqs. 81-84, 1 for Eq. 79.
        kept: the known multiples of the identity, T numbers, in the steps' Jacobians: they are not
            projected, and the rest is, from the left. None for D.1 to the letter. Input mode only.
        hessian: which terminal Hessian, "full" or "gauss_newton", see :mod:`diffoc.hessian`.
        together: whether P is pulled back in one batched backward pass, as
            :class:`diffoc.lowrank.MatrixFree` has it.
    """

    rank: int
    passes: int = 2
    sides: int = 2
    kept: tuple[float, ...] | None = None
    hessian: str = "full"
    together: bool = False

    def __post_init__(self) -> None:
        check_whole(0, rank=self.rank)
        for name in ("passes", "sides"):
            if getattr(self, name) not in (1, 2):
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or 2")
        check_member(HESSIANS, hessian=self.hessian)

    def step(
        self, problem: ControlProblem, i: int, x: Tensor, u: Tensor
    ) -> tuple[Tensor, Callable[[], ProjectedStep]]:
        r, n = control_weight(problem, i), x[0].numel()
        if self.rank > n:
            raise ValueError(f"rank is {self.rank}, but the states have {n} numbers")
        kept = None if self.kept is None else self.kept[i]
        self.counts.evaluations += 1
        y, pull = linearize_step(problem.dynamics, i, x, u, self.together)

        def pullback(cotangents: Tensor) -> tuple[Tensor, Tensor]:
            self.counts.products += len(cotangents)
            return pull(cotangents)

        def push(X: Tensor) -> Tensor:
            self.counts.evaluations += 1
            self.counts.tangents += X.shape[-1]
            pushed = push_forward(lambda x: problem.dynamics(i, x, u), x, X)
            return pushed if kept is None else pushed - kept * X

        def basis() -> Tensor:
            return self._basis(push, x, self.rank)

        step = ProjectedStep(basis, pullback, u.flatten(1), r, self.sides, kept)
        return y, lambda: step

    def terminal(self, problem: ControlProblem, x: Tensor, rank: int | None) -> ProjectedValue:
        """Returns the value at the final states; its Hessian H is projected, P (P^T H P) P^T."""
        rank = check_rank(x, rank)
        Vx, product = terminal_products(problem.terminal_cost, x, self.hessian)
        P = self._basis(product, x, rank)
        if rank == 0:
            return ProjectedValue(Vx, P, x.new_zeros(len(x), 0, 0))
        S = P.mT @ product(P)
        return ProjectedValue(Vx, P, (S + S.mT) / 2)

    def gradients(self, expansions: list[ProjectedStep], value: ProjectedValue) -> list[Tensor]:
        """Returns NaN (B, m) for every step: to know them would cost another product each."""
        return [torch.full_like(e.u, torch.nan) for e in expansions]

    def _basis(self, product: Callable[[Tensor], Tensor], x: Tensor, rank: int) -> Tensor:
        """Returns orthonormal columns (B, n, rank) for the range of a matrix, or random ones."""
        omega = random_directions(x, rank)  # the same for every matrix and iteration
        if rank and self.passes == 2:
            return range_finder(product, omega)
        return torch.linalg.qr(omega).Q


def push_forward(f: Callable[[Tensor], Tensor], x: Tensor, X: Tensor) -> Tensor:
    """Returns Jacobian-vector products (B, p, c) of a batched function, by forward mode.

    It maps x (B, ...), of n numbers each, to (B, ...), of p each. The directions X are (B, n, c).
    """
    tangents = X.movedim(-1, 0).reshape(-1, *x.shape)
    columns = torch.func.vmap(lambda v: torch.func.jvp(f, (x,), (v,))[1])(tangents)
    return columns.flatten(2).movedim(0, -1)
