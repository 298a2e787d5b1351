"""Priors that are wrong on purpose: how wrong, always the same, and what is left without one."""

import os
import subprocess
import sys

import pytest
import torch

from diffoc.costs import GaussianLikelihood
from diffoc.data import digits
from diffoc.data.manifest import data_folder
from diffoc.experiments import records
from diffoc.experiments.cells import load_once
from diffoc.experiments.inaccurate import (
    IdentityDenoiser,
    accurate_name,
    add_noise,
    draw_zeros,
    is_inaccurate,
    load_inaccurate,
    sizes_of,
)
from diffoc.priors.pretrained import load_prior, untrained_adm
from diffoc.problems.tasks import measure, task
from diffoc.process import ReverseProcess
from diffoc.rules import LBFGS
from diffoc.solve import solve
from diffoc.training.evaluation import denoising_psnr


def parameters(prior):
    return torch.cat([p.flatten() for p in prior.parameters()])


def test_names():
    names = ["faces64+noise0.1", "untrained faces64", "random ffhq256/32", "identity faces64"]
    assert [accurate_name(name) for name in names] == [
        "faces64",
        "faces64",
        "ffhq256/32",
        "faces64",
    ]
    assert all(is_inaccurate(name) for name in names)
    assert load_inaccurate("untrained faces64").image_shape == (3, 64, 64)
    assert accurate_name("faces64") == "faces64"
    assert not is_inaccurate("faces64")
    for name, message in (
        ("faces64", "name is 'faces64'"),
        ("identity nobody", "name is 'nobody'"),
        ("untrained faces64_latent", "prior is 'faces64_latent'"),
        ("untrained ffhq256/33", "prior is 'ffhq256/33'"),
        ("untrained ffhq256/wide", "prior is 'ffhq256/wide'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_inaccurate(name)


def test_noise_in_weights_has_the_level_it_says_and_none_at_zero():
    true = parameters(load_prior("mnist"))
    assert torch.equal(parameters(add_noise(load_prior("mnist"), 0.0)), true)
    noises = {
        level: parameters(load_inaccurate(f"mnist+noise{level}")) - true for level in (0.1, 0.2)
    }
    torch.testing.assert_close(noises[0.2], 2 * noises[0.1], rtol=1e-3, atol=1e-5)
    assert noises[0.1].norm() / true.norm() == pytest.approx(0.1, rel=0.05)
    with pytest.raises(ValueError, match="level is -1"):
        add_noise(load_prior("mnist"), -1)


def test_the_more_noise_in_the_weights_the_worse_it_denoises():
    images = digits()[0][:20]
    as_bytes = ((images[:, 0] + 1) * 127.5).round().byte().numpy()
    names = ("mnist", "mnist+noise0.1", "mnist+noise0.3", "untrained mnist")
    priors = [load_once(name, "cpu")[0] for name in names]
    scores = [denoising_psnr(prior, as_bytes, 0.3) for prior in priors]
    assert scores == sorted(scores, reverse=True)


def test_a_wrong_prior_is_the_same_every_time_and_its_digest_tells_it():
    names = ("mnist", "mnist+noise0.1", "mnist+noise0.2", "untrained mnist", "identity mnist")
    digests = []
    for name in names:
        torch.manual_seed(len(name))  # of no influence
        digests.append(load_once(name, "cpu")[1])
    assert len(set(digests)) == len(names)
    load_once.cache_clear()
    assert [load_once(name, "cpu")[1] for name in names] == digests


DIGESTS = """
import sys, torch
torch.set_flush_denormal("flush" in sys.argv)  # commands flush, a reader's program does not
from diffoc.data.provenance import digest
from diffoc.experiments.cells import load_once
from diffoc.problems.tasks import TASKS, task
print([load_once(n, "cpu")[1] for n in ("untrained faces64", "mnist+noise0.1", "random mnist")])
for name in TASKS:
    g = torch.Generator().manual_seed(0)
    print(name, digest(dict(task(name, (1, 64, 64), g).named_buffers())))
"""


def test_what_records_identify_by_digests_is_the_same_on_every_cpu(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [""])
    exec(DIGESTS, {})
    here = capsys.readouterr().out
    plain = subprocess.run(  # no vector instructions
        [sys.executable, "-c", DIGESTS, "flush"],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert plain.stdout == here
    table = records.read(data_folder() / "records" / "robustness_portraits.csv").values()
    known = {row["weights_sha256"] for rows in table for row in rows if "untr" in row["prior"]}
    assert all(digest in here for digest in known)


def test_an_untrained_adm_predicts_no_noise_and_a_random_one_does():
    prior = untrained_adm("ffhq256", 32)
    x, t = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)
    alpha, sigma = prior.schedule(t)
    torch.testing.assert_close(prior(x, t).mean, x / alpha)
    draw_zeros(prior.requires_grad_(True))
    noise = (x - alpha * prior(x, t).mean) / sigma
    assert 0.1 < noise.std() < 10


@pytest.mark.parametrize("side", [8, 16, 32, 48, 63, 64, 96])
def test_sides_that_an_adm_network_cannot_halve_are_refused(side):
    """Those that are refused are those where the network itself breaks."""
    network = untrained_adm("ffhq256", 32)
    x, fits = torch.zeros(1, 3, side, side), side % 32 == 0
    if fits:
        assert network(x, torch.tensor(0.5)).mean.shape == x.shape
        assert sizes_of(f"ffhq256/32/{side}") == ("ffhq256", 32, side)
        assert load_inaccurate(f"identity ffhq256/32/{side}").image_shape == x.shape[1:]
        return
    with pytest.raises((RuntimeError, ValueError)):
        network(x, torch.tensor(0.5))
    with pytest.raises(ValueError, match="expected ffhq256, ffhq256/CHANNELS or ffhq256/CH"):
        load_inaccurate(f"random ffhq256/32/{side}")


@pytest.mark.parametrize("sizes", ["0", "33", "x", "", "-32", "²", "32/", "32/64/96", "32/8192"])
def test_sizes_that_no_network_has_are_refused(sizes):
    with pytest.raises(ValueError, match=f"prior is 'ffhq256/{sizes}', expected"):
        load_inaccurate(f"untrained ffhq256/{sizes}")


def test_the_identity_s_process_moves_nothing_but_by_controls():
    prior = load_inaccurate("identity mnist")
    assert prior.image_shape == (1, 28, 28)
    x, u = torch.randn(2, 1, 1, 28, 28), torch.randn(4, 1, 1, 28, 28)
    for method in ("ddim", "euler"):
        states = ReverseProcess(prior, 4, method).rollout(x[0], u)
        torch.testing.assert_close(states[-1], x[0] + u.sum(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["super_resolution", "random_inpainting"])
def test_control_without_a_network_is_regularised_least_squares(name):
    shape, noise_std, steps, r = (1, 8, 12), 0.05, 4, 1.0
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(2, *shape, generator=g, dtype=torch.float64)
    physics = task(name, shape, g).double()
    y = measure(physics, truth, g, noise_std)
    prior = IdentityDenoiser(shape)
    process = ReverseProcess(prior, steps)
    found = solve(
        process,
        GaussianLikelihood(physics.A, y, noise_std),
        torch.zeros_like(truth),
        control_cost=r,
        rank=0,
        iterations=100,
        rule=LBFGS(),
    )
    eye = torch.eye(96, dtype=torch.float64).reshape(96, *shape)
    A = physics.A(eye).flatten(1).mT
    b = y.flatten(1).mT
    dense = torch.linalg.solve(
        A.mT @ A / noise_std**2 + r / steps * eye.flatten(1), A.mT @ b / noise_std**2
    )
    torch.testing.assert_close(found.x0.flatten(1).mT, dense, rtol=1e-4, atol=1e-4)
