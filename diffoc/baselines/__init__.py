r"""What the controller is compared with: one method a file, on any azula prior and our tasks.

Every method is a function ::

    method(prior, physics, y, x, generator, *, noise_std, ...) -> x0

of an azula denoiser, of a `deepinv` physics with measurements y (B, ...), of the state at time 1,
:math:`x_1 \sim N(0, \sigma_1^2 I)`, shape (B, ...), and of the source of all other randomness. It
returns images of the shape of `x`, not clipped; with a
:class:`diffoc.priors.latent.LatentPrior` x is a latent, and what is returned are decoded images. No
problem of a batch depends on another, but for the noise that they draw from one generator. Keyword
arguments are the method's settings, in the notation of the notebooks; :func:`method` looks at what
all share. Times run from 1 (noise) to 0,
:math:`x_t = \alpha_t x_0 + \sigma_t z`, and :math:`m(x, t)` is the posterior mean that the prior
returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING

import torch
from azula.denoise import Denoiser
from torch import Tensor

from diffoc.checks import check_tensor, evaluating

if TYPE_CHECKING:
    from deepinv.physics import Physics


@contextmanager
def global_generator(generator: torch.Generator) -> Iterator[None]:
    """For libraries that draw from torch's global generator, which is put back afterwards.

    Args:
        generator: gives the seed; what it gives next depends on that.
    """
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def method(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorates a method: what is no measurement of such images is refused before it runs.

    Many would draw a sample of the prior all the same.

    Args:
        run: as the module says; it then raises a ValueError, too, if `y` or `x` is not finite or
            does not fit the physics, or `noise_std` is not finite or negative.
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
        if not 0 <= noise_std < math.inf:
            raise ValueError(f"noise_std is {noise_std}, expected finite and at least 0")
        # Where the prior is one of latents, x is no image.
        if not hasattr(getattr(prior, "prior", prior), "decode"):
            _check_fit(physics, y, x)
        with evaluating(prior, physics, *settings.values()):
            return run(prior, physics, y, x, generator, noise_std=noise_std, **settings)

    return checked


@torch.no_grad()
def _check_fit(physics: Physics, y: Tensor, x: Tensor) -> None:
    try:
        expected = (len(x), *physics.A(x[:1]).shape[1:])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"x has shape {tuple(x.shape)}, not that of the task: {error}") from error
    if y.shape != expected:
        raise ValueError(f"y has shape {tuple(y.shape)}, expected {expected} for x and the task")
