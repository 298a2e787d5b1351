r"""The controller's derivatives by products only, for images of any size.

Nothing here has n x n numbers: the terminal Hessian is approximated by randomised products, and its
factor and the costate are pulled back along the trajectory, k + 1 vector-Jacobian products a step,
whose activations are let go of as soon as that is done. :mod:`diffoc.lowrank` has the algebra.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffoc.costs import ControlCost
from diffoc.curvature import HESSIANS, terminal_products
from diffoc.lowrank import LowRankExpansion, LowRankValue
from diffoc.randomized import nystrom, symmetric_eigen
from diffoc.riccati import System


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
class MatrixFreeStep:
    """Dynamics and control cost at one step of the trajectory, for products only.

    Attributes:
        pullback: maps cotangents of the next state, (c, B, n), to those of x, (c, B, n), and of
            u, (c, B, m), by a backward pass each.
        u: the nominal control, flat, (B, m).
        r: weight of the control cost.
    """

    pullback: Callable[[Tensor], tuple[Tensor, Tensor]]
    u: Tensor
    r: float


@dataclass(frozen=True)
class MatrixFree:
    r"""Derivatives by products only, for the controller; suits images of any size.

    The running cost must be a :class:`diffoc.costs.ControlCost`, and the rank of the terminal
    Hessian be given. The Hessian is approximated by randomised products with it, those of one
    backward pass through its gradient.

    In input mode, and without a test of the gradient, the controller needs :math:`(k + 3) T n`
    numbers beyond the trajectory and the network's activations, and Adam 3 T n more.

    Attributes:
        keep_activations: of the forward sweep for the next backward sweep, which costs
            :math:`T(F + (1 + k) B)`; otherwise each step is evaluated again, one F more.
        oversampling: directions beyond the rank.
        power: iterations of the range finder, see :mod:`diffoc.randomized`.
        convex: whether the terminal cost is, so that one product a direction suffices (Nystrom).
        hessian: "full", or "gauss_newton", which is positive semidefinite whatever the operator,
            so that one product suffices; see :mod:`diffoc.curvature`.
        together: pull the k + 1 vectors of a step back in one batched backward pass. Faster for
            priors in closed form; slower for networks on a CPU, whose activations it multiplies,
            and not every network can be batched.
        seed: of the random directions, which are the same in every iteration.
        counts: of the work done with this object.
    """

    keep_activations: bool = True
    oversampling: int = 5
    power: int = 0
    convex: bool = False
    hessian: str = "full"
    together: bool = False
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
            y, pullback = linearize_step(problem.dynamics, i, x, u, self.together)

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
        rank, batch, n = check_rank(x, rank), len(x), x[0].numel()
        Vx, product = terminal_products(problem.terminal_cost, x, self.hessian)
        if rank == 0:
            return LowRankValue(Vx, x.new_zeros(batch, n, 0), x.new_zeros(batch, 0, 0))
        omega = random_directions(x, min(n, rank + self.oversampling), self.seed)
        if self.convex or self.hessian == "gauss_newton":
            Z, values = nystrom(product, omega, rank)
        else:
            Z, values = symmetric_eigen(product, omega, rank, self.power)
        return LowRankValue(Vx, Z, torch.diag_embed(values))

    def expand(
        self, steps: list[Callable[[], MatrixFreeStep]], value: LowRankValue
    ) -> list[LowRankExpansion]:
        """The trajectory's expansion, by :func:`pull_back`; `steps` is empty afterwards."""
        return pull_back(steps, value)

    def gradients(self, expansions: list[LowRankExpansion], value: LowRankValue) -> list[Tensor]:
        """The derivatives of the total cost in the controls of every step, (B, m) each."""
        return [e.gradient for e in expansions]


def control_weight(problem: System, i: int) -> float:
    """r of step i; a ValueError if the running cost is none that products can do."""
    if not isinstance(problem.running_cost, ControlCost):
        raise ValueError(
            f"running_cost is {type(problem.running_cost).__name__}, expected a ControlCost: "
            "other costs need derivatives=Dense()"
        )
    return problem.running_cost.weight(i)


def check_rank(x: Tensor, rank: int | None) -> int:
    """The rank; a ValueError if the Hessian at states (B, ...) cannot have it."""
    n = x[0].numel()
    if rank is None or not 0 <= rank <= n:
        raise ValueError(f"hessian_rank is {rank}, expected 0 to {n}")
    return rank


def random_directions(x: Tensor, count: int, seed: int) -> Tensor:
    """Standard normal vectors (B, n, count) for states x (B, ...).

    The same for every problem, so that no result depends on the batch.
    """
    n, generator = x[0].numel(), torch.Generator().manual_seed(seed)
    omega = torch.randn(n, count, generator=generator, dtype=torch.float64).to(x)
    return omega.expand(len(x), n, count)


def linearize_step(
    dynamics: Callable[[int, Tensor, Tensor], Tensor],
    i: int,
    x: Tensor,
    u: Tensor,
    together: bool = False,
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """The next states, and their pullback through the activations that this call keeps.

    Args:
        dynamics: maps (i, x, u) to the next states.
        i: the step.
        x, u: states and controls, (B, ...).
        together: as in :class:`MatrixFree`.

    Returns:
        The next states, and :attr:`MatrixFreeStep.pullback`.
    """
    x, u = x.detach().requires_grad_(), u.detach().requires_grad_()
    with torch.enable_grad():
        y = dynamics(i, x, u)

    def pullback(cotangents: Tensor) -> tuple[Tensor, Tensor]:
        shaped = cotangents.reshape(len(cotangents), *y.shape)
        if together and len(shaped):
            in_x, in_u = torch.autograd.grad(
                y,
                (x, u),
                shaped,
                is_grads_batched=True,
                retain_graph=True,
                materialize_grads=True,
            )
            return in_x.flatten(2), in_u.flatten(2)
        grads = [
            torch.autograd.grad(y, (x, u), each, retain_graph=True, materialize_grads=True)
            for each in shaped
        ]
        in_x = _stack([g for g, _ in grads], x)
        # In input mode autograd gives one tensor for both: nothing is copied twice, or kept.
        same = grads and all(a is b for a, b in grads)
        return in_x, in_x if same else _stack([g for _, g in grads], u)

    return y.detach(), pullback


def pull_back(
    steps: list[Callable[[], MatrixFreeStep]], value: LowRankValue
) -> list[LowRankExpansion]:
    """The costate and the factor of the value's Hessian, pulled back along a trajectory.

    Args:
        steps: give the steps 0 to T - 1, last one first; each is taken off the list when its
            turn comes, and with it the last reference to its activations.
        value: at the final state.

    Returns:
        The expansions of the steps 0 to T - 1.
    """
    p, Z, expansions = value.p, value.Z, []
    while steps:
        e = _pull_back_step(steps.pop()(), p, Z)
        expansions.append(e)
        p, Z = e.px, e.W
    return expansions[::-1]


def _pull_back_step(step: MatrixFreeStep, p: Tensor, Z: Tensor) -> LowRankExpansion:
    # Apart, because the gains keep W and not px.
    px, pu = (g[0] for g in step.pullback(p.unsqueeze(0)))
    W, U = (g.movedim(0, -1) for g in step.pullback(Z.movedim(-1, 0)))
    return LowRankExpansion(px, pu, W, U, step.u, step.r)


def _stack(tensors: list[Tensor], like: Tensor) -> Tensor:
    """Flat derivatives (c, B, n) in a tensor (B, ...), none of them too."""
    if not tensors:
        return like.new_empty(0, len(like), like[0].numel())
    return torch.stack(tensors).flatten(2)
