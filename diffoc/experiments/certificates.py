r"""How samplers on one chain rank by the certificate where no posterior is known: on faces.

The chain is DDPM's of the shipped prior in colour, the problem is a portrait seen through a task's
operator. Every method is written as what it does to the chain's kernels. Its -log w is recorded,
whose mean is :math:`E[\sum_i |u_i|^2 / 2 c_i^2 + l(x_0)]` for a shift of the means
(:mod:`diffoc.theory.certificate`) and the same with the kernels' divergence in place of the squares
for the Riccati sampler (:mod:`diffoc.theory.riccati_draws`). Two methods differ in it by as
much as their paths' divergences from the posterior's do, in nats: log p(y) is the same for all.

What that needs: noise in every guided step; a shift that knows the past and not the noise to come;
the likelihood's own noise level; one chain, with the same T, for all that are compared. It does not
need the prior to be right: the posterior is that of the chain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from azula.denoise import Denoiser
from azula.guidance import MMPSDenoiser
from azula.linalg.covariance import IsotropicCovariance
from deepinv.physics import LinearPhysics
from torch import Tensor

from diffoc.baselines.paper import snr_weights
from diffoc.checks import evaluating
from diffoc.costs import ControlCost, GaussianLikelihood
from diffoc.data.images import portrait
from diffoc.data.provenance import ROOT
from diffoc.greedy import correction
from diffoc.lowrank import MatrixFree
from diffoc.priors.pretrained import load_prior
from diffoc.problems.tasks import measure, super_resolution
from diffoc.process import ReverseProcess, draw_noise
from diffoc.rules import LBFGS, Adam
from diffoc.solve import solve
from diffoc.system import ControlProblem
from diffoc.theory.certificate import Guidance, certify
from diffoc.theory.riccati_draws import ancestral_mean, noise_price, riccati_draws

RECORD = ROOT / "data" / "records" / "certificate_faces64.csv"
"""Written by `python tools/certificate.py`, a row a run."""

NOISE_STD = 0.05


@dataclass(frozen=True)
class Case:
    """A measured image y (1, ...), and a chain from x (1, C, H, W) with noise (T, 1, C, H, W)."""

    prior: Denoiser
    physics: LinearPhysics
    y: Tensor
    x: Tensor
    noise: Tensor

    @property
    def cost(self) -> GaussianLikelihood:
        """Returns the terminal cost, -log p(y | x_0) but for a constant."""
        return GaussianLikelihood(self.physics.A, self.y, NOISE_STD)

    @property
    def chain(self) -> ReverseProcess:
        """Returns DDPM's chain, with its noise."""
        return ReverseProcess(self.prior, len(self.noise), "ddpm", "output", self.noise)

    @cached_property
    def planned(self) -> Tensor:
        """Returns the controls of a plan without noise at the price of noise, (T, 1, C, H, W)."""
        price = noise_price(self.prior.schedule, self.means.times)
        return solve(
            self.means,
            self.cost,
            self.x,
            control_cost=ControlCost(price),
            rule=LBFGS(units=tuple(price.rsqrt().tolist())),
            rank=0,
            iterations=12,
        ).controls

    @property
    def means(self) -> ReverseProcess:
        """Returns DDPM's chain without noise, on which plans are made."""
        return ancestral_mean(self.prior, len(self.noise), self.x, torch.Generator())


def case(factor: int, steps: int, run: int) -> Case:
    """Returns the astronaut, scaled down by a factor, and the noise of a run of all methods."""
    truth = portrait("astronaut")
    physics = super_resolution(factor)
    y = measure(physics, truth, torch.Generator().manual_seed(1), NOISE_STD)
    generator = torch.Generator().manual_seed(100 + run)
    noise = draw_noise(steps + 1, truth.shape, generator).to(truth)
    return Case(load_prior("faces64"), physics, y, noise[0], noise[1:])


def none(case: Case) -> Guidance:
    """Returns no guidance: the chain itself."""
    return lambda i, x, mean: torch.zeros_like(x)


def dps(case: Case, scale: float = 1.0) -> Guidance:
    r"""Returns DPS's guidance as published: :math:`u = -\zeta \nabla_x \|y - A m(x, t)\|`."""

    def guidance(i: int, x: Tensor, mean: Tensor) -> Tensor:
        m, pull = _tweedie(case, i, x)
        residual = case.y - case.physics.A(m)
        return scale * pull(case.physics.A_adjoint(residual)) / residual.norm()

    return guidance


def pgdm(case: Case) -> Guidance:
    r"""PiGDM has :math:`u = \alpha_s \alpha_t J^T A^T (A A^T + s^2 / r_t^2 I)^{-1} (y - A m)`."""
    alphas, sigmas = case.prior.schedule(case.chain.times)

    def guidance(i: int, x: Tensor, mean: Tensor) -> Tensor:
        m, pull = _tweedie(case, i, x)
        variance = sigmas[i] ** 2 / (alphas[i] ** 2 + sigmas[i] ** 2)
        direction = correction(case.physics, case.y, m, (variance / NOISE_STD**2).item())
        return alphas[i].item() * alphas[i + 1].item() * pull(direction)

    return guidance


def mmps(case: Case) -> Guidance:
    """Returns MMPS's, E[x_0 | x_t, y] by Tweedie's covariance in the place of E[x_0 | x_t]."""
    conditioned = MMPSDenoiser(
        case.prior,
        case.y.flatten(1),
        lambda x0: case.physics.A(x0).flatten(1),
        IsotropicCovariance(case.y.new_tensor(NOISE_STD**2)),
        iterations=3,
    )
    chain = case.chain

    def guidance(i: int, x: Tensor, mean: Tensor) -> Tensor:
        a, b, _ = chain.coefficients[i]
        return a * x + b * conditioned(x, chain.times[i].to(x)).mean - mean

    return guidance


def paper(case: Case) -> Guidance:
    """Returns the paper's plan, made without noise from the start, in open loop."""
    times = case.means.times
    plan = solve(
        case.means,
        case.cost,
        case.x,
        control_cost=ControlCost(1e-6 * snr_weights(case.prior.schedule, times)),
        rule=Adam(5e-3),
        regularization=1e-3,
        rank=0,
        iterations=20,
    )
    return lambda i, x, mean: plan.controls[i]


def open_loop(case: Case) -> Guidance:
    """Returns a plan at the price of noise, whatever the noise does: the sampler of rank 0."""
    return lambda i, x, mean: case.planned[i]


def riccati(case: Case, rank: int) -> tuple[Tensor, float]:
    """Returns x_0 and -log w of the Riccati sampler of a rank around :attr:`Case.planned`."""
    means = case.means
    price = ControlCost(noise_price(case.prior.schedule, means.times))
    problem = ControlProblem(means.step, price, case.cost, means.horizon)
    derivatives = MatrixFree(hessian="gauss_newton")
    with evaluating(case.prior):
        draw = riccati_draws(problem, case.x, case.planned, case.noise, derivatives, rank)
    return draw.states[-1], -draw.log_weights.item()


def _shifted(guidance: Callable[[Case], Guidance], case: Case) -> tuple[Tensor, float]:
    with evaluating(case.prior):
        run = certify(case.chain, case.cost, guidance(case), case.x)
    return run.x0, -run.log_weights.item()


METHODS: dict[str, Callable[[Case], tuple[Tensor, float]]] = {
    "none": partial(_shifted, none),
    "dps": partial(_shifted, dps),
    "dps_3": partial(_shifted, partial(dps, scale=3.0)),
    "pgdm": partial(_shifted, pgdm),
    "mmps": partial(_shifted, mmps),
    "open_loop": partial(_shifted, open_loop),
    "riccati_16": partial(riccati, rank=16),
    "riccati_48": partial(riccati, rank=48),
    "paper": partial(_shifted, paper),
}
"""Each maps a case to x_0 (1, C, H, W) and -log w."""


def outcome(method: str, case: Case) -> dict[str, str]:
    """Returns a run's -log w in nats, its residual over the noise, and seconds, as written."""
    began = time.perf_counter()
    x0, nats = METHODS[method](case)
    residual = (case.physics.A(x0) - case.y).square().mean().sqrt().item() / NOISE_STD
    return {
        "nats": f"{nats:.6g}",
        "residual_over_noise": f"{residual:.4g}",
        "seconds": f"{time.perf_counter() - began:.1f}",
    }


def _tweedie(case: Case, i: int, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Returns m(x, t_i), and its Jacobian's transpose as a map."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        m = case.prior(x, case.chain.times[i].to(x)).mean
    return m.detach(), lambda v: torch.autograd.grad(m, x, v)[0]
