"""Faint states and gains: against dense algebra, and what the shipped priors do there."""

from __future__ import annotations

import pytest
import torch

from diffoc.data.images import portrait
from diffoc.priors.pretrained import load_prior
from diffoc.training.evaluation import trained
from diffoc.training.states import SIZES, LinearDenoiser, changes, excess, faint, gain
from diffoc.training.trainer import time_of


@pytest.fixture
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    return (torch.randn(500, 12, generator=generator, dtype=torch.float64) @ mix + 1).view(
        500, 1, 3, 4
    )


def test_linear_denoiser_is_the_posterior_mean_of_its_gaussian(images: torch.Tensor) -> None:
    linear = LinearDenoiser.fit(images, rank=5)
    values, vectors = torch.linalg.eigh(torch.cov(images.flatten(1).mT, correction=0))
    assert torch.allclose(linear.variances, values.flip(0)[:5], rtol=1e-6)
    assert torch.allclose(linear.rest, values[:7].mean(), rtol=1e-6)
    covariance = vectors[:, 7:] @ values[7:].diag() @ vectors[:, 7:].mT
    covariance += linear.rest * vectors[:, :7] @ vectors[:, :7].mT
    x, sigma = images[:3] + 0.5, torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    for one, s, found in zip(x.flatten(1), sigma, linear(x, sigma).flatten(1), strict=True):
        gain = covariance @ torch.linalg.inv(covariance + s**2 * torch.eye(12).double())
        assert torch.allclose(found, linear.mean + gain @ (one - linear.mean), rtol=1e-6)


def test_faint_states_lie_between_nothing_and_the_usual_state(images: torch.Tensor) -> None:
    linear = LinearDenoiser.fit(images, rank=5)
    z = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).double()
    sigma = torch.full((500,), 2.0, dtype=torch.float64)
    states, targets = faint(images, z, sigma, linear, torch.Generator().manual_seed(2))
    # Each state is b x + c sigma z: two unknowns, twelve equations.
    design = torch.stack([images.flatten(1), 2 * z.flatten(1)], dim=-1)
    found = torch.linalg.lstsq(design, states.flatten(1)[..., None])
    b, c = found.solution[..., 0].unbind(-1)
    assert torch.allclose(design @ found.solution, states.flatten(1)[..., None])
    assert min(b.min(), c.min()) > -1e-9
    assert max(b.max(), c.max()) < 1
    assert 0.2 < (b < 1e-9).double().mean() < 0.3
    correction = images - linear(images + 2 * z, sigma)
    expected = linear(states, sigma) + torch.minimum(b, c).view(-1, 1, 1, 1) * correction
    assert torch.allclose(targets, expected)


@pytest.mark.parametrize("name", ["mnist", "faces64"])
def test_shipped_priors_are_tame_where_the_noise_is_shorter_than_usual(name: str) -> None:
    prior = load_prior(name)
    z = torch.randn(4, *prior.image_shape, generator=torch.Generator().manual_seed(0))
    for t in (0.4, 0.67, 1.0):
        time = torch.tensor(t)
        _, sigma = prior.schedule(time)
        with torch.no_grad():
            sizes = [prior(c * sigma * z, time).mean.std() for c in (0.0, 0.1, 0.3, 0.7, 1.0)]
        assert max(sizes) < 2 * sizes[-1], sizes


def test_gain_of_a_linear_denoiser_is_the_eigenvalue_of_its_eigenvectors() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(mix @ mix.mT)
    x = torch.randn(12, 1, 3, 4, generator=generator, dtype=torch.float64)
    change = vectors.mT.reshape(12, 1, 3, 4)

    def linear(x: torch.Tensor) -> torch.Tensor:
        return (x.flatten(1) @ (mix @ mix.mT)).view_as(x)

    before, after = linear(x), linear(x + change)
    assert torch.allclose(gain(before, after, change), values)
    sigma = torch.tensor([0.5, 2.0]).double().repeat(6)
    expected = torch.where(sigma < 1, (values - 1).clamp(min=0), 0)
    assert torch.allclose(excess(before, after, change, sigma), expected)


def test_changes_have_the_sizes_that_are_promised_in_a_rectangle() -> None:
    x = torch.rand(200, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = changes(x, torch.Generator().manual_seed(1))
    inside = (found != 0).all(1)
    assert 0.4 < inside.flatten(1).all(1).float().mean() < 0.6
    whole = found[inside.flatten(1).all(1)].square().mean((1, 2, 3)).sqrt()
    assert whole.min() >= SIZES[0] * 0.999
    assert whole.max() <= SIZES[1] * 1.001
    for one in inside[inside.any(-1).any(-1)]:
        rows, columns = one.any(1).nonzero(), one.any(0).nonzero()
        assert one[rows[0, 0] : rows[-1, 0] + 1, columns[0, 0] : columns[-1, 0] + 1].all()
        assert one.sum() == len(rows) * len(columns)


@pytest.mark.parametrize("name", ["astronaut", "grace_hopper"])
def test_errors_of_brightness_and_contrast_do_not_grow_on_portraits(name: str) -> None:
    prior, x = trained("faces64"), portrait(name)
    brightness, contrast = torch.ones_like(x), x - x.mean()
    noise = torch.randn(8, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    for sigma in torch.tensor([0.2, 0.3, 0.5, 0.7]):
        for change in (0.3 * brightness, brightness, contrast):
            with torch.no_grad():
                before, after = (
                    prior(some + sigma * noise, time_of(sigma)).mean for some in (x, x + change)
                )
            found = gain(before, after, change.expand_as(noise)).mean()
            assert found < 1, f"sigma {sigma:g}, brightness changed by {change.mean():.1f}"
