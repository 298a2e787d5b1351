r"""The severity encoder of Flash-Diffusion, Fabian et al. 2024, arXiv:2309.06642.

A network that sees a degraded picture returns the latents' estimate :math:`\hat z` and the
logarithm of the severity :math:`\hat\sigma`, its prediction of the estimate's own error
:math:`\bar\sigma = \|\hat z - z_0\| / \sqrt n`, n the number of latents. One network serves all
tasks that measure a picture: it has to see from the picture which one it is. Its loss is

.. math:: \bar\sigma^2 + \lambda \, (\log \hat\sigma - \log \bar\sigma)^2,

with no gradient through :math:`\log \bar\sigma`. (Fabian et al. compare variances; logarithms weigh
easy and hard pictures alike.)
"""

from functools import cache

import torch
from azula.nn.unet import UNet
from torch import Tensor, nn

from diffoc.priors.autoencoder import FOLD, load_autoencoder
from diffoc.priors.weights import load_shipped
from diffoc.problems import tasks
from diffoc.recipe import TASKS

TRAINED_TASKS = TASKS[:6]  # the last one has no picture as measurement
ERROR_WEIGHT = 0.1  # lambda
_GROUP = 4  # images of a batch that share a task and its operator
_autoencoder = cache(load_autoencoder)


class SeverityEncoder(nn.Module):
    """Maps pictures (B, 3, H, W) in [-1, 1] to latents' estimates and log severities (B,).

    The latents are those of :class:`diffoc.priors.autoencoder.Autoencoder`, (B, 6, H / 4, W / 4).
    """

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet(3 * FOLD**2, 7, hid_channels=(48, 80), hid_blocks=(2, 3), norm="group")

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        output = self.unet(nn.functional.pixel_unshuffle(picture, FOLD))
        return output[:, :-1], output[:, -1].flatten(1).mean(1)


def load_severity_encoder() -> SeverityEncoder:
    """Returns the trained one, to evaluate, float32."""
    return load_shipped(SeverityEncoder, "faces64_severity")


def severity_loss(network: SeverityEncoder, x: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the loss of images (B, 3, H, W), a task and an operator drawn for every four."""
    error, log_severity = _estimated(network, x, generator)
    prediction_error = (log_severity - error.detach().log() / 2).square()
    return (error + ERROR_WEIGHT * prediction_error).mean()


@torch.no_grad()
def severities(network: SeverityEncoder, x: Tensor, generator: torch.Generator) -> Tensor:
    """Returns predicted and true severities, (2, B), of images degraded as in training."""
    error, log_severity = _estimated(network, x, generator)
    return torch.stack([log_severity.exp(), error.sqrt()])


def _estimated(
    network: SeverityEncoder, x: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Returns the mean squared error of the latents' estimate and its prediction, (B,) each."""
    pictures = torch.cat([_degraded(part, generator) for part in x.split(_GROUP)])
    with torch.no_grad():
        truth = _autoencoder().to(x).encode(x)
    estimate, log_severity = network(pictures)
    return (estimate - truth).square().flatten(1).mean(1), log_severity


def _degraded(x: Tensor, generator: torch.Generator) -> Tensor:
    index = int(torch.randint(len(TRAINED_TASKS), (), generator=generator))
    physics = tasks.task(TRAINED_TASKS[index], x.shape[1:], generator)
    return tasks.as_picture(tasks.measure(physics.to(x.device), x, generator), x.shape[1:])
