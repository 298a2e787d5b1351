r"""How far a method's samples are from an exact posterior, and from samples of it.

A posterior with mean :math:`m^*` and covariance :math:`C^*` in n dimensions is known; N samples of
a method have the mean m and the covariance C. All distances are relative to the posterior's own
spread:

.. math::
    \frac{\|m - m^*\|}{\sqrt{\mathrm{tr}\, C^*}}, \qquad
    \frac{\|C - C^*\|_F}{\|C^*\|_F}, \qquad
    \frac{\mathrm{tr}\, C}{\mathrm{tr}\, C^*}, \qquad
    \frac{W_2}{\sqrt{\mathrm{tr}\, C^*}}

with the Wasserstein distance between the Gaussians of these moments (Bures), and the sliced one
(:func:`shadow_distance`), over random unit vectors, relative to
:math:`\sqrt{\mathrm{tr}\, C^* / n}`, the posterior's root mean square along such a vector. Only the
last one sees more than moments, so it alone notices a missing mode that they hide.

N exact samples are not at distance zero either. What they score on average is the floor of the
table; one set of them may be half or twice as far.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from math import nan

import torch
from torch import Tensor

from diffoc.experiments.known_posteriors import Posterior, Problem
from diffoc.priors.counting import CountedPrior
from diffoc.problems.metrics import frechet_between, moments
from diffoc.problems.tasks import UnsupportedTask

DISTANCES = ("mean", "covariance", "trace", "bures", "sliced")
_DIRECTIONS = 100
_REFERENCE = 4  # exact samples for every sample that they judge
_FLOORS = 10  # sets of exact samples whose distances make the floor, on average


def posterior_distances(
    samples: Tensor, posterior: Posterior, reference: Tensor, directions: Tensor
) -> dict[str, float]:
    """Returns all distances of this module, of samples (N, n), N at least 2.

    The posterior is that of one measurement, B = 1. The sliced distance takes exact samples (M, n)
    as reference, M a multiple of N, and directions (n, P) as :func:`random_directions` draws them.
    """
    mean, covariance = moments(samples, "samples")
    if len(posterior.mean) != 1 or samples.shape[1] != posterior.mean.shape[1]:
        raise ValueError(
            f"samples has shape {tuple(samples.shape)}, the posterior's mean "
            f"{tuple(posterior.mean.shape)}, expected (N, n) and (1, n)"
        )
    n = samples.shape[1]
    exact_mean = posterior.mean[0].double().cpu()
    exact = posterior.covariance.double().cpu().reshape(n, n)
    total = exact.trace()
    squared = frechet_between((mean, covariance), (exact_mean, exact))
    sliced = shadow_distance(shadows(samples, directions), shadows(reference, directions))
    return {
        "mean": ((mean - exact_mean).norm() / total.sqrt()).item(),
        "covariance": ((covariance - exact).norm() / exact.norm()).item(),
        "trace": (covariance.trace() / total).item(),
        "bures": (max(squared, 0.0) / total.item()) ** 0.5,
        "sliced": sliced / (total.item() / n) ** 0.5,
    }


def shadows(points: Tensor, directions: Tensor) -> Tensor:
    """Returns the projections of points (N, n) on unit vectors (n, P), sorted in each, (N, P)."""
    return (points.double() @ directions.double()).sort(dim=0).values


def shadow_distance(ours: Tensor, theirs: Tensor) -> float:
    """Returns the sliced Wasserstein distance of two sets by their shadows, (N, P) and (M, P).

    It is the root mean square over directions of W_2 between projections, coupled by order: each
    of ours to M / N of theirs. M is a multiple of N.

    Source: Bonneel et al. 2015, doi:10.1007/s10851-014-0506-3.
    """
    copies, rest = divmod(len(theirs), len(ours))
    if rest or not copies:
        raise ValueError(f"reference has {len(theirs)} rows, no multiple of {len(ours)}")
    return (ours.repeat_interleave(copies, dim=0) - theirs).square().mean().sqrt().item()


def random_directions(n: int, count: int, generator: torch.Generator) -> Tensor:
    """Returns unit vectors, uniform on the sphere, (n, count), float64."""
    drawn = torch.randn(n, count, generator=generator, dtype=torch.float64)
    return drawn / drawn.norm(dim=0)


def distance_table(
    methods: Mapping[str, tuple[Callable[..., Tensor], Mapping[str, object]]],
    problems: Sequence[Problem],
    samples: int,
    generator: torch.Generator,
) -> list[dict[str, object]]:
    """Returns one row for every problem and method, the floor first, as method "exact".

    Methods are functions as :mod:`diffoc.baselines` says, with their settings. All methods of a
    problem get the same N states at time 1 and generators of the same seed, so that a row does not
    depend on which others there are.

    A row has problem, method, settings, the :data:`DISTANCES`, evaluations and products for each
    sample, seconds for all, and the reason where there are no numbers (nan): a method that cannot
    do the problem, or samples that are not finite.
    """
    rows = []
    for problem in problems:
        posterior, like = problem.posterior, problem.posterior.mean
        n = like.shape[1]
        axes = random_directions(n, _DIRECTIONS, generator)
        reference = posterior.sample(_REFERENCE * samples, generator)[:, 0]
        sets = [posterior.sample(samples, generator)[:, 0] for _ in range(_FLOORS)]
        floors = [posterior_distances(some, posterior, reference, axes) for some in sets]
        _, sigma = problem.prior.schedule(torch.ones((), dtype=like.dtype))
        noise = torch.randn(samples, n, generator=generator, dtype=torch.float64)
        x = sigma * noise.to(like)
        seed = int(torch.randint(2**62, (), generator=generator))
        floor = {name: sum(floor[name] for floor in floors) / _FLOORS for name in DISTANCES}
        rows.append(_row(problem.name, "exact", {}) | floor)
        for name, (method, settings) in methods.items():
            rows.append(row := _row(problem.name, name, settings))
            prior = CountedPrior(problem.prior)
            began = time.perf_counter()
            try:
                drawn = method(
                    prior,
                    problem.physics,
                    problem.measurement.y.expand(samples, -1),
                    x.clone(),
                    torch.Generator().manual_seed(seed),
                    noise_std=problem.measurement.noise_std,
                    **settings,
                )
            except UnsupportedTask as error:
                row["reason"] = str(error)
                continue
            row["seconds"] = time.perf_counter() - began
            row["evaluations"] = prior.evaluations / samples
            row["products"] = prior.products / samples
            if bad := int((~drawn.isfinite()).any(dim=1).sum()):
                row["reason"] = f"{bad} of {samples} samples are not finite"
            else:
                row |= posterior_distances(drawn.detach(), posterior, reference, axes)
    return rows


def _row(problem: str, method: str, settings: Mapping[str, object]) -> dict[str, object]:
    return {
        "problem": problem,
        "method": method,
        "settings": ", ".join(f"{key} {value}" for key, value in settings.items()),
        **dict.fromkeys(DISTANCES, nan),
        **dict.fromkeys(("evaluations", "products", "seconds"), 0.0),
        "reason": "",
    }
