r"""The Riccati recursion with a value Hessian of rank k, exact and free of matrices.

If the control cost is :math:`\frac12 r \|u\|^2` and the terminal Hessian is
:math:`Z S Z^T` with Z of shape (n, k), every value Hessian of the recursion has that form. With
:math:`W = f_x^T Z`, :math:`U = f_u^T Z`, :math:`G = U^T U` and :math:`\rho = r + a`,

.. math::
    Q_{xx} &= W S W^T, \quad Q_{uu} = r I + U S U^T, \quad Q_{ux} = U S W^T \\
    (Q_{uu} + a I)^{-1} &= \frac1\rho (I - U M U^T), \qquad M = S (\rho I + G S)^{-1} \\
    K &= -U M W^T, \qquad k = -\frac1\rho (Q_u - U M U^T Q_u) \\
    V_{xx} &= W S' W^T, \qquad S' = S + M (r G + G S G) M - M G S - S G M

so a step costs k + 1 vector-Jacobian products and algebra of k x k. Nothing is projected again,
unlike in the paper's Appendix D.1; the one approximation is that of the terminal Hessian. Vectors
are (B, n), factors (B, n, k), as in :mod:`diffoc.riccati`.

The products do not depend on the regularisation: :math:`V_x` differs from the costate
:math:`p_i = f_x^T p_{i+1}` of the open loop within the span of the factor only,

.. math::
    V_x = p + Z c, \qquad Q_u = r u + f_u^T p + U c,

so a trajectory is pulled back once, whatever constants are tried on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffoc.checks import check_member, check_whole
from diffoc.costs import ControlCost
from diffoc.hessian import (
    HESSIANS,
    OVERSAMPLING,
    batched_vjp,
    check_rank,
    nystrom,
    random_directions,
    symmetric_eigen,
    terminal_products,
)
from diffoc.riccati import UPDATES, matvec
from diffoc.system import ControlProblem, Derivatives, StepFunction, StepGains

Pullback = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps cotangents of the next states, (c, B, n), to those of x, (c, B, n), and of u, (c, B, m)."""


@dataclass(frozen=True)
class LowRankExpansion:
    """What the recursion needs of one step: the costate and the factor Z, pulled back.

    Attributes:
        px, pu: f_x^T p (B, n) and f_u^T p (B, m), of the costate p at the next state.
        W, U: f_x^T Z (B, n, k) and f_u^T Z (B, m, k), of the factor Z at the next state.
        u: the nominal control, flat, (B, m).
        r: the weight of the control cost.
    """

    px: Tensor
    pu: Tensor
    W: Tensor
    U: Tensor
    u: Tensor
    r: float

    @property
    def gradient(self) -> Tensor:
        """Returns the derivative of the open loop's total cost in the control, (B, m)."""
        return self.r * self.u + self.pu


@dataclass(frozen=True)
class LowRankGains(StepGains):
    """Gains with the feedback K = -U M W^T, of U (B, m, k), M (B, k, k) and W (B, n, k)."""

    U: Tensor
    M: Tensor
    W: Tensor

    def feedback(self, dx: Tensor) -> Tensor:
        return -matvec(self.U, matvec(self.M, matvec(self.W.mT, dx)))


@dataclass(frozen=True)
class LowRankValue:
    """The value function's gradient Vx = p + Z c and Hessian Z S Z^T at one state.

    The costate p is (B, n), at the final state the gradient; Z is (B, n, k), S is (B, k, k), and c
    is (B, k) or None for zero.
    """

    p: Tensor
    Z: Tensor
    S: Tensor
    c: Tensor | None = None

    @property
    def Vx(self) -> Tensor:
        return self.p if self.c is None else self.p + matvec(self.Z, self.c)

    def step_back(
        self, e: LowRankExpansion, a: Tensor, update: str
    ) -> tuple[LowRankGains, LowRankValue]:
        """Does as :meth:`diffoc.riccati.DenseValue.step_back` for the same Hessian."""
        c = self.S.new_zeros(self.S.shape[:-1]) if self.c is None else self.c
        Qu = e.gradient + matvec(e.U, c)
        gains, dc, S = low_rank_step(Qu, e.W, e.U, self.S, e.r, a, update)
        return gains, LowRankValue(e.px, e.W, S, c + dc)


def low_rank_step(
    Qu: Tensor, W: Tensor, U: Tensor, S: Tensor, r: float, a: Tensor, update: str
) -> tuple[LowRankGains, Tensor, Tensor]:
    """Does the algebra of a step, see the module, for whatever factors W (B, n, k) and U (B, m, k).

    The symmetric middle of Qxx and Quu is S, (B, k, k); Qu is that of Eq. 41, (B, m), and a has
    Tikhonov's constants, (B,). It returns the gains, and c (B, k) and S' (B, k, k) such that
    Vx = Qx + W c and Vxx = W S' W^T.
    """
    check_member(UPDATES, update=update)
    rho = (r + a)[:, None, None]
    G = U.mT @ U
    M, definite = _woodbury(S, G, rho)
    rho = torch.where(rho > 0, rho, 1)[..., 0]
    k = -(Qu - matvec(U, matvec(M, matvec(U.mT, Qu)))) / rho
    k = torch.where(definite[:, None], k, 0)

    UTk = matvec(U.mT, k)
    Quuk = r * k + matvec(U, matvec(S, UTk))
    squared = M @ (r * G + G @ S @ G) @ M  # K^T Quu K = W squared W^T
    if update == "paper":
        c = matvec(M, matvec(U.mT, Quuk))  # Eq. 48
        new_S = S - squared  # Eq. 49
    else:
        c = matvec(S, UTk) - matvec(M, matvec(U.mT, Quuk + Qu))
        cross = M @ G @ S
        new_S = S + squared - cross - cross.mT
    gains = LowRankGains(k, (k * Qu).sum(-1), (k * Quuk).sum(-1), definite, U, M, W)
    return gains, c, (new_S + new_S.mT) / 2


def _woodbury(S: Tensor, G: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """Returns M = S (rho I + G S)^-1, and whether rho I + U S U^T is positive definite, (B,).

    The matrix has the eigenvalue rho across the span of U, and those of rho I + L^T S L within,
    with G = L L^T; an eigenvalue that is rounding of the largest counts as zero.
    """
    k = S.shape[-1]
    if k == 0:  # the decompositions of nothing would take a tenth of a small prior's step
        return S, rho[:, 0, 0] > 0
    eye = torch.eye(k, dtype=S.dtype, device=S.device)
    values, vectors = torch.linalg.eigh(G)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    inside = torch.linalg.eigvalsh(root.mT @ S @ root)
    spectrum = torch.cat([rho[..., 0], rho[..., 0] + inside], dim=-1)
    floor = torch.finfo(S.dtype).eps * spectrum.abs().amax(-1)
    definite = spectrum.amin(-1) > floor
    safe = torch.where(definite[:, None, None], rho * eye + G @ S, eye)
    # S (rho I + G S)^-1 = ((rho I + S G)^-1 S)^T for symmetric S and G.
    M = torch.linalg.solve(safe.mT, S)
    return torch.where(definite[:, None, None], (M + M.mT) / 2, 0), definite


@dataclass(frozen=True)
class MatrixFree(Derivatives):
    r"""Derivatives by products only, which suit images of any size.

    The running cost must be a :class:`diffoc.costs.ControlCost`, and a rank be given for the
    terminal Hessian, which is approximated by randomised products.

    In input mode, and without a test of the gradient, the controller needs :math:`(k + 3) T n`
    numbers beyond the trajectory and the network's activations, and Adam 3 T n more.

    Attributes:
        keep_activations: whether the backward sweep uses those of the forward sweep. An iteration
            then costs :math:`T(F + (1 + k) B)`, F being one evaluation of the dynamics and B one
            vector-Jacobian product; otherwise each step is evaluated again, one F more.
        oversampling: how many directions are drawn beyond the rank.
        convex: whether the terminal cost is, so that one product a direction suffices (Nystrom).
        hessian: "full", or "gauss_newton", which is positive semidefinite whatever the operator, so
            that one product a direction suffices as well; see :mod:`diffoc.hessian`.
        together: whether the k + 1 vectors of a step are pulled back in one batched backward pass.
            That is faster for priors in closed form; it is slower for networks on a CPU, whose
            activations it multiplies, and not every network can be batched.
    """

    keep_activations: bool = True
    oversampling: int = OVERSAMPLING
    convex: bool = False
    hessian: str = "full"
    together: bool = False

    def __post_init__(self) -> None:
        check_member(HESSIANS, hessian=self.hessian)
        check_whole(0, oversampling=self.oversampling)

    def step(
        self, problem: ControlProblem, i: int, x: Tensor, u: Tensor
    ) -> tuple[Tensor, Callable[[Tensor, Tensor], LowRankExpansion]]:
        r, flat = control_weight(problem, i), u.flatten(1)

        def linearize() -> tuple[Tensor, Pullback]:
            self.counts.evaluations += 1
            return linearize_step(problem.dynamics, i, x, u, self.together)

        def pull_back(pullback: Pullback, p: Tensor, Z: Tensor) -> LowRankExpansion:
            self.counts.products += 1 + Z.shape[-1]
            # Two calls, because the gains keep W and not px.
            px, pu = (g[0] for g in pullback(p.unsqueeze(0)))
            W, U = (g.movedim(0, -1) for g in pullback(Z.movedim(-1, 0)))
            return LowRankExpansion(px, pu, W, U, flat, r)

        if self.keep_activations:
            y, pullback = linearize()
            return y, partial(pull_back, pullback)
        self.counts.evaluations += 1
        return problem.dynamics(i, x, u), lambda p, Z: pull_back(linearize()[1], p, Z)

    def terminal(self, problem: ControlProblem, x: Tensor, rank: int | None) -> LowRankValue:
        rank, batch, n = check_rank(x, rank), len(x), x[0].numel()
        Vx, product = terminal_products(problem.terminal_cost, x, self.hessian)
        if rank == 0:
            return LowRankValue(Vx, x.new_zeros(batch, n, 0), x.new_zeros(batch, 0, 0))
        omega = random_directions(x, min(n, rank + self.oversampling))
        semidefinite = self.convex or self.hessian == "gauss_newton"
        Z, values = (nystrom if semidefinite else symmetric_eigen)(product, omega, rank)
        return LowRankValue(Vx, Z, torch.diag_embed(values))

    def expand(self, steps: list[Callable[..., Any]], value: LowRankValue) -> list[Any]:
        p, Z, expansions = value.p, value.Z, []
        while steps:
            # What is taken off the list has the last reference to its activations.
            e = steps.pop()(p, Z)
            expansions.append(e)
            p, Z = e.px, e.W
        return expansions[::-1]

    def gradients(self, expansions: list[LowRankExpansion], value: LowRankValue) -> list[Tensor]:
        return [e.gradient for e in expansions]


def control_weight(problem: ControlProblem, i: int) -> float:
    """Returns r of step i, where the running cost is one that products can do."""
    if not isinstance(problem.running_cost, ControlCost):
        raise ValueError(
            f"running_cost is {type(problem.running_cost).__name__}, expected a ControlCost: "
            "other costs need derivatives=Dense()"
        )
    return problem.running_cost.weight(i)


def linearize_step(
    dynamics: StepFunction, i: int, x: Tensor, u: Tensor, together: bool = False
) -> tuple[Tensor, Pullback]:
    """Returns the next states, and their pullback through the activations that this call keeps.

    That takes a backward pass for each cotangent, or one if `together`, see :class:`MatrixFree`.
    """
    x, u = x.detach().requires_grad_(), u.detach().requires_grad_()
    with torch.enable_grad():
        y = dynamics(i, x, u)
    pull = partial(torch.autograd.grad, y, (x, u), retain_graph=True, materialize_grads=True)

    def pullback(cotangents: Tensor) -> tuple[Tensor, Tensor]:
        count = len(cotangents)
        shaped = cotangents.reshape(count, *y.shape)
        if count == 0:
            return x.new_empty(0, *x.flatten(1).shape), u.new_empty(0, *u.flatten(1).shape)
        if together:
            # In order in memory: else a matrix is applied vector by vector, several times slower.
            in_x, in_u = batched_vjp(y, (x, u), shaped.contiguous())
        else:
            pairs = [pull(each) for each in shaped]
            in_x = torch.stack([g for g, _ in pairs])
            # In input mode autograd gives one tensor for both: nothing is copied twice, or kept.
            same = all(a is b for a, b in pairs)
            in_u = in_x if same else torch.stack([g for _, g in pairs])
        return in_x.flatten(2), in_u.flatten(2)

    return y.detach(), pullback
