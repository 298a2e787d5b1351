"""A network of one's own as a prior."""

from collections.abc import Callable, Sequence

import torch
from azula.denoise import Denoiser
from azula.noise import Schedule
from torch import Tensor, nn

from diffoc.checks import as_numbers, check_kind, check_shape, one_line, shown
from diffoc.priors.pipelines import DiffusersDenoiser, Sampled, check_schedule
from diffoc.priors.pretrained import EDMDenoiser, default_schedule


class _Network(nn.Module):
    """Calls a network of a user's with a copy of the images, and looks at what it returns."""

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        check_kind(Callable, network=network)
        if isinstance(network, type):
            raise TypeError(f"network is the class {network.__name__}, expected one of its objects")
        self.network = network

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        copy = x.clone()
        try:
            output = self.network(copy, level)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of another precision or device, or another shape
            raise ValueError(
                f"network fails for images that are {x.dtype} of shape {tuple(x.shape)} on "
                f"{x.device}, as y is: {one_line(error)}"
            ) from error
        shape: tuple[int, ...] = tuple(output.shape) if isinstance(output, Tensor) else ()
        fits = len(shape) == x.ndim and (shape[0], *shape[2:]) == (len(x), *x.shape[2:])
        if not fits or shape[1] < x.shape[1]:
            raise ValueError(
                f"network gives {shown(output)} for images of shape {tuple(x.shape)}, expected a "
                "tensor of their shape, with more channels at most"
            )
        if not output.is_floating_point() or output.requires_grad < copy.requires_grad:
            raise ValueError(
                f"network gives a prediction of {output.dtype} without derivatives in the images: "
                "leave out its no_grad() or detach()"
            )
        return output.to(x)


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
        network: a differentiable function of noisy images
            :math:`\sqrt{\bar\alpha_i} x_0 + \sqrt{1 - \bar\alpha_i} z`, (B, C, H, W), and
            timesteps i, (B,), that returns a prediction of the images' shape; no image has a part
            in another's prediction. Channels beyond the images', a head for the variance, are cut
            off. A module is put into evaluation mode, and its weights are frozen: its training
            goes on after `train()` and `requires_grad_()`. One that only a function knows of has
            to be put there before.
        alphas_cumprod: the levels :math:`\bar\alpha_i`, decreasing within [0, 1[.
        shape: the shape of an image, (C, H, W).
        prediction_type: what is predicted: "epsilon" for z, "sample" for x_0, or "v_prediction".
        schedule: the schedule of the reverse process, within the levels of `alphas_cumprod`; by
            default :func:`diffoc.priors.pipelines.schedule_within`.

    Raises:
        ValueError: if an argument is out of its range.
    """
    backbone = Sampled(_Network(network))
    check_schedule(schedule)
    bar = as_numbers("alphas_cumprod", alphas_cumprod)
    if bar.ndim != 1 or len(bar) < 2 or not (bar.diff() < 0).all() or not 0 <= bar[-1] < bar[0] < 1:
        raise ValueError("alphas_cumprod must be at least two numbers that decrease within [0, 1[")
    denoiser = DiffusersDenoiser(backbone, bar, prediction_type, schedule)
    return _finished(denoiser, shape)


def wrap_edm(
    network: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
    *,
    schedule: Schedule | None = None,
) -> Denoiser:
    r"""Returns a denoiser :math:`D(x_0 + \sigma z; \sigma)`, as EDM and k-diffusion have it.

    Args:
        network: a function of noisy images (B, C, H, W) and noise levels sigma (B,) that returns
            clean images, and for the rest is as for :func:`wrap`.
        shape: the shape of an image, (C, H, W).
        schedule: the schedule of the reverse process; by default azula's variance-preserving one
            with sigma / alpha from 0.01 to 100.
    """
    check_schedule(schedule)
    return _finished(EDMDenoiser(_Network(network), schedule or default_schedule()), shape)


def _finished(denoiser: Denoiser, shape: Sequence[int]) -> Denoiser:
    check_shape(shape, "CHW")
    denoiser.image_shape = tuple(shape)
    return denoiser.eval().requires_grad_(False)
