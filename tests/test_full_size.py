"""The paper's network at its full size, with random weights, through one iteration for real.

Its images have 128 pixels a side: all layers are those of 256, at a quarter of the time. Images of
256, and the memory over several steps, are counted on fake tensors, in test_devices.py.
"""

import pytest
import torch

from diffoc.costs import GaussianLikelihood
from diffoc.lowrank import MatrixFree
from diffoc.priors.networks import parameter_count
from diffoc.priors.pretrained import untrained_adm
from diffoc.problems.operators import average_pool
from diffoc.process import ReverseProcess
from diffoc.rules import Adam
from diffoc.solve import solve


@pytest.mark.slow
def test_one_iteration_of_the_paper_s_network():
    """93.56 M parameters, rank 1, in a single step."""
    prior = untrained_adm("ffhq256")
    assert parameter_count(prior.backbone) == pytest.approx(93.56e6, rel=1e-4)
    g = torch.Generator().manual_seed(0)
    for parameter in prior.parameters():  # fresh networks end in zeros
        parameter.copy_(0.02 * torch.randn(parameter.shape, generator=g))
    calls = []
    prior.register_forward_hook(lambda *a: calls.append(1))
    process = ReverseProcess(prior, 1)
    x = process.initial_state((1, 3, 128, 128), g).float()
    likelihood = GaussianLikelihood(average_pool(4), torch.zeros(1, 3, 32, 32), 0.05)
    options = {"rank": 1, "rule": Adam(), "derivatives": MatrixFree(False)}
    found = solve(process, likelihood, x, iterations=1, **options)
    assert found.cost < found.costs[0]
    assert (found.controls != 0).any(dim=(1, 2, 3, 4)).all()
    assert found.x0.isfinite().all()
    assert len(calls) == found.evaluations == 1 + 2
    assert found.products == 2
