r"""The severity encoder of Flash-Diffusion, Fabian et al. 2024, arXiv:2309.06642.

A network that sees a degraded picture returns the latents' estimate :math:`\hat z` and the
logarithm of the severity :math:`\hat\sigma`, its prediction of the estimate's own error
:math:`\bar\sigma = \|\hat z - z_0\| / \sqrt n`, n the number of latents. Its loss is

.. math:: \bar\sigma^2 + \lambda \, (\log \hat\sigma - \log \bar\sigma)^2,

with no gradient through :math:`\log \bar\sigma`. (The paper compares variances; logarithms weigh
easy and hard pictures alike.) One network serves all tasks that measure a picture: it has to see
from the picture which one it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from azula.nn.unet import UNet
from torch import Tensor, nn

from diffoc.autoencoder import Autoencoder, load_autoencoder
from diffoc.baselines import UnsupportedTask
from diffoc.data import load_weights

if TYPE_CHECKING:
    from diffoc.training import Run

TRAINED_TASKS = (
    "super_resolution",
    "random_inpainting",
    "box_inpainting",
    "gaussian_blur",
    "motion_blur",
    "nonlinear_blur",
)
ERROR_WEIGHT = 0.1  # lambda
_GROUP = 4  # images of a batch that share a task and its operator


class SeverityEncoder(nn.Module):
    """Maps pictures (B, 1, H, W) in [-1, 1] to latents (B, c, H / fold, W / fold) and severities.

    Args:
        channels: hidden, of every level.
        blocks: residual blocks of every level, each way.
        latents: c.
        fold: side of the squares of pixels that become channels.
    """

    def __init__(
        self,
        channels: Sequence[int] = (48, 80),
        blocks: Sequence[int] = (2, 3),
        latents: int = 4,
        fold: int = 4,
    ) -> None:
        super().__init__()
        self.fold = fold
        self.unet = UNet(
            fold**2,
            latents + 1,
            hid_channels=channels,
            hid_blocks=blocks,
            norm="group",
        )

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """The latents' estimate (B, c, h, w) and log severities (B,)."""
        output = self.unet(nn.functional.pixel_unshuffle(picture, self.fold))
        return output[:, :-1], output[:, -1].flatten(1).mean(1)


def as_picture(y: Tensor, shape: Sequence[int]) -> Tensor:
    """A measurement as the encoder sees it: scaled up to the image's size where it is smaller.

    Args:
        y: (B, C, h, w).
        shape: of the images, (C, H, W).

    Raises:
        UnsupportedTask: if it is no picture.
    """
    if y.ndim != 4 or y.shape[1] != shape[0] or y.shape[2] > shape[1] or y.shape[3] > shape[2]:
        raise UnsupportedTask(
            f"a severity encoder needs a picture of at most {tuple(shape)}, but a measurement has "
            f"shape {tuple(y.shape[1:])}"
        )
    if y.shape[1:] == tuple(shape):
        return y
    return nn.functional.interpolate(y, tuple(shape[1:]), mode="bicubic", align_corners=False)


def severity_loss(network: SeverityEncoder, x: Tensor, run: Run) -> Tensor:
    """The module's loss of images (B, 1, H, W), a task and an operator drawn for every four.

    The noise of the measurements is that of :data:`diffoc.tasks.NOISE_STD`.
    """
    pictures = torch.cat([_degraded(part, run.generator) for part in x.split(_GROUP)])
    with torch.no_grad():
        truth = _autoencoder().to(x).encode(x)
    estimate, log_severity = network(pictures)
    error = (estimate - truth).square().flatten(1).mean(1)
    prediction_error = (log_severity - error.detach().log() / 2).square()
    return (error + ERROR_WEIGHT * prediction_error).mean()


@torch.no_grad()
def severities(network: SeverityEncoder, x: Tensor, generator: torch.Generator) -> Tensor:
    """Predicted and true severities, (2, B), of images (B, 1, H, W), degraded as in training."""
    pictures = torch.cat([_degraded(part, generator) for part in x.split(_GROUP)])
    estimate, log_severity = network(pictures)
    truth = _autoencoder().to(x).encode(x)
    return torch.stack([log_severity.exp(), (estimate - truth).square().flatten(1).mean(1).sqrt()])


def _degraded(x: Tensor, generator: torch.Generator) -> Tensor:
    from diffoc import tasks  # whose deepinv takes as long to import as torch

    index = int(torch.randint(len(TRAINED_TASKS), (), generator=generator))
    physics = tasks.task(TRAINED_TASKS[index], x.shape[1:], generator)
    return as_picture(tasks.measure(physics.to(x.device), x, generator), x.shape[1:])


@cache
def _autoencoder() -> Autoencoder:
    return load_autoencoder()


def load_severity_encoder() -> SeverityEncoder:
    """The trained severity encoder of "faces64_latent", in evaluation mode, float32.

    Raises:
        ValueError: if the weights are not those of the manifest.
        FileNotFoundError: if they are missing.
    """
    network = SeverityEncoder()
    weights = load_weights("faces64_severity")
    network.load_state_dict({name: value.float() for name, value in weights.items()})
    return network.eval().requires_grad_(False)
