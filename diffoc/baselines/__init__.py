r"""What the controller is compared with: one method a file, on any azula prior and our tasks.

Every method is a function ::

    method(prior, physics, y, x, generator, *, noise_std, ...) -> x0

of an azula denoiser, of a `deepinv` physics with measurements y (B, ...), of the state at time 1,
:math:`x_1 \sim N(0, \sigma_1^2 I)`, shape (B, ...), and of the source of all other randomness. It
returns images of the shape of `x`, not clipped; with a :class:`diffoc.latent.LatentPrior` x is a
latent, and what is returned are decoded images. No problem of a batch depends on another, but for
the noise that they draw from one generator. Keyword arguments are the method's settings, in the
notation of the notebooks: times run from 1 (noise) to 0, :math:`x_t = \alpha_t x_0 + \sigma_t z`,
and :math:`m(x, t)` is the posterior mean that the prior returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class UnsupportedTask(ValueError):
    """The method cannot do this task at all; tables show a dash."""


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
