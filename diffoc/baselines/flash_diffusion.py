r"""Flash-Diffusion: Fabian et al. 2024, arXiv:2309.06642.

A severity encoder sees the measurement and returns an estimate :math:`\hat z` of the latents and of
its own error, :math:`\hat z = z_0 + \hat\sigma n`. The sampler starts at the time whose noise is as
much louder than its signal as that,

.. math:: \sigma_{t^*} / \alpha_{t^*} = \hat\sigma, \qquad
    z_{t^*} = \alpha_{t^*} \hat z + \sigma_{t^*} n,

so that easy measurements cost few steps, and goes on as :mod:`diffoc.baselines.psld` does.
"""

from dataclasses import replace

import torch
from deepinv.physics import Physics
from torch import Tensor

from diffoc.baselines import Given, Method, method
from diffoc.baselines.decomposition import require_linear
from diffoc.baselines.noise_level import times_of_levels
from diffoc.baselines.psld import check_guided, guided_step
from diffoc.priors.latent import latent_prior
from diffoc.priors.severity import SeverityEncoder, load_severity_encoder
from diffoc.problems.tasks import as_picture, for_each, parts_of


@method
def flash_diffusion(
    given: Given,
    *,
    steps: int = 1000,
    guidance: float = 1.0,
    gluing: float = 0.0,
    eta: float = 1.0,
    encoder: SeverityEncoder | None = None,
) -> Tensor:
    r"""Returns images (B, C, H, W) by Flash-Diffusion; x is the noise that is added to estimates.

    Args:
        steps: the number of steps of the whole way from time 1; an image that starts at t* takes
            ceil(t* steps), each of which costs an evaluation and a product.
        guidance: the weight of the measurement's residual, see :func:`diffoc.baselines.psld.psld`.
        gluing: the weight of the encoding's residual, see there.
        eta: how much noise DDIM adds, see there.
        encoder: the severity encoder, by default that of "faces64_latent"; the noise of
            measurements is what it was trained for.
    """
    check_guided(steps, guidance, gluing, eta)
    autoencoder, y, x = latent_prior(given.prior), given.y, given.x
    if gluing:
        require_linear(given.physics)
    picture = as_picture(y, autoencoder.decoded_shape)
    if encoder is None:
        encoder = load_severity_encoder().to(x)
    with torch.no_grad():
        estimate, log_severity = encoder(picture)
    if estimate.shape != x.shape:
        raise ValueError(
            f"prior has latents {tuple(x.shape)}, the severity encoder {tuple(estimate.shape)}"
        )
    schedule = given.prior.schedule
    alpha_1, sigma_1 = (scale.item() for scale in schedule(torch.ones((), dtype=torch.float64)))
    ratio = log_severity.double().exp().cpu().clamp(max=sigma_1 / alpha_1)
    start = times_of_levels(schedule, ratio).to(log_severity)
    alpha, sigma = (a.reshape(-1, *(1,) * (x.ndim - 1)) for a in schedule(start))
    z = alpha * estimate + sigma * x / sigma_1
    counts = (start * steps).ceil().clamp(min=1)
    for left in range(int(counts.max()), 0, -1):
        active = counts >= left
        t, s = (start[active] * k / counts[active] for k in (left, left - 1))
        some = replace(given, physics=_of(given, active), y=y[active])
        z[active] = guided_step(some, z[active], t, s, guidance, gluing, eta)
    return autoencoder.decode(z)


def _of(given: Given, active: Tensor) -> Physics:
    """Returns the operator of some images of the batch, (B,) bool."""
    parts = parts_of(given.physics)
    if len(parts) == 1 or active.all():
        return given.physics
    return for_each([part for part, goes_on in zip(parts, active, strict=True) if goes_on])


METHOD = Method(
    "Flash-Diffusion",
    flash_diffusion,
    # It starts at some fifth of the time, by the severity of the picture.
    lambda task, nfe: {"steps": 5 * nfe},
    lambda settings: (settings["steps"] // 5, settings["steps"] // 5),
    tuned={"guidance": (0.1, 0.25, 0.5, 1.0), "gluing": (0.0, 0.1)},
    latent=True,
)
