r"""The controller as the paper describes it, Section 6 and Appendix D, with Table 2's settings.

Adam (Eq. 80) in input mode along the deterministic process from a random state, with the likelihood
as terminal cost and a terminal Hessian of rank 1. Where the text is silent, on Adam's rate and the
control cost, the numbers are those of the released code; by Table 5 any regularization does but
none, and ours is well above the rounding of 1 / s^2 = 400. What that code does otherwise is
:data:`diffoc.baselines.released.RELEASED`.
"""

from __future__ import annotations

from azula.noise import Schedule
from torch import Tensor

from diffoc.lowrank import MatrixFree
from diffoc.process import drift_and_diffusion
from diffoc.reconstruct import Recipe
from diffoc.rules import Adam


def snr_weights(schedule: Schedule, times: Tensor, scale: float = 1e-6) -> Tensor:
    r"""Weights of the control cost by the signal-to-noise ratio, (T,).

    .. math:: r_i = s \, \frac{\alpha_i}{\sigma_i} \frac{1}{dt^2}, \qquad dt = 1 / T

    The ratio is the one at the state that the control acts on, `times[i]`. The authors' released
    code has this formula with the ratio of a single noising step in place of all: its weights,
    :func:`diffoc.baselines.released.released_weights`, are hundreds of times these in the first of
    20 steps and five to ten times in the last.

    Args:
        schedule: of the prior.
        times: of the process, (T + 1,).
        scale: s.
    """
    alpha, sigma = schedule(times[:-1])
    steps = len(times) - 1
    return scale * alpha / sigma * steps**2


def guidance_regularization(schedule: Schedule, times: Tensor) -> Tensor:
    r"""Tikhonov's constants that make the first-order gains those of guidance, Lemma 4.2, (T,).

    .. math:: a_i = \frac{2}{g(t_i)^2 \, dt_i}

    Args:
        schedule: of the prior.
        times: of the process, (T + 1,).
    """
    _, g2 = drift_and_diffusion(schedule, times[:-1])
    return 2 / (g2 * -times.diff())


def _weights(schedule: Schedule, times: Tensor) -> Tensor:
    return snr_weights(schedule, times, 1.0)


PAPER = Recipe(
    "paper",
    steps=50,
    iterations=100,
    rule=Adam(5e-3),
    rank=1,
    derivatives=MatrixFree(keep_activations=False, hessian="gauss_newton"),
    regularization=1e-3,
    weight=1e-6,
    weights=_weights,
    from_noise=True,
    by_task={
        ("super_resolution", 2500): {"iterations": 50},
        ("gaussian_blur", 2500): {"rule": Adam(1e-2), "weight": 1e-5},
        ("nonlinear_blur", 2500): {"rule": Adam(1e-2)},
        ("phase_retrieval", 2500): {"rule": Adam(1e-2)},
    },
)
"""Table 2, which the paper calls NFE 2500: activations of 50 steps at 256 x 256 fit no GPU, so that
they are recomputed."""
