"""Counts of evaluations and products, against counting by hand."""

import pytest
import torch
from azula.guidance import DPSSampler

from diffoc.priors.counting import CountedPrior
from diffoc.priors.pretrained import load_prior


def test_a_sampler_of_known_cost_is_counted():
    prior = CountedPrior(load_prior("mnist"), "bfloat16")
    y = torch.zeros(2, 1, 28, 28)
    sampler = DPSSampler(prior, y, lambda x: x, steps=5, silent=True)
    x0 = sampler(torch.randn(y.shape, generator=torch.Generator().manual_seed(0)))
    assert x0.dtype == torch.float32
    assert (prior.evaluations, prior.products) == (10, 10)


def test_products_are_counted_once_for_every_cotangent():
    prior = CountedPrior(load_prior("mnist"))
    x = torch.zeros(3, 1, 28, 28, requires_grad=True)
    mean = prior(x, torch.tensor(0.5)).mean
    assert (prior.evaluations, prior.products) == (3, 0)
    for _ in range(2):
        torch.autograd.grad(mean.sum(), x, retain_graph=True)
    assert prior.products == 6
    # A gradient with respect to the mean does not pass through the prior.
    torch.autograd.grad(mean.square().sum(), mean, retain_graph=True)
    assert prior.products == 6
    with torch.no_grad():
        prior(x, torch.tensor(0.5))
    assert (prior.evaluations, prior.products) == (6, 6)


def test_the_mean_is_that_of_the_prior():
    prior = load_prior("mnist")
    x = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(0.3)
    with torch.no_grad():
        assert torch.equal(CountedPrior(prior)(x, t).mean, prior(x, t).mean)


def test_another_precision_is_refused():
    with pytest.raises(ValueError, match="precision is 'half'"):
        CountedPrior(load_prior("mnist"), "half")
