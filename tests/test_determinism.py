"""The same seed gives the same result: twice, in another process, and whatever else is solved."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from azula.denoise import KarrasDenoiser
from azula.noise import VPSchedule

from diffoc.costs import GaussianLikelihood
from diffoc.data.provenance import digest
from diffoc.lowrank import MatrixFree
from diffoc.priors.gaussian import GaussianMixturePrior
from diffoc.priors.mixture import mixture_from_loadings
from diffoc.priors.networks import UNetBackbone
from diffoc.problems.operators import average_pool
from diffoc.process import ReverseProcess, draw_noise
from diffoc.rules import LBFGS, Adam, LineSearch, Tikhonov
from diffoc.solve import solve
from diffoc.theory.projected import Projected

SHAPE = (1, 8, 8)
RULES = {
    "Adam": {"rule": Adam(0.05), "rank": 1},
    "L-BFGS": {"rule": LBFGS(), "rank": 0},
    "line search": {"rule": LineSearch(), "rank": 3},
    "Tikhonov": {"rule": LineSearch(), "rank": 1, "regularization": Tikhonov(1.0)},
    "Gauss-Newton": {"derivatives": MatrixFree(hessian="gauss_newton"), "rank": 2},
    "projections": {"derivatives": Projected(2), "rule": Adam(0.05), "rank": 2},
}


def network():
    """A small network in float32, with weights that do not vanish."""
    generator = torch.Generator().manual_seed(0)
    backbone = UNetBackbone((8, 16), (1, 1), fold=2, features=8)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    prior = KarrasDenoiser(backbone, VPSchedule(alpha_min=1e-2, sigma_min=1e-2))
    return prior.eval().requires_grad_(False), torch.float32


def mixture():
    """A mixture of two Gaussians in float64."""
    generator = torch.Generator().manual_seed(0)
    n = torch.Size(SHAPE).numel()
    means = torch.randn(2, n, generator=generator, dtype=torch.float64)
    loadings = torch.randn(2, n, 3, generator=generator, dtype=torch.float64)
    components = mixture_from_loadings(
        torch.zeros(2).double(), means, loadings, 0 * means[:, 0] + 1
    )
    return GaussianMixturePrior(components, VPSchedule(), SHAPE), torch.float64


def reconstructed(make, rule, images=2, only=None):
    """The result for some images, or for one of them alone, all from one seed."""
    prior, dtype = make()
    generator = torch.Generator().manual_seed(1)
    noise = draw_noise(2, (images, *SHAPE), generator)
    x = torch.randn(images, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(images, 1, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    if only is not None:
        noise, x, y = noise[:, only : only + 1], x[only : only + 1], y[only : only + 1]
    process = ReverseProcess(prior, 2, "ddpm", noise=noise)
    likelihood = GaussianLikelihood(average_pool(2), y, 0.5)
    return solve(process, likelihood, x, iterations=3, **RULES[rule])


once = cache(reconstructed)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads({threads})
import test_determinism as here
for make in (here.network, here.mixture):
    for rule in here.RULES:
        print(here.digests(here.reconstructed(make, rule)))
"""


def digests(found):
    return " ".join(digest(t) for t in (found.x0, found.controls, found.cost, found.costs))


def test_two_runs_and_two_processes_agree_to_the_last_bit():
    here = [digests(once(make, rule)) for make in (network, mixture) for rule in RULES]
    again = [digests(reconstructed(make, rule)) for make in (network, mixture) for rule in RULES]
    assert again == here
    assert len(set(here)) == len(here)
    tests = str(Path(__file__).parent)
    script = SCRIPT.format(tests=tests, threads=torch.get_num_threads())
    process = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(tests).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.splitlines() == here


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", [network, mixture])
def test_an_image_alone_gets_what_it_gets_among_others(make, rule):
    together = once(make, rule)
    assert (together.terminal_costs[-1] < together.terminal_costs[0]).all()
    for i in range(2):
        alone = reconstructed(make, rule, only=i)
        difference = (alone.x0[0] - together.x0[i]).abs().max().item()
        assert difference < 1e-5 * together.x0[i].abs().max().item()
        assert alone.status == together.status[i : i + 1]
