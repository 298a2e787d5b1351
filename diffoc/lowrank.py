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
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffoc.costs import ControlCost
from diffoc.curvature import HESSIANS, terminal_products
from diffoc.randomized import nystrom, symmetric_eigen
from diffoc.riccati import System


@dataclass(frozen=True)
class MatrixFreeStep:
    """Dynamics and control cost at one step of the trajectory, for products only.

    Attributes:
        pullback: maps cotangents of the next state, (c, B, n), to those of x, (c, B, n), and of
            u, (c, B, m), in one backward pass.
        u: the nominal control, flat, (B, m).
        r: weight of the control cost.
    """

    pullback: Callable[[Tensor], tuple[Tensor, Tensor]]
    u: Tensor
    r: float


@dataclass(frozen=True)
class LowRankGains:
    r"""The locally optimal control of one step, :math:`\delta u = \epsilon k - U M W^T \delta x`.

    Attributes:
        k: feedforward, (B, m).
        U, M, W: the factors of the feedback, (B, m, k), (B, k, k) and (B, n, k).
        slope, curvature, definite: as in :class:`diffoc.riccati.Gains`.
    """

    k: Tensor
    U: Tensor
    M: Tensor
    W: Tensor
    slope: Tensor
    curvature: Tensor
    definite: Tensor

    def feedback(self, dx: Tensor) -> Tensor:
        """K dx, for flat deviations dx (B, n)."""
        return -_times(self.U, _times(self.M, _times(self.W.mT, dx)))


@dataclass(frozen=True)
class LowRankValue:
    """The value function's gradient Vx (B, n) and Hessian Z S Z^T, (B, n, k) and (B, k, k)."""

    Vx: Tensor
    Z: Tensor
    S: Tensor

    def step_back(
        self, e: MatrixFreeStep, a: Tensor, update: str
    ) -> tuple[LowRankGains, LowRankValue]:
        """One Riccati step; arguments as for :meth:`diffoc.riccati.DenseValue.step_back`.

        Its result is that of the dense step for the same Hessian, up to rounding.
        """
        # Apart, because the gains keep W and U, and not Qx and Qu.
        (Qx, Qu), (W, U) = pull_back(e, self.Vx.unsqueeze(-1)), pull_back(e, self.Z)
        Qu = e.r * e.u + Qu[..., 0]
        gains, dc, S = low_rank_step(Qu, W, U, self.S, e.r, a, update)
        return gains, LowRankValue(Qx[..., 0] + _times(W, dc), W, S)


def pull_back(e: MatrixFreeStep, Z: Tensor) -> tuple[Tensor, Tensor]:
    """The factors f_x^T Z (B, n, c) and f_u^T Z (B, m, c) of Z (B, n, c)."""
    if not Z.shape[-1]:
        return Z, Z.new_zeros(*e.u.shape, 0)
    in_x, in_u = e.pullback(Z.movedim(-1, 0))
    return in_x.movedim(0, -1), in_u.movedim(0, -1)


def low_rank_step(
    Qu: Tensor, W: Tensor, U: Tensor, S: Tensor, r: float, a: Tensor, update: str
) -> tuple[LowRankGains, Tensor, Tensor]:
    """The algebra of a step, see the module, for whatever factors W and U.

    Args:
        Qu: the gradient of Q, Eq. 41, (B, m).
        W, U: factors of Qxx and Quu, (B, n, k) and (B, m, k).
        S: the symmetric middle of both, (B, k, k).
        r: weight of the control cost.
        a: Tikhonov's constant, (B,).
        update: a member of :data:`diffoc.riccati.VALUE_UPDATES`.

    Returns:
        The gains, and c (B, k) and S' (B, k, k) such that Vx = Qx + W c and Vxx = W S' W^T.
    """
    rho = (r + a)[:, None, None]
    G = U.mT @ U
    M, definite = _woodbury(S, G, rho)
    rho = torch.where(rho > 0, rho, 1)[..., 0]
    k = -(Qu - _times(U, _times(M, _times(U.mT, Qu)))) / rho
    k = torch.where(definite[:, None], k, 0)

    UTk = _times(U.mT, k)
    Quuk = r * k + _times(U, _times(S, UTk))
    squared = M @ (r * G + G @ S @ G) @ M  # of K^T Quu K = W squared W^T
    if update == "paper":
        c = _times(M, _times(U.mT, Quuk))  # Eq. 48
        new_S = S - squared  # Eq. 49
    else:
        c = _times(S, UTk) - _times(M, _times(U.mT, Quuk + Qu))
        cross = M @ G @ S
        new_S = S + squared - cross - cross.mT
    slope, curvature = (k * Qu).sum(-1), (k * Quuk).sum(-1)
    return LowRankGains(k, U, M, W, slope, curvature, definite), c, (new_S + new_S.mT) / 2


@dataclass
class Counts:
    """Work done so far, per problem: the unit of the cost model.

    Attributes:
        evaluations: of the dynamics.
        products: vector-Jacobian products of the dynamics.
        tangents: Jacobian-vector products of the dynamics, of :class:`diffoc.projected.Projected`
            only.
    """

    evaluations: int = 0
    products: int = 0
    tangents: int = 0


@dataclass(frozen=True)
class MatrixFree:
    r"""Derivatives by products only, for the controller; suits images of any size.

    The running cost must be a :class:`diffoc.costs.ControlCost`, and the rank of the terminal
    Hessian be given. The Hessian is approximated by randomised products with it, those of one
    backward pass through its gradient.

    Attributes:
        keep_activations: of the forward sweep for the next backward sweep, which costs
            :math:`T(F + (1 + k) B)`; otherwise each step is evaluated again, one F more.
        oversampling: directions beyond the rank.
        power: iterations of the range finder, see :mod:`diffoc.randomized`.
        convex: whether the terminal cost is, so that one product a direction suffices (Nystrom).
        hessian: "full", or "gauss_newton", which is positive semidefinite whatever the operator,
            so that one product suffices; see :mod:`diffoc.curvature`.
        seed: of the random directions, which are the same in every iteration.
        counts: of the work done with this object.
    """

    keep_activations: bool = True
    oversampling: int = 5
    power: int = 0
    convex: bool = False
    hessian: str = "full"
    seed: int = 0
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        if self.hessian not in HESSIANS:
            raise ValueError(f"hessian is {self.hessian!r}, expected one of {', '.join(HESSIANS)}")

    def step(
        self, problem: System, i: int, x: Tensor, u: Tensor
    ) -> tuple[Tensor, Callable[[], MatrixFreeStep]]:
        """The next states, and what expands this step."""
        r, flat = control_weight(problem, i), u.flatten(1)

        def linearize() -> tuple[Tensor, MatrixFreeStep]:
            self.counts.evaluations += 1
            y, pullback = linearize_step(problem.dynamics, i, x, u)

            def counted(cotangents: Tensor) -> tuple[Tensor, Tensor]:
                self.counts.products += len(cotangents)
                return pullback(cotangents)

            return y, MatrixFreeStep(counted, flat, r)

        if self.keep_activations:
            y, step = linearize()
            return y, lambda: step
        self.counts.evaluations += 1
        return problem.dynamics(i, x, u), lambda: linearize()[1]

    def terminal(self, problem: System, x: Tensor, rank: int | None) -> LowRankValue:
        """The value at the final states (B, ...), its Hessian of the given rank.

        Raises:
            ValueError: if `rank` is missing, or not between 0 and n.
        """
        batch, n = check_rank(x, rank)
        Vx, product = terminal_products(problem.terminal_cost, x, self.hessian)
        if rank == 0:
            return LowRankValue(Vx, x.new_zeros(batch, n, 0), x.new_zeros(batch, 0, 0))
        omega = random_directions(x, min(n, rank + self.oversampling), self.seed)
        if self.convex or self.hessian == "gauss_newton":
            Z, values = nystrom(product, omega, rank)
        else:
            Z, values = symmetric_eigen(product, omega, rank, self.power)
        return LowRankValue(Vx, Z, torch.diag_embed(values))

    def largest_gradient(self, expansions: list[MatrixFreeStep], value: LowRankValue) -> Tensor:
        """NaN (B,): the gradient would cost another vector-Jacobian product a step."""
        return torch.full_like(value.Vx[:, 0], torch.nan)


def control_weight(problem: System, i: int) -> float:
    """r of step i; a ValueError if the running cost is none that products can do."""
    if not isinstance(problem.running_cost, ControlCost):
        raise ValueError(
            f"running_cost is {type(problem.running_cost).__name__}, expected a ControlCost: "
            "other costs need derivatives=Dense()"
        )
    return problem.running_cost.weight(i)


def check_rank(x: Tensor, rank: int | None) -> tuple[int, int]:
    """B and n of states (B, ...); a ValueError if the Hessian cannot have that rank."""
    n = x[0].numel()
    if rank is None or not 0 <= rank <= n:
        raise ValueError(f"hessian_rank is {rank}, expected 0 to {n}")
    return len(x), n


def random_directions(x: Tensor, count: int, seed: int) -> Tensor:
    """Standard normal vectors (B, n, count) for states x (B, ...).

    The same for every problem, so that no result depends on the batch.
    """
    n, generator = x[0].numel(), torch.Generator().manual_seed(seed)
    omega = torch.randn(n, count, generator=generator, dtype=torch.float64).to(x)
    return omega.expand(len(x), n, count)


def linearize_step(
    dynamics: Callable[[int, Tensor, Tensor], Tensor], i: int, x: Tensor, u: Tensor
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """The next states, and their pullback through the activations that this call keeps.

    Args:
        dynamics: maps (i, x, u) to the next states.
        i: the step.
        x, u: states and controls, (B, ...).

    Returns:
        The next states, and :attr:`MatrixFreeStep.pullback`.
    """
    x, u = x.detach().requires_grad_(), u.detach().requires_grad_()
    with torch.enable_grad():
        y = dynamics(i, x, u)

    def pullback(cotangents: Tensor) -> tuple[Tensor, Tensor]:
        grads = torch.autograd.grad(
            y,
            (x, u),
            cotangents.reshape(len(cotangents), *y.shape),
            is_grads_batched=True,
            retain_graph=True,
            materialize_grads=True,
        )
        in_x, in_u = (g.flatten(2).detach() for g in grads)
        return in_x, in_u

    return y.detach(), pullback


def _woodbury(S: Tensor, G: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """M = S (rho I + G S)^-1, and whether rho I + U S U^T is positive definite, (B,).

    The matrix has the eigenvalue rho across the span of U, and those of rho I + L^T S L within,
    with G = L L^T; an eigenvalue that is rounding of the largest counts as zero.
    """
    k = S.shape[-1]
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
    M = torch.where(definite[:, None, None], (M + M.mT) / 2, 0)
    return M, definite


def _times(A: Tensor, v: Tensor) -> Tensor:
    return (A @ v.unsqueeze(-1)).squeeze(-1)
