r"""Inverse problems whose posterior is known, and samplers for them that serve as references.

States are flat, (B, n), priors Gaussian or mixtures of Gaussians, measurements linear,
:math:`y = A x_0 + s \eta`: the posterior is then of the prior's kind. The samplers have the
signature of :mod:`diffoc.baselines`. One is exact by construction, one is exact by control, and
the others are the controller as it is used on images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from azula.denoise import Denoiser
from azula.noise import VPSchedule
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor

from diffoc.costs import ControlCost, GaussianLikelihood
from diffoc.data import images as data
from diffoc.data import manifest
from diffoc.ilqr import ilqr
from diffoc.priors.counting import CountedPrior
from diffoc.priors.gaussian import GaussianMixturePrior, GaussianPosterior, GaussianPrior
from diffoc.priors.mixture import GaussianMixture, MixturePosterior, mixture_from_loadings
from diffoc.problems.operators import LinearMeasurement, as_matrix, average_pool
from diffoc.problems.tasks import UnsupportedTask
from diffoc.process import ReverseProcess, draw_noise
from diffoc.system import ControlProblem
from diffoc.theory.linear_gaussian import LinearGaussian, exact_kernel_problem

Posterior = GaussianPosterior | MixturePosterior


@dataclass(frozen=True)
class Problem:
    """A linear inverse problem with its posterior.

    Attributes:
        name: of prior and measurement.
        prior: of flat states (B, n).
        physics: the measurement, for methods.
        measurement: the same, for oracles, with y (1, m).
        posterior: of that y.
    """

    name: str
    prior: GaussianPrior | GaussianMixturePrior
    physics: Physics
    measurement: LinearMeasurement
    posterior: Posterior


def small_problems(seed: int = 0) -> list[Problem]:
    """Two Gaussian problems in 16 dimensions, and one of eight modes in the plane; float64.

    - "inpainting": a smooth Gaussian, every second number dropped, s = 0.05;
    - "blur": a rougher Gaussian, blurred, s = 0.2;
    - "ring": eight modes on a circle, those above the axis twice as heavy as those below; the first
      coordinate is measured, s = 0.2, to lie between two pairs of modes.

    Args:
        seed: of truth and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(16, dtype=torch.float64)
    distance = (place - place[:, None]).abs()
    identity = torch.eye(16, dtype=torch.float64)
    smooth = 0.25 * (-distance.square() / 8).exp() + 1e-3 * identity
    rough = 0.25 * (-distance / 4).exp()
    blur = (-distance.square() / 4.5).exp()
    blur = blur / blur.sum(dim=1, keepdim=True)
    gaussians = [
        ("inpainting", smooth, identity[::2], 0.05),
        ("blur", rough, blur, 0.2),
    ]
    found = []
    for name, covariance, A, noise_std in gaussians:
        prior = GaussianPrior(place.cos() / 4, covariance, VPSchedule())
        truth = prior.mean + torch.linalg.cholesky(covariance) @ _normal((16,), generator)
        y = A @ truth + noise_std * _normal((len(A),), generator)
        found.append(problem(name, prior, A, y, noise_std))
    A = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([0.28], dtype=torch.float64)
    return [*found, problem("ring", ring_prior(), A, y, 0.2)]


def ring_prior(radius: float = 0.8, spread: float = 0.1) -> GaussianMixturePrior:
    """Eight modes on a circle in the plane; the three above the axis weigh twice, float64.

    Args:
        radius: of the circle.
        spread: standard deviation of a mode.
    """
    angle = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    means = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    weights = torch.where(means[:, 1] > 1e-6, 2.0, 1.0).double()
    variance = torch.full((8,), spread**2, dtype=torch.float64)
    mixture = GaussianMixture(
        (weights / weights.sum()).log()[None],
        means[None],
        torch.eye(2, dtype=torch.float64)[:, :1].expand(8, 2, 1),
        variance[:, None],
        variance,
    )
    return GaussianMixturePrior(mixture, VPSchedule())


def digit_problem(seed: int = 0, noise_std: float = 0.05) -> Problem:
    """A handwritten digit under the shipped mixture, averaged over 2 x 2 pixels, n = 784, float64.

    Args:
        seed: of the noise.
        noise_std: s.
    """
    weights = {k: v.double() for k, v in manifest.load_weights("mixture_mnist").items()}
    prior = GaussianMixturePrior(mixture_from_loadings(**weights), VPSchedule())
    A = as_matrix(average_pool(2), (1, 28, 28), torch.float64)
    truth = data.digits()[0][6].double().flatten()
    noise = _normal((len(A),), torch.Generator().manual_seed(seed))
    return problem("digit", prior, A, A @ truth + noise_std * noise, noise_std)


def problem(
    name: str,
    prior: GaussianPrior | GaussianMixturePrior,
    matrix: Tensor,
    y: Tensor,
    noise_std: float,
) -> Problem:
    """A problem from a matrix A (m, n) and one measurement y (m,)."""
    measurement = LinearMeasurement(matrix, y[None], noise_std)
    physics = LinearPhysics(A=lambda x: x @ matrix.mT, A_adjoint=lambda z: z @ matrix)
    return Problem(name, prior, physics, measurement, prior.posterior(measurement))


def exact(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
) -> Tensor:
    """One exact sample of the posterior for each measurement, by its closed form, (B, n)."""
    known = _known(prior, GaussianPrior, GaussianMixturePrior)
    A = as_matrix(physics.A, x.shape[1:], x.dtype)
    posterior = known.posterior(LinearMeasurement(A, y, noise_std))
    return posterior.sample(1, generator)[0]


def control_frozen_noise(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int = 10,
    iterations: int = 10,
) -> Tensor:
    r"""The ancestral process with its noise frozen and y perturbed, steered at the price of noise.

    .. math:: \ell_i = \|u_i\|^2 / (2 c_i^2), \qquad y' = y + s \, \eta

    That is :func:`exact_kernels` with DDPM's isotropic kernels in the place of the exact ones, so
    that it needs the prior's posterior mean only; of a standard normal prior its samples' variance
    is too small by O(1 / T). Dense iLQR, for small n: the weights span the square of the schedule's
    range, too much for a first order.

    Args:
        steps, iterations: T, and at most so many; one is exact for a Gaussian prior.
    """
    noise = draw_noise(steps, x.shape, generator)
    process = ReverseProcess(prior, steps, "ddpm", "output", noise)
    weights = torch.tensor([1 / c**2 for _, _, c in process.coefficients], dtype=x.dtype)
    perturbed = y + noise_std * _normal(y.shape, generator).to(y)
    likelihood = GaussianLikelihood(physics.A, perturbed, noise_std)
    system = ControlProblem(process.step, ControlCost(weights), likelihood, steps)
    return ilqr(system, x, iterations=iterations).states[-1]


def exact_kernels(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int = 10,
) -> Tensor:
    r"""Control of the exact reverse kernels, noise frozen and y perturbed: posterior samples.

    For a Gaussian prior the optimal control's end is an exact sample of
    :math:`p(x_0 \mid x_1, y)`, see :func:`diffoc.theory.linear_gaussian.exact_kernel_problem`.

    Args:
        steps: T.

    Raises:
        UnsupportedTask: for another prior than a Gaussian.
    """
    known = _known(prior, GaussianPrior)
    A = as_matrix(physics.A, x.shape[1:], x.dtype)
    perturbed = y + noise_std * _normal(y.shape, generator).to(y)
    setting = LinearGaussian(
        known,
        LinearMeasurement(A, perturbed, noise_std),
        GaussianLikelihood(physics.A, perturbed, noise_std),
    )
    noise = draw_noise(steps, x.shape, generator).to(x)
    problem, _, _ = exact_kernel_problem(setting, steps, noise)
    # Linear dynamics and quadratic costs: one iteration is exact.
    return ilqr(problem, x, regularization=0.0, iterations=1).states[-1]


def _known(prior: Denoiser, *kinds: type[Denoiser]) -> Denoiser:
    """The prior inside a counting one, if its conditionals are known."""
    prior = prior.prior if isinstance(prior, CountedPrior) else prior
    if not isinstance(prior, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise UnsupportedTask(f"prior is a {type(prior).__name__}, expected a {expected}")
    return prior


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
