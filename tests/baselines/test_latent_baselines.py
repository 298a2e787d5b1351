"""PSLD and Flash-Diffusion: closed forms in a Gaussian latent space, and the shipped encoder."""

import math

import pytest
import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.noise import VPSchedule
from azula.sample import DDIMSampler
from deepinv.physics import Inpainting, LinearPhysics, Physics
from torch import nn

from diffoc.baselines import Given
from diffoc.baselines.flash_diffusion import flash_diffusion
from diffoc.baselines.noise_level import times_of_levels
from diffoc.baselines.psld import guided_step, psld
from diffoc.data import images as data
from diffoc.priors import severity
from diffoc.priors.counting import CountedPrior
from diffoc.priors.latent import LatentPrior
from diffoc.priors.networks import parameter_count
from diffoc.priors.pretrained import load_prior
from diffoc.problems import tasks
from diffoc.problems.tasks import UnsupportedTask

VARIANCE = 0.7**2  # of the toy prior's latents
N, M = 5, 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=1):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def states(batch, n=N, seed=1):
    """Rows of one pixel's height, so that they are pictures too."""
    return noise(batch, 1, 1, n, seed=seed)


class Linear(nn.Module):
    """Images are Q z with an orthogonal Q, or z itself."""

    def __init__(self, matrix):
        super().__init__()
        self.register_buffer("matrix", matrix)

    def encode(self, images):
        return images @ self.matrix

    def decode(self, latents):
        return latents @ self.matrix.T


class Gaussian(Denoiser):
    """The posterior mean for z ~ N(0, VARIANCE I), at a time for every state or for all."""

    def __init__(self):
        super().__init__()
        self.schedule = VPSchedule()

    def forward(self, x_t, t):
        alpha, sigma = (a.reshape(-1, 1, 1, 1) for a in self.schedule(t))
        return DiracPosterior(alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * x_t)


def toy(matrix=None):
    """z ~ N(0, VARIANCE I) and its images."""
    matrix = torch.eye(N, dtype=torch.float64) if matrix is None else matrix
    prior = LatentPrior(Gaussian(), Linear(matrix))
    prior.image_shape = prior.decoded_shape = (1, 1, N)
    return prior


def measurement(matrix):
    return LinearPhysics(A=lambda x: x @ matrix.T, A_adjoint=lambda y: y @ matrix)


def rotation():
    return torch.linalg.qr(noise(N, N, seed=5)).Q


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_psld_without_guidance_is_the_unconditional_sampler(eta):
    prior, x = toy(rotation()), states(3)
    y = states(3, M, seed=2)
    found = psld(
        CountedPrior(prior),
        measurement(noise(M, N, seed=3)),
        y,
        x,
        generator(4),
        noise_std=0.05,
        steps=20,
        guidance=0,
        gluing=0,
        eta=eta,
    )
    sampler = DDIMSampler(prior, eta=eta, steps=20, silent=True, dtype=torch.float64)
    torch.manual_seed(4)
    torch.testing.assert_close(found, prior.decode(sampler(x)))


@pytest.mark.parametrize(("guidance", "gluing"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_psld_s_gradient_is_the_one_by_hand(guidance, gluing):
    """m = k z, so that both norms are of linear functions of z."""
    prior, q, a = toy(rotation()), rotation(), noise(M, N, seed=3)
    z, y = states(2), states(2, M, seed=2)
    t, s = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    plain, guided = (
        guided_step(Given(prior, measurement(a), y, z, generator(), 0.05), z, t, s, *weights, 1.0)
        for weights in ((0.0, 0.0), (guidance, gluing))
    )
    alpha, sigma = prior.schedule(t)
    k = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
    data_residual = y - k * z @ (a @ q).T
    # m - E(A'y + (I - A'A) Q m) = Q'A' (A Q m - y)
    glue_residual = -data_residual @ (a @ q)
    expected = -guidance * k * data_residual @ (a @ q) / data_residual.norm(
        dim=-1, keepdim=True
    ) + gluing * k * (glue_residual @ (q.T @ a.T @ a @ q)) / glue_residual.norm(
        dim=-1, keepdim=True
    )
    torch.testing.assert_close(plain - guided, expected)


class Fixed(nn.Module):
    """A severity encoder that predicts zero latents and given severities."""

    def __init__(self, *severities):
        super().__init__()
        self.severities = torch.tensor(severities, dtype=torch.float64)

    def forward(self, picture):
        return torch.zeros(len(picture), 1, 1, N, dtype=torch.float64), self.severities.log()


@pytest.mark.parametrize("method", [psld, flash_diffusion])
def test_measurements_are_met_and_problems_do_not_mix(method):
    """With guidance A x_0 approaches y; a picture alone comes out as it does in a batch."""
    prior, a = toy(rotation()), torch.linalg.qr(noise(N, N, seed=3)).Q[:M]
    y, x = 2 * states(3, seed=8) @ a.T, states(3)

    def solve(chosen, guidance):
        settings = {"noise_std": 0.01, "steps": 500, "eta": 0.0}
        settings |= {"guidance": guidance, "gluing": guidance}
        if method is flash_diffusion:
            settings["encoder"] = Fixed(*[(0.5, 1.0, 2.0)[i] for i in chosen])
        with torch.no_grad():  # the gradient is the method's own
            return method(prior, measurement(a), y[chosen], x[chosen], generator(), **settings)

    found, free = solve([0, 1, 2], 0.05), solve([0, 1, 2], 0.0)
    residual, before = ((z @ a.T - y).norm(dim=-1) for z in (found, free))
    assert residual.mean() < 0.2 * before.mean()
    torch.testing.assert_close(solve([1], 0.05), found[1:2])


def test_only_psld_needs_a_linear_operator():
    prior, y, x = toy(), states(2, M), states(2)
    square = Physics(A=lambda image: image[..., :M].square())
    with pytest.raises(UnsupportedTask, match="adjoint"):
        psld(prior, square, y, x, generator(), noise_std=0.05)
    settings = {"noise_std": 0.05, "steps": 3, "encoder": Fixed(1.0, 1.0)}
    assert flash_diffusion(prior, square, y, x, generator(), **settings).shape == x.shape
    with pytest.raises(UnsupportedTask, match="adjoint"):
        flash_diffusion(prior, square, y, x, generator(), gluing=0.1, **settings)


@pytest.mark.parametrize("method", [psld, flash_diffusion])
def test_priors_of_images_are_refused(method):
    prior, x = CountedPrior(load_prior("mnist")), torch.zeros(1, 1, 28, 28)
    physics = tasks.task("gaussian_blur", (1, 28, 28), generator())
    with pytest.raises(ValueError, match="prior is a KarrasDenoiser"):
        method(prior, physics, x, x, generator(), noise_std=0.05)
    assert prior.evaluations == 0


# --- Flash-Diffusion


class Recorded(LatentPrior):
    """Keeps what it was asked."""

    def __init__(self, prior):
        super().__init__(prior.denoiser, prior.autoencoder)
        self.image_shape = self.decoded_shape = prior.decoded_shape
        self.asked = []

    def forward(self, x_t, t, **kwargs):
        self.asked.append((x_t.detach().clone(), t.clone()))
        return super().forward(x_t, t, **kwargs)


def test_flash_diffusion_starts_where_the_noise_is_as_large_as_the_severity():
    prior = Recorded(toy())
    y, x = states(2, seed=2), states(2)
    physics = measurement(torch.eye(N, dtype=torch.float64))
    _, sigma_1 = prior.schedule(torch.ones((), dtype=torch.float64))

    class Encoder(Fixed):
        def forward(self, picture):
            return 0.3 * picture, self.severities.log()

    for severities in ((0.1, 0.9), (0.2, 1.8)):
        prior.asked.clear()
        counted = CountedPrior(prior)
        settings = {"noise_std": 0.05, "steps": 40, "encoder": Encoder(*severities)}
        flash_diffusion(counted, physics, y, x, generator(), **settings)
        # The easy picture starts later, when the other one is on its way.
        together = next((z, t) for z, t in prior.asked if len(t) == 2)
        first = (together[0][0], together[1][0]), (prior.asked[0][0][0], prior.asked[0][1][0])
        for i, (z, t) in enumerate(first):
            alpha, sigma = prior.schedule(t)
            assert (sigma / alpha).item() == pytest.approx(severities[i], rel=1e-9)
            expected = alpha * 0.3 * y[i] + sigma * x[i] / sigma_1
            torch.testing.assert_close(z, expected)
        steps = sum(math.ceil(40 * t.item()) for _, t in first)
        assert counted.evaluations == counted.products == steps


def test_flash_diffusion_keeps_the_operator_of_each_image():
    """Images that start at other times, with masks of their own, are those that each is alone."""

    class Encoder(Fixed):
        def forward(self, picture):
            return 0.3 * picture, self.severities.log()

    masks = (noise(2, 1, 1, N, seed=4) > 0).double()
    x, severities = states(2), (0.1, 0.9)
    y = masks * states(2, seed=2)

    def restored(some):
        physics = Inpainting((1, 1, N), mask=masks[some])
        encoder = Encoder(*severities[some])
        settings = {"noise_std": 0.05, "steps": 20, "guidance": 0.3, "eta": 0.0}
        return flash_diffusion(
            toy(), physics, y[some], x[some], generator(), encoder=encoder, **settings
        )

    alone = torch.cat([restored(slice(i, i + 1)) for i in range(2)])
    torch.testing.assert_close(restored(slice(0, 2)), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_time_of_a_ratio_inverts_the_schedule(dtype):
    schedule, times = toy().schedule, torch.tensor([0.0, 0.2, 0.7, 0.99], dtype=dtype)
    alpha, sigma = schedule(times)
    found = times_of_levels(schedule, sigma / alpha)
    torch.testing.assert_close(found, times.double(), atol=1e-4, rtol=1e-5)


def test_severities_beyond_the_schedule_start_at_its_ends():
    prior, x = Recorded(toy()), states(2)
    physics = measurement(torch.eye(N, dtype=torch.float64))
    settings = {"noise_std": 0.05, "steps": 3, "encoder": Fixed(1e-9, 1e9)}
    flash_diffusion(prior, physics, x, x, generator(), **settings)
    (_, first), *_, (_, last) = prior.asked
    torch.testing.assert_close(first, torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(last, torch.tensor([0, 1 / 3], dtype=torch.float64))


def test_measurements_that_are_no_pictures_are_refused():
    prior = load_prior("faces64_latent")
    physics = tasks.task("phase_retrieval", prior.decoded_shape, generator())
    y = physics.A(torch.zeros(1, *prior.decoded_shape))
    with pytest.raises(UnsupportedTask, match="picture"):
        flash_diffusion(prior, physics, y, torch.zeros(1, 6, 16, 16), generator(), noise_std=0.05)


# --- the severity encoder


def test_a_small_measurement_is_scaled_up():
    shape = (3, 64, 64)
    x = data.portrait("astronaut")
    y = tasks.task("super_resolution", shape, generator()).A(x)
    picture = tasks.as_picture(y, shape)
    assert picture.shape == x.shape
    assert (picture - x).square().mean() < 0.25 * x.var()
    assert tasks.as_picture(x, shape) is x


def test_the_severity_loss_is_by_hand(monkeypatch):
    """Of an encoder that predicts zero with severity 1, and of latents with a known norm."""

    class Latents(nn.Module):
        def encode(self, x):
            return torch.full((len(x), 4, 16, 16), 3.0)

    class Zero(nn.Module):
        def forward(self, picture):
            return torch.zeros(len(picture), 4, 16, 16), torch.zeros(len(picture))

    monkeypatch.setattr(severity, "_autoencoder", Latents)
    x = data.portrait("astronaut").repeat(6, 1, 1, 1)
    expected = 9 + severity.ERROR_WEIGHT * torch.tensor(3.0).log().square()
    torch.testing.assert_close(severity.severity_loss(Zero(), x, generator()), expected)


def test_the_shipped_encoder_predicts_its_own_error():
    """On portraits that it has not seen; the card says it of many faces."""
    network = severity.load_severity_encoder()
    assert parameter_count(network) <= 1_000_000
    portraits = torch.cat([data.portrait(who) for who in ("astronaut", "grace_hopper")])
    x = torch.cat([portraits, portraits.flip(-1)]).repeat_interleave(24, 0)
    predicted, true = severity.severities(network, x, generator()).log()
    assert torch.corrcoef(torch.stack([predicted, true]))[0, 1] > 0.3
    assert true.exp().mean() < 0.9  # latents have standard deviation 1
