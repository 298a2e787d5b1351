r"""How the severity encoder of Flash-Diffusion is trained, and judged.

With :math:`\bar\sigma = \|\hat z - z_0\| / \sqrt n` the true error of the latents' estimate, the
loss is

.. math:: \bar\sigma^2 + \lambda \, (\log \hat\sigma - \log \bar\sigma)^2,

with no gradient through :math:`\log \bar\sigma`. (Fabian et al. compare variances; logarithms weigh
easy and hard pictures alike.)
"""

from functools import cache

import torch
from torch import Tensor

from diffoc.priors.autoencoder import Autoencoder, load_autoencoder
from diffoc.priors.severity import SeverityEncoder
from diffoc.problems import tasks
from diffoc.recipe import TASKS

TRAINED_TASKS = TASKS[:6]  # the last one has no picture as measurement
ERROR_WEIGHT = 0.1  # lambda
_GROUP = 4  # images of a batch that share a task and its operator


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


@cache
def _autoencoder() -> Autoencoder:
    return load_autoencoder()
