r"""What the controller is compared with: one method a file, on any azula prior and our tasks.

Every method is called as ::

    x0 = method(prior, physics, y, x, generator, noise_std=..., **settings)

and gets these six as one value, :class:`Given`. It returns images (B, ...), not clipped; with a
:class:`diffoc.priors.latent.LatentPrior` they are decoded. No problem of a batch depends on
another, but for the noise that they draw from one generator; where a method fails with one, it
raises for all of them, and the tables run each alone. Keyword arguments are the method's settings,
in the notation of the notebooks; `steps` is the number T of steps, at least 1, and the end of a
file says what they cost. A method raises an :class:`diffoc.problems.tasks.UnsupportedTask` for a
task that it cannot do, and a ValueError that names a setting out of its range. Times run from 1
(noise) to 0, :math:`x_t = \alpha_t x_0 + \sigma_t z`, and :math:`m(x, t)` is the posterior mean
that the prior returns.

A file ends with ``METHOD = Method(...)``, which says how the tables run it. They know it by the
file's name, and nothing else has to be told of a new one.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from itertools import product
from typing import TYPE_CHECKING

import torch
from azula.denoise import Denoiser
from torch import Tensor

from diffoc.checks import (
    check_at_least,
    check_kind,
    check_networks,
    check_precision,
    check_tensor,
    evaluating,
)
from diffoc.priors.counting import CountedPrior
from diffoc.problem import Problem, check_operator
from diffoc.recipe import Recipe
from diffoc.reconstruct import reconstruct

if TYPE_CHECKING:
    from deepinv.physics import Physics

TRIALS = 8
"""How many settings of each method are tried for a task at least, for all methods alike."""


class Share(float):
    """A share of the budget, for keywords such as a number of steps."""


@dataclass(frozen=True)
class Method:
    """A method, and how the tables run it.

    Attributes:
        label: as in the paper's tables.
        run: see :mod:`diffoc.baselines`.
        settings: maps a task's name and a budget of evaluations to keyword arguments; it raises a
            ValueError for a budget that the method cannot have.
        work: maps keyword arguments to the evaluations and products of an image.
        tuned: the values to try, in all combinations, of one to three keywords tuned for a task;
            keywords of a tuple have their values together.
        largest, smallest: the extreme values that they may have, by keyword.
        per_step: maps keyword arguments to the evaluations that each of their `steps` needs at
            least; trials with a small budget have fewer steps.
        latent: whether the method needs a :class:`diffoc.priors.latent.LatentPrior`.
        recipe: of the controller, which `run` puts the settings into; None for other methods.
    """

    label: str
    run: Callable[..., Tensor]
    settings: Callable[[str, int], dict]
    work: Callable[[dict], tuple[int, int]]
    tuned: Mapping[str | tuple[str, ...], Sequence] | None = None
    largest: Mapping[str, float] = field(default_factory=dict)
    smallest: Mapping[str, float] = field(default_factory=dict)
    per_step: Callable[[Mapping], int] = lambda settings: 1
    latent: bool = False
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        if self.tuned and math.prod(map(len, self.tuned.values())) < TRIALS:
            raise ValueError(f"tuned is {self.tuned}, expected {TRIALS} trials, no fewer")

    def trials(self, nfe: int) -> list[dict]:
        """Returns the settings that are tried for a budget of evaluations, in a fixed order."""
        tuned = self.tuned or {}
        trials = [_trial(tuned, some, nfe) for some in product(*tuned.values())] if tuned else []
        for trial in trials:
            if "steps" in trial:
                trial["steps"] = max(1, min(trial["steps"], nfe // self.per_step(trial)))
        return _each_once(trials)

    def trials_near(self, best: Mapping[str, float], usual: int, nfe: int) -> list[dict]:
        """Returns the settings that are tried for a budget once a smaller one has been tuned.

        The first keyword moves half a step of its values to either side of the best value for the
        budget `usual`, and one and a half. Shares of the budget grow with it.
        """
        shares = [key for key, some in (self.tuned or {}).items() if isinstance(some[0], Share)]
        centre = {k: round(v * nfe / usual) if k in shares else v for k, v in best.items()}
        keyword = next(iter(self.trials(nfe)[0]))
        return _each_once(
            centre | {keyword: self._moved(keyword, centre, step, nfe)}
            for step in (-1.5, -0.5, 0.5, 1.5)
        )

    def outward(self, best: Mapping, tried: Sequence[Mapping], nfe: int) -> list[dict]:
        """Returns what is still to be tried if the best of the settings lies at an edge of these.

        Each keyword whose best value is the smallest or largest of those tried goes a step further
        while the others keep their best values. Keywords of a tuple, or with one value, stay.
        """
        trials = []
        for keyword in self.tuned or {}:
            if isinstance(keyword, tuple):
                continue
            values = [trial[keyword] for trial in tried]
            for step, edge in ((-1, min(values)), (1, max(values))):
                if best[keyword] == edge and min(values) < max(values):
                    trials.append({**best, keyword: self._moved(keyword, best, step, nfe)})
        return [trial for trial in _each_once(trials) if trial not in tried]

    def _moved(self, keyword: str, settings: Mapping, step: float, nfe: int) -> float:
        """Returns a setting's value moved by so many steps of its values, within its limits.

        Steps are factors, or differences where one of the values is 0.
        """
        value = settings[keyword]
        values = sorted({trial[keyword] for trial in self.trials(nfe)})
        intervals = max(1, len(values) - 1)
        if values[0] > 0:
            moved = value * (values[-1] / values[0]) ** (step / intervals)
        else:
            moved = max(0, value + step * values[-1] / intervals)
        most = nfe // self.per_step(settings) if keyword == "steps" else math.inf
        moved = min(float(f"{moved:.2g}"), most, self.largest.get(keyword, math.inf))
        moved = max(moved, self.smallest.get(keyword, -math.inf))
        return max(1, round(moved)) if isinstance(values[0], int) else moved


def _each_once(trials: Iterable[dict]) -> list[dict]:
    trials = list(trials)
    return [trial for i, trial in enumerate(trials) if trial not in trials[:i]]


def _trial(keywords: Iterable[str | tuple[str, ...]], values: Iterable, nfe: int) -> dict:
    trial: dict[str, float] = {}
    for keyword, value in zip(keywords, values, strict=True):
        if isinstance(keyword, tuple):
            trial |= zip(keyword, value, strict=True)
        else:
            trial[keyword] = max(1, round(value * nfe)) if isinstance(value, Share) else value
    return trial


def one_a_step(task: str, nfe: int) -> dict:
    """Settings of a method whose step costs one evaluation."""
    return {"steps": nfe}


def product_a_step(settings: dict) -> tuple[int, int]:
    """Returns the work of a method whose step costs an evaluation and a product."""
    return settings["steps"], settings["steps"]


def no_products(settings: dict) -> tuple[int, int]:
    """Returns the work of a method whose step costs an evaluation alone."""
    return settings["steps"], 0


def methods() -> dict[str, Method]:
    """Returns the methods of this package by their files' names."""
    names = [found.name for found in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module.METHOD for name, module in modules.items() if hasattr(module, "METHOD")}


@contextmanager
def global_generator(generator: torch.Generator) -> Iterator[None]:
    """Seeds torch's global generator, from which libraries draw, by this one, and restores it."""
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Given:
    r"""What every method gets.

    Attributes:
        prior: an azula denoiser.
        physics: the operator A, a `deepinv` physics.
        y: the measurements, (B, ...).
        x: the state at time 1, :math:`x_1 \sim N(0, \sigma_1^2 I)`, (B, ...); with a
            :class:`diffoc.priors.latent.LatentPrior` it is a latent.
        generator: the source of all other randomness.
        noise_std: the standard deviation s of the measurements' noise.
    """

    prior: Denoiser
    physics: Physics
    y: Tensor
    x: Tensor
    generator: torch.Generator
    noise_std: float

    def noise(self, like: Tensor | None = None) -> Tensor:
        """Draws standard normal numbers of the shape of `x`, or of another tensor."""
        x, device = self.x if like is None else like, self.generator.device
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype, device=device).to(x)

    def reconstruct(self, recipe: Recipe, x: Tensor | None = None) -> Tensor:
        """Returns the images of a recipe, which starts from `x`, by default from zeros."""
        problem = Problem(self.physics, self.y, self.noise_std)
        x = 0 * self.x if x is None else x
        found = reconstruct(problem, self.prior, recipe, x=x, generator=self.generator)
        if isinstance(self.prior, CountedPrior):
            self.prior.of_each = found.evaluations, found.products
        return found.x0


def method(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Turns a function of :class:`Given` and settings into a method that is called as above.

    A `y` or `x` that is not finite or does not fit the physics, and a negative `noise_std`, are
    refused before it runs, because many would draw a sample of the prior all the same.
    """

    @wraps(run)
    def checked(
        prior: Denoiser,
        physics: Physics,
        y: Tensor,
        x: Tensor,
        generator: torch.Generator,
        *,
        noise_std: float,
        **settings: object,
    ) -> Tensor:
        check_tensor("y", y)
        check_tensor("x", x)
        check_at_least(0, noise_std=noise_std)
        from deepinv.physics import Physics  # slow to import

        check_kind(Physics, physics=physics)
        check_kind(Denoiser, prior=prior)
        check_networks(prior=prior, physics=physics)
        check_precision(prior, x)
        # Where the prior is one of latents, x is no image.
        if not hasattr(getattr(prior, "prior", prior), "decode"):
            check_operator(Problem(physics, y, 1.0), x)
        with evaluating(prior, physics, *settings.values()):
            return run(Given(prior, physics, y, x, generator, noise_std), **settings)

    return checked
