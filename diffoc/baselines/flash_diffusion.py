r"""Flash-Diffusion: Fabian et al. 2024, arXiv:2309.06642.

A severity encoder sees the measurement and returns an estimate :math:`\hat z` of the latents and of
its own error, :math:`\hat z = z_0 + \hat\sigma n`. The sampler starts at the time whose noise is as
much louder than its signal as that,

.. math:: \sigma_{t^*} / \alpha_{t^*} = c \, \hat\sigma, \qquad
    z_{t^*} = \alpha_{t^*} \hat z + \sigma_{t^*} n,

so that easy measurements cost few steps, and goes on as :mod:`diffoc.baselines.psld` does.
"""

from __future__ import annotations

import math

import torch
from azula.denoise import Denoiser
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor

from diffoc.baselines import Method, method
from diffoc.baselines.psld import guided_step
from diffoc.priors.latent import latent_prior
from diffoc.priors.severity import SeverityEncoder, load_severity_encoder
from diffoc.problems.tasks import UnsupportedTask, as_picture


@method
def flash_diffusion(
    prior: Denoiser,
    physics: Physics,
    y: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    noise_std: float,
    steps: int = 1000,
    guidance: float = 1.0,
    gluing: float = 0.0,
    eta: float = 1.0,
    correction: float = 1.0,
    encoder: SeverityEncoder | None = None,
) -> Tensor:
    r"""Images (B, C, H, W) by Flash-Diffusion; see :mod:`diffoc.baselines` for what all share.

    Args:
        prior: a `LatentPrior`; `x` is the latents' state at time 1, whose noise is the one that is
            added to the estimate.
        noise_std: not used: the guidance has to be tuned to it, and the encoder was trained for it.
        steps: of the whole way from time 1; an image that starts at t* takes ceil(t* steps), each
            an evaluation and a product.
        guidance, gluing, eta: as for PSLD.
        correction: c, positive.
        encoder: the severity encoder, by default that of "faces64_latent", or, for a prior of
            colour images, of "faces64_rgb_latent".

    Raises:
        ValueError: for a prior of images, or one that the encoder is not for.
        UnsupportedTask: if the measurement is no picture, or for gluing and an A that is not
            linear.
    """
    autoencoder = latent_prior(prior)
    if gluing and not isinstance(physics, LinearPhysics):
        raise UnsupportedTask("the gluing term needs the adjoint of a linear operator")
    picture = as_picture(y, autoencoder.decoded_shape)
    if encoder is None:
        faces = {1: "faces64", 3: "faces64_rgb"}[autoencoder.decoded_shape[0]]
        encoder = load_severity_encoder(f"{faces}_severity").to(x)
    with torch.no_grad():
        estimate, log_severity = encoder(picture)
    if estimate.shape != x.shape:
        raise ValueError(
            f"prior has latents {tuple(x.shape)}, the severity encoder {tuple(estimate.shape)}"
        )
    start = time_of_ratio(prior, correction * log_severity.exp())
    alpha, sigma = (a.reshape(-1, *(1,) * (x.ndim - 1)) for a in prior.schedule(start))
    _, sigma_1 = prior.schedule(torch.ones_like(start[0]))
    z = alpha * estimate + sigma * x / sigma_1
    counts = (start * steps).ceil().clamp(min=1)
    for left in range(int(counts.max()), 0, -1):
        active = counts >= left
        t, s = (start[active] * k / counts[active] for k in (left, left - 1))
        z[active] = guided_step(
            prior, physics, y[active], z[active], t, s, generator, guidance, gluing, eta
        )
    return autoencoder.decode(z)


def time_of_ratio(prior: Denoiser, ratio: Tensor) -> Tensor:
    """The times in [0, 1] at which sigma / alpha, which must increase, has values (B,).

    What lies outside its range gets the nearer end.
    """
    low, high = torch.zeros_like(ratio), torch.ones_like(ratio)
    for _ in range(1 - math.floor(math.log2(torch.finfo(ratio.dtype).eps))):
        middle = (low + high) / 2
        alpha, sigma = prior.schedule(middle)
        above = sigma > ratio * alpha
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


METHOD = Method(
    "Flash-Diffusion",
    flash_diffusion,
    # It starts at some fifth of the time, by the severity of the picture.
    lambda task, nfe: {"steps": 5 * nfe},
    lambda settings: (settings["steps"] // 5, settings["steps"] // 5),
    tuned={"guidance": (0.1, 0.25, 0.5, 1.0), "gluing": (0.0, 0.1)},
    latent=True,
)
