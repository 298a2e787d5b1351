"""What a control cost believes, against formulas and draws; Langevin steps against known laws."""

import pytest
import torch

from diffoc.priors.gaussian import GaussianPrior
from diffoc.process import ReverseProcess
from diffoc.theory.beliefs import believed_covariance, believed_draws, effective_draws, langevin
from diffoc.theory.linear_gaussian import linear_gaussian, relative_error


def test_one_variance_is_believed_as_notebook_9_says():
    """S(v) = sum J_i^2 / r_i, with the slopes J_i by rolling out from every step."""
    setting = linear_gaussian()
    v = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)
    prior = GaussianPrior(torch.zeros(3, dtype=torch.float64), v.diag(), setting.prior.schedule)
    process = ReverseProcess(prior, 12)
    costs = torch.linspace(0.2, 4, 12, dtype=torch.float64)
    one = torch.ones(1, 3, dtype=torch.float64)
    slopes = torch.cat([process.rollout(one, start=i)[-1] for i in range(12)])
    S = believed_covariance(process, costs, 0 * one)
    assert relative_error(S, (slopes.square() / costs[:, None]).sum(0).diag()) < 1e-12


def test_draws_have_the_believed_covariance():
    setting = linear_gaussian(n=3, m=2)
    process = ReverseProcess(setting.prior, 5)
    costs = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    x = torch.zeros(1, 3, dtype=torch.float64)
    count = 20000
    draws = believed_draws(process, costs, x.expand(count, 3), torch.Generator().manual_seed(0))
    S = believed_covariance(process, costs, x)
    d = draws - process.rollout(x)[-1]
    error = (S.square() + S.diagonal()[:, None] * S.diagonal()).sqrt() / count**0.5
    assert ((d.mT @ d / count - S).abs() < 4 * error).all()


@pytest.mark.parametrize("step", [0.1, 0.8])
def test_langevin_keeps_its_law_whatever_the_step(step):
    """Without accept and reject the variance would be 1 / (1 - step / 2): 5 and 67 % too large."""
    generator = torch.Generator().manual_seed(0)
    count = 40000
    x = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    ends, kept = langevin(lambda x: -x.square().sum(1) / 2, x, step, 25, generator)
    assert 0.5 < kept < 1
    assert abs(ends.mean().item()) < 4 / count**0.5
    assert abs(ends.var().item() - 1) < 4 * (2 / count) ** 0.5


def test_langevin_finds_a_skewed_law():
    """Of the density x e^{-x^2/2} on x > 0 (Rayleigh's), from a point."""
    generator = torch.Generator().manual_seed(0)
    count = 20000

    def log_density(x):
        inside = x[:, 0] > 0
        safe = torch.where(inside, x[:, 0], 1)
        return torch.where(inside, safe.log() - safe.square() / 2, -torch.inf)

    x = torch.full((count, 1), 1.0, dtype=torch.float64)
    ends, _ = langevin(log_density, x, 0.3, 40, generator)
    assert (ends > 0).all()
    mean, variance = (torch.pi / 2) ** 0.5, 2 - torch.pi / 2
    assert abs(ends.mean().item() - mean) < 4 * (variance / count) ** 0.5


def test_langevin_needs_no_gradients_outside_and_one_density_a_chain():
    x = torch.ones(4, 1, dtype=torch.float64)

    def run(log_density):
        return langevin(log_density, x, 0.3, 3, torch.Generator().manual_seed(0))[0]

    expected = run(lambda x: -x.square().sum(1) / 2)
    with torch.no_grad():
        assert torch.equal(run(lambda x: -x.square().sum(1) / 2), expected)
    with pytest.raises(ValueError, match="log_density has shape"):
        run(lambda x: -x.square() / 2)


def test_what_has_no_belief_and_no_draws_is_refused():
    process, x = ReverseProcess(linear_gaussian(n=3).prior, 5), torch.zeros(1, 3).double()
    with pytest.raises(ValueError, match=r"costs is -1\.0"):
        believed_covariance(process, torch.tensor([1.0, 1, -1, 1, 1]).double(), x)
    for chains, message in ((torch.ones(9, 2), "chains is 0"), (torch.rand(9, 2, 3), "unpack")):
        with pytest.raises(ValueError, match=message):
            effective_draws(chains)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_effective_draws_are_those_of_an_autoregression(phi):
    """x' = phi x + noise: the variance of its mean is (1 + phi) / (1 - phi) times that of draws."""
    g, length, count = torch.Generator().manual_seed(0), 400, 200
    x, chains = torch.randn(count, generator=g, dtype=torch.float64), []
    for _ in range(length):
        noise = torch.randn(count, generator=g, dtype=torch.float64)
        x = phi * x + (1 - phi**2) ** 0.5 * noise
        chains.append(x)
    expected = length * count * (1 - phi) / (1 + phi)
    assert effective_draws(torch.stack(chains)) == pytest.approx(expected, rel=0.3)
