"""The Riccati sampler by the public call against closed forms; its draws against dense inverses.

That its law is that of dense policies is a row of `diffoc verify`.
"""

from dataclasses import replace

import pytest
import torch
from azula.noise import VPSchedule

from diffoc.experiments.known_posteriors import small_problems
from diffoc.experiments.posterior_distance import random_directions, shadow_distance, shadows
from diffoc.lowrank import MatrixFree
from diffoc.priors.gaussian import GaussianPrior
from diffoc.problem import Problem
from diffoc.process import ReverseProcess
from diffoc.reconstruct import reconstruct
from diffoc.riccati import Dense
from diffoc.theory.linear_gaussian import linear_gaussian, relative_error
from diffoc.theory.riccati_draws import RICCATI, ancestral_mean, low_rank_draw
from diffoc.theory.riccati_sampler import ancestral_kernels, propagate, riccati_policies

PRODUCTS = MatrixFree(convex=True, together=True)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_chain(n=6, m=3, steps=5):
    """A setting, its prior with noise left at the end, and the kernels of DDPM's chain."""
    setting = linear_gaussian(n=n, m=m, noise_std=0.3)
    prior = GaussianPrior(setting.prior.mean, setting.prior.matrix, VPSchedule(sigma_min=1e-2))
    return setting, prior, ancestral_kernels(prior, steps)


def test_the_public_call_samples_the_posterior_of_a_gaussian_chain():
    """Mean and covariance by Monte Carlo, within 4.5 standard errors of the closed form."""
    n, m, T, count = 6, 3, 5, 4000
    setting, prior, kernels = gaussian_chain(n, m, T)
    policies = riccati_policies(kernels, setting.measurement)
    origin = torch.zeros(n, dtype=torch.float64)
    mean, covariance = propagate(kernels, policies, origin)[-1]
    carried = torch.autograd.functional.jacobian(
        lambda x: propagate(kernels, policies, x)[-1][0], origin
    )
    sigma = prior.schedule(torch.ones(()).double())[1]
    covariance = covariance + sigma**2 * carried @ carried.mT  # of the start

    A, s = setting.measurement.matrix, setting.measurement.noise_std
    problem = Problem(lambda x: x @ A.mT, setting.measurement.y, s)
    recipe = replace(RICCATI, steps=T, rank=m, iterations=1)
    # Of `starts` the first begins where `x` says, the others in random noise.
    start = process_start(prior, n)
    found = reconstruct(problem, prior, recipe, x=start, starts=count)
    assert found.x0.shape == (count, n)
    assert found.log_weights.std() < 1e-3 * found.log_weights.abs().mean()
    assert found.evaluations.tolist() == [4 * T] * count
    errors = (covariance.diagonal() / count).sqrt()
    assert ((found.x0.mean(0) - mean).abs() < 4.5 * errors).all()
    variances = covariance.diagonal()
    errors = ((variances[:, None] * variances + covariance.square()) / count).sqrt()
    assert ((torch.cov(found.x0.mT) - covariance).abs() < 4.5 * errors).all()


def process_start(prior, n):
    process = ReverseProcess(prior, 1)
    return process.initial_state((1, n), torch.Generator().manual_seed(7))


def test_more_steps_bring_the_chain_s_posterior_to_the_prior_s():
    """DDPM's isotropic kernels are what is left: their error of the covariance is O(1 / T)."""
    errors = []
    for T in (40, 160, 640):
        setting, prior, kernels = gaussian_chain(steps=T)
        policies = riccati_policies(kernels, setting.measurement)
        _, covariance = propagate(kernels, policies, torch.zeros(6, dtype=torch.float64))[-1]
        exact = prior.posterior(setting.measurement).covariance.reshape(6, 6)
        errors.append(relative_error(covariance, exact))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.05


def test_on_the_ring_it_is_near_the_posterior_and_the_plan_is_not():
    """An approximation: eight modes, one coordinate measured, a quadratic around one plan."""
    ring, count, T = small_problems()[-1], 200, 40
    times = torch.linspace(1, 0.02, T + 1, dtype=torch.float64)
    y, s = ring.measurement.y.expand(count, -1), ring.measurement.noise_std
    g = torch.Generator().manual_seed(0)
    start = torch.randn(count, 2, generator=g, dtype=torch.float64)
    exact, directions = ring.posterior.sample(4000, g)[:, 0], random_directions(2, 50, g)
    scale, theirs = (torch.cov(exact.mT).trace() / 2).sqrt(), shadows(exact, directions)
    recipe = replace(
        RICCATI,
        rank=1,
        iterations=2,
        derivatives=PRODUCTS,
        process=lambda prior, steps, x, generator: ancestral_mean(prior, times, x, generator),
        steps=T,
    )

    def distance(recipe):
        problem = Problem(lambda x: x @ ring.measurement.matrix.mT, y, s)
        found = reconstruct(problem, ring.prior, recipe, x=start, generator=g)
        return shadow_distance(shadows(found.x0, directions), theirs) / scale

    assert distance(recipe) < 0.45
    assert distance(replace(recipe, draw=None)) > 0.8


@pytest.mark.parametrize("kind", ["positive", "indefinite", "dependent", "rank 0"])
def test_low_rank_draws_have_the_dense_covariance(kind):
    m, r = 12, 0.7
    U, S = random(m, 4), random(4, 4, seed=1)
    S = {"indefinite": 0.01 * (S + S.mT)}.get(kind, S @ S.mT)
    if kind == "dependent":
        U[:, 3] = U[:, 0] - 2 * U[:, 1]
    if kind == "rank 0":
        U, S = U[:, :0], S[:0, :0]
    unit, dense = torch.eye(m, dtype=torch.float64), U @ S @ U.mT
    root, log_det = low_rank_draw(U.expand(m, -1, -1), S.expand(m, -1, -1), r, unit)
    assert relative_error(root.mT @ root, torch.linalg.inv(r * unit + dense)) < 1e-12
    assert (log_det - torch.logdet(unit + dense / r)).abs().max() < 1e-12


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="raise r"):
        low_rank_draw(random(1, 5, 2), -5 * torch.eye(2).double()[None], 0.1, random(1, 5))
    setting, prior, _ = gaussian_chain()
    A, s = setting.measurement.matrix, setting.measurement.noise_std
    problem, x = Problem(lambda x: x @ A.mT, setting.measurement.y, s), random(1, 6)
    small = replace(RICCATI, steps=3, rank=3, iterations=1)
    with pytest.raises(TypeError, match=r"derivatives is Dense.* expected a MatrixFree"):
        reconstruct(problem, prior, replace(small, derivatives=Dense()), x=x)
    with pytest.raises(ValueError, match="raise r"):
        reconstruct(problem, prior, replace(small, weight=0.0, regularization=1.0), x=x)
    assert reconstruct(problem, prior, replace(small, draw=None), x=x).log_weights is None
