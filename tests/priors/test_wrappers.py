"""Networks of one's own, against the exact denoiser of a Gaussian and against the libraries."""

import deepinv
import pytest
import torch
from azula.denoise import GaussianDenoiser, KarrasDenoiser
from azula.linalg.covariance import IsotropicCovariance
from azula.noise import VPSchedule
from diffusers import DDPMScheduler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diffoc
from diffoc.data import digits
from diffoc.priors import wrap, wrap_edm
from diffoc.priors.pretrained import default_schedule, load_prior

STD = 0.5


def exact(schedule):
    """The posterior mean of N(0, STD^2) as azula has it."""
    mean, variance = torch.zeros(()), torch.tensor(STD**2)
    return GaussianDenoiser(mean, IsotropicCovariance(variance), schedule)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_predictor_is_the_exact_denoiser(prediction):
    """Under diffusers' own betas; between timesteps the level is interpolated."""
    bar = DDPMScheduler(1000).alphas_cumprod.double()

    def network(x, timestep):
        a = _at(bar, timestep).exp().reshape(-1, 1, 1, 1)
        x0 = a.sqrt() * STD**2 / (a * STD**2 + 1 - a) * x
        z = (x - a.sqrt() * x0) / (1 - a).sqrt()
        return {"epsilon": z, "sample": x0, "v_prediction": a.sqrt() * z - (1 - a).sqrt() * x0}[
            prediction
        ]

    prior = wrap(network, bar, (1, 4, 4), prediction_type=prediction)
    assert prior.image_shape == (1, 4, 4)
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = exact(default_schedule())
    for t in (0.2, 0.5, 0.8):
        time = torch.tensor(t, dtype=torch.float64)
        torch.testing.assert_close(
            prior(x, time).mean, reference(x, time).mean, rtol=2e-4, atol=2e-5
        )


def _at(bar, timestep):
    """The logarithm of a level at a fractional timestep, linear in log-SNR as the wrapper's."""
    log_snr = (bar / (1 - bar)).log()
    low = timestep.double().floor().long().clamp(0, len(bar) - 2)
    value = log_snr[low] + (timestep - low) * (log_snr[low + 1] - log_snr[low])
    return nn.functional.logsigmoid(value)


@pytest.mark.parametrize("betas", ["linear of 100", "Stable Diffusion's", "to zero"])
def test_the_schedule_ends_where_the_network_was_trained(betas):
    """A perfect predictor for N(0, 1/4) is right at both ends of the process, x = 1.

    Where the last level is noise alone, its network predicts velocities.
    """
    kind = "epsilon"
    if betas == "linear of 100":
        bar = DDPMScheduler(100).alphas_cumprod.double()
    elif betas == "to zero":
        kind, scheduler = "v_prediction", DDPMScheduler(1000, rescale_betas_zero_snr=True)
        bar = scheduler.alphas_cumprod.double()
        assert bar[-1] == 0
    else:
        scaled = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        bar = DDPMScheduler(1000, **scaled).alphas_cumprod.double()

    def network(x, timestep):
        a = _at(bar.clamp(min=2**-24), timestep).exp().reshape(-1, 1, 1, 1)
        x0 = a.sqrt() * STD**2 / (a * STD**2 + 1 - a) * x
        z = (x - a.sqrt() * x0) / (1 - a).sqrt()
        return z if kind == "epsilon" else a.sqrt() * z - (1 - a).sqrt() * x0

    prior = wrap(network, bar, (1, 1, 1), prediction_type=kind)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for t in (0.0, 1.0):
        time = torch.tensor(t, dtype=torch.float64)
        expected = exact(prior.schedule)(x, time).mean
        torch.testing.assert_close(prior(x, time).mean, expected, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="the network was trained from"):
        wrap(network, bar, (1, 1, 1), schedule=VPSchedule(alpha_min=1e-3, sigma_min=1e-3))


def test_an_edm_denoiser_is_the_exact_denoiser():
    def network(x, sigma):
        s = sigma.reshape(-1, 1, 1, 1)
        return STD**2 / (STD**2 + s**2) * x

    prior = wrap_edm(network, (1, 4, 4), schedule=VPSchedule())
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor(0.6, dtype=torch.float64)
    torch.testing.assert_close(prior(x, t).mean, exact(VPSchedule())(x, t).mean)


def test_a_wrapped_network_is_a_prior():
    net = nn.Conv2d(1, 1, 3, padding=1)
    prior = wrap(lambda x, i: net(x), DDPMScheduler(1000).alphas_cumprod, (1, 8, 8))
    y = torch.zeros(1, 1, 8, 8)
    recipe = diffoc.Recipe("short", steps=2, iterations=2)
    found = diffoc.reconstruct(diffoc.Problem(lambda x: x, y, 0.1), prior, recipe)
    assert found.x0.shape == y.shape
    for wrong in ([0.5], [0.5, 0.6], [1.0, 0.5]):
        with pytest.raises(ValueError, match="alphas_cumprod"):
            wrap(net, wrong, (1, 8, 8))
    with pytest.raises(ValueError, match="shape is"):
        wrap(net, [0.9, 0.5], (8, 8))


def test_a_denoiser_of_azula_s_is_a_prior():
    """Karras's, of a network that returns zero, is the exact one of N(0, 1)."""

    class Zero(nn.Conv2d):
        def forward(self, x, log_sigma):
            return 0 * x

    one = IsotropicCovariance(torch.ones(()))
    karras = KarrasDenoiser(Zero(1, 1, 1), VPSchedule())
    gaussian = GaussianDenoiser(torch.zeros(()), one, VPSchedule())
    problem = diffoc.Problem(lambda x: x[..., ::2], digits()[0][:1, ..., ::2], 0.1)
    recipe = diffoc.Recipe("short", steps=3, iterations=3)
    found, expected = (
        diffoc.reconstruct(problem, prior, recipe, x=torch.zeros(1, 1, 28, 28)).x0
        for prior in (karras, gaussian)
    )
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_deepinv_tests_the_model_as_its_own():
    """The PSNR that `deepinv.test` reports is that of our own call."""
    x = digits()[0][[2, 9]]
    physics = deepinv.physics.Inpainting(
        (1, 28, 28),
        mask=(torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0)) < 0.5).float(),
        noise_model=deepinv.physics.GaussianNoise(0.05),
    )
    y = physics.A(x)
    recipe = diffoc.Recipe("short", steps=4, iterations=6, weight=0.1)
    model = diffoc.Reconstructor(load_prior("mnist"), recipe)
    psnr = deepinv.metric.PSNR(max_pixel=1, min_pixel=-1)
    found = deepinv.test(
        model,
        DataLoader(TensorDataset(x, y), batch_size=2),
        physics,
        metrics=[psnr],
        verbose=False,
        show_progress_bar=False,
        compare_no_learning=False,
    )
    expected = psnr(model(y, physics), x).mean().item()
    assert found["PSNR"] == pytest.approx(expected, abs=1e-3)
    assert expected > 15
    with pytest.raises(ValueError, match="noise_std is None"):
        model(y, deepinv.physics.Inpainting((1, 28, 28), mask=0.5))
