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

so a trajectory is pulled back once, whatever constants are tried on it. :mod:`diffoc.matrix_free`
takes the products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRankExpansion:
    """What the recursion needs of one step: the costate and the factor Z, pulled back.

    Attributes:
        px, pu: f_x^T p (B, n) and f_u^T p (B, m), of the costate p at the next state.
        W, U: f_x^T Z (B, n, k) and f_u^T Z (B, m, k), of the factor Z at the next state.
        u: the nominal control, flat, (B, m).
        r: weight of the control cost.
    """

    px: Tensor
    pu: Tensor
    W: Tensor
    U: Tensor
    u: Tensor
    r: float

    @property
    def gradient(self) -> Tensor:
        """Of the open loop's total cost in the control, (B, m)."""
        return self.r * self.u + self.pu


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
    """The value function's gradient Vx = p + Z c and Hessian Z S Z^T at one state.

    Attributes:
        p: the costate, (B, n); at the final state it is the gradient.
        Z, S: (B, n, k) and (B, k, k).
        c: (B, k), None for zero.
    """

    p: Tensor
    Z: Tensor
    S: Tensor
    c: Tensor | None = None

    @property
    def Vx(self) -> Tensor:
        """The gradient, (B, n)."""
        return self.p if self.c is None else self.p + _times(self.Z, self.c)

    def step_back(
        self, e: LowRankExpansion, a: Tensor, update: str
    ) -> tuple[LowRankGains, LowRankValue]:
        """One Riccati step; arguments as for :meth:`diffoc.riccati.DenseValue.step_back`.

        Its result is that of the dense step for the same Hessian, up to rounding.
        """
        c = self.S.new_zeros(self.S.shape[:-1]) if self.c is None else self.c
        Qu = e.gradient + _times(e.U, c)
        gains, dc, S = low_rank_step(Qu, e.W, e.U, self.S, e.r, a, update)
        return gains, LowRankValue(e.px, e.W, S, c + dc)


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


def _woodbury(S: Tensor, G: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """M = S (rho I + G S)^-1, and whether rho I + U S U^T is positive definite, (B,).

    The matrix has the eigenvalue rho across the span of U, and those of rho I + L^T S L within,
    with G = L L^T; an eigenvalue that is rounding of the largest counts as zero.
    """
    k = S.shape[-1]
    if (
        k == 0
    ):  # the first order: no decompositions of nothing, a tenth of the step of a small prior
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
    M = torch.where(definite[:, None, None], (M + M.mT) / 2, 0)
    return M, definite


def _times(A: Tensor, v: Tensor) -> Tensor:
    return (A @ v.unsqueeze(-1)).squeeze(-1)
