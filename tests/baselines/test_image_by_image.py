"""No method lets an image of a batch change another: each of them, on the shipped priors.

In double precision, so that what is left is rounding, and with one noise for every image and call,
so that an image is given the same alone as beside another.
"""

import pytest
import torch

import diffoc
from diffoc.baselines.decomposition import pseudo_inverse
from diffoc.data import images as data
from diffoc.experiments.methods import METHODS
from diffoc.priors.severity import load_severity_encoder
from diffoc.problems.tasks import measure, task

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
    "diffpir": {"strength": 1e4},
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
    """mnist, and for latent methods that of faces, in double precision; where they start."""
    return {name: diffoc.load_prior(name).double() for name in ("mnist", "faces64_latent")}


def cases():
    for name, method in METHODS.items():
        for place in ("gaussian_blur",) if method.latent else ("random_inpainting", "motion_blur"):
            yield pytest.param(name, place, id=f"{name}-{place}")


@pytest.mark.usefixtures("_one_noise")
@pytest.mark.parametrize(("name", "place"), cases())
def test_an_image_beside_noise_comes_out_as_alone(name, place, priors):
    method = METHODS[name]
    prior = priors["faces64_latent" if method.latent else "mnist"]
    shape = prior.decoded_shape if method.latent else prior.image_shape
    if method.latent:
        picture = torch.linspace(-1, 1, 64).expand(1, *shape).double()
    else:
        picture = data.digits()[0][:1].double()
    beside = 2 * torch.rand(1, *shape, generator=generator(), dtype=torch.float64) - 1
    physics = task(place, shape, generator()).to(torch.float64)
    y = torch.cat([measure(physics, one, generator(), NOISE_STD) for one in (picture, beside)])
    _, sigma = prior.schedule(torch.ones((), dtype=torch.float64))
    x = sigma * randn(2, *prior.image_shape, generator=generator(), dtype=torch.float64)

    large = {"stopped": 120, "paper": 1000, "paper_tuned": 1000, "released": 1000}
    settings = method.settings(place, large.get(name, 4))
    settings |= {key: values[-1] for key, values in list((method.tuned or {}).items())[:1]}
    settings |= SHORT.get(name, {})
    if name == "flash_diffusion":
        settings["encoder"] = load_severity_encoder().double()

    def images(count):
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
