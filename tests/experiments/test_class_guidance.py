"""Guidance by a label against exact conditional means, and plans that cost less than it."""

import json

import pytest
import torch
from azula.noise import VPSchedule
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from matplotlib import rc_context
from safetensors.torch import load_file
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from diffoc import classifier
from diffoc.costs import ClassLikelihood, ControlCost
from diffoc.data import digits
from diffoc.data.files import lock
from diffoc.data.provenance import ROOT
from diffoc.experiments import class_guidance
from diffoc.experiments.class_guidance import (
    Way,
    ancestral,
    guidance_controls,
    make,
    measures,
    noise_weights,
    planned,
    read,
    record,
)
from diffoc.priors.counting import CountedPrior
from diffoc.priors.gaussian import GaussianPrior
from diffoc.priors.pretrained import load_prior
from diffoc.process import ReverseProcess, draw_noise


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_guidance_with_the_exact_likelihood_moves_the_mean_to_the_conditional_one(method):
    """At a time where p(y | x_t) is known as a function of the posterior mean, nothing is lost."""
    generator, n, s = seeded(), 4, 0.3
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    covariance, mean = root @ root.mT + torch.eye(n), torch.randn(n, generator=generator).double()
    prior = GaussianPrior(mean, covariance, VPSchedule())
    A = torch.randn(2, n, generator=generator, dtype=torch.float64)
    y = torch.randn(2, generator=generator, dtype=torch.float64)
    x = torch.randn(3, n, generator=generator, dtype=torch.float64)
    noise = draw_noise(2, x.shape, generator) if method == "ddpm" else None
    process = ReverseProcess(prior, 2, method, noise=noise)
    alpha, sigma = prior.schedule(process.times[0])
    C = torch.linalg.inv(torch.linalg.inv(covariance) + (alpha / sigma) ** 2 * torch.eye(n))
    S = A @ C @ A.mT + s**2 * torch.eye(2)

    def cost(m):
        return -MultivariateNormal(y, S).log_prob(m @ A.mT)

    controls, image = guidance_controls(process, cost, x)
    before = prior(x, process.times[0]).mean
    conditional = before + (C @ A.mT @ torch.linalg.solve(S, (y - before @ A.mT).mT)).mT
    _, b, _ = process.coefficients[0]
    torch.testing.assert_close(controls[1], b * (conditional - before))
    assert not controls[0].any()
    torch.testing.assert_close(process.rollout(x, controls)[-1], image)


def test_the_controls_cost_is_a_divergence_from_the_prior():
    labels = torch.tensor([3, 5])
    process, x = ancestral(load_prior("mnist"), 4, labels)
    u = torch.randn(4, *x.shape, generator=seeded())
    _, sigma = process.denoiser.schedule(process.times[0])
    deviations = [sigma.item()] + [c for _, _, c in process.coefficients[:-1]]
    cost = ControlCost(noise_weights(process))
    for i, c in enumerate(deviations):
        expected = kl_divergence(Normal(u[i], c), Normal(torch.zeros_like(u[i]), c))
        torch.testing.assert_close(cost(i, x, u[i]), expected.flatten(1).sum(1))


def test_an_image_is_the_same_in_any_batch():
    prior = load_prior("mnist")
    many, x = ancestral(prior, 3, torch.tensor([7, 2, 7]), first=4)
    one, z = ancestral(prior, 3, torch.tensor([7]), first=6)
    assert torch.equal(x[2:], z)
    assert torch.equal(many.noise[:, 2:], one.noise)
    assert not torch.equal(x[0], x[2])


def test_a_plan_is_no_dearer_than_guidance_and_still_sure_of_its_label():
    prior, guide = CountedPrior(load_prior("mnist")), classifier("mnist").requires_grad_(False)
    prior.image_shape = (1, 28, 28)
    labels = torch.tensor([4, 8])
    cost, steps, strength = ClassLikelihood(guide, labels), 16, 1.0
    process, x = ancestral(prior, steps, labels)
    controls, greedy = guidance_controls(process, cost, x, strength)
    alone = make(Way(steps, strength), prior, 4, 1)
    torch.testing.assert_close(alone, greedy[:1], rtol=1e-3, atol=1e-3)
    before = prior.evaluations
    found = planned(process, cost, x, strength)
    assert prior.evaluations - before <= 2 * 6 * steps
    running = ControlCost(noise_weights(process))
    spent = class_guidance.SHARPNESS * cost(greedy) + sum(
        running(i, x, u) for i, u in enumerate(controls)
    )
    torch.testing.assert_close(found.costs[0], spent, rtol=1e-4, atol=0)
    # The eight's guidance overshoots with so few steps, and all steps from there are refused.
    assert (found.cost <= spent).all()
    assert found.cost[0] < 0.9 * spent[0]
    assert (guide(found.x0).argmax(1) == labels).all()


def test_what_is_measured_of_digits():
    """Real ones are what they are; two copies of one have no diversity."""
    images, labels = digits()
    ones = images[labels == 1]
    found = measures(ones, 1, ones)
    assert found["guided"] == found["judged"] == 1
    assert found["frechet"] == pytest.approx(0, abs=1e-3)
    assert found["diversity"] == pytest.approx((ones[0] - ones[1]).norm().item())
    assert measures(ones[:1].repeat(2, 1, 1, 1), 7, ones)["diversity"] == 0
    assert measures(ones, 7, ones)["judged"] == 0


def test_records_of_digits_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    images, labels = digits()
    pictures = ((images[:, 0] + 1) * 127.5).round().byte().numpy()
    monkeypatch.setattr(class_guidance, "mnist", lambda split: (pictures, labels.numpy()))
    monkeypatch.setattr(class_guidance, "WAYS", {"a": Way(2, None), "b": Way(2, 1.0)})
    path = tmp_path / "digits.csv"
    record(path, tmp_path / "images", 2, [3])
    before = path.read_text()
    record(path, tmp_path / "images", 2, [3, 4])
    assert path.read_text().startswith(before)
    rows = read(path)
    assert [(row["way"], row["label"]) for row in rows] == [(w, c) for c in "34" for w in "ab"]
    assert {row["prior"] for row in rows} == {"mnist"}
    assert [float(row["products"]) for row in rows] == [0, 2, 0, 2]
    assert load_file(tmp_path / "images" / "b_4.safetensors")["digits"].shape == (2, 1, 28, 28)


def test_another_prior_of_digits_has_rows_of_its_own_in_the_same_table(tmp_path, monkeypatch):
    images, labels = digits()
    pictures = ((images[:, 0] + 1) * 127.5).round().byte().numpy()
    monkeypatch.setattr(class_guidance, "mnist", lambda split: (pictures, labels.numpy()))
    monkeypatch.setattr(class_guidance, "WAYS", {"a": Way(2, None)})
    path, model = tmp_path / "digits.csv", tmp_path / "1aurent-mnist"
    network = UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(model)
    for name in ("mnist", str(model)):
        record(path, tmp_path / "images", 2, [3], name=name)
    rows = read(path)
    assert [row["prior"] for row in rows] == ["mnist", str(model)]
    assert rows[0]["diversity"] != rows[1]["diversity"]
    with pytest.raises(ValueError, match=r"prior 'faces64' makes \(3, 64, 64\), expected digits"):
        record(path, tmp_path / "images", 2, [3], name="faces64")


def test_a_table_of_digits_has_one_writer_and_is_cut_at_whole_rows(tmp_path, monkeypatch):
    images, labels = digits()
    pictures = ((images[:, 0] + 1) * 127.5).round().byte().numpy()
    monkeypatch.setattr(class_guidance, "mnist", lambda split: (pictures, labels.numpy()))
    monkeypatch.setattr(class_guidance, "WAYS", {"a": Way(2, None)})
    path = tmp_path / "digits.csv"
    record(path, tmp_path / "images", 2, [3])
    whole = path.read_bytes()
    with path.open("ab") as other:
        lock(other)
        with pytest.raises(ValueError, match="written by another process"):
            record(path, tmp_path / "images", 2, [3, 4])
    path.write_bytes(whole + b"mnist,a,4")
    record(path, tmp_path / "images", 2, [3])
    assert path.read_bytes() == whole
    assert (tmp_path / "digits.csv.torn-1").read_bytes() == b"mnist,a,4"
    path.write_bytes(whole.replace(b",2,", b",", 1))
    with pytest.raises(ValueError, match=r"digits.csv is damaged"):
        record(path, tmp_path / "images", 2, [3])


@pytest.mark.parametrize("content", [b"a,b\n1,2\nhalf", b"no line of it ends", b"\n", bytes(9)])
def test_a_file_of_something_else_is_not_cut(content, tmp_path, monkeypatch):
    nothing = torch.zeros(0, 1, 28, 28), torch.zeros(0)
    monkeypatch.setattr("diffoc.experiments.class_guidance.mnist", lambda part: nothing)
    path = tmp_path / "notes.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes.csv is damaged, or no table .*name another"):
        record(path, tmp_path / "images", 2, [3])
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_what_guidance_and_plans_refuse():
    prior, x = load_prior("mnist"), torch.zeros(1, 1, 28, 28)
    with pytest.raises(ValueError, match="strength is -1"):
        guidance_controls(ReverseProcess(prior, 2), torch.sum, x, -1)
    with pytest.raises(ValueError, match="output mode"):
        guidance_controls(ReverseProcess(prior, 2, mode="output"), torch.sum, x)
    with pytest.raises(ValueError, match="ddim in input mode"):
        noise_weights(ReverseProcess(prior, 2))


def test_the_notebook_shows_another_prior_s_rows_once_there_are_some(monkeypatch, capsys):
    """With the shipped prior's rows under another name: the same table."""
    text = (ROOT / "notebooks" / "11_mnist_class_guidance.ipynb").read_text(encoding="utf-8")
    sources = {cell["id"]: "".join(cell["source"]) for cell in json.loads(text)["cells"]}
    monkeypatch.setattr(torch, "set_flush_denormal", lambda mode: True)
    names = {}
    with rc_context():  # a notebook sets its style for good
        exec(sources["cell-01"], names)
    names["display"] = lambda *shown: print(*(getattr(one, "data", "") for one in shown))
    exec(sources["cell-11"], names)
    table = capsys.readouterr().out.partition("| difference")[0]
    names["records"] += [row | {"prior": "a/b"} for row in names["rows"]]
    exec(sources["other-priors-table"], names)
    assert capsys.readouterr().out == "*a/b* " + table
    names["records"] = names["rows"] + [names["rows"][0] | {"prior": "a/b"}]
    exec(sources["other-priors-table"], names)
    assert capsys.readouterr().out == "a/b: 1 of 40 rows, so no table yet\n"
