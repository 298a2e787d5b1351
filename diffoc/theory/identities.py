r"""The paper's theory as numbers: identities in float64, each with an error and a bound.

Every row compares the controller with a computation that does not use it: gradients through
whole rollouts, closed forms of Gaussians, an independently written loop. Notebooks 03 to 05 and
14 derive them; `python -m diffoc verify` prints them. The setting, unless a row says otherwise, is
a random Gaussian prior in 8 dimensions, measured in 4, under a variance-preserving schedule.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from diffoc.costs import GaussianLikelihood
from diffoc.ilqr import ilqr
from diffoc.problems.operators import LinearMeasurement
from diffoc.process import ReverseProcess, drift_and_diffusion
from diffoc.theory.doob_identities import DOOB_IDENTITIES
from diffoc.theory.linear_gaussian import (
    EXACT,
    SLOPE,
    Identity,
    LinearGaussian,
    exact_kernel_problem,
    fitted_slope,
    linear_gaussian,
    posterior_from,
    relative_error,
    standard_normal,
)
from diffoc.theory.rollouts import euler, one_sweep, rollout_gradient, second_order_gains


def first_order() -> Iterator[Identity]:
    """Theorems 4.1 and 4.3 without second-order terms: the controls are rollout gradients / a."""
    for mode, theorem in (("output", "4.1, Eq. 29"), ("input", "4.3, Eq. 32")):
        setting, process, nominal = uncontrolled(mode, 50)
        gradients = rollout_gradients(setting, process, nominal)
        for a in (1e-2, 1.0, 1e4):
            controls = one_sweep(process, setting.likelihood, nominal[0], a, rank=0).controls
            yield Identity(
                f"Theorem {theorem}: u = grad log p(y|x_0(x)) / a",
                f"{mode} mode, first order, a = {a:g}, T = 50",
                max(map(relative_error, controls, gradients / a)),
                EXACT,
            )


def second_order() -> Iterator[Identity]:
    """With V_xx kept, by either update, the theorems hold only as a grows: error of order 1 / a."""
    constants = torch.tensor([1e7, 1e8, 1e9], dtype=torch.float64)
    for mode, theorem in (("output", "4.1"), ("input", "4.3")):
        setting, process, nominal = uncontrolled(mode, 50)
        gradients = rollout_gradients(setting, process, nominal)
        for update, name in (("paper", "Eqs. 48, 49"), ("full", "full update")):
            starts = nominal[0].expand(len(constants), -1)
            gains = second_order_gains(process, setting.likelihood, starts, constants, update)
            scaled = (constants[:, None] * gains).movedim(1, 0)[:, :, None]
            errors = [relative_error(each, gradients) for each in scaled]
            yield Identity(
                f"Theorem {theorem}, V_xx kept: error ~ 1/a",
                f"{mode} mode, {name}, slope over a = 1e7 ... 1e9",
                abs(fitted_slope(constants.tolist(), errors) + 1),
                SLOPE,
            )


def lemma_4_2() -> Iterator[Identity]:
    """Output mode with a_t = 2 / (g^2 dt) is the Euler step of Eq. 9 with the rollout's score."""
    setting, process, nominal = uncontrolled("output", 50)
    t, dt = process.times[:-1], -process.times.diff()
    _, g2 = drift_and_diffusion(setting.prior.schedule, t)
    controls = one_sweep(process, setting.likelihood, nominal[0], 2 / (g2 * dt), rank=0).controls
    gradients = rollout_gradients(setting, process, nominal)
    guided = map(partial(euler, setting.prior), nominal, t, dt, gradients)
    controlled = map(process.step, range(process.horizon), nominal, controls)
    yield Identity(
        "Lemma 4.2: Eq. 18 is Eq. 9, constant g^2 dt / 2",
        "output mode, gradient at h(x_t), T = 50",
        max(map(relative_error, controlled, guided)),
        EXACT,
    )


def predictor_corrector() -> Iterator[Identity]:
    """Theorem 4.3: the controlled rollout is a loop of predictions and corrections."""
    setting, process, nominal = uncontrolled("input", 50)
    gradients = rollout_gradients(setting, process, nominal)
    for a in (1e2, 1e4):
        states = one_sweep(process, setting.likelihood, nominal[0], a, rank=0).states
        predicted, errors = nominal[0], []
        for i, gradient in enumerate(gradients):
            corrected = predicted + gradient / a  # x~ of Eq. 77
            predicted = process.step(i, corrected)
            errors.append(relative_error(states[i + 1], predicted))
        yield Identity(
            "Theorem 4.3: input mode is predictor-corrector",
            f"states of every step, a = {a:g}, T = 50",
            max(errors),
            EXACT,
        )


def kl_control() -> Iterator[Identity]:
    """The statement that needs no limit: V_t = -log p(y | x_t) for the exact stochastic process."""
    setting = linear_gaussian()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, 8, generator=g, dtype=torch.float64)
    for steps in (10, 100, 1000):
        problem, kernels, times = exact_kernel_problem(setting, steps)
        result = ilqr(problem, x, regularization=0.0, iterations=1)
        errors = []
        for i, (F, _, C) in enumerate(kernels):
            exact = setting.prior.conditional_score(result.states[i], times[i], setting.measurement)
            errors.append(
                relative_error(torch.linalg.solve(C, result.controls[i].mT).mT @ F, exact)
            )
        yield Identity(
            "KL control: F' C^-1 u* = grad log p(y|x_t)",
            f"every step, T = {steps}",
            max(errors),
            EXACT,
        )

    problem, _, _ = exact_kernel_problem(setting, 100, start=0.5)
    states = torch.randn(5, 8, generator=g, dtype=torch.float64)
    value = ilqr(problem, states, regularization=0.0, iterations=1).cost
    evidence = posterior_from(setting, states, 0.5).log_evidence
    # Their constants differ: LQR's value lacks log-determinants that no control can change.
    yield Identity(
        "KL control: V_t(x) = -log p(y|x) + const",
        "differences among five states at t = 1/2, T = 100",
        relative_error(value - value.mean(), evidence.mean() - evidence),
        EXACT,
    )


def posterior_by_control() -> Iterator[Identity]:
    """Without noise the controlled process ends in the posterior mean; with noise, in a sample."""
    setting = linear_gaussian(n=4, m=2)
    n, m, steps = 4, 2, 10
    s = setting.measurement.noise_std
    A, y = setting.measurement.matrix, setting.measurement.y
    x = torch.randn(1, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    problem, _, _ = exact_kernel_problem(setting, steps)
    mean = ilqr(problem, x, regularization=0.0, iterations=1).states[-1]
    exact = posterior_from(setting, x)
    yield Identity(
        "Control without noise ends in E[x_0|x_T, y]",
        "exact kernels, n = 4, T = 10",
        relative_error(mean, exact.mean),
        EXACT,
    )

    # x_0 is affine in all noises (T n of the process, m of the measurement): push unit vectors.
    count = steps * n + m
    unit = torch.eye(count, dtype=torch.float64)
    noise = unit[:, : steps * n].reshape(count, steps, n).movedim(1, 0)
    perturbed = LinearGaussian(
        setting.prior,
        setting.measurement,
        GaussianLikelihood(lambda z: z @ A.mT, y + s * unit[:, steps * n :], s),
    )
    problem, _, _ = exact_kernel_problem(perturbed, steps, noise)
    ends = ilqr(problem, x.expand(count, n), regularization=0.0, iterations=1).states[-1]
    columns = ends - mean
    yield Identity(
        "Control with frozen noise and y + noise: Cov[x_0|x_T, y]",
        "exact kernels, n = 4, T = 10, all noises pushed through",
        relative_error(columns.mT @ columns, exact.covariances[0]),
        EXACT,
    )


def standard_normal_scores() -> Iterator[Identity]:
    """Three scores of N(0, 1) agree with closed forms: true, through the flow, through Tweedie."""
    s, y, time = 0.1, 0.7, 0.5
    prior, one = standard_normal()
    alpha, _ = prior.schedule(torch.tensor(time, dtype=torch.float64))
    x = torch.tensor([[0.3]], dtype=torch.float64)
    measurement = LinearMeasurement(one, y * one, s)

    def through(estimate: Callable[[Tensor], Tensor]) -> Tensor:
        z = x.clone().requires_grad_()
        log_likelihood = -((y - estimate(z)) ** 2).sum() / (2 * s**2)
        return torch.autograd.grad(log_likelihood, z)[0]

    rows = (
        (
            "conditional score: alpha (y - alpha x) / (1 - alpha^2 + s^2)",
            prior.conditional_score(x, torch.tensor(time), measurement),
            alpha * (y - alpha * x) / (1 - alpha**2 + s**2),
        ),
        (
            "through the flow, the identity: (y - x) / s^2",
            through(lambda z: prior.flow(z, time, 0.0)),
            (y - x) / s**2,
        ),
        (
            "through Tweedie (DPS): alpha (y - alpha x) / s^2",
            through(lambda z: prior(z, time).mean),
            alpha * (y - alpha * x) / s**2,
        ),
    )
    for name, value, closed_form in rows:
        yield Identity(
            f"N(0,1): {name}", "t = 1/2, s = 0.1", relative_error(value, closed_form), EXACT
        )


IDENTITIES: tuple[Callable[[], Iterator[Identity]], ...] = (
    first_order,
    second_order,
    lemma_4_2,
    predictor_corrector,
    kl_control,
    posterior_by_control,
    standard_normal_scores,
    *DOOB_IDENTITIES,
)


def uncontrolled(mode: str, steps: int) -> tuple[LinearGaussian, ReverseProcess, Tensor]:
    """Returns the random setting, Euler steps in a mode, and the trajectory without control."""
    setting = linear_gaussian()
    process = ReverseProcess(setting.prior, steps, "euler", mode)
    x = process.initial_state((1, len(setting.prior.mean)), torch.Generator().manual_seed(1))
    return setting, process, process.rollout(x)


def rollout_gradients(setting: LinearGaussian, process: ReverseProcess, nominal: Tensor) -> Tensor:
    """Returns those of Euler rollouts, from the states that the controls are added to."""
    first = int(process.mode == "output")
    through = partial(rollout_gradient, setting.prior, setting.likelihood, process.times)
    return torch.stack([through(i, nominal[i]) for i in range(first, first + process.horizon)])
