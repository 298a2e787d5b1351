"""Methods as kernels of one chain, on a Gaussian prior, where the best certificate is known."""

import pytest
import torch
from azula.noise import VPSchedule
from deepinv.physics import LinearPhysics

from diffoc.experiments.certificates import METHODS, Case, outcome, riccati
from diffoc.priors.gaussian import GaussianPrior
from diffoc.process import draw_noise

N, MEASURED, STEPS = 6, 2, 20


@pytest.fixture(scope="module")
def found():
    """-log w of every method in four runs, {method: [nats]}."""
    g = torch.Generator().manual_seed(0)
    root, A = (torch.randn(k, N, generator=g, dtype=torch.float64) for k in (N, MEASURED))
    prior = GaussianPrior(torch.zeros(N).double(), root @ root.mT / N, VPSchedule(sigma_min=1e-2))
    physics = LinearPhysics(A=lambda x: x @ A.mT, A_adjoint=lambda z: z @ A)
    y = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    cases = []
    for _ in range(4):
        noise = draw_noise(STEPS + 1, (1, N), g)
        cases.append(Case(prior, physics, y, noise[0], noise[1:]))
    names = [name for name in METHODS if not name.startswith("riccati")]
    nats = {name: [float(outcome(name, case)["nats"]) for case in cases] for name in names}
    nats |= {f"rank {k}": [riccati(case, k)[1] for case in cases] for k in (0, MEASURED)}
    return {name: torch.tensor(values) for name, values in nats.items()}


def test_without_feedback_the_riccati_sampler_is_the_open_loop(found):
    torch.testing.assert_close(found["rank 0"], found["open_loop"], rtol=1e-4, atol=0)


def test_at_full_rank_every_run_weighs_the_same_and_nobody_is_better(found):
    best = found[f"rank {MEASURED}"]
    assert best.std() < 0.05  # the start's part in y, alpha = 0.01
    for name, nats in found.items():
        assert nats.mean() > best.mean() - 0.05, name
    assert found["mmps"].mean() < found["none"].mean()
