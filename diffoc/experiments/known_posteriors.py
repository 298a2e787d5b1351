r"""Inverse problems whose posterior is known, and samplers for them that serve as references.

States are flat, (B, n), priors Gaussian or mixtures of Gaussians, measurements linear,
:math:`y = A x_0 + s \eta`: the posterior is then of the prior's kind. The samplers are called as
those of :mod:`diffoc.baselines`. One is exact by construction, and two by control.
"""

from dataclasses import dataclass

import torch
from azula.denoise import Denoiser
from azula.noise import VPSchedule
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor

from diffoc.baselines import Given, method
from diffoc.costs import ControlCost, GaussianLikelihood
from diffoc.data import images as data
from diffoc.data import manifest
from diffoc.ilqr import ilqr
from diffoc.priors.counting import CountedPrior
from diffoc.priors.gaussian import GaussianMixturePrior, GaussianPosterior, GaussianPrior
from diffoc.priors.mixture import MixturePosterior, mixture_from_loadings
from diffoc.problems.operators import LinearMeasurement, as_matrix, average_pool
from diffoc.problems.tasks import UnsupportedTask
from diffoc.process import ReverseProcess, draw_noise
from diffoc.system import ControlProblem
from diffoc.theory.linear_gaussian import LinearGaussian, exact_kernel_problem
from diffoc.theory.riccati_draws import noise_price

Prior = GaussianPrior | GaussianMixturePrior
Posterior = GaussianPosterior | MixturePosterior


@dataclass(frozen=True)
class Problem:
    """A linear inverse problem of flat states (B, n), with the posterior of one y, (1, m).

    Methods are given the physics, oracles the measurement, which are the same.
    """

    name: str
    prior: Prior
    physics: Physics
    measurement: LinearMeasurement
    posterior: Posterior


def small_problems(seed: int = 0) -> list[Problem]:
    """Returns two Gaussian problems in 16 dimensions, and one of eight modes in the plane; float64.

    - "inpainting": a smooth Gaussian, every second number dropped, s = 0.05;
    - "blur": a rougher Gaussian, blurred, s = 0.2;
    - "ring": eight modes on a circle, those above the axis twice as heavy as those below; the first
      coordinate is measured, s = 0.2, to lie between two pairs of modes.
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(16, dtype=torch.float64)
    distance = (place - place[:, None]).abs()
    identity = torch.eye(16, dtype=torch.float64)
    smooth = 0.25 * (-distance.square() / 8).exp() + 1e-3 * identity
    rough = 0.25 * (-distance / 4).exp()
    blur = (-distance.square() / 4.5).exp()
    blur = blur / blur.sum(dim=1, keepdim=True)
    gaussians = [("inpainting", smooth, identity[::2], 0.05), ("blur", rough, blur, 0.2)]
    problems = []
    for name, covariance, A, noise_std in gaussians:
        prior = GaussianPrior(place.cos() / 4, covariance, VPSchedule())
        truth = prior.mean + torch.linalg.cholesky(covariance) @ _normal((16,), generator)
        y = A @ truth + noise_std * _normal((len(A),), generator)
        problems.append(problem(name, prior, A, y, noise_std))
    A = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([0.28], dtype=torch.float64)
    return [*problems, problem("ring", ring_prior(), A, y, 0.2)]


def ring_prior() -> GaussianMixturePrior:
    """Returns modes on a ring, see :func:`small_problems`: radius 0.8, standard deviation 0.1."""
    angle = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    means = 0.8 * torch.stack([angle.cos(), angle.sin()], dim=1)
    weights = torch.where(means[:, 1] > 1e-6, 2.0, 1.0).double()
    none, variance = weights.new_zeros(8, 2, 1), weights.new_full((8,), 0.1**2)
    mixture = mixture_from_loadings(weights.log(), means, none, variance)
    return GaussianMixturePrior(mixture, VPSchedule())


def digit_problem() -> Problem:
    """Returns a digit under the shipped mixture, averaged over 2 x 2 pixels, n = 784, float64."""
    weights = {k: v.double() for k, v in manifest.load_weights("mixture_mnist").items()}
    prior = GaussianMixturePrior(mixture_from_loadings(**weights), VPSchedule())
    A = as_matrix(average_pool(2), (1, 28, 28), torch.float64)
    truth = data.digits()[0][6].double().flatten()
    noise = _normal((len(A),), torch.Generator().manual_seed(0))
    return problem("digit", prior, A, A @ truth + 0.05 * noise, 0.05)


def problem(name: str, prior: Prior, matrix: Tensor, y: Tensor, noise_std: float) -> Problem:
    """Returns a problem from a matrix A (m, n) and one measurement y (m,)."""
    measurement = LinearMeasurement(matrix, y[None], noise_std)
    physics = LinearPhysics(A=lambda x: x @ matrix.mT, A_adjoint=lambda z: z @ matrix)
    return Problem(name, prior, physics, measurement, prior.posterior(measurement))


@method
def exact(given: Given) -> Tensor:
    """Returns one exact sample of the posterior for each measurement, (B, n), in closed form."""
    known = _known(given.prior, GaussianPrior, GaussianMixturePrior)
    A = as_matrix(given.physics.A, given.x.shape[1:], given.x.dtype)
    posterior = known.posterior(LinearMeasurement(A, given.y, given.noise_std))
    return posterior.sample(1, given.generator)[0]


@method
def control_frozen_noise(given: Given, *, steps: int = 10, iterations: int = 10) -> Tensor:
    r"""Returns states (B, n) of the ancestral process with its noise frozen and y perturbed.

    .. math:: \ell_i = \|u_i\|^2 / (2 c_i^2), \qquad y' = y + s \, \eta

    That is :func:`exact_kernels` with DDPM's isotropic kernels in the place of the exact ones, so
    that it needs the prior's posterior mean only; of a standard normal prior its samples' variance
    is too small by O(1 / T). The controller is dense iLQR, for small n, with T steps and at most so
    many iterations, one of which is exact for a Gaussian prior: the weights span the square of the
    schedule's range, too much for a first order.
    """
    noise = draw_noise(steps, given.x.shape, given.generator)
    process = ReverseProcess(given.prior, steps, "ddpm", "output", noise)
    weights = noise_price(given.prior.schedule, process.times)
    likelihood = GaussianLikelihood(given.physics.A, _perturbed(given), given.noise_std)
    system = ControlProblem(process.step, ControlCost(weights), likelihood, steps)
    return ilqr(system, given.x, iterations=iterations).states[-1]


@method
def exact_kernels(given: Given, *, steps: int = 10) -> Tensor:
    r"""Returns posterior samples (B, n) by control of the exact reverse kernels in T steps.

    Their noise is frozen and y is perturbed. The prior is Gaussian; the optimal control's end is an
    exact sample of :math:`p(x_0 \mid x_1, y)`, see
    :func:`diffoc.theory.linear_gaussian.exact_kernel_problem`.
    """
    known = _known(given.prior, GaussianPrior)
    A = as_matrix(given.physics.A, given.x.shape[1:], given.x.dtype)
    y = _perturbed(given)
    setting = LinearGaussian(
        known,
        LinearMeasurement(A, y, given.noise_std),
        GaussianLikelihood(given.physics.A, y, given.noise_std),
    )
    noise = draw_noise(steps, given.x.shape, given.generator).to(given.x)
    problem, _, _ = exact_kernel_problem(setting, steps, noise)
    # Linear dynamics and quadratic costs: one iteration is exact.
    return ilqr(problem, given.x, regularization=0.0, iterations=1).states[-1]


def _perturbed(given: Given) -> Tensor:
    return given.y + given.noise_std * _normal(given.y.shape, given.generator).to(given.y)


def _known(prior: Denoiser, *kinds: type[Denoiser]) -> Denoiser:
    """Returns the prior inside a counting one, if its conditionals are known."""
    prior = prior.prior if isinstance(prior, CountedPrior) else prior
    if not isinstance(prior, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise UnsupportedTask(f"prior is a {type(prior).__name__}, expected a {expected}")
    return prior


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
