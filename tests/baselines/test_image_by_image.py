"""No method lets an image of a batch change another, or its operator the other's.

In double precision, so that what is left is rounding, and with one noise for every image and call,
so that an image is given the same alone as beside another.
"""

import pytest
import torch
from azula.noise import VPSchedule

import diffoc
from diffoc.baselines.decomposition import pseudo_inverse
from diffoc.experiments.methods import METHODS
from diffoc.priors.gaussian import GaussianMixturePrior
from diffoc.priors.mixture import mixture_from_loadings
from diffoc.priors.severity import load_severity_encoder
from diffoc.problems.tasks import for_each, measure, task

NOISE_STD = 0.05
SHORT = {
    "stopped": {"steps": 3, "budget": 24},
    "ours": {"steps": 3, "budget": 24},
    "cold": {"steps": 3, "iterations": 4},
    "paper": {"steps": 3, "iterations": 4},
    "paper_tuned": {"steps": 3, "iterations": 4},
    "released": {"steps": 3, "iterations": 4},
    "admm_tv": {"steps": 10},
    "d_flow": {"steps": 2, "iterations": 8},
    "daps": {"steps": 3, "langevin_steps": 20},
    "deep_image_prior": {"iterations": 4, "channels": 8},
    "flash_diffusion": {"steps": 12},
    # With less, its conjugate gradients make 0.06 of 1e-15, whoever is beside the image.
    "diffpir": {"strength": 1e3},
}
LOOSE = {
    "paper": 1e-7,
    "paper_tuned": 1e-7,
    "pnp_admm": 1e-5,
    "diffpir": 1e-3,
    "diffpir_smooth": 1e-4,
    "ours": 1e-4,
    "quick": 1e-4,
}
"""Adam divides by small gradients; conjugate gradients stop at 1e-5 of their start, and lose digits
where they are many."""

randn = torch.randn


def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def _one_noise(monkeypatch):
    """Every noise of a shape's images is the same, whoever draws it and how often."""

    def same(*size, dtype=None, **kwargs):
        size = size if isinstance(size[0], int) else size[0]
        one = randn(*size[1:], generator=generator(), dtype=torch.float64)
        return one.expand(*size).clone().to(dtype or torch.float32)

    monkeypatch.setattr(torch, "randn", same)
    monkeypatch.setattr(torch, "randn_like", lambda x: same(*x.shape, dtype=x.dtype))


@pytest.fixture(scope="module")
def priors():
    """A mixture of Gaussians, and for latent methods that of faces, in double precision."""
    g = generator()
    means, loadings = torch.randn(2, 256, generator=g), torch.randn(2, 256, 2, generator=g)
    mixture = mixture_from_loadings(torch.zeros(2), means / 3, loadings / 3, torch.ones(2) / 9)
    schedule = VPSchedule(alpha_min=1e-2, sigma_min=1e-2)
    return {
        "pixels": GaussianMixturePrior(mixture, schedule, (1, 16, 16)).double(),
        "latents": diffoc.load_prior("faces64_latent").double(),
    }


def cases():
    for name, method in METHODS.items():
        if method.latent:
            yield name, "gaussian_blur", False
        else:
            yield from ((name, place, True) for place in ("random_inpainting", "motion_blur"))
            yield name, "motion_blur", False


@pytest.mark.usefixtures("_one_noise")
@pytest.mark.parametrize(("name", "place", "own"), cases())
def test_an_image_beside_noise_comes_out_as_alone(name, place, own, priors):
    """With the operator of both, or with one of its own."""
    method = METHODS[name]
    prior = priors["latents" if method.latent else "pixels"]
    small = prior.image_shape if method.latent else (1, 16, 16)
    shape = prior.decoded_shape if method.latent else small
    picture = torch.linspace(-1, 1, shape[-1]).expand(1, *shape).double()
    beside = 2 * torch.rand(1, *shape, generator=generator(), dtype=torch.float64) - 1
    first = task(place, shape, generator()).to(torch.float64)
    other = task(place, shape, generator().manual_seed(1)).to(torch.float64) if own else first
    pairs = (first, picture), (other, beside)
    y = torch.cat([measure(physics, one, generator(), NOISE_STD) for physics, one in pairs])
    _, sigma = prior.schedule(torch.ones((), dtype=torch.float64))
    x = sigma * randn(2, *small, generator=generator(), dtype=torch.float64)

    large = {"stopped": 120, "paper": 1000, "paper_tuned": 1000, "released": 1000}
    settings = method.settings(place, large.get(name, 4))
    settings |= {key: values[-1] for key, values in list((method.tuned or {}).items())[:1]}
    settings |= SHORT.get(name, {})
    if name == "flash_diffusion":
        settings["encoder"] = load_severity_encoder().double()

    def images(count):
        physics = for_each([first, other]) if own and count == 2 else first
        given = (prior, physics, y[:count], x[:count].clone(), generator())
        return method.run(*given, noise_std=NOISE_STD, **settings)

    alone, both = images(1), images(2)
    assert (both[1] - both[0]).abs().max() > 0.1  # they are different images
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=LOOSE.get(name, 1e-10))


@pytest.mark.parametrize("place", ["super_resolution", "gaussian_blur", "motion_blur"])
def test_an_inverse_does_not_wait_for_the_image_beside(place):
    """A white picture is done before noise is; deepinv's iterations would go on with both."""
    physics = task(place, (1, 28, 28), generator()).to(torch.float64)
    noise = torch.randn(1, 1, 28, 28, generator=generator(), dtype=torch.float64)
    y = physics.A(torch.cat([torch.ones_like(noise), noise]))
    assert torch.equal(pseudo_inverse(physics, y)[:1], pseudo_inverse(physics, y[:1]))


def test_copies_of_a_measurement_are_inverted_as_each_would_be():
    """An expanded measurement takes another way than a repeated one."""
    physics = task("gaussian_blur", (1, 28, 28), generator()).to(torch.float64)
    y = physics.A(torch.randn(1, 1, 28, 28, generator=generator(), dtype=torch.float64))
    repeated = pseudo_inverse(physics, y.repeat(3, 1, 1, 1))
    assert torch.equal(pseudo_inverse(physics, y.expand(3, -1, -1, -1)), repeated)
