"""A network of one's own as a prior."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from azula.denoise import Denoiser
from azula.noise import Schedule
from torch import Tensor, nn

from diffoc.checks import check_callable, check_kind, check_shape, shown
from diffoc.priors.pipelines import DiffusersDenoiser
from diffoc.priors.pretrained import EDMDenoiser, default_schedule


class _Output(nn.Module):
    """Calls a network, and returns its output as networks of `diffusers` do."""

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timestep: Tensor) -> SimpleNamespace:
        """The output as attribute `sample`; a ValueError refuses one that is no prediction."""
        output = self.network(x, timestep)
        shape = tuple(getattr(output, "shape", ()))
        fits = len(shape) == x.ndim and (shape[0], *shape[2:]) == (len(x), *x.shape[2:])
        if not fits or shape[1] < x.shape[1]:
            raise ValueError(
                f"network gives {shape or type(output).__name__} for images of {tuple(x.shape)}, "
                "expected their shape, with more channels at most"
            )
        return SimpleNamespace(sample=output)


def wrap(
    network: Callable[[Tensor, Tensor], Tensor],
    alphas_cumprod: Tensor | Sequence[float],
    shape: Sequence[int],
    *,
    prediction_type: str = "epsilon",
    schedule: Schedule | None = None,
) -> Denoiser:
    r"""Returns a network that predicts noise, as DDPM's do, as a prior with `image_shape`.

    >>> prior = diffoc.priors.wrap(network, alphas_cumprod, (3, 64, 64))
    >>> result = diffoc.reconstruct(problem, prior)

    Args:
        network: maps noisy images :math:`\sqrt{\bar\alpha_i} x_0 + \sqrt{1 - \bar\alpha_i} z`,
            (B, C, H, W), and timesteps i, (B,), to a prediction of the images' shape. Channels
            beyond the images', a head for the variance, are cut off. A module is put into
            evaluation mode; one that only a function knows of has to be put there before.
        alphas_cumprod: :math:`\bar\alpha_i`, decreasing within ]0, 1[.
        shape: of an image, (C, H, W).
        prediction_type: "epsilon" for z, "sample" for x_0, or "v_prediction".
        schedule: of the reverse process, within the levels of `alphas_cumprod`; by default
            :func:`diffoc.priors.pipelines.schedule_within`.

    Raises:
        ValueError: if an argument is out of its range.
    """
    check_kind(Callable, network=network)
    check_callable(schedule=schedule)
    try:
        bar = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"alphas_cumprod is {shown(alphas_cumprod)}, expected numbers") from error
    if bar.ndim != 1 or len(bar) < 2 or not (bar.diff() < 0).all() or not 0 < bar[-1] < bar[0] < 1:
        raise ValueError("alphas_cumprod must be at least two numbers that decrease within ]0, 1[")
    denoiser = DiffusersDenoiser(_Output(network), bar, prediction_type, schedule)
    return _finished(denoiser, shape)


def wrap_edm(
    network: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
    *,
    schedule: Schedule | None = None,
) -> Denoiser:
    r"""Returns a denoiser :math:`D(x_0 + \sigma z; \sigma)`, as EDM and k-diffusion have it.

    Args:
        network: maps noisy images (B, C, H, W) and noise levels sigma (B,) to clean images.
        shape: as for :func:`wrap`.
        schedule: of the reverse process; by default azula's variance-preserving one with sigma /
            alpha from 0.01 to 100.
    """
    return _finished(EDMDenoiser(network, schedule or default_schedule()), shape)


def _finished(denoiser: Denoiser, shape: Sequence[int]) -> Denoiser:
    check_shape(shape, "CHW")
    denoiser.image_shape = tuple(shape)
    return denoiser.eval().requires_grad_(False)
