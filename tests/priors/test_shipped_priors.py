"""The priors in `data/`: that they are what they claim to be."""

import pytest
import torch
from azula.noise import CosineSchedule, VPSchedule

import diffoc
from diffoc.priors.pretrained import load_prior


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHIPPED = {"mnist": (1, 28, 28), "faces64": (3, 64, 64)}


@pytest.mark.parametrize(("name", "shape"), SHIPPED.items())
def test_the_shipped_priors_know_their_images(name, shape):
    """Where the noise is small the estimate is close to the image, and far from it is not."""
    prior = diffoc.load_prior(name)
    assert not prior.training
    assert prior.image_shape == shape
    if name == "mnist":
        x0 = diffoc.data.digits()[0]
    else:
        names = ("astronaut", "grace_hopper")
        x0 = torch.cat([diffoc.data.portrait(who) for who in names])
    for t, least in ((0.2, 18.0), (0.4, 12.0)):
        alpha, sigma = prior.schedule(torch.tensor(t))
        x_t = alpha * x0 + sigma * noise(*x0.shape)
        mean = prior(x_t, torch.tensor(t)).mean
        assert mean.shape[1:] == shape
        gain = (x_t / alpha - x0).square().mean() / (mean - x0).square().mean()
        assert 10 * gain.log10() > least / 3, (t, gain)


@pytest.mark.parametrize("name", SHIPPED)
def test_schedules_may_be_exchanged(name):
    """Two schedules at one signal-to-noise ratio see the same image."""
    x = noise(1, *SHIPPED[name])
    one, two = load_prior(name, VPSchedule(1e-2, 1e-2)), load_prior(name, CosineSchedule(1e-2))
    t = torch.tensor(0.5)
    alpha, sigma = one.schedule(t)
    other = torch.linspace(0, 1, 100001)
    ratio = two.schedule(other)
    s = other[(ratio[1] / ratio[0] - sigma / alpha).abs().argmin()]
    scale = two.schedule(s)[0] / alpha
    with torch.no_grad():
        torch.testing.assert_close(two(scale * x, s).mean, one(x, t).mean, rtol=1e-3, atol=1e-3)
