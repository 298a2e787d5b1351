"""Contraction: gains of denoisers whose gain is known, and those of the priors that ship."""

from __future__ import annotations

import pytest
import torch

from diffoc.data.images import portrait
from diffoc.training.contraction import SIZES, changes, excess, gain
from diffoc.training.evaluation import trained
from diffoc.training.trainer import time_of


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
